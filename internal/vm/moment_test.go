package vm

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestMoment(t *testing.T) {
	for text, want := range map[string]Moment{
		"123":                                   {Instruction: 123},
		"1_000_000":                             {Instruction: 1000000},
		"+90s":                                  {After: 90 * time.Second},
		"2026-11-22T10:00:00Z":                  {Time: time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)},
		"process.started":                       {Kind: "process.started"},
		"process.started,exe=/usr/bin/id,uid=0": {Kind: "process.started", Fields: map[string]string{"exe": "/usr/bin/id", "uid": "0"}},
		"file.opened,path=*a=b*":                {Kind: "file.opened", Fields: map[string]string{"path": "*a=b*"}},
	} {
		got, err := ParseMoment(text)
		if err != nil || !cmp.Equal(got, want) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
		again, err := ParseMoment(got.String())
		if err != nil || !cmp.Equal(again, want) {
			t.Errorf("%q, written as %q, is read as %v, %v", text, got.String(), again, err)
		}
	}
	for _, text := range []string{"", "0", "-1", "+", "+-3s", "12:30", "2026-11-22", "1e9", "process.started,", "process.started,=x", "99999999999999999999"} {
		if m, err := ParseMoment(text); !errors.Is(err, ErrInvalid) && m.Kind != text {
			t.Errorf("%q is read as %v, %v", text, m, err)
		}
	}
}
