package test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// host is one state directory, the daemon on it, and the command line that speaks to it.
type host struct {
	t       *testing.T
	state   stateDir
	program string
	client  *api.Client
	user    *syscall.Credential // nil: the user who runs the tests
	env     []string            // for the daemon and commands, beside the test's own
	*served
}

// served is the daemon that runs, if one does. Subtests share it.
type served struct {
	daemon *exec.Cmd
	ended  chan struct{}
}

// newHost makes a state directory with the images in it, and sees that nothing of it is left at the test's end.
func newHost(t *testing.T) *host {
	t.Helper()
	dir, err := os.MkdirTemp(filepath.Dir(filepath.Dir(images)), "state-")
	if err != nil {
		t.Fatal(err)
	}
	if err := linkImage(filepath.Join(dir, "images")); err != nil {
		t.Fatal(err)
	}
	return hostOn(t, dir, nil)
}

// hostOn is newHost on a directory that the test has made.
func hostOn(t *testing.T, dir string, user *syscall.Credential) *host {
	uid := os.Getuid()
	if user != nil {
		uid = int(user.Uid)
	}
	h := &host{t: t, state: stateDir{dir, uid}, program: program, client: api.Dial(dir), user: user, served: &served{}}
	remember(h.state)
	t.Cleanup(h.close)
	return h
}

// linkImage makes a store in dst with the image tiny, of links to its files: images never change.
func linkImage(dst string) error {
	return storeImage(dst, "tiny", os.Link)
}

// storeImage is linkImage for an image of any name, by any way to give a file a second place. What an older recipe made is
// left out.
func storeImage(dst, image string, give func(from, to string) error) error {
	id, err := os.ReadFile(filepath.Join(images, "names", image))
	if err != nil {
		return err
	}
	name := strings.TrimSpace(string(id))
	for _, dir := range []string{"names", name} {
		if err := os.MkdirAll(filepath.Join(dst, dir), 0o711); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dst, "names", image), id, 0o644); err != nil {
		return err
	}
	parts, err := os.ReadDir(filepath.Join(images, name))
	if err != nil {
		return err
	}
	for _, p := range parts {
		if err := give(filepath.Join(images, name, p.Name()), filepath.Join(dst, name, p.Name())); err != nil {
			return err
		}
	}
	return nil
}

// copySparse copies a file that is mostly holes.
func copySparse(from, to string) error {
	out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// close ends everything, shows the daemon's log if the test failed, and counts what is left.
func (h *host) close() {
	if h.daemon == nil { // a daemon is needed to end the machines of one that was killed
		if _, err := os.Stat(filepath.Join(h.state.path, "lock")); err == nil {
			if err := h.start(); err != nil {
				h.t.Errorf("no daemon to clean up with: %v", err)
			}
		}
	}
	if h.daemon != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if list, err := h.client.Machines.List(ctx, connect.NewRequest(&vigiav1.ListMachinesRequest{})); err == nil {
			for _, m := range list.Msg.Machines {
				h.client.Machines.Remove(ctx, connect.NewRequest(&vigiav1.RemoveRequest{Name: m.Name, Force: true}))
			}
		}
		h.stopDaemon()
	}
	if h.t.Failed() {
		if log, err := os.ReadFile(h.log()); err == nil {
			h.t.Logf("the daemon's log:\n%s", log)
		}
	}
	if wantNothingLeft(h.t, h.state) { // never through a mount that was left
		os.RemoveAll(h.state.path)
	}
}

func (h *host) log() string { return filepath.Join(h.state.path, "serve.log") }

func (h *host) path(parts ...string) string {
	return filepath.Join(append([]string{h.state.path}, parts...)...)
}

// command is one call of the program, not yet started.
func (h *host) command(args ...string) *exec.Cmd {
	cmd := exec.Command(h.program, args...)
	cmd.Env = append(append(os.Environ(), "VIGIA_STATE="+h.state.path), h.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.user, Setpgid: true}
	return cmd
}

