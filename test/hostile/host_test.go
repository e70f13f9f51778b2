package hostile

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/structpb"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
	"vigia/internal/image"
)

// The programs under test: vigia as it is shipped, the stub in QEMU's place, and vigia with workers that were taken over.
var vigia, stubDir, rogue string

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "vigia-hostile-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755) // a machine's own user executes what lies here
	vigia, stubDir, rogue = filepath.Join(dir, "vigia"), filepath.Join(dir, "bin"), filepath.Join(dir, "rogue")
	programs := map[string]string{vigia: "vigia/cmd/vigia", filepath.Join(stubDir, "qemu-system-x86_64"): "./testdata/stub", rogue: "./testdata/rogue"}
	if built := os.Getenv("VIGIA_TEST_PROGRAM"); built != "" {
		delete(programs, vigia)
		if err := errors.Join(copyFile(built, vigia), os.Chmod(vigia, 0o755)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	for out, pkg := range programs {
		build := exec.Command("go", "build", "-trimpath", "-o", out, pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n%s", build, err, text)
			return 1
		}
	}
	if err := os.Link(filepath.Join(stubDir, "qemu-system-x86_64"), filepath.Join(stubDir, "qemu-img")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// host is one daemon on a state of its own.
type host struct {
	t      *testing.T
	state  string
	log    string
	client *api.Client
	daemon *exec.Cmd
	ended  chan struct{}
	owner  uint32 // the daemon's user

	program string // empty: vigia as it is shipped
}

// stubHost starts a daemon whose QEMU is the stub, with an image that has a disk and nothing to boot.
func stubHost(t *testing.T) *host {
	h := newHost(t, "")
	makeImage(t, filepath.Join(h.state, "images"))
	h.start(stubDir + ":" + os.Getenv("PATH"))
	return h
}

// newHost makes a state directory under parent, the default being the system's for temporary files, and sees to its end.
func newHost(t *testing.T, parent string) *host {
	t.Helper()
	state, err := os.MkdirTemp(parent, "vigia-hostile-state-")
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, state: state, log: filepath.Join(state, "serve.log"), client: api.Dial(state), owner: uint32(os.Getuid())}
	t.Cleanup(h.end)
	return h
}

func (h *host) start(path string) {
	h.t.Helper()
	log, err := os.Create(h.log)
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	program := vigia
	if h.program != "" {
		program = h.program
	}
	h.daemon = exec.Command(program, "--state", h.state, "serve", "--accelerator", "tcg")
	h.daemon.Stdout, h.daemon.Stderr = log, log
	h.daemon.Env = append(os.Environ(), "PATH="+path)
	if h.owner != uint32(os.Getuid()) {
		h.daemon.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: h.owner, Gid: h.owner}}
	}
	if err := h.daemon.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.ended = make(chan struct{})
	go func() {
		h.daemon.Wait()
		close(h.ended)
	}()
	for range 300 {
		if _, err := h.client.Daemon.Info(h.t.Context(), connect.NewRequest(&vigiav1.InfoRequest{})); err == nil {
			return
		}
		select {
		case <-h.ended:
			h.t.Fatalf("the daemon ended: %s", h.said())
		case <-time.After(50 * time.Millisecond):
		}
	}
	h.t.Fatalf("the daemon does not answer: %s", h.said())
}

func (h *host) said() string {
	text, _ := os.ReadFile(h.log)
	return string(text[max(0, len(text)-4096):])
}

// end removes all machines, ends the daemon, and looks for what was left behind.
func (h *host) end() {
	if h.daemon == nil {
		os.RemoveAll(h.state)
		return
	}
	if h.t.Failed() {
		h.t.Logf("the daemon said:\n%s", h.said())
	}
	defer h.sweep()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if list, err := h.client.Machines.List(ctx, connect.NewRequest(&vigiav1.ListMachinesRequest{})); err != nil {
		h.t.Errorf("machines: %v", err)
	} else {
		for _, m := range list.Msg.Machines {
			h.remove(ctx, m.Name)
		}
	}
	h.daemon.Process.Signal(syscall.SIGTERM)
	select {
	case <-h.ended:
	case <-time.After(30 * time.Second):
		h.t.Error("the daemon does not end")
		h.daemon.Process.Kill()
		<-h.ended
	}
}

