package hostile

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

const (
	infoCall = "/vigia.v1.Daemon/Info"
	headTime = 10 * time.Second // the daemon's own
)

// TestAPIIsTheOwnersAlone has another user of the host ask.
func TestAPIIsTheOwnersAlone(t *testing.T) {
	h := stubHost(t)
	for path, most := range map[string]os.FileMode{h.state: 0o700, filepath.Join(h.state, api.SocketName): 0o600} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&^most != 0 {
			t.Errorf("%s has mode %s", path, info.Mode())
		}
	}
	if os.Getuid() != 0 {
		t.Skip("another user takes root")
	}
	os.Chmod(h.state, 0o711) // should somebody open the directory, the socket is still shut
	ls := exec.Command(vigia, "--state", h.state, "ls")
	ls.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := ls.CombinedOutput(); err == nil || !strings.Contains(string(out), "permission") {
		t.Errorf("nobody asked, and heard: %v %s", err, out)
	}
}

// abuse is what the owner's own programs do wrong.
type abuse struct {
	name string
	do   func(t *testing.T, h *host)
}

// TestAPIPatience has clients that take their time.
func TestAPIPatience(t *testing.T) {
	t.Parallel() // most of it is waiting
	abuseAll(t, abuse{"silent", silent}, abuse{"half", half}, abuse{"slow-body", slowBody})
}

// TestAPIAbuse has clients that send what they should not.
func TestAPIAbuse(t *testing.T) {
	abuseAll(t, abuse{"giants", giants}, abuse{"nonsense", nonsense}, abuse{"resets", resets}, abuse{"control-frames", controlFrames},
		abuse{"headers", endlessHeaders}, abuse{"streams", streams}, abuse{"deaf-readers", deafReaders}, abuse{"polling", polling})
}

func abuseAll(t *testing.T, all ...abuse) {
	h := stubHost(t)
	for _, a := range all {
		t.Run(a.name, func(t *testing.T) {
			entries := h.entries()
			before := descriptors(h)
			seen := h.watch()
			began := time.Now()
			a.do(t, h)
			h.answersSoon(t)
			seen.check(t)
			seconds := time.Since(began).Seconds()
			grown := h.entries() - entries
			t.Logf("ledger: %d entries in %.0f s", grown, seconds)
			if grown > burstEntries/10+int64(entriesMost/5*seconds) {
				t.Errorf("the ledger grew by %d entries in %.0f seconds", grown, seconds)
			}
			eventually(t, 20*time.Second, "the end of its connections", func() bool { return descriptors(h) <= before+10 })
		})
	}
}

// answersSoon asks until there is an answer: what holds connections is let go of in the time that a request has.
func (h *host) answersSoon(t *testing.T) {
	t.Helper()
	began := time.Now()
	eventually(t, answerMost+10*time.Second, "the daemon's answer", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), answerMost)
		defer cancel()
		_, err := api.Dial(h.state).Daemon.Info(ctx, connect.NewRequest(&vigiav1.InfoRequest{}))
		return err == nil
	})
	t.Logf("answered after %s", time.Since(began).Round(time.Millisecond))
}

func descriptors(h *host) int {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", h.daemon.Process.Pid))
	return len(entries)
}

// dial opens n connections, as many as are let in, which the test's end closes.
func (h *host) dial(t *testing.T, n int) (all []net.Conn) {
	t.Helper()
	for range n {
		if c, err := net.Dial("unix", filepath.Join(h.state, api.SocketName)); err == nil {
			all = append(all, c)
		}
	}
	t.Cleanup(func() { hangUp(all) })
	return all
}

func hangUp(all []net.Conn) {
	for _, c := range all {
		c.Close()
	}
}

// silent connects a thousand times and says nothing.
func silent(t *testing.T, h *host) {
	all := h.dial(t, 1000)
	defer hangUp(all)
	if began := time.Now(); len(all) == 0 {
		t.Fatal("no connection was taken")
	} else if h.answersSoon(t); time.Since(began) > headTime/2 {
		t.Error("those who say nothing keep others out")
	}
}

// half sends half a head, and one more byte now and then.
func half(t *testing.T, h *host) {
	all := h.dial(t, 300)
	defer hangUp(all)
	for i, c := range all {
		heads := []string{"POST " + infoCall + " HTTP/1.1\r\nHost: x\r\nX: ", "P", http2.ClientPreface[:10], http2.ClientPreface}
		io.WriteString(c, heads[i%len(heads)])
	}
	for range 4 {
		time.Sleep(500 * time.Millisecond)
		for _, c := range all {
			c.SetDeadline(time.Now().Add(time.Second))
			io.WriteString(c, "y")
		}
	}
	h.answersSoon(t)
}

