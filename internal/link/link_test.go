package link

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"vigia/internal/event"
)

// pair returns both ends of a connected unix stream socket.
func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	path := t.TempDir() + "/s"
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	b, err = l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func TestCallCarriesDescriptorsBothWays(t *testing.T) {
	a, b := pair(t)
	server := New(b, func(ctx context.Context, r Request) (Response, error) {
		if r.Method != "swap" || len(r.Files) != 1 {
			return Response{}, errors.New("unexpected call")
		}
		defer r.Files[0].Close()
		text, err := io.ReadAll(r.Files[0])
		if err != nil {
			return Response{}, err
		}
		pr, pw, err := os.Pipe()
		if err != nil {
			return Response{}, err
		}
		pw.WriteString(strings.ToUpper(string(text)))
		pw.Close()
		return Response{Body: len(text), Files: []*os.File{pr}}, nil
	})
	defer server.Close()
	client := New(a, nil)
	defer client.Close()

	pr, pw, _ := os.Pipe()
	pw.WriteString("over the wall")
	pw.Close()
	var n int
	files, err := client.Call(t.Context(), "swap", nil, &n, pr)
	pr.Close()
	if err != nil || n != 13 || len(files) != 1 {
		t.Fatalf("swap: n %d, %d files, err %v", n, len(files), err)
	}
	got, _ := io.ReadAll(files[0])
	files[0].Close()
	if string(got) != "OVER THE WALL" {
		t.Errorf("came back: %q", got)
	}
	if _, err := client.Call(t.Context(), "nothing", nil, nil); err == nil || err.Error() != "unexpected call" {
		t.Errorf("an unknown call: %v", err)
	}
}

func TestHostilePeerEndsOnlyItsConnection(t *testing.T) {
	for name, bytes := range map[string][]byte{
		"huge frame":        binary.BigEndian.AppendUint32(nil, 1<<31),
		"not JSON":          append(binary.BigEndian.AppendUint32(nil, 3), "abc"...),
		"lying about files": append(binary.BigEndian.AppendUint32(nil, 19), `{"id":1,"files":33}`...),
		"negative files":    append(binary.BigEndian.AppendUint32(nil, 19), `{"id":1,"files":-3}`...),
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t)
			c := New(b, nil)
			a.Write(bytes)
			select {
			case <-c.Done():
			case <-time.After(10 * time.Second):
				t.Fatal("the connection goes on")
			}
			if !errors.Is(c.Err(), ErrProtocol) {
				t.Errorf("ended with %v", c.Err())
			}
			if _, err := c.Call(t.Context(), "x", nil, nil); !errors.Is(err, ErrProtocol) {
				t.Errorf("a later call: %v", err)
			}
		})
	}
}

func TestPendingCallsEndWithTheConnection(t *testing.T) {
	a, b := pair(t)
	c := New(b, nil)
	failed := make(chan error, 1)
	go func() {
		_, err := c.Call(context.Background(), "never", nil, nil)
		failed <- err
	}()
	a.Read(make([]byte, 1))
	a.Close()
	if err := <-failed; !errors.Is(err, ErrClosed) {
		t.Errorf("pending call: %v", err)
	}
}

func TestOutboxGivesUnacknowledgedEventsToTheNextDaemon(t *testing.T) {
	o := NewOutbox("web")
	for range 5 {
		o.Emit(event.MachinePaused, nil)
	}
	first := collect(o, 5)
	o.Ack(3)
	second := collect(o, 2)
	if first[3].ID != second[0].ID || first[4].ID != second[1].ID {
		t.Errorf("given again: %v, want the last two of %v", ids(second), ids(first))
	}
	o.Ack(99) // beyond what was ever sent: a lying daemon drops nothing
	if got := collect(o, 2); len(got) != 2 {
		t.Errorf("after a wild acknowledgement %d events are left", len(got))
	}
}

func TestOutboxCountsWhatItDrops(t *testing.T) {
	o := NewOutbox("web")
	for range OutboxSize {
		o.Emit(event.ConsoleLine, event.Fields{"line": "flood"})
	}
	o.Emit(event.DiskRead, event.Fields{"path": "/etc/shadow", "watched": true})
	all := collect(o, LowWater+1)
	if last := all[len(all)-1]; last.Kind != event.DiskRead {
		t.Errorf("what rules wait for was crowded out: last is %s", last.Kind)
	}
	o.Ack(LowWater + 1)
	lost := collect(o, 1)
	if lost[0].Kind != event.EventsLost || lost[0].Fields["count"] != int64(OutboxSize-LowWater) {
		t.Errorf("after the flood: %v", lost)
	}
	if err := lost[0].Check(); err != nil {
		t.Error(err)
	}
}

// collect takes n events as a daemon would, over a fresh connection.
func collect(o *Outbox, n int) []event.Event {
	var out []event.Event
	enough := errors.New("enough")
	o.Send(context.Background(), func(_ context.Context, batch []event.Event) (int, error) {
		out = append(out, batch...)
		if len(out) >= n {
			return len(batch), enough
		}
		return len(batch), nil
	})
	return out
}

func ids(events []event.Event) (out []string) {
	for _, e := range events {
		out = append(out, e.ID)
	}
	return out
}

func FuzzReadFrame(f *testing.F) {
	f.Add(append(binary.BigEndian.AppendUint32(nil, 19), `{"id":1,"files":33}`...))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		readFrame(strings.NewReader(string(b)))
	})
}
