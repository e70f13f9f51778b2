package jail

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

// Worker is a process of the workers' program to be started under a profile.
type Worker struct {
	Profile Profile
	Args    []string   // the sub-command and its arguments: os.Args[1:] of the worker
	Env     []string   // nothing of the daemon's environment is inherited
	Files   []*os.File // its descriptors 3, 4, …
	Stdin   *os.File   // nil is /dev/null, here and below
	Stdout  *os.File
	Stderr  *os.File
	User    *User  // its own, as root
	Group   *Group // nil: no cgroup limits
	Tag     string // how Leftovers finds it after a crash of the daemon: "state/machine/guard"

	// MaxFile bounds every file it writes, its log too; 0 is no bound. Beyond it the worker dies of SIGXFSZ.
	MaxFile uint64
}

// Start starts the worker and returns when it has confined itself by Confine, or has failed to. It survives its parent.
func (w Worker) Start(ctx context.Context) (*Process, error) {
	s := spawn{
		profile: w.Profile,
		argv:    append([]string{"vigia"}, w.Args...),
		env:     append([]string{"GODEBUG=containermaxprocs=0", tagVariable + "=" + w.Tag}, w.Env...),
		files:   w.Files,
		stdio:   [3]*os.File{w.Stdin, w.Stdout, w.Stderr},
		group:   w.Group,
		order:   order{User: w.User, MaxFile: w.MaxFile},
	}
	return s.start(ctx)
}

// Confine puts this process under the profile and returns what is in force. A worker calls it first thing in its main,
// before it reads a byte that a guest had a hand in; on an error it must end. Descriptors 3, 4, … are as Worker.Files
// gave them.
func Confine(p Profile) ([]Measure, error) {
	o, answer, err := receive()
	if err != nil {
		return nil, err
	}
	defer answer.Close()
	measures, err := o.confine(p)
	if err := tell(answer, report{Measures: measures}, err); err != nil {
		return nil, err
	}
	return measures, nil
}

func (o order) confine(p Profile) ([]Measure, error) {
	if o.Profile != p.Name {
		return nil, fmt.Errorf("ordered to be confined as %q, not as %q", o.Profile, p.Name)
	}
	t := threads{all: true}
	if err := t.usable(); err != nil {
		return nil, err
	}
	return o.carryOut(p, t)
}

// tell writes a report and returns err, or what the writing met.
func tell(answer *os.File, rep report, err error) error {
	if err != nil {
		var r refusal
		rep = report{Error: err.Error(), Refused: errors.As(err, &r)}
	}
	if werr := json.NewEncoder(answer).Encode(rep); err == nil {
		err = werr
	}
	return err
}
