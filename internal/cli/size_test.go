package cli

import (
	"testing"
	"time"

	"vigia/internal/api/vigiav1"
)

func TestSize(t *testing.T) {
	for in, want := range map[string]uint64{"1": 1, "512M": 512 << 20, "512m": 512 << 20, "2GiB": 2 << 30, "2GB": 2 << 30, "1t": 1 << 40, "64K": 64 << 10, "7b": 7} {
		if got, err := parseSize(in); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "M", "-1M", "+1M", "1.5G", "0", "0G", "12Q", "1e3", "18446744073709551616", "17179869184G", "16777216T", " 1M", "1 M", "1i", "0x10"} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", in, got)
		}
	}
	for in, want := range map[uint64]string{0: "0", 1023: "1023", 1024: "1K", 1536: "1.5K", 512 << 20: "512M", 1<<30 - 1: "1G", 290_400_000: "277M", 2 << 40: "2T", 1 << 63: "8192P"} {
		if got := formatSize(in); got != want {
			t.Errorf("formatSize(%d) = %q, want %q", in, got, want)
		}
	}
}

func TestSpans(t *testing.T) {
	for in, want := range map[time.Duration]string{0: "in 0s", -3 * time.Second: "3s ago", 90 * time.Minute: "in 90m", -5 * time.Hour: "5h ago", 7 * 24 * time.Hour: "in 7d"} {
		if got := relative(in); got != want {
			t.Errorf("relative(%s) = %q, want %q", in, got, want)
		}
	}
	for in, want := range map[float64]string{0: "0:00.00", 0.005: "0:00.01", 59.999: "1:00.00", 3661.5: "61:01.50"} {
		if got := cpuTime(in); got != want {
			t.Errorf("cpuTime(%g) = %q, want %q", in, got, want)
		}
	}
}

func TestNameOf(t *testing.T) {
	for in, want := range map[string]string{"/x/Debian_12 (1).qcow2": "debian-12-1", "disk.img": "disk", "é.raw": "", "a.b.c": "a-b"} {
		if got := nameOf(in); got != want {
			t.Errorf("nameOf(%q) = %q, want %q", in, got, want)
		}
	}
}

// TestExitStatus: whatever the guest claims, only a 0 is a success.
func TestExitStatus(t *testing.T) {
	for _, c := range []struct{ code, signal, want int32 }{{0, 0, 0}, {7, 0, 7}, {255, 0, 255}, {256, 0, 255}, {-1, 0, 255}, {0, 15, 143}, {0, 128, 255}, {0, -128, 255}, {0, 127, 255}, {-128, 0, 255}} {
		if got := exitStatus(&vigiav1.ExecOutput{ExitCode: c.code, Signal: c.signal}); got != int(c.want) {
			t.Errorf("code %d, signal %d: status %d, want %d", c.code, c.signal, got, c.want)
		}
	}
}
