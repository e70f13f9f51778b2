package guard

import (
	"context"
	"errors"
	"slices"
	"testing"

	"vigia/internal/machine/additions"
)

func TestInside(t *testing.T) {
	answer := "1\n2\n4242\nacpi\nself\n99999999999\n-3\n.\next4 1003520 1 - Live 0x0000000000000000\nodd\nmbcache 16384 1 ext4, Live 0x0\n"
	var fails error
	asked := 0
	i := &inside{exec: func(context.Context, []string, []byte) (additions.Result, error) {
		asked++
		return additions.Result{Stdout: []byte(answer)}, fails
	}}
	for range 2 {
		pids, modules, err := i.Listing()
		if err != nil || !slices.Equal(pids, []int64{1, 2, 4242, -3}) || !slices.Equal(modules, []string{"ext4", "mbcache"}) {
			t.Errorf("%v %v %v", pids, modules, err)
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times for one round", asked)
	}
	i.asked = i.asked.Add(-2 * insideFresh)
	fails = errors.New("no agent")
	for range 3 {
		if _, _, err := i.Listing(); err == nil {
			t.Error("no error")
		}
	}
	if asked != 2 {
		t.Errorf("an agent that does not answer was asked %d times", asked-1)
	}
}
