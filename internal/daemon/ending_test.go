package daemon

import (
	"syscall"
	"testing"
	"time"

	"vigia/internal/jail"
	qemu "vigia/internal/machine"
	"vigia/internal/vm"
)

func TestEndingsAreToldApart(t *testing.T) {
	clean, killed := jail.Exit{Known: true}, jail.Exit{Known: true, Signal: syscall.SIGKILL}
	said := func(e vm.Ended) qemu.Ending { return qemu.Ending{Ended: e, Reason: "said"} }
	for name, c := range map[string]struct {
		said  qemu.Ending
		asked vm.Ended
		exit  jail.Exit
		want  vm.Ended
	}{
		"power-off":                       {said(vm.EndedPowerOff), "", clean, vm.EndedPowerOff},
		"stopped":                         {said(vm.EndedPowerOff), vm.EndedStopped, clean, vm.EndedStopped},
		"forced":                          {said(vm.EndedForced), vm.EndedForced, clean, vm.EndedForced},
		"forced, killed":                  {said(""), vm.EndedForced, killed, vm.EndedForced},
		"panic":                           {said(vm.EndedPanic), "", clean, vm.EndedPanic},
		"panic while it is stopped":       {said(vm.EndedPanic), vm.EndedStopped, clean, vm.EndedPanic},
		"QEMU killed":                     {said(""), "", killed, vm.EndedQEMU},
		"QEMU killed while it is stopped": {said(""), vm.EndedStopped, killed, vm.EndedQEMU},
		"told to end by another":          {said(vm.EndedForced), "", clean, vm.EndedQEMU},
		"nobody saw a clean end":          {said(""), "", clean, vm.EndedPowerOff},
		"nobody saw anything":             {said(""), "", jail.Exit{}, vm.EndedQEMU},
	} {
		if got := joinEnding(c.said, c.asked, c.exit, "last words"); got.Ended != c.want || got.Reason == "" {
			t.Errorf("%s: %+v, want %s", name, got, c.want)
		}
	}
}

func TestReplacementsEnd(t *testing.T) {
	r, now := &run{}, time.Now()
	for i := range replaceMost {
		if r.tooMany(now.Add(time.Duration(i) * time.Second)) {
			t.Fatalf("given up at replacement %d", i+1)
		}
	}
	if !r.tooMany(now.Add(30 * time.Second)) {
		t.Error("not given up")
	}
	if r.tooMany(now.Add(5 * time.Minute)) {
		t.Error("old ones count for ever")
	}
}
