package image

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// rootTar gives random access to the tar of a freshly built root: what mmdebstrap wrote on this host.
type rootTar struct {
	f     *os.File
	files map[string]span   // regular files by absolute path
	links map[string]string // symbolic links by absolute path
}

type span struct{ offset, size int64 }

// maxFromRoot bounds what is read of one file into memory: a module, busybox, a list.
const maxFromRoot = 64 << 20

func openRootTar(name string) (*rootTar, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	t := &rootTar{f: f, files: map[string]span{}, links: map[string]string{}}
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return t, nil
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		at := path.Clean("/" + h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			// The reader takes blocks from the file as they come: after a header the file stands at the content.
			offset, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				f.Close()
				return nil, err
			}
			t.files[at] = span{offset, h.Size}
		case tar.TypeLink:
			t.files[at] = t.files[path.Clean("/"+h.Linkname)]
		case tar.TypeSymlink:
			t.links[at] = h.Linkname
		}
	}
}

func (t *rootTar) Close() error { return t.f.Close() }

// section opens one file of the root.
func (t *rootTar) section(name string) (*io.SectionReader, error) {
	s, ok := t.files[name]
	if !ok {
		return nil, fmt.Errorf("%s: not in the root that was built", name)
	}
	return io.NewSectionReader(t.f, s.offset, s.size), nil
}

func (t *rootTar) read(name string) ([]byte, error) {
	s, err := t.section(name)
	if err != nil {
		return nil, err
	}
	if s.Size() > maxFromRoot {
		return nil, fmt.Errorf("%s: %d bytes, want at most %d", name, s.Size(), maxFromRoot)
	}
	return io.ReadAll(s)
}

var errNoKernel = errors.New("the root has no kernel")

// kernelVersion finds the newest kernel of the root.
func (t *rootTar) kernelVersion() (string, error) {
	newest := ""
	for name := range t.files {
		if v, ok := strings.CutPrefix(name, "/boot/vmlinuz-"); ok && (newest == "" || compareVersions(v, newest) > 0) {
			newest = v
		}
	}
	if newest == "" {
		return "", errNoKernel
	}
	return newest, nil
}

// compareVersions orders kernel versions: runs of digits by number, the rest by text.
func compareVersions(a, b string) int {
	for a != "" && b != "" {
		x, restA := versionPart(a)
		y, restB := versionPart(b)
		if c := compareParts(x, y); c != 0 {
			return c
		}
		a, b = restA, restB
	}
	return len(a) - len(b)
}

func versionPart(s string) (part, rest string) {
	digit := func(c byte) bool { return c >= '0' && c <= '9' }
	i := 1
	for i < len(s) && digit(s[i]) == digit(s[0]) {
		i++
	}
	return s[:i], s[i:]
}

func compareParts(x, y string) int {
	digits := x[0] >= '0' && x[0] <= '9' && y[0] >= '0' && y[0] <= '9'
	if digits {
		x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
		if len(x) != len(y) {
			return len(x) - len(y)
		}
	}
	return strings.Compare(x, y)
}
