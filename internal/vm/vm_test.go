package vm

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestNames(t *testing.T) {
	for _, ok := range []string{"a", "web-1", "0", strings.Repeat("x", 63)} {
		if _, err := ParseName(ok); err != nil {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for _, bad := range []string{"", "-a", "Web", "a_b", "a.b", "a/b", "../x", "a b", "a\n", "ä", strings.Repeat("x", 64)} {
		if _, err := ParseName(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q is taken: %v", bad, err)
		}
	}
}

func TestSizes(t *testing.T) {
	for s, want := range map[string]uint64{"512M": 512 << 20, "1g": 1 << 30, "4GiB": 4 << 30, "2kb": 2048, "77": 77, "7b": 7} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
	for _, bad := range []string{"", "M", "-1", "1.5G", "0", "0M", "1X", "99999999999T", "18446744073709551616", "1 G"} {
		if got, err := ParseSize(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q is taken for %d", bad, got)
		}
	}
	for n, want := range map[uint64]string{512 << 20: "512M", 3 << 30: "3G", 1000: "1000", 1 << 10: "1K"} {
		if got := FormatSize(n); got != want {
			t.Errorf("%d is written %q", n, got)
		}
	}
}

func TestTTL(t *testing.T) {
	for s, want := range map[string]time.Duration{"90m": 90 * time.Minute, "7d": 7 * 24 * time.Hour} {
		if got, err := ParseTTL(s); err != nil || got != want {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, bad := range []string{"", "0s", "-1h", "d", "1.5d", "99999999d", "soon"} {
		if got, err := ParseTTL(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q is taken for %v", bad, got)
		}
	}
}

func TestPublish(t *testing.T) {
	for s, want := range map[string]string{
		"8080:80":            "127.0.0.1:8080:80/tcp",
		"0.0.0.0:53:53/udp":  "0.0.0.0:53:53/udp",
		"0:22":               "127.0.0.1:0:22/tcp",
		"[::1]:8443:443/tcp": "[::1]:8443:443/tcp",
	} {
		if got, err := ParsePublish(s); err != nil || got.String() != want {
			t.Errorf("%q: %s, %v", s, got, err)
		}
	}
	for _, bad := range []string{"", "80", ":80", "80:", "80:0", "80:65536", "x:80", "8080:80/sctp", "host:80:80", "1.2.3:80:80"} {
		if got, err := ParsePublish(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q is taken for %s", bad, got)
		}
	}
}

func TestNetRules(t *testing.T) {
	for s, want := range map[string]string{
		"deny out tcp any:25":           "deny out tcp any:25",
		"allow out tcp 10.1.2.3/8:443":  "allow out tcp 10.0.0.0/8:443",
		"allow out *.Debian.org.":       "allow out *.debian.org",
		"deny out":                      "deny out any",
		"allow in udp any:1000-2000":    "allow in udp any:1000-2000",
		"deny out tcp [2001:db8::1]:80": "deny out tcp [2001:db8::1]:80",
		"deny out 2001:db8::/32":        "deny out 2001:db8::/32",
	} {
		r, err := ParseNetRule(s)
		if err != nil || r.String() != want {
			t.Errorf("%q: %s, %v", s, r, err)
			continue
		}
		if again, err := ParseNetRule(r.String()); err != nil || again != r {
			t.Errorf("%q reads back as %+v, %v", r.String(), again, err)
		}
	}
	for _, bad := range []string{"", "allow", "permit out", "allow up", "allow out tcp any:0", "allow out tcp any:99999", "allow out tcp any:9-1",
		"allow in example.org", "allow out tcp any:80 now", "allow out sctp any", "allow out 10.0.0.0/40"} {
		if r, err := ParseNetRule(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q is taken for %s", bad, r)
		}
	}
}

func TestSpecNamesWhatIsWrong(t *testing.T) {
	good := func() Spec { return Spec{Name: "web", Memory: 256 << 20, CPUs: 1, Net: Net{Mode: NetNAT}} }
	if s := good(); s.Check() != nil {
		t.Fatal(s.Check())
	}
	for word, spoil := range map[string]func(*Spec){
		"name":     func(s *Spec) { s.Name = "Web" },
		"memory":   func(s *Spec) { s.Memory = 1 << 20 },
		"multiple": func(s *Spec) { s.Memory = 256<<20 + 4096 },
		"cpus":     func(s *Spec) { s.CPUs = 0 },
		"owner":    func(s *Spec) { s.Owner = "a\x1b[2J" },
		"purpose":  func(s *Spec) { s.Purpose = strings.Repeat("x", 201) },
		"addition": func(s *Spec) { s.Additions = []string{"sound"} },
		"label":    func(s *Spec) { s.Labels = map[string]string{"k": "a\nb"} },
		"net":      func(s *Spec) { s.Net.Mode = "bridge" },
		"twice": func(s *Spec) {
			p, _ := ParsePublish("80:80")
			s.Publish = []Publish{p, p}
		},
	} {
		s := good()
		spoil(&s)
		if err := s.Check(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", word, err)
		}
	}
}

func TestIDsAreTheirOwn(t *testing.T) {
	a, b := NewID(), NewID()
	if a == b {
		t.Error("two machines have one id")
	}
	if _, err := ParseID(string(a)); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "../../etc", strings.Repeat("g", 16), strings.ToUpper("00112233445566aa")} {
		if _, err := ParseID(bad); err == nil {
			t.Errorf("%q is taken for an id", bad)
		}
	}
}
