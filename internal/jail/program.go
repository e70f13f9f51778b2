package jail

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// ProgramFiles is what an executable needs from the host to run in an empty root.
type ProgramFiles struct {
	Path  string            // the executable, as it shows in the root
	Binds []Bind            // it, its interpreter, its libraries, its data
	Links map[string]string // symbolic links of the host's root that the loader's search goes through: /lib → usr/lib
}

// qemuData is QEMU's data by place of Debian, Ubuntu and upstream; what a host lacks is left out.
var qemuData = []Bind{
	{Source: "/usr/share/qemu", Reason: "firmware, option ROMs, keymaps"},
	{Source: "/usr/share/seabios", Reason: "the BIOS that /usr/share/qemu links to"},
	{Source: "/usr/lib/ipxe/qemu", Reason: "option ROMs of network devices"},
	{Source: "/etc/ld.so.cache", Reason: "where the loader finds libraries"},
}

// qemuModules are the loadable parts of QEMU that a machine of vigia uses.
var qemuModules = []string{"accel-*.so", "hw-display-virtio-*.so"}

// libraryDirs is the loader's search beside what an object names itself.
var libraryDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib"}

// maxLibraries bounds the walk; QEMU has about 50 (Debian) to 150.
const maxLibraries = 500

var programs struct {
	sync.Mutex
	known map[string]knownProgram
}

type knownProgram struct {
	changed time.Time
	files   ProgramFiles
}

// Program finds what an executable needs by reading ELF headers; nothing is executed. The answer is kept until the
// executable changes.
func Program(path string) (ProgramFiles, error) {
	if path == "" {
		return ProgramFiles{}, errors.New("no program named")
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return ProgramFiles{}, err
	}
	st, err := os.Stat(real)
	if err != nil {
		return ProgramFiles{}, err
	}
	programs.Lock()
	defer programs.Unlock()
	if k, ok := programs.known[real]; ok && k.changed.Equal(st.ModTime()) {
		return k.files, nil
	}
	files, err := findProgram(real)
	if err != nil {
		return ProgramFiles{}, fmt.Errorf("%s: %w", path, err)
	}
	if programs.known == nil {
		programs.known = map[string]knownProgram{}
	}
	programs.known[real] = knownProgram{st.ModTime(), files}
	return files, nil
}

func findProgram(real string) (ProgramFiles, error) {
	w := walk{seen: map[string]bool{}}
	if err := w.object(real, real); err != nil {
		return ProgramFiles{}, err
	}
	if strings.HasPrefix(filepath.Base(real), "qemu-system-") {
		for _, m := range modules() {
			if err := w.object(m, m); err != nil {
				continue // a module that lacks a library is one that QEMU can't load either
			}
		}
		for _, d := range qemuData {
			if _, err := os.Stat(d.Source); err == nil {
				w.binds = append(w.binds, d)
			}
		}
	}
	return ProgramFiles{Path: real, Binds: w.binds, Links: rootLinks()}, nil
}

func modules() []string {
	var found []string
	for _, dir := range []string{"/usr/lib/x86_64-linux-gnu/qemu", "/usr/lib64/qemu", "/usr/lib/qemu"} {
		for _, pattern := range qemuModules {
			m, _ := filepath.Glob(filepath.Join(dir, pattern))
			found = append(found, m...)
		}
	}
	return found
}

// rootLinks are the links of a merged /usr.
func rootLinks() map[string]string {
	links := map[string]string{}
	for _, name := range []string{"/lib", "/lib64", "/bin"} {
		if to, err := os.Readlink(name); err == nil && !strings.HasPrefix(to, "..") {
			links[name] = to
		}
	}
	return links
}

// walk follows NEEDED entries.
type walk struct {
	seen  map[string]bool
	binds []Bind
}

// object adds the file at a path, shown at target, and all it needs.
func (w *walk) object(file, target string) error {
	if w.seen[target] {
		return nil
	}
	if len(w.seen) >= maxLibraries {
		return fmt.Errorf("needs more than %d libraries", maxLibraries)
	}
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("%s is not an ELF file: %w", file, err)
	}
	defer f.Close()
	w.seen[target] = true
	w.binds = append(w.binds, Bind{Source: file, Target: plainTarget(file, target), Exec: true})
	if loader := interpreter(f); loader != "" {
		if err := w.library(loader); err != nil {
			return err
		}
	}
	needed, err := f.ImportedLibraries()
	if err != nil && !errors.Is(err, elf.ErrNoSymbols) {
		return err
	}
	dirs := append(runPath(f, file), libraryDirs...)
	for _, name := range needed {
		path, err := findLibrary(name, dirs)
		if err != nil {
			return err
		}
		if err := w.library(path); err != nil {
			return err
		}
	}
	return nil
}

// plainTarget is empty where a file shows at its own place.
func plainTarget(file, target string) string {
	if file == target {
		return ""
	}
	return target
}

// library adds one by the name under which the loader will open it: the directory resolved, the last part as it is.
func (w *walk) library(path string) error {
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return err
	}
	file, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	return w.object(file, filepath.Join(dir, filepath.Base(path)))
}

func interpreter(f *elf.File) string {
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP && p.Filesz < 4096 {
			raw := make([]byte, p.Filesz)
			if _, err := p.ReadAt(raw, 0); err == nil {
				return strings.TrimRight(string(raw), "\x00")
			}
		}
	}
	return ""
}

// runPath is where an object itself says its libraries are.
func runPath(f *elf.File, file string) []string {
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		values, err := f.DynString(tag)
		if err != nil {
			continue
		}
		for _, v := range values {
			v = strings.NewReplacer("$ORIGIN", filepath.Dir(file), "${ORIGIN}", filepath.Dir(file)).Replace(v)
			dirs = append(dirs, strings.Split(v, ":")...)
		}
	}
	return slices.DeleteFunc(dirs, func(d string) bool { return !filepath.IsAbs(d) })
}

func findLibrary(name string, dirs []string) (string, error) {
	if filepath.IsAbs(name) {
		return name, nil
	}
	for _, d := range dirs {
		p := filepath.Join(d, name)
		if f, err := elf.Open(p); err == nil {
			ok := f.Class == elf.ELFCLASS64 && f.Machine == elf.EM_X86_64
			f.Close()
			if ok {
				return p, nil
			}
		}
	}
	return "", fmt.Errorf("needs %s, which is in none of %s", name, strings.Join(dirs, " "))
}
