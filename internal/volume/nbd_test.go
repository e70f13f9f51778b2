package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// served starts a server for v and returns its socket.
func served(t testing.TB, v *Volume, o ServeOptions) string {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, v, o) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return sock
}

func freshVolume(t testing.TB, size int64) *Volume {
	t.Helper()
	v, err := Open(nil, newOverlay(t, size, ID{}), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return v
}

// peer runs a program of another implementation; a test without it is skipped.
func peer(t *testing.T, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestPeers(t *testing.T) {
	v := freshVolume(t, 64<<20)
	sock := served(t, v, ServeOptions{Name: "disk", OnError: func(err error) { t.Error(err) }})
	uri := "nbd+unix:///disk?socket=" + sock
	raw := filepath.Join(t.TempDir(), "raw")
	data := make([]byte, 64<<20)
	copy(data[3<<20:], pattern(5<<20, 1))
	copy(data[60<<20+4096:], pattern(100000, 2))
	if err := os.WriteFile(raw, data, 0o600); err != nil {
		t.Fatal(err)
	}
	info := peer(t, "nbdinfo", uri)
	for _, want := range []string{"export-size: 67108864", "can_fua: true", "can_multi_conn: true", "can_trim: true", "can_zero: true", "can_fast_zero: true", "base:allocation"} {
		if !strings.Contains(info, want) {
			t.Errorf("nbdinfo does not say %q:\n%s", want, info)
		}
	}
	if list := peer(t, "nbdinfo", "--list", "nbd+unix:///?socket="+sock); !strings.Contains(list, "disk") {
		t.Errorf("nbdinfo --list: %s", list)
	}
	peer(t, "nbdcopy", "--connections=4", raw, uri)
	peer(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", raw, uri)
	if m := peer(t, "nbdinfo", "--map", uri); !strings.Contains(m, "hole,zero") || !strings.Contains(m, "data") {
		t.Errorf("nbdinfo --map: %s", m)
	}
	back := filepath.Join(t.TempDir(), "back")
	peer(t, "nbdcopy", uri, back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
		t.Error("what nbdcopy read back differs", err)
	}
	peer(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
		t.Error("what qemu-img read back differs", err)
	}
	out := peer(t, "qemu-io", "-f", "raw", uri, "-c", "write -P 0x5a 1000k 100k", "-c", "write -f -P 0x77 4k 512", "-c", "flush",
		"-c", "discard 1040k 8k", "-c", "write -z 1050k 3k", "-c", "write -z -u 2M 1M", "-c", "read -P 0x5a 1000k 40k",
		"-c", "read -P 0 1040k 8k", "-c", "read -P 0x77 4k 512", "-c", "read -P 0 1050k 3k", "-c", "read -P 0 2M 1M", "-c", "read -P 0x5a 1090k 10k")
	if strings.Contains(out, "verification failed") || strings.Contains(out, "error") {
		t.Error(out)
	}
}

// client is a bare NBD client that can say anything.
type client struct {
	t testing.TB
	net.Conn
}

func dial(t testing.TB, sock string) *client {
	t.Helper()
	c, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	return &client{t, c}
}

func (c *client) take(n int) []byte {
	c.t.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(c, p); err != nil {
		c.t.Fatal(err)
	}
	return p
}

// start goes through the shortest negotiation: EXPORT_NAME.
func (c *client) start() *client {
	c.take(18)
	b := binary.BigEndian.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
	b = binary.BigEndian.AppendUint64(b, optMagic)
	b = binary.BigEndian.AppendUint32(b, optExportName)
	c.Write(binary.BigEndian.AppendUint32(b, 0))
	c.take(10)
	return c
}

func rawRequest(flags, cmd uint16, cookie, off uint64, n uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, requestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, n)
}

func (c *client) errno() uint32 {
	c.t.Helper()
	return binary.BigEndian.Uint32(c.take(simpleSize)[4:])
}

// TestHostileRequests: each is answered with its error, and the connection goes on.
func TestHostileRequests(t *testing.T) {
	v := freshVolume(t, 1<<20)
	c := dial(t, served(t, v, ServeOptions{})).start()
	for _, tc := range []struct {
		name    string
		req     []byte
		payload int
		want    uint32
	}{
		{"read past the end", rawRequest(0, cmdRead, 1, 1<<20, 1), 0, 22},
		{"read at the end of the world", rawRequest(0, cmdRead, 1, 1<<64-1, 1<<31), 0, 22},
		{"read of nothing", rawRequest(0, cmdRead, 1, 0, 0), 0, 22},
		{"read of too much", rawRequest(0, cmdRead, 1, 0, 1<<32-1), 0, 22},
		{"write past the end", rawRequest(0, cmdWrite, 1, 1<<20-100, 5000), 5000, 22},
		{"write at the end of the world", rawRequest(0, cmdWrite, 1, 1<<63, 300000), 300000, 22},
		{"unknown flag", rawRequest(1<<15, cmdTrim, 1, 0, 4096), 0, 22},
		{"unknown command", rawRequest(0, 99, 1, 0, 4096), 0, 22},
		{"zero past the end", rawRequest(0, cmdWriteZeroes, 1, 4096, 1<<32-1), 0, 22},
		{"trim past the end", rawRequest(0, cmdTrim, 1, 1<<63+5, 1), 0, 22},
		{"block status not negotiated", rawRequest(0, cmdBlockStatus, 1, 0, 4096), 0, 22},
		{"fast zero that would write", rawRequest(cmdFlagFastZero|cmdFlagNoHole, cmdWriteZeroes, 1, 0, 4096), 0, 95},
		{"flush, to see that all is well", rawRequest(0, cmdFlush, 1, 0, 0), 0, 0},
	} {
		c.Write(append(tc.req, make([]byte, tc.payload)...))
		if got := c.errno(); got != tc.want {
			t.Errorf("%s: error %d, want %d", tc.name, got, tc.want)
		}
	}
}

// TestBrokenProtocol: who breaks the protocol is dropped, with an error that says why.
func TestBrokenProtocol(t *testing.T) {
	errs := make(chan error, 1)
	v := freshVolume(t, 1<<20)
	sock := served(t, v, ServeOptions{OnError: func(err error) { errs <- err }})
	drop := func(name string, c *client, what []byte, want error) {
		t.Helper()
		c.Write(what)
		if err := <-errs; !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: not dropped: %v", name, err)
		}
	}
	drop("magic", dial(t, sock).start(), make([]byte, requestSize), ErrRequest)
	drop("huge write", dial(t, sock).start(), rawRequest(0, cmdWrite, 1, 0, maxPayload+1), ErrRequest)
	drop("client flags", dial(t, sock), []byte{0xff, 0, 0, 0}, ErrNegotiation)
	drop("option magic", dial(t, sock), append([]byte{0, 0, 0, 3}, make([]byte, 16)...), ErrNegotiation)
	huge := binary.BigEndian.AppendUint64([]byte{0, 0, 0, 3}, optMagic)
	drop("huge option", dial(t, sock), append(huge, 0, 0, 0, 6, 0xff, 0xff, 0xff, 0xff), ErrNegotiation)
}

// TestReconnect: clients that die in the middle of a write leave nothing behind that would hinder the next.
func TestReconnect(t *testing.T) {
	sock := served(t, freshVolume(t, 8<<20), ServeOptions{MaxConns: 2})
	for range 20 {
		hello := func() bool {
			c, err := net.Dial("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.ReadFull(c, make([]byte, 18)); err != nil {
				return false // both places are taken by clients that are just dying
			}
			b := binary.BigEndian.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
			b = binary.BigEndian.AppendUint64(b, optMagic)
			b = binary.BigEndian.AppendUint32(b, optExportName)
			b = append(binary.BigEndian.AppendUint32(b, 0), rawRequest(0, cmdWrite, 1, 0, 1<<20)...)
			c.Write(append(b, make([]byte, 5000)...))
			return true
		}
		for n := 0; !hello(); n++ {
			if n == 1000 {
				t.Fatal("no connection is taken any more")
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// TestSimple: who is refused structured replies reads the same, and is told so when it asks.
func TestSimple(t *testing.T) {
	v := freshVolume(t, 8<<20)
	want := bytes.Repeat([]byte("in its place"), 100<<10)
	if _, err := v.WriteAt(want, 12345); err != nil {
		t.Fatal(err)
	}
	sock := served(t, v, ServeOptions{Simple: true})
	c := dial(t, sock)
	c.take(18)
	b := binary.BigEndian.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
	b = binary.BigEndian.AppendUint64(b, optMagic)
	b = binary.BigEndian.AppendUint32(b, optStructuredReply)
	c.Write(binary.BigEndian.AppendUint32(b, 0))
	if kind := binary.BigEndian.Uint32(c.take(20)[12:]); kind != repErrUnsup {
		t.Errorf("structured replies: answer %#x", kind)
	}
	b = binary.BigEndian.AppendUint64(nil, optMagic)
	b = binary.BigEndian.AppendUint32(b, optExportName)
	c.Write(binary.BigEndian.AppendUint32(b, 0))
	c.take(10)
	c.Write(rawRequest(0, cmdRead, 7, 12345, uint32(len(want))))
	if n := c.errno(); n != 0 {
		t.Fatal("error", n)
	}
	if !bytes.Equal(c.take(len(want)), want) {
		t.Error("read something else")
	}
	peer(t, "qemu-io", "-f", "raw", "nbd+unix:///?socket="+sock, "-c", "write -P 0x33 1M 1M", "-c", "read -P 0x33 1M 1M", "-c", "flush")
}

// TestStopWhileBusy: the server ends although clients neither send nor take anything.
func TestStopWhileBusy(t *testing.T) {
	v := freshVolume(t, 64<<20)
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- Serve(ctx, l, v, ServeOptions{}) }()
	dial(t, sock).start()
	deaf := dial(t, sock).start()
	deaf.Write(rawRequest(0, cmdRead, 1, 0, 32<<20))
	deaf.take(4) // it has begun
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TestStopWhileHeld: the server can end although a request waits for room on the host.
func TestStopWhileHeld(t *testing.T) {
	stalled := make(chan error, 1)
	v, _, s := sickVolume(t, Options{OnStall: func(err error) { stalled <- err }, RetryEvery: time.Hour})
	ctx, cancel := context.WithCancel(context.Background())
	here, there := net.Pipe()
	done := make(chan error)
	go func() { done <- ServeConn(ctx, there, v, ServeOptions{}) }()
	s.set("write", 28, -1)
	c := (&client{t, here}).start()
	c.Write(append(rawRequest(0, cmdWrite, 1, 0, 4096), make([]byte, 4096)...))
	<-stalled
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
