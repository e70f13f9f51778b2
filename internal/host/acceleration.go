package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
)

// Accelerator is what runs the guest's instructions, with the reason.
type Accelerator struct {
	Name string `json:"name"` // kvm or tcg
	Why  string `json:"why"`
}

// Accelerator chooses kvm only where the processor says it can and a little virtual machine has really run. A device
// that opens proves nothing: there are nested, emulated ones on which a stock kernel hangs for ever in its boot code.
func (h *Host) Accelerator() Accelerator {
	if err := h.tryKVM(); err != nil {
		return Accelerator{"tcg", err.Error()}
	}
	return Accelerator{"kvm", "the processor has it and a try ran"}
}

// Reasons why there is no KVM.
var (
	errNoFlag   = errors.New("the processor shows neither vmx nor svm")
	errNoDevice = errors.New("there is no /dev/kvm")
)

func (h *Host) tryKVM() error {
	text, err := h.read("/proc/cpuinfo")
	if err != nil {
		return err
	}
	flags, err := parseFlags(text)
	if err != nil {
		return err
	}
	device := h.at("/dev/kvm")
	_, err = os.Stat(device)
	present := err == nil
	if !slices.Contains(flags, "vmx") && !slices.Contains(flags, "svm") {
		if present {
			return fmt.Errorf("%w, though there is a /dev/kvm: it is emulated and can't be relied on", errNoFlag)
		}
		return errNoFlag
	}
	if !present {
		return errNoDevice
	}
	try := h.kvm
	if try == nil {
		try = func() error { return runGuestCode(device) }
	}
	if err := try(); err != nil {
		return fmt.Errorf("/dev/kvm does not work: %w", err)
	}
	return nil
}

// parseFlags returns the flags of the first processor.
func parseFlags(cpuinfo string) ([]string, error) {
	for line := range strings.Lines(cpuinfo) {
		key, value, ok := strings.Cut(line, ":")
		if ok && strings.TrimSpace(key) == "flags" {
			return strings.Fields(value), nil
		}
	}
	return nil, errors.New("/proc/cpuinfo names no processor flags")
}

func (h *Host) findAcceleration(context.Context) Finding {
	err := h.tryKVM()
	if err == nil {
		return Finding{Status: OK, Seen: "kvm: the processor has it and a try ran"}
	}
	f := Finding{Status: Degraded, Seen: "tcg: " + err.Error(),
		Consequence: "machines are emulated: 5 to 20 times slower, and QEMU's makers do not call TCG a boundary; such machines say so"}
	switch {
	case errors.Is(err, errNoFlag):
		f.Remedy = "switch virtualisation on in the firmware, or, in a virtual machine, nested virtualisation on its host"
	case errors.Is(err, errNoDevice):
		f.Remedy = "modprobe kvm_intel or kvm_amd"
	case errors.Is(err, fs.ErrPermission):
		f.Remedy = "adduser " + userName() + " kvm, then log in again"
	}
	return f
}

func userName() string {
	if u := os.Getenv("USER"); u != "" {
		return u
	}
	return "YOU"
}
