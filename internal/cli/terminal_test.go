package cli_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/cli"
)

// patience bounds what must happen soon; tests never wait for it to pass.
const patience = 30 * time.Second

// daemon starts a fake daemon and points vigia at it.
func daemon(t *testing.T) *fake {
	t.Helper()
	state := t.TempDir()
	t.Setenv("VIGIA_STATE", state)
	f := newFake()
	stop, err := f.serve(state)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return f
}

// pty is a terminal with a test at its other end.
type pty struct {
	person, program *os.File
	mu              sync.Mutex
	seen            bytes.Buffer
}

func openPTY(t *testing.T) *pty {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	t.Cleanup(func() { slave.Close() })
	if err := unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 60}); err != nil {
		t.Fatal(err)
	}
	p := &pty{person: master, program: slave}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			p.mu.Lock()
			p.seen.Write(buf[:n])
			p.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return p
}

func (p *pty) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen.String()
}

// wait waits until the terminal has shown the text.
func (p *pty) wait(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(patience); !strings.Contains(p.text(), text); {
		if time.Now().After(deadline) {
			t.Fatalf("the terminal never showed %q, but %q", text, p.text())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (p *pty) streams() cli.Streams {
	return cli.Streams{In: p.program, Out: p.program, Err: p.program}
}

// start runs a command line in the background.
func start(ctx context.Context, std cli.Streams, args ...string) <-chan int {
	done := make(chan int, 1)
	go func() { done <- cli.Main(ctx, args, std, local) }()
	return done
}

func wantStatus(t *testing.T, done <-chan int, want int) {
	t.Helper()
	select {
	case got := <-done:
		if got != want {
			t.Errorf("ended with %d, not %d", got, want)
		}
	case <-time.After(patience):
		t.Fatal("did not end")
	}
}

// TestConsoleOnTerminal: keys go to the guest, Ctrl-C too; the guest's escape sequences do not reach the terminal but
// for the harmless; ^] ends it and the terminal is as it was.
func TestConsoleOnTerminal(t *testing.T) {
	f, p := daemon(t), openPTY(t)
	before, err := unix.IoctlGetTermios(int(p.program.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	done := start(t.Context(), p.streams(), "console", "web")
	p.wait(t, "console of web: ^] detaches")
	p.wait(t, "\x1b[31mlogin:\x1b[0m ")
	p.person.WriteString("ls\x03")
	p.wait(t, `you typed "ls\x03"`)
	p.person.WriteString("\x1d")
	wantStatus(t, done, 0)
	p.wait(t, "\x1b[!p")
	p.wait(t, "left the console of web")
	if strings.Contains(p.text(), "owned") {
		t.Errorf("the guest set the terminal's title: %q", p.text())
	}
	select {
	case <-f.detached:
	case <-time.After(patience):
		t.Error("the daemon never saw the client leave")
	}
	after, err := unix.IoctlGetTermios(int(p.program.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if *before != *after {
		t.Errorf("the terminal was left as %+v, it was %+v", after, before)
	}
}

// TestConsoleHangup: the machine stops, and who watches gets the shell back without a key.
func TestConsoleHangup(t *testing.T) {
	daemon(t)
	p := openPTY(t)
	done := start(t.Context(), p.streams(), "console", "web")
	p.wait(t, "login:")
	p.person.WriteString("exit\r")
	wantStatus(t, done, 0)
}

// TestConsoleKilled: a signal's context restores the terminal too.
func TestConsoleKilled(t *testing.T) {
	daemon(t)
	p := openPTY(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := start(ctx, p.streams(), "console", "web")
	p.wait(t, "login:")
	cancel()
	wantStatus(t, done, 1)
	p.wait(t, "left the console of web")
}

// TestTablesOnTerminal: lines fit, times are relative, hostile names stay text.
func TestTablesOnTerminal(t *testing.T) {
	daemon(t)
	p := openPTY(t)
	wantStatus(t, start(t.Context(), p.streams(), "ps", "web"), 0)
	wantStatus(t, start(t.Context(), p.streams(), "show", "web"), 0)
	p.wait(t, "qemu 4242")
	for line := range strings.Lines(p.text()) {
		if n := len([]rune(strings.TrimRight(line, "\r\n"))); n > 60 && strings.HasPrefix(line, "666") {
			t.Errorf("a line has %d characters on 60 columns: %q", n, line)
		}
	}
	if strings.Contains(p.text(), "\x1b") {
		t.Errorf("an escape sequence reached the terminal: %q", p.text())
	}
	if !strings.Contains(p.text(), " ago") {
		t.Errorf("times are not relative on a terminal: %q", p.text())
	}
}

// TestExecOnTerminal: a command's output is text there.
func TestExecOnTerminal(t *testing.T) {
	daemon(t)
	p := openPTY(t)
	wantStatus(t, start(t.Context(), p.streams(), "exec", "web", "--", "paint"), 0)
	p.wait(t, "end")
	if strings.ContainsAny(p.text(), "\x1b\x07") {
		t.Errorf("an escape sequence reached the terminal: %q", p.text())
	}
	// And with --raw, whoever asks for it gets it.
	wantStatus(t, start(t.Context(), p.streams(), "exec", "--raw", "web", "--", "paint"), 0)
	p.wait(t, "\x1b]0;owned\x07")
}

// TestProgressOnTerminal: a build shows its steps there, its failure too, and the result last.
func TestProgressOnTerminal(t *testing.T) {
	daemon(t)
	p := openPTY(t)
	wantStatus(t, start(t.Context(), p.streams(), "image", "build", "debian"), 0)
	p.wait(t, "unpacking")
	p.wait(t, "copying")
	p.wait(t, "sealing")
	p.wait(t, "debian b3-11 0")
	wantStatus(t, start(t.Context(), p.streams(), "image", "build", "fails"), 1)
	p.wait(t, "vigia: recipe fails: mmdebstrap ended with 25")
	if strings.Contains(p.text(), "\x1b]") {
		t.Errorf("a step's name reached the terminal as it was: %q", p.text())
	}
}

// TestCaptureToTerminal: binary frames are not poured over a person.
func TestCaptureToTerminal(t *testing.T) {
	daemon(t)
	p := openPTY(t)
	wantStatus(t, start(t.Context(), p.streams(), "capture", "web", "-w", "-"), 2)
}

// TestInterrupt: Ctrl-C is how following ends; elsewhere it ends what waits, even for input that never comes.
func TestInterrupt(t *testing.T) {
	t.Run("events", func(t *testing.T) {
		f := daemon(t)
		ctx, cancel := context.WithCancel(t.Context())
		var out, errs bytes.Buffer
		done := start(ctx, cli.Streams{In: strings.NewReader(""), Out: &out, Err: &errs}, "events", "-f", "-o", "json")
		select {
		case <-f.following:
		case <-time.After(patience):
			t.Fatal("nothing followed")
		}
		cancel()
		wantStatus(t, done, 0)
		if errs.Len() > 0 {
			t.Errorf("said %q", errs.String())
		}
	})
	for _, args := range [][]string{{"exec", "web", "--", "cat"}, {"cp", "-", "web:/tmp/x"}, {"image", "build", "-"}} {
		t.Run(args[0], func(t *testing.T) {
			f := daemon(t)
			ctx, cancel := context.WithCancel(t.Context())
			never, w := io.Pipe()
			defer w.Close()
			var errs bytes.Buffer
			done := start(ctx, cli.Streams{In: never, Out: io.Discard, Err: &errs}, args...)
			cancel()
			wantStatus(t, done, 1)
			if got := errs.String(); got != "vigia: interrupted\n" {
				t.Errorf("said %q", got)
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			if _, there := f.files["/tmp/x"]; there {
				t.Error("half a copy was taken for a whole one")
			}
		})
	}
}

// TestFollowIsPrompt: each event is on its way before the next one happens, a line each.
func TestFollowIsPrompt(t *testing.T) {
	daemon(t)
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	done := start(ctx, cli.Streams{In: strings.NewReader(""), Out: w, Err: io.Discard}, "events", "-f", "-o", "json")
	var got []byte
	buf := make([]byte, 4096)
	for bytes.Count(got, []byte("\n")) < 2 { // the fake sends two and then waits for ever
		n, err := r.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, buf[:n]...)
	}
	cancel()
	go io.Copy(io.Discard, r)
	wantStatus(t, done, 0)
	for _, line := range bytes.Split(bytes.TrimSpace(got), []byte("\n")) {
		if !bytes.HasPrefix(line, []byte(`{"id":"`)) || !bytes.HasSuffix(line, []byte("}")) {
			t.Errorf("a line is %q", line)
		}
	}
}

// TestCopyFails: an input that breaks off is no copy.
func TestCopyFails(t *testing.T) {
	f := daemon(t)
	broken := io.MultiReader(strings.NewReader(strings.Repeat("x", 1<<20)), errReader{})
	var errs bytes.Buffer
	wantStatus(t, start(t.Context(), cli.Streams{In: broken, Out: io.Discard, Err: &errs}, "cp", "-", "web:/tmp/x"), 1)
	if errs.String() != "vigia: the disk is on fire\n" {
		t.Errorf("said %q", errs.String())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, there := f.files["/tmp/x"]; there {
		t.Error("half a copy was taken for a whole one")
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, fmt.Errorf("the disk is on fire") }

// TestLargeCopy moves more than one message each way.
func TestLargeCopy(t *testing.T) {
	daemon(t)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	wantStatus(t, start(t.Context(), cli.Streams{In: bytes.NewReader(data), Out: io.Discard, Err: io.Discard}, "cp", "-", "web:/tmp/x"), 0)
	var back bytes.Buffer
	wantStatus(t, start(t.Context(), cli.Streams{Out: &back, Err: io.Discard}, "cp", "web:/tmp/x", "-"), 0)
	if !bytes.Equal(back.Bytes(), data) {
		t.Errorf("%d bytes came back of %d", back.Len(), len(data))
	}
}

// TestLargeInput: what exec cannot pass in one request is refused with what to do, not cut.
func TestLargeInput(t *testing.T) {
	daemon(t)
	var errs bytes.Buffer
	in := bytes.NewReader(make([]byte, 3<<20+1))
	wantStatus(t, start(t.Context(), cli.Streams{In: in, Out: io.Discard, Err: &errs}, "exec", "web", "--", "cat"), 1)
	if errs.String() != "vigia: standard input is larger than 3M: use vigia cp\n" {
		t.Errorf("said %q", errs.String())
	}
	var out bytes.Buffer
	in = bytes.NewReader(make([]byte, 3<<20))
	wantStatus(t, start(t.Context(), cli.Streams{In: in, Out: &out, Err: io.Discard}, "exec", "web", "--", "cat"), 0)
	if out.Len() != 3<<20 {
		t.Errorf("%d bytes came back", out.Len())
	}
}
