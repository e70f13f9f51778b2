package convert

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"vigia/internal/image"
)

func TestErrorsCrossAsWhatTheyAre(t *testing.T) {
	text, err := json.Marshal(reply{Error: "disk format: \x1b[2Jevil", Kind: kindOf(image.ErrFormat)})
	if err != nil {
		t.Fatal(err)
	}
	err = parse(text, nil)
	if !errors.Is(err, image.ErrFormat) || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("crossed as %q", err)
	}
}

func TestAnAnswerWithFieldsOfItsOwnIsNoError(t *testing.T) {
	found := image.Found{Kind: "ext4", Kernel: "/boot/vmlinuz-6.1"}
	inner, _ := json.Marshal(found)
	text, _ := json.Marshal(reply{Answer: inner})
	var got image.Found
	if err := parse(text, &got); err != nil || got != found {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestALyingWorkerIsNotBelieved(t *testing.T) {
	for _, text := range []string{"", "{", `{"answer":7}`, `{"error":"x","kind":99}`, `{"error":"x","kind":-1}`, `[]`, strings.Repeat(" ", MaxAnswer+1)} {
		var f image.Found
		if err := parse([]byte(text), &f); err == nil {
			t.Errorf("%.20q is believed", text)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"answer":{"root":{"offset":1048576,"size":2},"kind":"ext4"}}`))
	f.Add([]byte(`{"error":"no","kind":2}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var found image.Found
		parse(text, &found)
	})
}
