package jail

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// QEMU is one emulator process to be started. Its paths are the host's own: a bind shows at the same place in the jail,
// unless Bind.Target says otherwise, which rules out the fallback to landlock alone.
type QEMU struct {
	Binary string     // an absolute path
	Args   []string   // after argv[0]; SandboxArgs belong in it
	Files  []*os.File // its descriptors 3, 4, …
	Stdin  *os.File   // nil is /dev/null, here and below
	Stdout *os.File
	Stderr *os.File
	Binds  []Bind // beside QEMU's own program, libraries and firmware: RAM file (Write), kernel, directory of sockets (connecting needs no Write)
	KVM    bool   // show /dev/kvm
	User   *User  // the machine's own, as root; must be able to open what Binds names
	Group  *Group // nil: no cgroup limits
	Tag    string // how Leftovers finds it after a crash of the daemon: "state/machine/qemu"

	// MaxFile bounds every file it writes, its log too; 0 is no bound. Beyond it the kernel ends it (SIGXFSZ).
	MaxFile uint64
}

// StageCommand is the sub-command that main hands to Stage.
const StageCommand = "jail-exec"

// Start confines and executes QEMU. On return QEMU has been executed. It survives its parent.
func (q QEMU) Start(ctx context.Context) (*Process, error) {
	program, err := Program(q.Binary)
	if err != nil {
		return nil, fmt.Errorf("qemu: %w: %w", ErrNotStarted, err)
	}
	user, err := q.user()
	if err != nil {
		return nil, fmt.Errorf("qemu: %w: %w", ErrNotStarted, err)
	}
	binds := append(append([]Bind(nil), program.Binds...), q.Binds...)
	binds = append(binds, devices(q.KVM)...)
	s := spawn{
		profile: Emulator,
		argv:    []string{"vigia", StageCommand},
		env:     []string{"GODEBUG=containermaxprocs=0", "GOMAXPROCS=1", tagVariable + "=" + q.Tag},
		files:   q.Files,
		stdio:   [3]*os.File{q.Stdin, q.Stdout, q.Stderr},
		group:   q.Group,
		order: order{
			MaxFile: q.MaxFile, User: user, Binds: binds, Links: program.Links,
			Args: append([]string{program.Path}, q.Args...),
			Env:  []string{"LC_ALL=C", "TZ=UTC", tagVariable + "=" + q.Tag},
		},
	}
	for _, b := range binds {
		s.needRoot = s.needRoot || b.target() != b.Source
	}
	return s.start(ctx)
}

// Probe confines a throwaway process as QEMU would be, with every limit that a tree, if given, lets it set, and returns
// what came in force on this host.
func Probe(ctx context.Context, user *User, tree *Tree) ([]Measure, error) {
	s := spawn{
		profile: Emulator,
		argv:    []string{"vigia", StageCommand},
		env:     []string{"GODEBUG=containermaxprocs=0", "GOMAXPROCS=1"},
		order:   order{User: user, Binds: devices(false)},
	}
	if tree != nil {
		var err error
		if s.group, err = tree.New("probe", Limits{Memory: 256 << 20, CPUs: 1, PIDs: 64}); err != nil {
			return nil, err
		}
		defer tree.Remove()
		defer s.group.Remove()
	}
	p, err := s.start(ctx)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	if exit := p.Exit(); exit.Code != 0 || exit.Signal != 0 {
		return nil, fmt.Errorf("the trial process: %s", exit)
	}
	return p.Measures, nil
}

// user is the machine's own, with the group that may open /dev/kvm if it takes one to do so.
func (q QEMU) user() (*User, error) {
	if q.User == nil || !q.KVM {
		return q.User, nil
	}
	var st unix.Stat_t
	if err := unix.Stat("/dev/kvm", &st); err != nil {
		return nil, fmt.Errorf("/dev/kvm: %w", err)
	}
	const others, group = 0o006, 0o060
	u := *q.User
	switch {
	case st.Mode&others == others:
	case st.Mode&group == group && st.Gid != 0:
		u.Device = int(st.Gid)
	default:
		return nil, fmt.Errorf("/dev/kvm is root's alone (mode %#o), so a machine's own user can't open it: chgrp kvm /dev/kvm && chmod 660 /dev/kvm", st.Mode&0o777)
	}
	return &u, nil
}

// devices are the nodes of /dev in QEMU's root.
func devices(kvm bool) []Bind {
	d := []Bind{
		{Source: "/dev/null", Device: true, Reason: "closed standard input"},
		{Source: "/dev/urandom", Device: true, Reason: "the guest's random numbers"},
	}
	if kvm {
		d = append(d, Bind{Source: "/dev/kvm", Device: true, Reason: "hardware virtualisation"})
	}
	return d
}

// Stage is the main of "vigia jail-exec": it confines itself as ordered and becomes QEMU. It returns an error when that
// failed, which the daemon has then been told, and nil when the order was only to try.
func Stage() error {
	runtime.LockOSThread() // what is dropped below belongs to this thread, and it is the one that executes QEMU
	o, answer, err := receive()
	if err != nil {
		return err
	}
	defer answer.Close()
	if err := o.become(answer); err != nil {
		return tell(answer, report{}, err)
	}
	return nil
}

func (o order) become(answer *os.File) error {
	p, err := o.profile()
	if err != nil {
		return err
	}
	measures, err := o.carryOut(p, threads{})
	if err != nil {
		return err
	}
	if err := tell(answer, report{Measures: measures}, nil); err != nil || len(o.Args) == 0 {
		return err
	}
	if err := closeBeyond(o.beyond); err != nil {
		return fmt.Errorf("close descriptors: %w", err)
	}
	return fmt.Errorf("execute %s: %w", o.Args[0], syscall.Exec(o.Args[0], o.Args, o.Env))
}

// closeBeyond marks every descriptor from first on to be closed by execve.
func closeBeyond(first int) error {
	return unix.CloseRange(uint(first), ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
}