// slowBody promises a body and sends a byte of it each second: it must be given up.
func slowBody(t *testing.T, h *host) {
	c := h.dial(t, 1)[0]
	io.WriteString(c, "POST "+infoCall+" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
	ended := make(chan struct{})
	go func() {
		io.Copy(io.Discard, c)
		close(ended)
	}()
	for range 45 {
		select {
		case <-ended:
			return
		case <-time.After(time.Second):
			io.WriteString(c, " ")
		}
	}
	t.Error("a body that comes byte by byte is waited for without end")
}

// giants sends requests of a size that nobody needs, whole, packed and without end.
func giants(t *testing.T, h *host) {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	zeros := make([]byte, 1<<20)
	for range 512 {
		z.Write(zeros)
	}
	z.Close()
	const head = "POST /vigia.v1.Machines/Run HTTP/1.1\r\nHost: x\r\nContent-Type: application/proto\r\n"
	requests := []string{
		head + "Content-Length: 68719476736\r\n\r\n" + strings.Repeat("x", 32<<20),
		head + "Transfer-Encoding: chunked\r\n\r\n" + strings.Repeat("100000\r\n"+strings.Repeat("y", 1<<20)+"\r\n", 32),
		head + fmt.Sprintf("Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n", packed.Len()) + packed.String(),
		head + "X: " + strings.Repeat("z", 16<<20) + "\r\n\r\n",
		head + strings.Repeat("X: y\r\n", 1<<20) + "\r\n",
	}
	for i, r := range requests {
		c := h.dial(t, 1)[0]
		c.SetDeadline(time.Now().Add(5 * time.Second))
		go io.WriteString(c, r)
		answer := make([]byte, 64)
		n, _ := io.ReadAtLeast(c, answer, 13)
		if strings.Contains(string(answer[:n]), " 200 ") {
			t.Errorf("request %d was taken: %q", i, answer[:n])
		}
		c.Close()
	}
}

// nonsense sends what no client of the API says. Nothing but refusals may come.
func nonsense(t *testing.T, h *host) {
	for _, r := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "DELETE " + infoCall + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"POST " + infoCall + " HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
		"POST " + infoCall + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n[{}]",
		"POST /vigia.v1.Machines/Show HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 30\r\n\r\n{\"name\":\"../../etc/passwd\"}   ",
		"POST /vigia.v1.Machines/Show HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{\"name\":\"x\"}",
		"POST /vigia.v1.Machines/Run HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n" + strings.Repeat("[", 50),
		"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "\x00\x00\x00\x00", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
	} {
		c := h.dial(t, 1)[0]
		c.SetDeadline(time.Now().Add(2 * time.Second))
		io.WriteString(c, r)
		answer := make([]byte, 4096)
		n, _ := c.Read(answer)
		if strings.Contains(string(answer[:n]), " 200 ") || strings.Contains(string(answer[:n]), "root:") {
			t.Errorf("%.60q was answered: %q", r, answer[:n])
		}
		c.Close()
	}
}

// speakHTTP2 begins a connection, whose answers go nowhere.
func speakHTTP2(t *testing.T, h *host) (*http2.Framer, net.Conn, []byte) {
	c := h.dial(t, 1)[0]
	c.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(c, http2.ClientPreface)
	f := http2.NewFramer(c, c)
	f.WriteSettings()
	go io.Copy(io.Discard, c)
	var head bytes.Buffer
	e := hpack.NewEncoder(&head)
	for _, p := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":authority", "x"}, {":path", infoCall}, {"content-type", "application/proto"}} {
		e.WriteField(hpack.HeaderField{Name: p[0], Value: p[1]})
	}
	return f, c, head.Bytes()
}

// resets opens streams and takes them back at once (CVE-2023-44487).
func resets(t *testing.T, h *host) {
	f, _, head := speakHTTP2(t, h)
	for i := uint32(0); i < 50_000; i++ {
		if f.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: head, EndHeaders: true}) != nil ||
			f.WriteRSTStream(2*i+1, http2.ErrCodeCancel) != nil {
			t.Logf("cut off after %d streams", i)
			break
		}
	}
}

// controlFrames sends settings and pings, whose answers pile up.
func controlFrames(t *testing.T, h *host) {
	f, c, _ := speakHTTP2(t, h)
	deadline := time.Now().Add(5 * time.Second)
	c.SetDeadline(deadline)
	for time.Now().Before(deadline) && f.WritePing(false, [8]byte{}) == nil && f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}) == nil {
	}
}

// endlessHeaders continues a head for ever (CVE-2023-45288).
func endlessHeaders(t *testing.T, h *host) {
	f, _, head := speakHTTP2(t, h)
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head})
	var more bytes.Buffer
	e := hpack.NewEncoder(&more)
	e.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("y", 8000), Sensitive: true})
	for range 100_000 {
		if f.WriteContinuation(1, false, more.Bytes()) != nil {
			return
		}
	}
	t.Error("a head without end is read without end")
}

// streams opens more streams than it may, none of which is ever finished.
func streams(t *testing.T, h *host) {
	f, _, head := speakHTTP2(t, h)
	for i := uint32(0); i < 10_000; i++ {
		if f.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: head, EndHeaders: true}) != nil {
			break
		}
	}
}

// deafReaders follow the events and read none.
func deafReaders(t *testing.T, h *host) {
	head := "POST /vigia.v1.Events/List HTTP/1.1\r\nHost: x\r\nContent-Type: application/connect+json\r\nContent-Length: 20\r\n\r\n"
	all := h.dial(t, 100)
	defer hangUp(all)
	for _, c := range all {
		io.WriteString(c, head+"\x00\x00\x00\x00\x0f{\"follow\":true}")
	}
	polling(t, h)
}

// polling asks the same thing as fast as it goes.
func polling(t *testing.T, h *host) {
	n := 0
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); n++ {
		if _, err := h.client.Daemon.Info(t.Context(), connect.NewRequest(&vigiav1.InfoRequest{})); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("asked %d times", n)
}