// start starts a daemon and waits until it answers.
func (h *host) start(args ...string) error {
	log, err := os.OpenFile(h.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := h.command(append([]string{"serve", "--accelerator", "tcg"}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	deadline := time.After(time.Minute)
	for {
		if _, err := h.client.Daemon.Info(context.Background(), connect.NewRequest(&vigiav1.InfoRequest{})); err == nil {
			h.daemon, h.ended = cmd, ended
			return nil
		}
		select {
		case <-ended:
			text, _ := os.ReadFile(h.log())
			return fmt.Errorf("the daemon ended: %s", bytes.TrimSpace(text))
		case <-deadline:
			cmd.Process.Kill()
			return errors.New("the daemon does not answer")
		case <-time.After(30 * time.Millisecond):
		}
	}
}

func (h *host) serve(args ...string) {
	h.t.Helper()
	if err := h.start(args...); err != nil {
		h.t.Fatal(err)
	}
}

// stopDaemon asks the daemon to end and returns its exit status.
func (h *host) stopDaemon() int {
	h.daemon.Process.Signal(syscall.SIGTERM)
	return h.waitDaemon()
}

func (h *host) killDaemon() {
	h.daemon.Process.Kill()
	h.waitDaemon()
}

func (h *host) waitDaemon() int {
	select {
	case <-h.ended:
	case <-time.After(time.Minute):
		h.t.Error("the daemon did not end in a minute: its goroutines are in its log")
		h.daemon.Process.Signal(syscall.SIGQUIT)
		time.Sleep(time.Second)
		h.daemon.Process.Kill()
		<-h.ended
	}
	code := h.daemon.ProcessState.ExitCode()
	h.daemon = nil
	return code
}

// result is what a person sees of a command.
type result struct {
	args   []string
	stdout string
	stderr string
	status int
}

func (r result) String() string {
	return fmt.Sprintf("vigia %s: status %d\n%s%s", strings.Join(r.args, " "), r.status, r.stdout, r.stderr)
}

// runTime bounds one command: a stop may take its grace time.
const runTime = 3 * time.Minute

// vigia runs a command and returns what came of it.
func (h *host) vigia(args ...string) result {
	h.t.Helper()
	return h.vigiaWith(nil, args...)
}

func (h *host) vigiaWith(stdin io.Reader, args ...string) result {
	h.t.Helper()
	cmd := h.command(args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errs
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	timer := time.AfterFunc(runTime, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	if !timer.Stop() {
		h.t.Fatalf("vigia %s: not done after %s", strings.Join(args, " "), runTime)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.t.Fatal(err)
	}
	return result{args, out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

// must is vigia where anything but success ends the test.
func (h *host) must(args ...string) string {
	h.t.Helper()
	r := h.vigia(args...)
	if r.status != 0 {
		h.t.Fatal(r)
	}
	return r.stdout
}

// refused is vigia where a failure with that status is wanted, and words that its message must hold.
func (h *host) refused(status int, words []string, args ...string) {
	h.t.Helper()
	r := h.vigia(args...)
	if r.status != status {
		h.t.Errorf("want status %d: %s", status, r)
	}
	for _, w := range words {
		if !strings.Contains(r.stdout+r.stderr, w) {
			h.t.Errorf("want %q in: %s", w, r)
		}
	}
	if strings.Contains(r.stderr, "goroutine ") {
		h.t.Errorf("it panicked: %s", r)
	}
}

// object is a JSON object that a command has printed.
type object map[string]any

func (o object) text(key string) string {
	s, _ := o[key].(string)
	return s
}

func (o object) number(key string) float64 {
	f, _ := o[key].(float64)
	return f
}

func (o object) object(key string) object {
	m, _ := o[key].(map[string]any)
	return m
}

func (h *host) json(args ...string) object {
	h.t.Helper()
	var o object
	out := h.must(append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(out), &o); err != nil {
		h.t.Fatalf("vigia %s: no JSON object: %v: %s", strings.Join(args, " "), err, out)
	}
	return o
}

func (h *host) list(args ...string) []object {
	h.t.Helper()
	var o []object
	out := h.must(append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(out), &o); err != nil {
		h.t.Fatalf("vigia %s: no JSON list: %v: %s", strings.Join(args, " "), err, out)
	}
	return o
}

func (h *host) show(name string) object {
	h.t.Helper()
	return h.json("show", name)
}

// until asks again and again until the answer is yes. what says what was waited for.
func (h *host) until(what string, most time.Duration, yes func() bool) {
	h.t.Helper()
	for deadline := time.Now().Add(most); !yes(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("not after %s: %s", most, what)
		}
	}
}

// untilSays is until for what a command says: a failure tells its last words.
func (h *host) untilSays(most time.Duration, word string, args ...string) {
	h.t.Helper()
	for deadline := time.Now().Add(most); ; time.Sleep(100 * time.Millisecond) {
		r := h.vigia(args...)
		if r.status == 0 && strings.Contains(r.stdout, word) {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("not after %s: %q in what this says: %.6000s\nshow: %s", most, word, r, h.vigia("show", args[1]))
		}
	}
}

// untilState waits for a machine's state and returns it as shown.
func (h *host) untilState(name, state string, most time.Duration) (m object) {
	h.t.Helper()
	h.until(fmt.Sprintf("machine %s is %s", name, state), most, func() bool {
		m = h.show(name)
		return m.text("state") == state
	})
	return m
}

// event is one event as `events -o json` prints it.
type event struct {
	ID      string
	Time    time.Time
	Machine string
	Kind    string
	Fields  object
}

func (e event) String() string {
	b, _ := json.Marshal(e.Fields)
	return fmt.Sprintf("%s %s %s %s", e.Time.Format(time.TimeOnly+".000"), e.Machine, e.Kind, b)
}

// events asks for the events of the past.
func (h *host) events(args ...string) []event {
	h.t.Helper()
	var list []event
	out := h.must(append([]string{"events", "-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		h.t.Fatalf("events: %v: %.300s", err, out)
	}
	return list
}

// untilEvent waits until an event of a kind is there that is meant, and returns the first.
func (h *host) untilEvent(name, kind string, most time.Duration, meant func(event) bool) (found event) {
	h.t.Helper()
	var last []event
	for deadline := time.Now().Add(most); ; time.Sleep(200 * time.Millisecond) {
		last = h.events(name, "--kind", kind)
		for _, e := range last {
			if meant == nil || meant(e) {
				return e
			}
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("no such %s after %s; there are %v", kind, most, last)
		}
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

func copyFile(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
