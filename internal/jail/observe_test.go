package jail

import (
	"os"
	"testing"
)

func TestObserveSelf(t *testing.T) {
	o, err := Observe(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if len(o.Own) != 0 || o.UIDs[0] != os.Getuid() || len(o.Mounts) == 0 || len(o.Descriptors) < 3 || o.Limits["Max open files"] == 0 {
		t.Errorf("%+v", o)
	}
	if _, ok := o.Limits["Max cpu time"]; !ok {
		t.Errorf("limits %v", o.Limits)
	}
	for _, m := range Guard.Compare(o) {
		if m.Name == "namespaces" && m.InForce || m.Name == "empty root" && m.InForce {
			t.Errorf("an unconfined process is said to have: %s", m)
		}
	}
}

func TestMountinfo(t *testing.T) {
	ms, err := parseMountinfo([]byte("36 35 98:0 /mnt1 /a\\040b rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n" +
		"25 24 0:23 / /dev/shm ro,nosuid - tmpfs tmpfs rw\n"))
	if err != nil || len(ms) != 2 {
		t.Fatalf("%v %v", ms, err)
	}
	if ms[0].Target != "/a b" || ms[0].Type != "ext3" || ms[0].Root != "/mnt1" || !ms[0].Has("noatime") || ms[0].Has("errors=continue") {
		t.Errorf("%+v", ms[0])
	}
	if !ms[1].Has("ro") || ms[1].Has("rw") {
		t.Errorf("%+v: the file system's options are not the mount's", ms[1])
	}
	for _, bad := range []string{"x\n", "36 35 98:0 / / rw - ext3\n", "1 2 3 4 5 - 6 7\n"} {
		if ms, err := parseMountinfo([]byte(bad)); err == nil || ms != nil {
			t.Errorf("%q: %v %v", bad, ms, err)
		}
	}
}

func FuzzMountinfo(f *testing.F) {
	if raw, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		f.Add(raw)
	}
	f.Add([]byte("36 35 98:0 /mnt1 /a\\040\\x rw master:1 - ext3 /dev/root rw\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		ms, err := parseMountinfo(raw)
		if err != nil && ms != nil {
			t.Error("an error with a value")
		}
		for _, m := range ms {
			if m.Type == "" {
				t.Errorf("%+v", m)
			}
		}
	})
}

func FuzzStatus(f *testing.F) {
	if raw, err := os.ReadFile("/proc/self/status"); err == nil {
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var o Observation
		if err := o.parseStatus(raw); err == nil && (len(o.UIDs) != 4 || len(o.GIDs) != 4) {
			t.Errorf("%+v", o)
		}
	})
}
