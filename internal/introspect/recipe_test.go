package introspect

import (
	"bytes"
	"encoding/binary"
	"testing"

	"vigia/internal/kernel"
	"vigia/internal/memory"
)

// cook follows a recipe as probe.c does, and returns the copy's bytes.
func (g *Guest) cook(steps []memory.Step, s *Sight, task uint64, opening bool) []byte {
	var out []byte
	reg := [memory.StepRegisters]uint64{task}
	take := func(va uint64, n int) []byte {
		b := make([]byte, (n+7)&^7)
		space := g.space
		if va>>63 == 0 {
			space = g.user
		}
		if space.Read(va, b[:n]) != nil {
			return nil
		}
		var head [16]byte
		binary.LittleEndian.PutUint64(head[:], va)
		binary.LittleEndian.PutUint32(head[8:], uint32(n))
		out = append(append(out, head[:]...), b...)
		return b[:n]
	}
	word := func(va uint64) uint64 {
		if b := take(va, 8); b != nil {
			return binary.LittleEndian.Uint64(b)
		}
		return 0
	}
	for _, st := range steps {
		base := reg[st.Base]
		if base == 0 || st.When == memory.WhenOpening && !opening {
			continue
		}
		switch st.Op {
		case memory.StepCopy:
			take(base+uint64(st.At), int(st.Len))
		case memory.StepLoad:
			reg[st.Dst] = word(base + uint64(st.At))
		case memory.StepText:
			n := min(reg[st.Dst]-base, uint64(st.Len))
			if text := take(base, int(n)); text != nil && n > 0 && text[n-1] != 0 {
				take(base+n, int(min(reg[st.At]-base-n, uint64(st.Len)-n)))
			}
		case memory.StepClimb:
			mnt, dentry := base, reg[st.Dst]
			for range 48 {
				if dentry == word(mnt+s.Root) {
					mount := mnt - s.Mount
					above := word(mount + s.Above)
					if above == mount || above == 0 {
						break
					}
					dentry, mnt = word(mount+s.Point), above+s.Mount
					continue
				}
				parent := word(dentry + s.Parent)
				name, n := word(dentry+s.Name), take(dentry+s.NameLen, 4)
				if n == nil || parent == 0 {
					break
				}
				take(name, int(min(binary.LittleEndian.Uint32(n), 255)))
				if parent == dentry {
					break
				}
				dentry = parent
			}
		}
	}
	return out
}

// TestCopied: what is read from a copy of a moment is what was to be seen at that moment, and nothing else is read.
func TestCopied(t *testing.T) {
	onRecordings(t, func(t *testing.T, r *recorded, p *kernel.Profile) {
		g := attach(t, r, p)
		l := strayLayout(g, p)
		if l == nil {
			t.Fatal("the recording lacks a field")
		}
		g.moments = l
		steps, err := g.Recipe()
		if err != nil {
			t.Fatal(err)
		}
		if len(steps) > memory.MaxSteps {
			t.Fatalf("%d steps", len(steps))
		}
		m := &g.layout.mount
		s := &Sight{Parent: g.layout.dentry.parent, Name: g.layout.dentry.name, NameLen: g.layout.dentry.nameLen, Mount: m.mnt, Above: m.parent, Point: m.mountpoint, Root: m.root}
		for _, proc := range processes(t, g) {
			want := Moment{Process: Process{Task: proc.Task}}
			var b []byte
			if err := g.view(func() error {
				err := g.moment(l, &want) // the process's own tables are those of g.user then
				b = g.cook(steps, s, proc.Task, false)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			if len(b) > memory.MaxCopy {
				t.Errorf("pid %d: %d bytes", want.PID, len(b))
			}
			c, err := memory.ParseCopied(b)
			if err != nil {
				t.Fatal(err)
			}
			mem := g.mem
			g.mem, g.meter.mem = nil, nil // whoever reads it panics
			got, err := g.CopiedMoment(proc.Task, c)
			g.mem, g.meter.mem = mem, mem
			if err != nil || got.PID != want.PID || got.PPID != want.PPID || got.UID != want.UID || got.EUID != want.EUID || got.Comm != want.Comm || got.Exe != want.Exe ||
				got.Cmdline != want.Cmdline || got.Kernel != want.Kernel || got.Thread != want.Thread || got.Last != want.Last || got.Exit != want.Exit || got.StartTime != want.StartTime || got.Call != want.Call {
				t.Errorf("%+v, %v, want %+v", got, err, want)
			}
		}
		if _, err := g.CopiedMoment(g.initTask(), &memory.Copied{}); err == nil {
			t.Error("an empty copy tells something")
		}
	})
}

// FuzzCopied reads moments from copies that somebody made up.
func FuzzCopied(f *testing.F) {
	r, p := load(f, recordings[0])
	g, err := Attach(r, p)
	if err != nil {
		f.Fatal(err)
	}
	l := strayLayout(g, p)
	g.moments = l
	steps, err := g.Recipe()
	if err != nil {
		f.Fatal(err)
	}
	list, err := g.Processes()
	if err != nil {
		f.Fatal(err)
	}
	for _, proc := range list[:min(len(list), 3)] {
		f.Add(proc.Task, g.cook(steps, &Sight{Parent: g.layout.dentry.parent, Name: g.layout.dentry.name, NameLen: g.layout.dentry.nameLen}, proc.Task, true))
	}
	f.Fuzz(func(t *testing.T, task uint64, b []byte) {
		c, err := memory.ParseCopied(bytes.Clone(b))
		if err != nil {
			return
		}
		_, _ = g.CopiedMoment(task, c)
		_, _ = g.CopiedOpening(task, c)
	})
}
