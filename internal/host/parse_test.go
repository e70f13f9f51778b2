package host

import (
	"os"
	"strings"
	"testing"
)

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]Version{
		qemu72: {7, 2, 22},
		"QEMU emulator version 8.2.2 (Debian 1:8.2.2+ds-0ubuntu1.4)\n": {8, 2, 2},
		"QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)":          {10, 0, 2},
		"QEMU emulator version 9.1.50 (v9.1.0-1000-gabc)":              {9, 1, 50},
		"QEMU emulator version 9.0.0-rc1":                              {9, 0, 0},
	} {
		if v, _, err := parseVersion(text); err != nil || v != want {
			t.Errorf("%q: %v %v, want %v", text, v, err, want)
		}
	}
	for _, bad := range []string{"", "QEMU emulator version ", "QEMU emulator version x.y", "QEMU emulator version 7", "qemu-img version 7.2.0", "QEMU emulator version 99999.1.1"} {
		if v, _, err := parseVersion(bad); err == nil || v != (Version{}) {
			t.Errorf("%q: %v %v", bad, v, err)
		}
	}
}

func TestVersionOrder(t *testing.T) {
	for _, v := range []Version{{7, 1, 99}, {5, 2, 0}, {0, 0, 0}} {
		if !v.before(Oldest) {
			t.Errorf("%s is new enough", v)
		}
	}
	for _, v := range []Version{{7, 2, 0}, {7, 2, 22}, {8, 0, 0}, {10, 0, 0}} {
		if v.before(Oldest) {
			t.Errorf("%s is too old", v)
		}
	}
}

func FuzzVersion(f *testing.F) {
	f.Add(qemu72)
	f.Add("QEMU emulator version 9.0.0-rc1")
	f.Fuzz(func(t *testing.T, text string) {
		v, pkg, err := parseVersion(text)
		if err != nil && (v != Version{} || pkg != "") {
			t.Error("an error with a value")
		}
		if v.Major < 0 || v.Minor < 0 || v.Micro < 0 || len(pkg) > 200 {
			t.Errorf("%v %q", v, pkg)
		}
	})
}

func FuzzCpuinfo(f *testing.F) {
	if raw, err := os.ReadFile("/proc/cpuinfo"); err == nil && len(raw) < 1<<14 {
		f.Add(string(raw))
	}
	f.Add(intel)
	f.Fuzz(func(t *testing.T, text string) {
		flags, err := parseFlags(text)
		if err != nil && flags != nil {
			t.Error("an error with a value")
		}
		for _, w := range flags {
			if strings.ContainsAny(w, " \t\n") {
				t.Errorf("%q", w)
			}
		}
	})
}

func FuzzMeminfo(f *testing.F) {
	f.Add(meminfo)
	f.Fuzz(func(t *testing.T, text string) {
		if n, ok := parseMeminfo(text, "MemTotal"); !ok && n != 0 {
			t.Error("nothing with a value")
		}
	})
}

func FuzzSubordinate(f *testing.F) {
	f.Add("nobody:100000:65536\n")
	f.Fuzz(func(t *testing.T, text string) {
		if n := subordinate(text, []string{"nobody"}); n < 0 {
			t.Error(n)
		}
	})
}
