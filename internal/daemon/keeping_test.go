package daemon

import (
	"errors"
	"testing"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/vm"
)

func TestWhatARuleKeeps(t *testing.T) {
	now := time.Unix(1_000_000, 0).UTC()
	k := &keepRule{Every: time.Minute, Keep: 3, Since: now}
	if !k.next(nil).Equal(now.Add(time.Minute)) {
		t.Errorf("the first is due at %s", k.next(nil))
	}
	var made []checkpoint.Record
	for i := range 8 {
		made = append(made, checkpoint.Record{ID: checkpoint.ID(rune('a' + i)), Time: now.Add(time.Duration(i) * time.Minute)})
	}
	made[1].Stable, made[2].Label = true, "mine"
	if got := k.next(made); !got.Equal(now.Add(8 * time.Minute)) {
		t.Errorf("the next is due at %s", got)
	}
	text := ""
	for _, c := range k.surplus(made, map[checkpoint.ID]bool{"d": true}) {
		text += string(c.ID)
	}
	if text != "ae" { // b is stable, c labelled, d used; f, g, h are the last three
		t.Errorf("removed are %q", text)
	}
	if left := k.surplus(made[5:], nil); len(left) != 0 {
		t.Errorf("of three %d are too many", len(left))
	}
}

func TestKeepRulesAreRead(t *testing.T) {
	for _, c := range []struct {
		every string
		keep  int32
		want  *keepRule
	}{{"", 0, nil}, {"5m", 12, &keepRule{Every: 5 * time.Minute, Keep: 12}}, {"1d", 0, &keepRule{Every: 24 * time.Hour, Keep: keepDefault}}} {
		got, err := parseKeep(c.every, c.keep)
		if err != nil || (got == nil) != (c.want == nil) || got != nil && (got.Every != c.want.Every || got.Keep != c.want.Keep || got.Since.IsZero()) {
			t.Errorf("%q %d: %+v, %v", c.every, c.keep, got, err)
		}
	}
	for _, bad := range []struct {
		every string
		keep  int32
	}{{"", 3}, {"x", 3}, {"1ms", 3}, {"-5m", 3}, {"5m", -1}, {"5m", keepMost + 1}} {
		if k, err := parseKeep(bad.every, bad.keep); !errors.Is(err, vm.ErrInvalid) || k != nil {
			t.Errorf("%q %d: %+v, %v", bad.every, bad.keep, k, err)
		}
	}
}
