package introspect

import (
	"strings"
	"testing"

	"vigia/internal/kernel"
)

// TestCredentials plays what makes a process root without asking: each is found, by its kind, in the round after.
func TestCredentials(t *testing.T) {
	onGuests(t, func(t *testing.T, mem Physical, p *kernel.Profile) {
		i := enter(t, mem, p)
		l := i.credLayout()
		if l.err != nil {
			t.Fatal(l.err)
		}
		c, off := &i.layout.cred, i.layout.task.realCred
		user, root := i.task("dbus-daemon", 101), i.task("tail", 0)
		cred, rootCred := i.get(user.Task+off), i.get(root.Task+off)
		become := func(to uint64) func() {
			return func() { i.put(user.Task+off, to) }
		}
		ids := func(v uint32) {
			for _, at := range []uint64{c.uid, c.euid, c.suid, c.fsuid} {
				i.put32(cred+at, v)
			}
		}
		// Room for a struct cred in another slab: a task nobody looks at any more.
		foreign := i.task("inmnt", 0).Task + 256
		for _, k := range []struct {
			name  string
			do    func()
			full  bool
			kinds string
		}{
			{"its ids are written over", func() { ids(0) }, false, KindCredRaised + " " + KindCredUser},
			{"its effective id alone", func() { i.put32(cred+c.euid, 0) }, false, KindCredRaised},
			{"another's credentials", become(rootCred), false, KindCredRaised + " " + KindCredShared},
			{"the kernel's first credentials", become(l.initCred + i.boot.Slide), false, KindCredRaised + " " + KindCredShared},
			{"capabilities", func() { i.put(cred+l.permitted, 1<<21); i.put(cred+l.effective, 1<<21) }, false, KindCredRaised},
			{"capabilities that it is not permitted", func() { i.put(cred+l.effective, 1<<21) }, false, KindCredCaps},
			{"another user, not root", func() { ids(33) }, false, KindCredUser},
			{"made by hand", func() {
				b := make([]byte, l.size)
				_ = i.space.Read(cred, b)
				i.write(foreign, b)
				become(foreign)()
			}, true, KindCredForeign},
			// What is right.
			{"calls of exec between", func() { i.put(user.Task+l.execID, 99); i.put32(cred+c.euid, 0) }, false, ""},
			{"one call of exec between, of a plain program", func() {
				become(rootCred)()
				i.put(user.Task+l.execID, i.get(user.Task+l.execID)+1)
			}, false, KindCredRaised + " " + KindCredShared},
			{"it reads a file on an overlay", func() {
				at, err := i.profile.Offset("task_struct", "cred")
				if err != nil {
					t.Fatal(err)
				}
				i.put(user.Task+at, rootCred)
			}, false, ""},
			{"root gives it up", func() { i.put32(rootCred+c.euid, 1000); i.put32(rootCred+c.fsuid, 1000) }, false, ""},
		} {
			checker := quick(i.Guest)
			for range 2 {
				if found := round(t, checker, k.full); len(found) > 0 {
					t.Fatalf("before: %+v", found)
				}
			}
			undo := i.change(k.do)
			for n := range 2 { // it stays
				var kinds []string
				for _, f := range round(t, checker, k.full) {
					if f.Process == nil || f.Process.Task != user.Task && f.Process.Task != root.Task {
						t.Errorf("%s: %+v", k.name, f)
					}
					if len(kinds) == 0 || kinds[len(kinds)-1] != f.Kind {
						kinds = append(kinds, f.Kind)
					}
				}
				if got := strings.Join(kinds, " "); got != k.kinds {
					t.Errorf("%s, round %d: found %q, want %q", k.name, n, got, k.kinds)
				}
			}
			undo()
			if found := round(t, checker, k.full); len(found) > 0 {
				t.Errorf("%s, undone: %+v", k.name, found)
			}
		}
	})
}

func TestRaised(t *testing.T) {
	user := identity{uid: 1000, euid: 1000, suid: 1000, fsuid: 1000, exec: 3, ns: 1}
	was := func(change func(i *identity)) identity { i := user; change(&i); return i }
	for name, c := range map[string]struct {
		was, is identity
		raised  bool
	}{
		"nothing":              {user, user, false},
		"root":                 {user, was(func(i *identity) { i.uid, i.euid = 0, 0 }), true},
		"with exec":            {user, was(func(i *identity) { i.uid, i.euid, i.exec = 0, 0, 4 }), false},
		"a set-uid program":    {was(func(i *identity) { i.suid = 0 }), was(func(i *identity) { i.suid, i.euid = 0, 0 }), false},
		"allowed to":           {was(func(i *identity) { i.permitted = capSetUID }), was(func(i *identity) { i.uid = 0 }), false},
		"another user":         {user, was(func(i *identity) { i.uid = 33 }), false},
		"capabilities":         {user, was(func(i *identity) { i.permitted = 1 }), true},
		"capabilities dropped": {was(func(i *identity) { i.permitted = 3 }), was(func(i *identity) { i.permitted = 1 }), false},
		"a set-uid file":       {user, was(func(i *identity) { i.euid, i.exec = 0, 4 }), false},
		"a plain file":         {user, was(func(i *identity) { i.euid, i.exec, i.plain = 0, 4, true }), true},
		"two files":            {user, was(func(i *identity) { i.euid, i.exec, i.plain = 0, 5, true }), false},
		"a user namespace":     {user, was(func(i *identity) { i.permitted, i.ns = 1<<41-1, 2 }), false},
	} {
		if how, raised := c.is.raisedFrom(&c.was); raised != c.raised || raised != (how != "") {
			t.Errorf("%s: %v %q", name, raised, how)
		}
	}
}

// TestExecBetween looks at a process after it has counted its call of exec and before its credentials changed.
func TestExecBetween(t *testing.T) {
	user := identity{at: 1, uid: 1000, euid: 1000, suid: 1000, fsuid: 1000, exec: 3}
	during, after := user, user
	during.exec = 4
	after.exec, after.at, after.euid, after.suid, after.fsuid = 4, 2, 0, 0, 0
	h := credHistory{}.next(user).next(user).next(during).next(after)
	if h.how != "" {
		t.Error("a set-uid program: ", h.how)
	}
	raised := user
	raised.euid = 0
	if h = (credHistory{}).next(user).next(user).next(raised); h.how == "" {
		t.Error("not found")
	}
	if h = h.next(user); h.how != "" {
		t.Error("it gave back what it was not given: ", h.how)
	}
}