// sweep says what was left behind, and removes it.
func (h *host) sweep() {
	for pid, what := range processesOf(h.state) {
		h.t.Errorf("left behind: %d %s", pid, what)
		syscall.Kill(pid, syscall.SIGKILL)
	}
	left, _ := filepath.Glob("/dev/shm/vigia-*-" + stateHash(h.state) + "/*")
	if len(left) > 0 {
		h.t.Errorf("left behind: %v", left)
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/*/vigia-*-" + stateHash(h.state) + "/*")
	nested, _ := filepath.Glob("/sys/fs/cgroup/*/vigia-*-" + stateHash(h.state) + "/*/cgroup.procs")
	for _, g := range append(groups, nested...) {
		h.t.Errorf("left behind: %s", g)
	}
	dirs, _ := filepath.Glob("/dev/shm/vigia-*-" + stateHash(h.state))
	for _, d := range append(dirs, h.state) {
		os.RemoveAll(d)
	}
}

func (h *host) remove(ctx context.Context, name string) {
	h.t.Helper()
	began := time.Now()
	_, err := h.client.Machines.Remove(ctx, connect.NewRequest(&vigiav1.RemoveRequest{Name: name, Force: true}))
	if err != nil {
		h.t.Errorf("machine %s can't be removed: %v", name, err)
	}
	if took := time.Since(began); took > 30*time.Second {
		h.t.Errorf("machine %s took %s to be removed", name, took)
	}
}

// run starts a machine, which the end of the host removes.
func (h *host) run(r *vigiav1.RunRequest) *vigiav1.Machine {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	if r.MemoryBytes == 0 {
		r.MemoryBytes = 96 << 20
	}
	res, err := h.client.Machines.Run(ctx, connect.NewRequest(r))
	if err != nil {
		h.t.Fatalf("run %s: %v\n%s", r.Name, err, h.said())
	}
	return res.Msg
}

func (h *host) show(name string) (*vigiav1.Machine, error) {
	ctx, cancel := context.WithTimeout(h.t.Context(), 20*time.Second)
	defer cancel()
	res, err := h.client.Machines.Show(ctx, connect.NewRequest(&vigiav1.MachineRequest{Name: name}))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// entries is the number of entries in the ledger.
func (h *host) entries() int64 {
	h.t.Helper()
	res, err := h.client.Ledger.Head(h.t.Context(), connect.NewRequest(&vigiav1.HeadRequest{}))
	if err != nil {
		h.t.Fatalf("ledger head: %v", err)
	}
	return int64(res.Msg.Size)
}

// events counts the events of a machine by kind, and hands each to look, if given.
func (h *host) events(machine string, look func(*vigiav1.Event)) map[string]int {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 30*time.Second)
	defer cancel()
	stream, err := h.client.Events.List(ctx, connect.NewRequest(&vigiav1.ListEventsRequest{Machine: machine}))
	if err != nil {
		h.t.Fatalf("events: %v", err)
	}
	defer stream.Close()
	counts := map[string]int{}
	for stream.Receive() {
		counts[stream.Msg().Kind]++
		if look != nil {
			look(stream.Msg())
		}
	}
	if err := stream.Err(); err != nil {
		h.t.Fatalf("events: %v", err)
	}
	return counts
}

// console is what a machine's serial line said first.
func (h *host) console(m *vigiav1.Machine) string {
	text, _ := os.ReadFile(filepath.Join(h.state, "machines", m.Id, "console.log"))
	return string(text)
}

// used is the room that a part of the state directory takes on the disk.
func (h *host) used(part ...string) int64 {
	return diskUse(filepath.Join(append([]string{h.state}, part...)...))
}

func diskUse(dir string) int64 {
	var sum int64
	filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := d.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				sum += st.Blocks * 512
			}
		}
		return nil
	})
	return sum
}

// stateHash ends the name under which package daemon keeps all that a state has on the host.
func stateHash(state string) string {
	sum := sha256.Sum256([]byte(state))
	return hex.EncodeToString(sum[:4])
}

// processesOf are the processes that carry a state's tag or name it.
func processesOf(state string) map[int]string {
	found := map[int]string{}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		cmdline, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		environ, _ := os.ReadFile(filepath.Join(p, "environ"))
		if strings.Contains(string(cmdline), state) || strings.Contains(string(environ), stateHash(state)+"/") {
			pid, _ := strconv.Atoi(filepath.Base(p))
			found[pid] = strings.ReplaceAll(string(cmdline[:min(len(cmdline), 80)]), "\x00", " ")
		}
	}
	return found
}

// peaks follows the private memory of processes, and keeps the highest value of each.
type peaks struct {
	mu   sync.Mutex
	pids map[string]int64
	most map[string]int64
	stop chan struct{}
	done chan struct{}
}

// watch follows the daemon, and guard and gate of machines: also their successors, where they die.
func (h *host) watch(machines ...string) *peaks {
	p := &peaks{pids: map[string]int64{"daemon": int64(h.daemon.Process.Pid)}, most: map[string]int64{}, stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		for i := 0; ; i++ {
			if i%10 == 0 {
				for _, name := range machines {
					if m, err := h.show(name); err == nil {
						p.mu.Lock()
						p.pids[name+"/guard"], p.pids[name+"/gate"] = m.GuardPid, m.GatePid
						p.mu.Unlock()
					}
				}
			}
			p.sample()
			select {
			case <-p.stop:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return p
}

func (p *peaks) sample() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, pid := range p.pids {
		if kb, err := statusKB(pid, "RssAnon"); err == nil {
			p.most[name] = max(p.most[name], kb<<10)
		}
	}
}

func (p *peaks) end() map[string]int64 {
	close(p.stop)
	<-p.done
	return p.most
}

// memoryMost is what none of vigia's processes may exceed, whatever a guest does: half of a worker's control group.
const memoryMost = 256 << 20

func (p *peaks) check(t *testing.T) {
	t.Helper()
	for name, bytes := range p.end() {
		t.Logf("%s: at most %d MiB", name, bytes>>20)
		if bytes > memoryMost {
			t.Errorf("%s took %d MiB, at most %d are fine", name, bytes>>20, memoryMost>>20)
		}
	}
}

var errNoField = errors.New("no such field")

func statusKB(pid int64, field string) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		}
	}
	return 0, errNoField
}

// anyKernel takes any file for a kernel: a stub boots none.
type anyKernel struct{ image.InProcess }

func (anyKernel) Profile(_ context.Context, _, dst, _ *os.File) error {
	_, err := dst.WriteString("no profile")
	return err
}

// makeImage puts the image "bare" into a store: a small ext4 file system with a file that the starter rules watch.
func makeImage(t *testing.T, store string) {
	t.Helper()
	disk := makeDisk(t)
	s, err := image.Open(store, image.Options{Worker: anyKernel{}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Import(t.Context(), disk, "bare", image.ImportOptions{}, nil); err != nil {
		t.Fatal(err)
	}
}

// makeDisk makes a raw disk of 32 MiB with what an import looks for.
func makeDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{"root/etc/os-release": "ID=other\n", "root/etc/shadow": "root:*:1::::::\n",
		"root/boot/vmlinuz-6.1.0-10": "a kernel", "root/usr/bin/true": ""} {
		at := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	disk := filepath.Join(dir, "disk.raw")
	mustRun(t, "mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-d", filepath.Join(dir, "root"), disk, "32M")
	return disk
}

func mustRun(t *testing.T, name string, args ...string) {
	t.Helper()
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		if path := filepath.Join(dir, name); exec.Command("test", "-x", path).Run() == nil {
			if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
				t.Fatalf("%s %q: %v\n%s", name, args, err, out)
			}
			return
		}
	}
	t.Skipf("no %s: run script/setup", name)
}

func itoa(n int) string { return strconv.Itoa(n) }

func field(e *vigiav1.Event, name string) *structpb.Value { return e.Fields.GetFields()[name] }
