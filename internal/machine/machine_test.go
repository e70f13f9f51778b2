package machine

import (
	"slices"
	"strings"
	"testing"

	"vigia/internal/vm"
)

func spec() *vm.Spec {
	return &vm.Spec{Name: "web", ID: "00112233445566aa", Memory: 256 << 20, CPUs: 2, Net: vm.Net{Mode: vm.NetNAT}}
}

func TestNoChannelThatWasNotAskedFor(t *testing.T) {
	s := spec()
	s.Net.Mode = vm.NetOff
	line := strings.Join(Args(Config{Spec: s, Accelerator: "tcg", FDs: Descriptors{QMP: 3, Console: 4}}), " ")
	for _, word := range []string{"agent", "virtserialport", "netdev", "virtio-net", "vga", "usb=on", "vnc", "spice"} {
		if strings.Contains(line, word) {
			t.Errorf("a machine without network and additions has %q: %s", word, line)
		}
	}
	line = strings.Join(Args(Config{Spec: spec(), Accelerator: "tcg", FDs: Descriptors{QMP: 3, Console: 4, Net: 5, Agent: 6}}), " ")
	for _, word := range []string{"org.qemu.guest_agent.0", "addr.str=5", "mac=52:54:00:"} {
		if !strings.Contains(line, word) {
			t.Errorf("asked for, but not there: %q", word)
		}
	}
}

func TestQEMUIsAlwaysSandboxedAndHeld(t *testing.T) {
	for _, accel := range []string{"kvm", "tcg"} {
		args := Args(Config{Spec: spec(), Accelerator: accel, FDs: Descriptors{QMP: 3, Console: 4, Net: 5}})
		i := slices.Index(args, "-sandbox")
		if i < 0 || !strings.Contains(args[i+1], "spawn=deny") || !slices.Contains(args, "-S") {
			t.Errorf("%s: no sandbox, or not stopped at start: %v", accel, args)
		}
	}
}

func TestEndings(t *testing.T) {
	for data, want := range map[string]vm.Ended{
		`{"guest":true,"reason":"guest-shutdown"}`:  vm.EndedPowerOff,
		`{"guest":true,"reason":"guest-reset"}`:     vm.EndedReboot,
		`{"guest":true,"reason":"guest-panic"}`:     vm.EndedPanic,
		`{"guest":false,"reason":"host-qmp-quit"}`:  vm.EndedForced,
		`{"guest":false,"reason":"host-signal"}`:    vm.EndedForced,
		`{"guest":false,"reason":"host-error"}`:     vm.EndedQEMU,
		`{"guest":false,"reason":"\u001b[2Jhello"}`: vm.EndedQEMU,
		`nonsense`: vm.EndedQEMU,
	} {
		got := shutdown([]byte(data))
		if got.Ended != want || strings.Contains(got.Reason, "\x1b") {
			t.Errorf("%s: %+v, want %s", data, got, want)
		}
	}
}

func TestMACIsStableAndOwn(t *testing.T) {
	a, b := MAC("00112233445566aa"), MAC("00112233445566ab")
	if a.String() == b.String() || a.String() != MAC("00112233445566aa").String() {
		t.Errorf("%s %s", a, b)
	}
}
