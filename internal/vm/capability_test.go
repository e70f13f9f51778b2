package vm

import (
	"slices"
	"testing"
)

func TestCapabilityNames(t *testing.T) {
	for _, c := range []struct {
		set  uint64
		want []string
	}{
		{0, []string{}},
		{1 << 13, []string{"cap_net_raw"}},
		{1<<0 | 1<<21 | 1<<40 | 1<<63, []string{"cap_chown", "cap_sys_admin", "cap_checkpoint_restore", "cap_63"}},
		{1<<41 - 1, []string{"all"}},
		{^uint64(0), []string{"all"}},
	} {
		if got := CapabilityNames(c.set); !slices.Equal(got, c.want) {
			t.Errorf("%#x: %v, want %v", c.set, got, c.want)
		}
	}
}
