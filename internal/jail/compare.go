package jail

import (
	"fmt"
	"slices"
	"strings"
)

// limitNames are the kernel's names of resource limits in /proc/PID/limits.
var limitNames = map[string]string{
	"core": "Max core file size", "nofile": "Max open files", "nproc": "Max processes",
	"memlock": "Max locked memory", "msgqueue": "Max msgqueue size",
}

// Compare says which walls of the profile stand, by what /proc shows of a process. It is how a daemon learns it of a
// process that an earlier one started, and how the tests know that a table is what the kernel does.
func (p Profile) Compare(o Observation) []Measure {
	measures := []Measure{p.compareNamespaces(o), compareRoot(o), p.compareLimits(o), compareUser(o)}
	measures = append(measures, judge("no capabilities", o.Capabilities == 0, "", fmt.Sprintf("it holds %#x", o.Capabilities)))
	measures = append(measures, judge("no_new_privs", o.NoNewPrivs, "", "the bit is not set"))
	return append(measures, judge("seccomp", o.Filters > 0, fmt.Sprintf("%d filters", o.Filters), "no filter is loaded"))
}

func judge(name string, ok bool, detail, why string) Measure {
	if ok {
		return Measure{Name: name, InForce: true, Detail: detail}
	}
	return Measure{Name: name, Why: why}
}

func (p Profile) compareNamespaces(o Observation) Measure {
	var shared []string
	for _, ns := range p.Namespaces {
		if !slices.Contains(o.Own, ns.Name) {
			shared = append(shared, ns.Name)
		}
	}
	return judge("namespaces", len(shared) == 0, strings.Join(o.Own, " "), "shared with the daemon: "+strings.Join(shared, " "))
}

// compareRoot wants a tmpfs that can't be written as the root, and says what may be written at all.
func compareRoot(o Observation) Measure {
	writable := 0
	var root *Mount
	for i, m := range o.Mounts {
		if m.Target == "/" {
			root = &o.Mounts[i]
		} else if m.Has("rw") {
			writable++
		}
	}
	ok := root != nil && root.Type == "tmpfs" && root.Has("ro")
	return judge("empty root", ok, fmt.Sprintf("%d binds, %d writable", len(o.Mounts)-1, writable), "it sees the host's root")
}

func (p Profile) compareLimits(o Observation) Measure {
	var above []string
	for _, l := range p.Rlimits {
		if have, ok := o.Limits[limitNames[l.Name]]; !ok || have > l.Max {
			above = append(above, fmt.Sprintf("%s %d", l.Name, have))
		}
	}
	return judge("resource limits", len(above) == 0, fmt.Sprintf("%d", len(p.Rlimits)), "above the table: "+strings.Join(above, ", "))
}

func compareUser(o Observation) Measure {
	uid := o.UIDs[0]
	for _, u := range o.UIDs {
		if u != uid || u == 0 {
			return Measure{Name: "own user", Why: fmt.Sprintf("it is user %v", o.UIDs)}
		}
	}
	return in("own user", fmt.Sprintf("uid %d", uid))
}
