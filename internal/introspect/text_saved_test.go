package introspect

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/kernel"
	"vigia/internal/kernel/patch"
)

// fileTree gives modules from a directory that has lib/modules.
type fileTree map[string]string

func (f fileTree) Module(name string) ([]byte, error) {
	file, ok := f[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	if strings.HasSuffix(file, ".xz") {
		return exec.Command("xz", "-dc", file).Output()
	}
	return os.ReadFile(file)
}

var savedReferences = map[string]*kernel.Reference{}

// savedCode returns a saved guest with the reference of its kernel and its modules' files.
func savedCode(t testing.TB, g *Guest, name string) (*kernel.Reference, fileTree) {
	about, err := os.Open(filepath.Join(os.Getenv("VIGIA_TEST_SAVED"), name+".txt"))
	if err != nil {
		t.Skip(err)
	}
	defer about.Close()
	words := map[string]string{}
	for lines := bufio.NewScanner(about); lines.Scan(); {
		if f := strings.Fields(lines.Text()); len(f) == 2 {
			words[f[0]] = f[1]
		}
	}
	image := words["kernel"]
	if savedReferences[image] == nil {
		f, err := os.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		st, _ := f.Stat()
		if savedReferences[image], err = kernel.BuildReference(f, st.Size(), g.profile); err != nil {
			t.Fatal(err)
		}
	}
	files := fileTree{}
	err = filepath.WalkDir(filepath.Join(words["modules"], "lib/modules"), func(p string, _ fs.DirEntry, err error) error {
		if name := kernel.ModuleName(p); name != "" {
			files[name] = p
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return savedReferences[image], files
}

// TestSavedText: a healthy guest's code is explained to the last byte; and when one byte is changed at places of every sort
// that the kernel writes over, or anywhere, each of them is found.
func TestSavedText(t *testing.T) {
	saved(t, func(t *testing.T, g *Guest) {
		ref, files := savedCode(t, g, filepath.Base(t.Name()))
		began := cpu()
		list, stats, err := g.CheckText(ref, files)
		if err != nil {
			t.Fatal(err)
		}
		before := cpu()
		again, _, err := g.CheckText(ref, nil)
		t.Logf("%+v; %v of CPU; the kernel again: %v", stats, before-began, cpu()-before)
		if err != nil || len(again) > 0 {
			t.Errorf("the second time: %v, %v", again, err)
		}
		for _, f := range list {
			t.Errorf("%s: %s: %s: %x", f.Kind, f.Subject, f.Detail, f.Evidence)
		}
		found, _, err := g.CheckExecutable()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			t.Errorf("%s: %s: %s: %x", f.Kind, f.Subject, f.Detail, f.Evidence)
		}
		mem := &edited{base: g.mem, lines: map[uint64]*[lineSize]byte{}}
		bad, err := Attach(mem, g.profile)
		if err != nil {
			t.Fatal(err)
		}
		tamperedSites(t, bad, mem, ref)
		tamperedAnywhere(t, bad, mem, ref, files)
		tamperedTables(t, bad, mem)
	})
}

// liveModules are those that are compared: none that is being loaded.
func liveModules(t *testing.T, g *Guest) (list []*loadedModule) {
	t.Helper()
	c := &textCheck{Guest: g}
	err := g.view(func() (err error) {
		if c.code, err = g.codeMap(); err == nil {
			list, err = c.loaded()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// entry returns where the last entry of the page tables for an address lies, and what it is.
func entry(t *testing.T, g *Guest, va uint64) (pa, e uint64) {
	t.Helper()
	table := g.space.Root()
	for level := g.boot.Levels; level > 0; level-- {
		pa = table + va>>(12+entryBits*(level-1))&511*8
		var b [8]byte
		if err := g.mem.ReadPhys(pa, b[:]); err != nil {
			t.Fatal(err)
		}
		if e = binary.LittleEndian.Uint64(b[:]); e&pteLeaf != 0 {
			break
		}
		table = e & pteFrame
	}
	return pa, e
}

// tamperedTables lets the kernel write to a module's code, and execute its data.
func tamperedTables(t *testing.T, g *Guest, mem *edited) {
	m := liveModules(t, g)[0]
	for kind, change := range map[string]func() (pa, e uint64){
		KindCodeWritable: func() (uint64, uint64) { pa, e := entry(t, g, m.start); return pa, e | pteW },
		KindCodeUnowned:  func() (uint64, uint64) { pa, e := entry(t, g, m.module); return pa, e &^ pteNoExec },
	} {
		clear(mem.lines)
		pa, e := change()
		mem.write(pa, binary.LittleEndian.AppendUint64(nil, e))
		found, _, err := g.CheckExecutable()
		if err != nil || !slices.ContainsFunc(found, func(f Finding) bool { return f.Kind == kind }) {
			t.Errorf("%s is not found: %+v, %v", kind, found, err)
		}
	}
}

// cpu is the time that this process has used of the CPU: what a busy machine does not blur.
func cpu() time.Duration {
	var r unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// flip changes one byte at a kernel address.
func flip(t *testing.T, g *Guest, mem *edited, va uint64, r *rand.Rand) {
	t.Helper()
	pa, err := g.space.Translate(va)
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if err := mem.ReadPhys(pa, b[:]); err != nil {
		t.Fatal(err)
	}
	mem.write(pa, []byte{b[0] ^ byte(1+r.IntN(255))})
}

// tampered runs the comparison alone and returns how many bytes it finds changed.
func tampered(t *testing.T, g *Guest, ref *kernel.Reference, files ModuleFiles) *textCheck {
	t.Helper()
	c := &textCheck{Guest: g, ref: ref}
	err := errors.Join(g.view(c.prepare), c.segments())
	if files != nil {
		err = errors.Join(err, c.modules(files))
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func tamperedSites(t *testing.T, g *Guest, mem *edited, ref *kernel.Reference) {
	const each = 64
	r := rand.New(rand.NewPCG(1, 2))
	o := patch.Kernel{Ref: ref, Slide: g.Boot().Slide}
	text := ref.Text()
	for kind, name := range siteNames {
		var all []kernel.Site
		for i := range o.NumSites() {
			s := o.Site(i)
			if link := s.Addr - o.Slide; s.Kind == kind && link >= text.Addr && link < text.End() {
				all = append(all, s)
			}
		}
		if len(all) == 0 {
			continue
		}
		clear(mem.lines)
		flipped := map[uint64]bool{}
		for range each {
			s := all[r.IntN(len(all))]
			va := s.Addr + uint64(r.IntN(s.Len))
			if !flipped[va] {
				flip(t, g, mem, va, r)
				flipped[va] = true
			}
		}
		c := tampered(t, g, ref, nil)
		if c.stats.Changed < len(flipped) {
			t.Errorf("%s: %d of %d changes were found", name, c.stats.Changed, len(flipped))
		}
	}
}

const maxBannerBytes = 512

func tamperedAnywhere(t *testing.T, g *Guest, mem *edited, ref *kernel.Reference, files ModuleFiles) {
	const flips = 4000
	r := rand.New(rand.NewPCG(3, 4))
	clear(mem.lines)
	// What was found as it must be is not explained again: it is what is changed now.
	if c := tampered(t, g, ref, files); c.stats.Changed > 0 || len(g.textSound.modules) == 0 {
		t.Errorf("%d changes, %d modules known", c.stats.Changed, len(g.textSound.modules))
	}
	flipped := map[uint64]bool{}
	from, to := ref.AfterInit()
	banner := g.link.banner // by which a kernel is found: without it there is none
	for _, s := range []kernel.Segment{ref.Text(), ref.Rodata()} {
		for range flips {
			link := s.Addr + uint64(r.IntN(len(s.Data)))
			if va := link + g.Boot().Slide; !flipped[va] && (link < from || link >= to) && (link < banner || link >= banner+maxBannerBytes) {
				flip(t, g, mem, va, r)
				flipped[va] = true
			}
		}
	}
	for _, m := range liveModules(t, g) {
		for i := range uint64(4) {
			flip(t, g, mem, m.start+i*700, r)
			flipped[m.start+i*700] = true
		}
	}
	if c := tampered(t, g, ref, files); c.stats.Changed < len(flipped) {
		t.Errorf("anywhere: %d of %d changes were found", c.stats.Changed, len(flipped))
	}
}
