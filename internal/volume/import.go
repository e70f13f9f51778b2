package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"
)

const copySize = 1 << 20

// ImportRaw writes a raw disk into the empty file dst as a frozen layer without a parent, and returns its id, the hash
// of its content. Blocks of zeros are not stored; where src is a sparse file its holes are not even read. progress may
// be nil. Until the last step the file has no header, so an import that was cut short is never taken for a layer.
func ImportRaw(dst *os.File, src io.ReaderAt, size int64, progress func(done, total int64)) (ID, error) {
	id, err := importRaw(hostFile(dst), src, size, progress)
	if err != nil {
		return ID{}, fmt.Errorf("import disk: %w", err)
	}
	return id, nil
}

func importRaw(dst file, src io.ReaderAt, size int64, progress func(done, total int64)) (ID, error) {
	disk := (size + sector - 1) / sector * sector
	if err := checkSize(disk); err != nil {
		return ID{}, err
	}
	if n, err := dst.Size(); err != nil || n != 0 {
		return ID{}, errors.Join(errors.New("the layer's file must be empty"), err)
	}
	h := header{generation: 1, size: disk, state: layerFrozen, flags: flagContentID, geo: geometryOf(disk)}
	if err := dst.Truncate(h.geo.fileSize(disk)); err != nil {
		return ID{}, err
	}
	im := importer{dst: dst, src: src, size: size, h: h, m: newBlockMap(disk), sum: newContentHash(disk, ID{})}
	if progress != nil {
		im.progress = progress
	} else {
		im.progress = func(int64, int64) {}
	}
	if err := im.copy(); err != nil {
		return ID{}, err
	}
	im.h.id = im.sum.id()
	return im.h.id, sealNew(im.dst, im.h, im.m)
}

type importer struct {
	dst      file
	src      io.ReaderAt
	size     int64
	h        header
	m        *blockMap
	sum      contentHash
	progress func(done, total int64)
}

func (im *importer) copy() error {
	buf := make([]byte, copySize)
	for off := int64(0); off < im.size; {
		off = nextData(im.src, off, im.size) / BlockSize * BlockSize
		n := min(copySize, im.size-off)
		if n <= 0 {
			break
		}
		p := buf[:(n+BlockSize-1)/BlockSize*BlockSize]
		clear(p[n:])
		if k, err := im.src.ReadAt(p[:n], off); int64(k) < n {
			return fmt.Errorf("the disk is %d bytes long, not %d: %w", off+int64(k), im.size, err)
		}
		if err := im.store(p, off); err != nil {
			return err
		}
		off += n
		im.progress(off, im.size)
	}
	im.progress(im.size, im.size)
	return nil
}

// nextData skips a hole of a sparse file.
func nextData(src io.ReaderAt, off, size int64) int64 {
	f, ok := src.(*os.File)
	if !ok {
		return off
	}
	next := off
	if rc, err := f.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) {
			n, err := unix.Seek(int(fd), off, unix.SEEK_DATA)
			switch err {
			case nil:
				next = n
			case unix.ENXIO:
				next = size
			}
		})
	}
	return max(off, next)
}

// store writes the runs of p that are not zeros.
func (im *importer) store(p []byte, off int64) error {
	for a := 0; a < len(p); {
		if uniform(p[a:a+BlockSize]) == 0 {
			a += BlockSize
			continue
		}
		b := a
		for ; b < len(p) && uniform(p[b:b+BlockSize]) != 0; b += BlockSize {
			im.sum.block((off+int64(b))/BlockSize, stateData, p[b:b+BlockSize])
		}
		if _, err := im.dst.WriteAt(p[a:b], im.h.geo.dataOff+off+int64(a)); err != nil {
			return err
		}
		im.m.set((off+int64(a))/BlockSize, int64(b-a)/BlockSize, 1)
		a = b
	}
	return nil
}

