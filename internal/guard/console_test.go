package guard

import (
	"bytes"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"vigia/internal/event"
)

func testConsole(t *testing.T) (line net.Conn, c *console, emitted *[]event.Fields) {
	t.Helper()
	dir := t.TempDir()
	open := func(name string) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	here, there := net.Pipe()
	emitted = new([]event.Fields)
	c = newConsole(here, openConsoleLog(open("head"), open("tail0"), open("tail1")), func(_ event.Kind, f event.Fields) { *emitted = append(*emitted, f) })
	t.Cleanup(func() { there.Close() })
	return there, c, emitted
}

// TestCrumbsDoNotDetach: a guest writes byte by byte while the person's side is not scheduled.
func TestCrumbsDoNotDetach(t *testing.T) {
	_, c, _ := testConsole(t)
	person, attached := net.Pipe()
	if err := c.attach(attached); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("x"), 5000)
	for i := range want {
		c.fan(want[i : i+1])
	}
	got := make([]byte, len(want))
	person.SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.ReadFull(person, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes were to come: %v", len(want), err)
	}
}

// TestAPersonWhoDoesNotReadIsLetGo, and holds up neither the guest nor the others.
func TestAPersonWhoDoesNotReadIsLetGo(t *testing.T) {
	_, c, _ := testConsole(t)
	_, attached := net.Pipe()
	if err := c.attach(attached); err != nil {
		t.Fatal(err)
	}
	chunk := make([]byte, 4096)
	for range 2 * attachMost / len(chunk) {
		c.fan(chunk)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.attached) != 0 {
		t.Error("a person two megabytes behind is still attached")
	}
}

func TestTheLogKeepsTheBeginningAndTheEnd(t *testing.T) {
	_, c, _ := testConsole(t)
	first := bytes.Repeat([]byte("a"), logHead)
	c.log.write(first)
	for i := range 5 {
		c.log.write(bytes.Repeat([]byte{byte('0' + i)}, logTail))
	}
	c.log.write([]byte("end"))
	size := fileSize(c.log.head) + fileSize(c.log.tails[0]) + fileSize(c.log.tails[1])
	if size > logHead+2*logTail {
		t.Errorf("the log takes %d bytes", size)
	}
	begin, end := make([]byte, 1), make([]byte, 3)
	c.log.head.ReadAt(begin, 0)
	c.log.tails[c.log.cur].ReadAt(end, 0)
	if begin[0] != 'a' || string(end) != "end" {
		t.Errorf("begins with %q, ends with %q", begin, end)
	}
}
