package introspect

import (
	"encoding/binary"
	"fmt"

	"vigia/internal/kernel"
)

// Kinds of findings about credentials.
const (
	KindCredRaised  = "credentials.raised"  // became root, or more capable, as no system call lets it
	KindCredShared  = "credentials.shared"  // two processes, one struct cred
	KindCredUser    = "credentials.user"    // the user's id was written over: the account is another's
	KindCredCaps    = "credentials.capable" // effective capabilities that are not permitted
	KindCredForeign = "credentials.foreign" // not made by the kernel's own allocator
)

// credLayout is where the fields lie that only these checks read.
type credLayout struct {
	execID                                  uint64 // of task_struct
	permitted, effective, user, ns, userUID uint64
	size                                    uint64 // of what is read at once
	initCred                                uint64 // link address
	err                                     error
}

func (g *Guest) credLayout() *credLayout {
	if g.creds != nil {
		return g.creds
	}
	r, l := &resolver{p: g.profile}, &credLayout{}
	l.execID = r.field("task_struct", "self_exec_id")
	l.permitted, l.effective = r.field("cred", "cap_permitted"), r.field("cred", "cap_effective")
	l.user, l.ns, l.userUID = r.field("cred", "user"), r.field("cred", "user_ns"), r.field("user_struct", "uid")
	l.initCred = r.symbol("init_cred")
	l.size = max(l.permitted, l.effective, l.user, l.ns) + 8
	l.err = r.err
	if c := &g.layout.cred; l.err == nil && (l.size > 512 || max(c.uid, c.euid, c.suid, c.fsuid)+4 > l.size) {
		l.err = &kernel.MissingError{What: "type", Name: "cred"}
	}
	g.creds = l
	g.profile.Trim()
	return l
}

// identity is who a task is, as its real credentials say. Its effective ones may be another's for the time of a system call:
// a file on an overlay is read as who mounted it, access(2) asks as the real user.
type identity struct {
	at                     uint64 // address of the struct cred
	uid, euid, suid, fsuid uint32
	permitted, effective   uint64
	user, ns               uint64
	exec                   uint64 // how often the task has called exec
	// plain: what it runs is not set-uid, and it has all capabilities there are, which it did not get from a file that gives some.
	plain bool
}

// root reports whether any of its ids is.
func (i *identity) root() bool { return i.uid == 0 || i.euid == 0 || i.suid == 0 || i.fsuid == 0 }

const capSetUID = 1 << 7

// mayBecomeRoot reports whether a system call other than exec could give it the id 0.
func (i *identity) mayBecomeRoot() bool { return i.root() || i.permitted&capSetUID != 0 }

// raisedFrom reports whether a task was another before and can't have become what it is: it has not called exec, or not of a
// set-uid file, and had neither the right to change its id nor the capabilities that it has now. After two calls of exec
// nothing is known: the first may have been of sudo.
func (i *identity) raisedFrom(was *identity) (how string, raised bool) {
	root := i.root() && !was.mayBecomeRoot()
	switch {
	case i.exec == was.exec+1 && root && i.plain:
		return fmt.Sprintf("became root with one call of exec, of a program that is not set-uid: its ids were %d, %d, %d and %d", was.uid, was.euid, was.suid, was.fsuid), true
	case i.exec != was.exec:
		return "", false
	case root:
		return fmt.Sprintf("became root without calling exec: its ids were %d, %d, %d and %d", was.uid, was.euid, was.suid, was.fsuid), true
	case i.ns == was.ns && i.permitted&^was.permitted != 0:
		return fmt.Sprintf("gained capabilities without calling exec: %#x", i.permitted&^was.permitted), true
	}
	return "", false
}

// identityOf reads a task's credentials. The pointer is read again afterwards: a struct that was let go meanwhile may be
// another's by now. exec counts before it changes credentials, so it is read last.
func (g *Guest) identityOf(task uint64) (i identity, err error) {
	l, c := g.credLayout(), &g.layout.cred
	r := reader{s: g.space}
	i.at = r.u64(task + g.layout.task.realCred)
	var buf [512]byte
	b := buf[:l.size]
	r.bytes(i.at, b)
	if r.u64(task+g.layout.task.realCred) != i.at {
		return i, ErrTorn
	}
	i.exec = r.u64(task + l.execID)
	le := binary.LittleEndian
	i.uid, i.euid, i.suid, i.fsuid = le.Uint32(b[c.uid:]), le.Uint32(b[c.euid:]), le.Uint32(b[c.suid:]), le.Uint32(b[c.fsuid:])
	i.permitted, i.effective = le.Uint64(b[l.permitted:]), le.Uint64(b[l.effective:])
	i.user, i.ns = le.Uint64(b[l.user:]), le.Uint64(b[l.ns:])
	return i, r.err
}

const modeSetUID = 0o4000

// plainProgram reports whether what a task runs since its last call of exec is known not to be set-uid. Whose the file is does
// not matter: a mount may map owners.
func (g *Guest) plainProgram(task uint64, id *identity) bool {
	f, err := g.fileLayout()
	if err != nil {
		return false
	}
	r := reader{s: g.space}
	file := r.u64(r.u64(task+g.layout.task.mm) + g.layout.mm.exe)
	mode := r.u16(r.u64(file+f.inode) + f.mode)
	all := r.u64(g.creds.initCred + g.boot.Slide + g.creds.permitted)
	again := r.u64(task + g.creds.execID)
	return r.err == nil && again == id.exec && fileTypes[uint32(mode)>>12] == "file" && mode&modeSetUID == 0 && id.permitted == all
}
