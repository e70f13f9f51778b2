package guard

import (
	"encoding/binary"
	"net"
	"testing"

	"vigia/internal/link"
)

// frame is a frame as QEMU's filter-mirror shows it.
func frame(b []byte) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...) }

// seen is what is known of frames once their stream has ended.
func seen(t testing.TB, late bool, stream []byte) link.Shown {
	t.Helper()
	ours, theirs := net.Pipe()
	f := newFrames(ours, late)
	go f.run()
	theirs.Write(stream)
	theirs.Close()
	<-f.ended
	return f.shown()
}

func TestFrames(t *testing.T) {
	ping, pong := frame([]byte("ping")), frame([]byte("pong"))
	both := seen(t, false, append(ping, pong...))
	if !both.Whole || both.Frames != 2 || both.Bytes != 8 {
		t.Fatalf("two frames: %+v", both)
	}
	if again := seen(t, false, append(frame([]byte("ping")), pong...)); again != both {
		t.Errorf("the same frames again: %+v, before %+v", again, both)
	}
	for what, stream := range map[string][]byte{
		"another order":       append(frame([]byte("pong")), ping...),
		"other boundaries":    append(frame([]byte("pingp")), frame([]byte("ong"))...),
		"a changed byte":      append(frame([]byte("pinh")), pong...),
		"one frame less":      ping,
		"one empty frame too": append(append(frame([]byte("ping")), pong...), frame(nil)...),
	} {
		if other := seen(t, false, stream); !other.Whole || other.Sum == both.Sum {
			t.Errorf("%s: %+v, like %+v", what, other, both)
		}
	}
	for what, s := range map[string]link.Shown{
		"cut in a frame":         seen(t, false, append(ping, pong[:6]...)),
		"cut in a length":        seen(t, false, append(ping, pong[:2]...)),
		"a frame too long":       seen(t, false, append(ping, 0x7f, 0xff, 0xff, 0xff, 1, 2, 3)),
		"seen by another before": seen(t, true, ping),
	} {
		if s.Whole {
			t.Errorf("%s: is said to be whole: %+v", what, s)
		}
	}
}

// FuzzFrames gives QEMU's side any bytes: they are read to their end, and what is called whole are frames.
func FuzzFrames(f *testing.F) {
	f.Add(frame([]byte("ping")))
	f.Add([]byte{0, 0, 0})
	f.Add([]byte{0, 1, 0x10, 1, 0})
	f.Fuzz(func(t *testing.T, stream []byte) {
		s := seen(t, false, stream)
		if s.Whole && s.Bytes+4*s.Frames != int64(len(stream)) {
			t.Errorf("%d bytes make %+v", len(stream), s)
		}
	})
}
