package jail

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// startTimeout bounds how long a process may take to confine itself.
const startTimeout = 20 * time.Second

// program is the descriptor of what confined processes are started from; 0: of this program itself.
var program atomic.Int32

// beyondChildren is a descriptor's number that no child is given one at: those it is given are put there before it is executed.
const beyondChildren = 200

// StartFrom makes a file the program that confined processes are started from. It takes the file over, for good.
func StartFrom(f *os.File) error {
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, beyondChildren)
	if err == nil {
		program.Store(int32(fd))
	}
	return err
}

func startedFrom() string {
	if fd := program.Load(); fd != 0 {
		return "/proc/self/fd/" + strconv.Itoa(int(fd))
	}
	return "/proc/self/exe"
}

// spawn starts the workers' program with a profile.
type spawn struct {
	profile  Profile
	argv     []string // of the child
	env      []string
	files    []*os.File // its descriptors 3, 4, …
	stdio    [3]*os.File
	order    order
	group    *Group
	needRoot bool // the binds' targets differ from their sources: only a root of its own can show them
}

// plan is one way to put up the walls of namespaces.
type plan struct {
	name   string
	flags  uintptr
	walled bool
	user   bool // a user namespace of its own
}

// plans are the ways in the order of preference.
func (s *spawn) plans() []plan {
	var flags uintptr
	for _, ns := range s.profile.Namespaces {
		flags |= ns.Flag
	}
	first := plan{name: "namespaces", flags: flags, walled: true}
	if !capable(unix.CAP_SYS_ADMIN) {
		first = plan{name: "user namespace", flags: flags | unix.CLONE_NEWUSER, walled: true, user: true}
	}
	if s.needRoot {
		return []plan{first}
	}
	return []plan{first, {name: "no namespaces"}}
}

// start tries the plans. What the first ones failed of is part of the process's measures.
func (s *spawn) start(ctx context.Context) (*Process, error) {
	if err := s.checkBinds(); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", s.profile.Name, ErrNotStarted, err)
	}
	var missed error
	for _, p := range s.plans() {
		proc, measures, err := s.try(ctx, p)
		if err == nil {
			proc.Measures = append(s.walls(p, missed), measures...)
			return proc, nil
		}
		missed = err
		var r refusal
		if !errors.As(err, &r) {
			break
		}
	}
	return nil, fmt.Errorf("%s: %w: %w", s.profile.Name, ErrNotStarted, missed)
}

func (s *spawn) checkBinds() error {
	for _, b := range s.order.Binds {
		if err := b.check(); err != nil {
			return err
		}
		if _, err := os.Stat(b.Source); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
	}
	return nil
}

// walls tells of the namespaces a plan gave.
func (s *spawn) walls(p plan, missed error) []Measure {
	var names []string
	for _, ns := range s.profile.Namespaces {
		names = append(names, ns.Name)
	}
	if p.user {
		names = append(names, "user")
	}
	list := strings.Join(names, " ")
	if p.walled {
		return []Measure{in("namespaces", list)}
	}
	measures := []Measure{out("namespaces", fmt.Errorf("the host refused (%w); paths are kept away by landlock alone", missed)),
		out("empty root", errors.New("needs namespaces"))}
	if s.profile.Name == Emulator.Name {
		measures = append(measures, out("no unix sockets of others", errors.New("needs namespaces: it may connect to what its user may connect to by path")))
	}
	return measures
}

func (s *spawn) try(ctx context.Context, p plan) (*Process, []Measure, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	orderRead, orderWrite, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer orderWrite.Close()
	reportRead, reportWrite, err := os.Pipe()
	if err != nil {
		orderRead.Close()
		return nil, nil, err
	}
	defer reportRead.Close()
	proc, err := s.fork(p, orderRead, reportWrite)
	orderRead.Close()
	reportWrite.Close()
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { proc.Kill() }) // ends the child, hence the reads below
	defer stop()
	measures, err := s.settle(proc, p, orderWrite, reportRead)
	if err != nil {
		proc.Kill()
		exit := proc.Exit()
		proc.Close()
		if ctx.Err() != nil {
			err = fmt.Errorf("it was not confined in time: %w", context.Cause(ctx))
		} else if errors.Is(err, io.EOF) {
			err = fmt.Errorf("it ended before it was confined: %s", exit)
		}
		return nil, nil, err
	}
	return proc, measures, nil
}

// fork clones the child into the plan's namespaces. It does nothing there before it has its order.
func (s *spawn) fork(p plan, orderRead, reportWrite *os.File) (*Process, error) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	files := make([]*os.File, 0, 5+len(s.files))
	for _, f := range s.stdio {
		if f == nil {
			f = null
		}
		files = append(files, f)
	}
	files = append(files, s.files...)
	env := append([]string{orderVariable + "=" + strconv.Itoa(len(files))}, s.env...)
	files = append(files, orderRead, reportWrite)

	pidfd := -1
	sys := &syscall.SysProcAttr{Cloneflags: p.flags, PidFD: &pidfd, Setsid: true}
	if p.user {
		uid, gid := os.Getuid(), os.Getgid()
		sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
		sys.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_SETPCAP} // over the coming execve, for its first steps
	}
	if err := closeBeyond(3); err != nil { // of this process's own, none is to be inherited by accident
		return nil, err
	}
	child, err := os.StartProcess(startedFrom(), s.argv, &os.ProcAttr{Dir: "/", Env: env, Files: files, Sys: sys})
	if err != nil {
		return nil, refused(fmt.Errorf("clone into %s: %w", p.name, err))
	}
	proc, err := watch(child.Pid, pidfd, child)
	if err != nil {
		child.Kill()
		child.Wait()
		return nil, err
	}
	return proc, nil
}

// settle puts the child under its limits, gives it its order, and hears what came of it.
func (s *spawn) settle(proc *Process, p plan, orderWrite, reportRead *os.File) ([]Measure, error) {
	measures := []Measure{s.scoreOOM(proc.PID)}
	if s.group != nil {
		if err := s.group.add(proc.PID); err != nil {
			return nil, err
		}
		measures = append(measures, s.group.Measures...)
	} else {
		measures = append(measures, out("cgroup limits", errors.New("none were asked for")))
	}
	o := s.order
	o.Profile, o.Walled = s.profile.Name, p.walled
	if p.user || !capable(unix.CAP_SETUID) {
		o.User = nil // one user is all a user namespace has; the child says so
	}
	if err := json.NewEncoder(orderWrite).Encode(o); err != nil && !errors.Is(err, syscall.EPIPE) {
		return nil, fmt.Errorf("give the order: %w", err)
	}
	orderWrite.Close()
	said, err := hear(reportRead)
	return append(measures, said...), err
}

// hear reads reports until the child closes its end, which execve does too. io.EOF alone means it died without a word.
func hear(r io.Reader) ([]Measure, error) {
	dec := json.NewDecoder(io.LimitReader(r, 1<<20))
	var measures []Measure
	for n := 0; ; n++ {
		var rep report
		err := dec.Decode(&rep)
		if errors.Is(err, io.EOF) && n > 0 {
			return measures, nil
		}
		if err != nil {
			return nil, err
		}
		measures = append(measures, rep.Measures...)
		if rep.Error != "" {
			if rep.Refused {
				return nil, refusal{errors.New(rep.Error)}
			}
			return nil, errors.New(rep.Error)
		}
	}
}

func (s *spawn) scoreOOM(pid int) Measure {
	score := strconv.Itoa(s.profile.OOM)
	if err := os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(score), 0); err != nil {
		return out("out-of-memory order", err)
	}
	return in("out-of-memory order", "killed before the daemon, score +"+score)
}
