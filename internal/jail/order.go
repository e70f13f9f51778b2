package jail

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// orderVariable names the descriptor on which a confined process finds its order; its report goes to the next one.
const orderVariable = "VIGIA_JAIL"

// order is what the daemon tells the process it has started. It travels on a pipe, once the process is in its cgroup.
type order struct {
	Profile string            `json:"profile"`
	Walled  bool              `json:"walled"`         // it is in the profile's namespaces
	User    *User             `json:"user,omitempty"` // to become, as root
	MaxFile uint64            `json:"max_file,omitempty"`
	Binds   []Bind            `json:"binds,omitempty"`
	Links   map[string]string `json:"links,omitempty"`
	Args    []string          `json:"args,omitempty"` // QEMU's, from argv[0] on
	Env     []string          `json:"env,omitempty"`

	beyond int // the first descriptor that is not one of the files handed over
}

// report is what it answers, once or, when execve fails after the first, twice.
type report struct {
	Measures []Measure `json:"measures,omitempty"`
	Error    string    `json:"error,omitempty"`
	Refused  bool      `json:"refused,omitempty"` // the host refused a namespace's use: less may be tried
}

// refusal marks an error as the host's refusal of a feature, as opposed to a mistake.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

// refused marks err if its errno is one by which kernels and security modules refuse a feature.
func refused(err error) error {
	for _, no := range []error{unix.EPERM, unix.EACCES, unix.ENOSYS, unix.EINVAL, unix.ENOSPC, unix.EUSERS, unix.ENODEV} {
		if errors.Is(err, no) {
			return refusal{err}
		}
	}
	return err
}

// receive reads the order in the child, and takes the descriptors out of reach of what comes after.
func receive() (order, *os.File, error) {
	n, err := strconv.Atoi(os.Getenv(orderVariable))
	if err != nil || n < 3 {
		return order{}, nil, ErrNotOrdered
	}
	os.Unsetenv(orderVariable)
	unix.CloseOnExec(n)
	unix.CloseOnExec(n + 1)
	in, answer := os.NewFile(uintptr(n), "order"), os.NewFile(uintptr(n+1), "report")
	defer in.Close()
	var o order
	if err := json.NewDecoder(io.LimitReader(in, 1<<20)).Decode(&o); err != nil {
		answer.Close()
		return order{}, nil, fmt.Errorf("read the order: %w", err)
	}
	o.beyond = n
	return o, answer, nil
}

func (o order) profile() (Profile, error) {
	p, ok := Profiles[o.Profile]
	if !ok {
		return Profile{}, fmt.Errorf("no profile %q", o.Profile)
	}
	return p, nil
}

// carryOut confines this process, step by step, and says what is in force. An error means it must not go on.
func (o order) carryOut(p Profile, t threads) ([]Measure, error) {
	var measures []Measure
	if o.Walled {
		if err := unix.Sethostname([]byte("vigia")); err != nil {
			return nil, refused(fmt.Errorf("set the host's name: %w", err))
		}
		if err := newRoot(o.Binds, o.Links); err != nil {
			return nil, err
		}
		measures = append(measures, in("empty root", bindDetail(o.Binds)))
	}
	limits := p.Rlimits
	if o.MaxFile > 0 {
		limits = append(limits[:len(limits):len(limits)], Rlimit{"fsize", unix.RLIMIT_FSIZE, o.MaxFile, "no file of the host grows without end"})
	}
	limited, err := setRlimits(limits)
	if err != nil {
		return nil, err
	}
	measures = append(measures, limited)
	identity, err := o.dropPrivileges(t)
	if err != nil {
		return nil, err
	}
	measures = append(measures, identity...)
	detail, err := "", error(nil)
	if !p.Tracer {
		detail, err = t.landlock(o.Binds, p.Network)
	}
	switch {
	case p.Tracer && o.Walled:
		measures = append(measures, out("landlock", errors.New("it forbids tracing, which this process is for; its root is empty")))
	case p.Tracer:
		return nil, errors.New("namespaces can't confine it, and landlock would forbid its work")
	case err == nil:
		measures = append(measures, in("landlock", detail))
	case o.Walled:
		measures = append(measures, out("landlock", err))
	default:
		return nil, fmt.Errorf("neither namespaces nor landlock confine it: %w", err)
	}
	if err := load(p.Syscalls, p.Otherwise, t.all); err != nil {
		return nil, fmt.Errorf("load the system call filter: %w", err)
	}
	return append(measures, in("seccomp", p.filterDetail())), nil
}

// dropPrivileges ends at a user without capabilities and without a way to new ones.
func (o order) dropPrivileges(t threads) ([]Measure, error) {
	if capable(unix.CAP_SETPCAP) {
		if err := t.shrink(); err != nil {
			return nil, err
		}
	}
	var user Measure
	switch {
	case o.User != nil:
		if err := t.become(*o.User); err != nil {
			return nil, err
		}
		user = in("own user", o.User.String())
	case os.Getuid() == 0:
		user = out("own user", errors.New("it is user 0, without capabilities: no user was given, or it may not be taken"))
	default:
		user = out("own user", errors.New("vigia does not run as root: its namespaces part it from the caller's other processes"))
	}
	if err := t.renounce(); err != nil {
		return nil, err
	}
	return []Measure{user, in("no capabilities", "bounding set empty or inherited"), in("no_new_privs", "")}, nil
}

func setRlimits(limits []Rlimit) (Measure, error) {
	var set []string
	for _, l := range limits {
		if err := setRlimit(l); err != nil {
			return Measure{}, fmt.Errorf("limit %s to %d: %w", l.Name, l.Max, err)
		}
		set = append(set, fmt.Sprintf("%s %d", l.Name, l.Max))
	}
	return in("resource limits", strings.Join(set, ", ")), nil
}

// setRlimit lowers a limit; one that is lower already stays.
func setRlimit(l Rlimit) error {
	var now syscall.Rlimit
	if err := syscall.Getrlimit(l.Resource, &now); err != nil {
		return err
	}
	limit := min(l.Max, now.Max)
	return syscall.Setrlimit(l.Resource, &syscall.Rlimit{Cur: limit, Max: limit})
}

func bindDetail(binds []Bind) string {
	if len(binds) == 0 {
		return "nothing in it"
	}
	writable := 0
	for _, b := range binds {
		if b.Write {
			writable++
		}
	}
	return fmt.Sprintf("%d binds, %d writable", len(binds), writable)
}

func (p Profile) filterDetail() string {
	if p.Otherwise == Allow {
		return fmt.Sprintf("%d refusals, and QEMU's own sandbox", len(p.Syscalls))
	}
	allowed := 0
	for _, r := range p.Syscalls {
		if r.Do == Allow {
			allowed++
		}
	}
	return fmt.Sprintf("%d system calls allowed, all others refused", allowed)
}
