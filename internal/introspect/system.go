package introspect

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"time"

	"vigia/internal/event"
	"vigia/internal/kernel"
)

// System is what the guest's kernel says of itself, and where it was found.
type System struct {
	Banner    string    `json:"banner"`
	Version   string    `json:"version"`
	Phys      uint64    `json:"physical_base"`  // of its text
	Slide     uint64    `json:"virtual_slide"`  // KASLR; 0 without
	Levels    int       `json:"paging_levels"`  // 4 or 5
	Cmdline   string    `json:"command_line"`   // as given to it
	Taint     uint64    `json:"taint"`          // the kernel's own mask
	Taints    []string  `json:"taints"`         // what its bits say
	Uptime    float64   `json:"uptime_seconds"` // as of the guest's last tick
	Time      time.Time `json:"time,omitzero"`  // the guest's clock, as of its last tick
	Forks     uint64    `json:"total_forks"`
	Processes int       `json:"processes"`

	// Missing says what this kernel lacks for which views.
	Missing []string `json:"missing,omitempty"`
	Unknown []string `json:"unknown,omitempty"`
}

// taints are what the bits of tainted_mask mean (Documentation/admin-guide/tainted-kernels.rst).
var taints = [...]string{"proprietary-module", "forced-module", "cpu-out-of-spec", "forced-unload", "machine-check", "bad-page", "user-request",
	"oops", "acpi-table-overridden", "warning", "staging-module", "firmware-workaround", "out-of-tree-module", "unsigned-module", "soft-lockup",
	"live-patch", "auxiliary", "randomized-structs", "test-module"}

func taintNames(mask uint64) []string {
	names := []string{}
	for ; mask != 0; mask &= mask - 1 {
		n := bits.TrailingZeros64(mask)
		if n < len(taints) {
			names = append(names, taints[n])
		} else {
			names = append(names, fmt.Sprintf("bit-%d", n))
		}
	}
	return names
}

// System reads the view of the kernel itself.
func (g *Guest) System() (System, error) {
	var s System
	err := g.view(func() error {
		s = System{
			Banner: event.Text(bytes.TrimRight(g.profile.Banner(), "\n")), Version: g.profile.Version(),
			Phys: g.boot.Phys, Slide: g.boot.Slide, Levels: g.boot.Levels,
		}
		g.system(&s)
		s.Missing = g.missing()
		if g.layout.err != nil {
			s.Unknown = append(s.Unknown, "processes")
			return nil
		}
		return g.leaders(func(uint64) error { s.Processes++; return nil })
	})
	if err != nil {
		return System{}, err
	}
	return s, nil
}

// missing names what the kernel lacks for which view.
func (g *Guest) missing() (out []string) {
	add := func(view string, err error) {
		if err != nil {
			out = append(out, view+": "+err.Error())
		}
	}
	add("processes", g.layout.err)
	add("capabilities", g.layout.cred.errCaps)
	add("groups", g.layout.cred.errGroups)
	add("namespaces", g.layout.namespace.err)
	add("control groups", g.layout.cgroup.err)
	_, err := g.moduleLayout()
	add("modules", err)
	_, err = g.fileLayout()
	add("files", err)
	if _, err = g.mapsLayout(); g.files != nil { // else the reason is the same
		add("maps", err)
	}
	_, err = g.socketLayout()
	add("sockets", err)
	return append(out, g.tableLayout().missing()...)
}

func (g *Guest) system(s *System) {
	unknown := func(name string, err error) {
		if err != nil {
			s.Unknown = append(s.Unknown, name)
		}
	}
	line, err := g.global(g.link.cmdline)
	if err == nil {
		var text []byte
		text, err = g.space.CString(line, maxCmdline)
		s.Cmdline = event.Text(text)
	}
	unknown("command_line", err)
	s.Taint, err = g.global(g.link.taint)
	s.Taints = taintNames(s.Taint)
	unknown("taint", err)
	s.Forks, err = g.global(g.link.forks)
	unknown("total_forks", err)
	if !g.now(s) {
		s.Unknown = append(s.Unknown, "uptime_seconds", "time")
	}
}

// Panicked reports whether the guest's kernel has panicked: panic_cpu holds the number of the processor that did, and
// PANIC_CPU_INVALID, -1, before (kernel/panic.c). It needs no driver in the guest.
func (g *Guest) Panicked() (bool, error) {
	if g.link.panicCPU == 0 {
		return false, &kernel.MissingError{What: "symbol", Name: "panic_cpu"}
	}
	panicked := false
	err := g.view(func() error {
		cpu, err := g.space.U32(g.link.panicCPU + g.boot.Slide)
		panicked = int32(cpu) >= 0
		return err
	})
	return panicked && err == nil, err
}

var errNoSymbol = errors.New("the kernel has no such symbol")

// global reads the 8 bytes at a symbol's link address; 0 is one that the kernel lacks.
func (g *Guest) global(link uint64) (uint64, error) {
	if link == 0 {
		return 0, errNoSymbol
	}
	return g.space.U64(link + g.boot.Slide)
}

// now reads the clock: xtime_sec is wall time, and wall_to_monotonic what it takes to get to the time since boot.
func (g *Guest) now(s *System) bool {
	sec, ok := g.wallSeconds()
	offset, ok2 := g.realOffset()
	if !ok || !ok2 || sec <= 0 {
		return false
	}
	s.Time = time.Unix(sec, 0).UTC()
	s.Uptime = max(0, float64(sec)-float64(offset)/1e9)
	return true
}
