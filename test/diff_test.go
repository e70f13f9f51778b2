package test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

// differences is what `checkpoint diff` prints.
type differences struct {
	Files []struct {
		Path, Change string
		What         []string
	}
	Processes []struct{ Change, Comm, Cmdline string }
	Notes     []string
}

// betweenCheckpoints looks at what was done between two checkpoints, and since: a program that was overwritten and has its old times and size
// is found, and who ran meanwhile.
func betweenCheckpoints(g *guest) {
	g.sh("printf good >/root/forged; touch -d @1000000000 /root/forged; printf x >/root/leaves; sync")
	from := g.save()
	g.sh("printf evil >/root/forged; touch -d @1000000000 /root/forged; rm /root/leaves; printf 1 >/root/comes; chmod 4755 /root/comes; (sleep 7777 & ) ; sync")
	to := g.save()
	g.sh("pkill -f 'sleep 7777'; rm /root/comes; sync")
	ask := func(args ...string) (d differences) {
		g.t.Helper()
		out := g.must(append([]string{"checkpoint", "diff", g.name, from, "-o", "json"}, args...)...)
		if err := json.Unmarshal([]byte(out), &d); err != nil {
			g.t.Fatal(err)
		}
		return d
	}
	says := func(d differences, change, path string) bool {
		return slices.ContainsFunc(d.Files, func(f struct {
			Path, Change string
			What         []string
		}) bool {
			return f.Path == path && f.Change == change
		})
	}
	d := ask(to)
	if !says(d, "changed", "/root/forged") || !says(d, "removed", "/root/leaves") || !says(d, "added", "/root/comes") {
		g.t.Errorf("between the two: %+v", d)
	}
	slept := func(d differences) bool {
		return slices.ContainsFunc(d.Processes, func(p struct{ Change, Comm, Cmdline string }) bool {
			return p.Change == "started" && strings.Contains(p.Cmdline, "sleep 7777")
		})
	}
	if !slept(d) {
		g.t.Errorf("who ran is not in %+v, %v", d.Processes, d.Notes)
	}
	now := ask()
	if !says(now, "changed", "/root/forged") || says(now, "added", "/root/comes") || slept(now) {
		g.t.Errorf("since the first: %+v", now)
	}
	if table := g.must("checkpoint", "diff", g.name, from, to); !strings.Contains(table, "/root/forged") || !strings.Contains(table, "sleep 7777") {
		g.t.Errorf("the table:\n%s", table)
	}
	g.must("checkpoint", "rm", from, to)
}

func TestBetweenCheckpoints(t *testing.T) {
	h := newHost(t)
	h.serve()
	betweenCheckpoints(h.run("one", "--net", "off"))
}
