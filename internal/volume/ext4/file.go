package ext4

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"sync"
)

// maxFileSpans bounds the memory that one open file's block map takes (24 MB).
const maxFileSpans = 1 << 20

// File is an open regular file. It is an [io.ReadSeeker] and an [io.ReaderAt]; ReadAt may be called concurrently.
type File struct {
	Info
	v      *view
	spans  []span // by logical block
	inline []byte

	mu  sync.Mutex
	pos int64
}

// Open opens the regular file at a path, following symbolic links.
func (f *FS) Open(name string) (*File, error) {
	i, err := f.resolve(name, true)
	if err == nil && !i.isRegular() {
		err = fmt.Errorf("%w: not a regular file", fs.ErrInvalid)
	}
	var file *File
	if err == nil {
		file, err = f.newFile(f.v, i)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	file.name = path.Base("/" + name)
	return file, nil
}

// ReadFile reads a whole file of at most limit bytes: more are [ErrTooLarge].
func (f *FS) ReadFile(name string, limit int64) ([]byte, error) {
	file, err := f.Open(name)
	if err != nil {
		return nil, err
	}
	if file.Size() > limit {
		return nil, &fs.PathError{Op: "read", Path: name, Err: fmt.Errorf("%d bytes, at most %d: %w", file.Size(), limit, ErrTooLarge)}
	}
	buf := make([]byte, file.Size())
	if n, err := file.ReadAt(buf, 0); n < len(buf) {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return buf, nil
}

func (f *FS) newFile(v *view, i *inode) (*File, error) {
	if i.flags&flagEncrypt != 0 {
		return nil, errors.New("encrypted by the guest")
	}
	file := &File{Info: info("", i), v: v}
	if i.inline() {
		file.inline = i.inlineData()
		return file, nil
	}
	m := mapper{v: v, budget: maxFileSpans, visit: func(s span) error {
		if !s.tree && !s.unwritten {
			file.spans = append(file.spans, s)
		}
		return nil
	}}
	if err := m.inode(i); err != nil {
		return nil, err
	}
	slices.SortFunc(file.spans, func(a, b span) int {
		if a.logical < b.logical {
			return -1
		}
		return 1
	})
	return file, nil
}

// ReadAt reads from any place. Holes and unwritten extents read as zeros.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fs.ErrInvalid
	}
	if off >= f.size {
		return 0, io.EOF
	}
	want := p
	if int64(len(p)) > f.size-off {
		want = p[:f.size-off]
	}
	clear(want)
	if f.inline != nil {
		copy(want, f.inline[min(off, int64(len(f.inline))):])
	} else if err := f.fill(want, off); err != nil {
		return 0, err
	}
	if len(want) < len(p) {
		return len(want), io.EOF
	}
	return len(want), nil
}

func (f *File) fill(p []byte, off int64) error {
	bs := f.v.bs
	first, end := uint64(off/bs), uint64((off+int64(len(p))+bs-1)/bs)
	n, _ := slices.BinarySearchFunc(f.spans, first, func(s span, b uint64) int {
		if s.logical+s.n <= b {
			return -1
		}
		return 1
	})
	for ; n < len(f.spans) && f.spans[n].logical < end; n++ {
		s := f.spans[n]
		from, to := max(s.logical, first), min(s.logical+s.n, end)
		if from >= to {
			continue
		}
		if err := f.fillSpan(p, off, from, to, s.start+from-s.logical); err != nil {
			return err
		}
	}
	return nil
}

// fillSpan copies the file's blocks from..to, which lie at block on the disk, up to 256 KiB a time.
func (f *File) fillSpan(p []byte, off int64, from, to, block uint64) error {
	bs := f.v.bs
	step := uint64(max(1, (256<<10)/bs))
	buf := make([]byte, int64(min(step, to-from))*bs)
	for from < to {
		n := min(step, to-from)
		if err := f.v.run(block, int(n), buf); err != nil {
			return err
		}
		at := int64(from)*bs - off
		if at >= 0 {
			copy(p[at:], buf[:int64(n)*bs])
		} else {
			copy(p, buf[-at:int64(n)*bs])
		}
		from, block = from+n, block+n
	}
	return nil
}

// Read implements [io.Reader].
func (f *File) Read(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.ReadAt(p, f.pos)
	f.pos += int64(n)
	if n > 0 {
		err = nil
	}
	return n, err
}

// Seek implements [io.Seeker].
func (f *File) Seek(offset int64, whence int) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch whence {
	case io.SeekCurrent:
		offset += f.pos
	case io.SeekEnd:
		offset += f.size
	}
	if offset < 0 {
		return 0, fs.ErrInvalid
	}
	f.pos = offset
	return offset, nil
}

// Piece is a part of a file and where it lies on the disk, in bytes.
type Piece struct{ At, Disk, Length int64 }

// Pieces are where the file's content lies, in order; what is in none is zeros. ok is false where the content lies elsewhere: in the inode.
func (f *File) Pieces() (list []Piece, ok bool) {
	if f.inline != nil {
		return nil, false
	}
	bs := f.v.bs
	for _, s := range f.spans {
		list = append(list, Piece{int64(s.logical) * bs, f.v.off + int64(s.start)*bs, int64(s.n) * bs})
	}
	return list, true
}