// sealNew writes a new layer's map, whose source in m is 1, and once that and the data are on the disk, the header.
func sealNew(dst file, h header, m *blockMap) error {
	sum := mapSum(0)
	for _, p := range m.mapPages(1, h.geo) {
		sum.add(p.page, encodePage(p.data, p.page, h.generation))
		if _, err := dst.WriteAt(p.data, h.geo.mapOff[0]+p.page*pageSize); err != nil {
			return err
		}
	}
	h.mapSum = uint32(sum)
	if err := dst.Sync(); err != nil {
		return err
	}
	b := h.encode()
	if _, err := dst.WriteAt(append(b, b...), 0); err != nil {
		return err
	}
	return dst.Sync()
}

// contentHash is the BLAKE3 hash of what a layer says about its disk: the size, the parent, and number, state and data
// of each block it has, in order.
type contentHash struct{ h hash.Hash }

func newContentHash(size int64, parent ID) contentHash {
	c := contentHash{blake3.New(32, nil)}
	c.h.Write([]byte("vigia layer 1\n"))
	c.h.Write(binary.LittleEndian.AppendUint64(nil, uint64(size)))
	c.h.Write(parent[:])
	return c
}

func (c contentHash) block(b int64, state byte, data []byte) {
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(b)<<2|uint64(state))
	c.h.Write(n[:])
	if state == stateData {
		c.h.Write(data)
	}
}

func (c contentHash) id() ID { return ID(c.h.Sum(nil)) }

// ErrContent is returned by Verify for a layer whose content is not what its id says.
var ErrContent = errors.New("layer's content does not match its id")

// Verify reads the whole of a frozen layer and returns the hash of its content. Where the layer's id is such a hash, as
// an imported layer's is, a difference is ErrContent.
func Verify(f *os.File) (ID, error) { return verify(hostFile(f)) }

func verify(f file) (ID, error) {
	l, err := openLayer(f)
	if err != nil {
		return ID{}, err
	}
	if l.state != layerFrozen {
		return ID{}, ErrNotFrozen
	}
	sum := newContentHash(l.size, l.parent)
	var rerr error
	buf := make([]byte, BlockSize)
	err = l.loadMap(func(c int64, st []byte) {
		for i := int64(0); i < chunkBlocks && rerr == nil; i++ {
			s := st[i/4] >> (2 * (i % 4)) & 3
			if s == stateAbsent {
				continue
			}
			b := c*chunkBlocks + i
			if s == stateData {
				rerr = readFull(f, buf, l.geo.dataOff+b*BlockSize)
			}
			sum.block(b, s, buf)
		}
	})
	if err = errors.Join(err, rerr); err != nil {
		return ID{}, err
	}
	id := sum.id()
	if l.flags&flagContentID != 0 && id != l.id {
		return id, fmt.Errorf("%w: it is %.12s, its id says %.12s", ErrContent, id, l.id)
	}
	return id, nil
}

// Info is what a layer's header says.
type Info struct {
	ID, Parent ID
	Size       int64
	Frozen     bool
	ContentID  bool // the id is the hash of the content
}

// ReadInfo reads a layer's header.
func ReadInfo(f *os.File) (Info, error) {
	h, _, err := readHeader(hostFile(f))
	if err != nil {
		return Info{}, err
	}
	if st, err := f.Stat(); err != nil {
		return Info{}, err
	} else if want := h.geo.fileSize(h.size); st.Size() < want {
		return Info{}, fmt.Errorf("%w: its file has %d bytes, of %d", ErrDamaged, st.Size(), want)
	}
	return Info{h.id, h.parent, h.size, h.state == layerFrozen, h.flags&flagContentID != 0}, nil
}

// Export writes the disk as a raw, sparse image into the empty file dst.
func (v *Volume) Export(dst *os.File, progress func(done, total int64)) error {
	if err := dst.Truncate(v.size); err != nil {
		return fmt.Errorf("export disk: %w", err)
	}
	buf := make([]byte, copySize)
	for off := int64(0); off < v.size; {
		e := v.extent(off, v.size-off)
		n := e.n
		if e.f != nil {
			n = min(n, copySize)
			if _, err := v.fill(buf[:n], off); err != nil {
				return fmt.Errorf("export disk: %w", err)
			}
			if _, err := dst.WriteAt(buf[:n], off); err != nil {
				return fmt.Errorf("export disk: %w", err)
			}
		}
		off += n
		if progress != nil {
			progress(off, v.size)
		}
	}
	return nil
}
