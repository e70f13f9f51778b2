package event

import (
	"testing"
	"unicode/utf8"
)

// FuzzUnmarshal: what a worker that was taken over sends is either an event that keeps to its kind's table, and is
// written back the same, or an error.
func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte(`{"id":"6f0c2d1e-00000000000000a7","machine":"web","time":"2026-01-02T03:04:05.678Z","kind":"disk.read","fields":{"path":"/etc/shadow","bytes":4096}}`))
	f.Add([]byte(`{"id":"a-0000000000000001","time":"2026-01-02T03:04:05Z","kind":"net.dns","fields":{"answers":["10.0.0.1"],"name":"x"}}`))
	f.Add([]byte(`{"kind":"cpu.usage","time":"2026-01-02T03:04:05Z","fields":{"percent":1e308}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := Unmarshal(b)
		if err != nil {
			return
		}
		again, err := e.Marshal()
		if err != nil {
			t.Fatalf("taken, but can't be written: %v", err)
		}
		if _, err := Unmarshal(again); err != nil {
			t.Fatalf("written, but not taken again: %v: %s", err, again)
		}
	})
}

// FuzzText: whatever a guest says, what becomes of it is bounded and printable.
func FuzzText(f *testing.F) {
	f.Add([]byte("\x1b[2J\xff\xfe plain"))
	f.Add([]byte("\u202egnp.exe\u2066\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := Text(b)
		if !utf8.ValidString(s) || len(s) > 2*MaxText {
			t.Fatalf("%d bytes, valid %v", len(s), utf8.ValidString(s))
		}
		for _, r := range s {
			if r < 0x20 || r == 0x7f || (r >= 0x80 && r < 0xa0) || (r >= 0x202a && r <= 0x202e) || (r >= 0x2066 && r <= 0x2069) {
				t.Fatalf("%U is left in %q", r, s)
			}
		}
	})
}
