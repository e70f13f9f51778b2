package introspect

import (
	"errors"
	"slices"
	"testing"

	"vigia/internal/kernel"
)

// teller is a guest that answers what it is told to.
type teller struct {
	pids    []int64
	modules []string
	err     error
}

func (t *teller) Listing() ([]int64, []string, error) { return t.pids, t.modules, t.err }

// TestGuestHides plays a rootkit that leaves every list whole and hides from who asks in the guest.
func TestGuestHides(t *testing.T) {
	onGuests(t, func(t *testing.T, mem Physical, p *kernel.Profile) {
		i := enter(t, mem, p)
		victim := i.task("gone", 0)
		honest := &teller{pids: []int64{9999}, modules: []string{"other"}} // it knows more than was seen before
		for _, p := range processes(t, i.Guest) {
			honest.pids = append(honest.pids, p.PID)
		}
		list, err := i.Modules()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range list {
			honest.modules = append(honest.modules, m.Name)
		}
		lying := func(change func(*teller)) *teller {
			l := &teller{pids: slices.Clone(honest.pids), modules: slices.Clone(honest.modules)}
			change(l)
			return l
		}
		for name, c := range map[string]struct {
			says *teller
			kind string
		}{
			"honest":           {honest, ""},
			"hides a process":  {lying(func(l *teller) { l.pids = slices.DeleteFunc(l.pids, func(p int64) bool { return p == victim.PID }) }), KindProcessHidden},
			"hides a module":   {lying(func(l *teller) { l.modules = l.modules[:len(l.modules)-1] }), KindModuleHidden},
			"does not answer":  {lying(func(l *teller) { l.err = errors.New("no") }), ""},
			"answers nonsense": {lying(func(l *teller) { l.pids = []int64{1, -5, 1 << 40} }), ""},
		} {
			checker := quick(i.Guest)
			checker.inside = c.says
			found := round(t, checker, true)
			if c.kind == "" {
				if len(found) > 0 {
					t.Errorf("%s: %+v", name, found)
				}
				continue
			}
			if len(found) != 1 || found[0].Kind != c.kind || !slices.Equal(found[0].Missing, []string{viewGuest}) {
				t.Errorf("%s: %+v", name, found)
			}
		}
	})
}
