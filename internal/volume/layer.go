package volume

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
)

// CreateOptions describe a new layer.
type CreateOptions struct {
	Size   int64 // of the disk, in bytes: a multiple of 512
	ID     ID    // zero: a random one
	Parent ID    // the id of the layer below; zero for the lowest
}

// Create makes the empty file f an overlay with nothing in it. It does not wait for the disk: the first Flush of the
// volume does, before anything of the guest can be lost.
func Create(f *os.File, o CreateOptions) error {
	return create(f, o)
}

type truncater interface {
	io.WriterAt
	Truncate(int64) error
}

func create(f truncater, o CreateOptions) error {
	if err := checkSize(o.Size); err != nil {
		return fmt.Errorf("create layer: %w", err)
	}
	if o.ID.IsZero() {
		o.ID = NewID()
	}
	h := header{generation: 1, id: o.ID, parent: o.Parent, size: o.Size, state: layerWritable, geo: geometryOf(o.Size)}
	if err := f.Truncate(h.geo.fileSize(h.size)); err != nil {
		return fmt.Errorf("create layer: %w", err)
	}
	b := h.encode()
	if _, err := f.WriteAt(append(b, b...), 0); err != nil {
		return fmt.Errorf("create layer: %w", err)
	}
	return nil
}

// layer is an open layer file.
type layer struct {
	f file
	header
	slot    int64   // the next header goes there first
	logNext int64   // where in the log the next record goes
	logSeq  uint64  // and its number
	pending *header // perhaps on the disk already, not yet in force
	lost    bool    // a sync failed: what was written since the last good one has to be written again
}

func openLayer(f file) (*layer, error) {
	h, slot, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	if h.cipher != 0 {
		return nil, ErrEncrypted
	}
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if want := h.geo.fileSize(h.size); size < want {
		return nil, fmt.Errorf("%w: file is %d bytes long, its header asks for %d", ErrDamaged, size, want)
	}
	return &layer{f: f, header: h, slot: slot}, nil
}

const pageMagic = 0x50414d56 // "VMAP"

// loadMap reads the layer's map and calls chunk for each chunk it has something of.
func (l *layer) loadMap(chunk func(c int64, states []byte)) error {
	var sum mapSum
	buf := make([]byte, min(l.geo.pages, 64)*pageSize)
	for p := int64(0); p < l.geo.pages; {
		b := buf[:min(l.geo.pages-p, 64)*pageSize]
		if _, err := l.f.ReadAt(b, l.geo.mapOff[l.mapWhich]+p*pageSize); err != nil {
			return fmt.Errorf("read the map: %w", err)
		}
		for ; len(b) > 0; b, p = b[pageSize:], p+1 {
			if err := l.loadPage(p, b[:pageSize], &sum, chunk); err != nil {
				return err
			}
		}
	}
	if uint32(sum) != l.mapSum {
		return fmt.Errorf("%w: the map's checksum", ErrDamaged)
	}
	return nil
}

func (l *layer) loadPage(p int64, b []byte, sum *mapSum, chunk func(int64, []byte)) error {
	if uniform(b) == 0 {
		return nil
	}
	le := binary.LittleEndian
	crc := crc32.Checksum(b[:pageSize-4], castagnoli)
	if le.Uint32(b[pageSize-4:]) != crc || le.Uint32(b[pageChunks*chunkStates:]) != pageMagic ||
		le.Uint64(b[pageChunks*chunkStates+8:]) != uint64(p) {
		return fmt.Errorf("%w: map page %d", ErrDamaged, p)
	}
	sum.add(p, crc)
	for i := range int64(pageChunks) {
		st := b[i*chunkStates : (i+1)*chunkStates]
		if uniform(st) == 0 {
			continue
		}
		if err := l.checkStates(p*pageChunks+i, st); err != nil {
			return err
		}
		chunk(p*pageChunks+i, st)
	}
	return nil
}

// checkStates refuses what no writer writes: an unknown state, or a block beyond the disk's end.
func (l *layer) checkStates(c int64, states []byte) error {
	if c >= l.geo.chunks {
		return fmt.Errorf("%w: map of chunk %d beyond the disk", ErrDamaged, c)
	}
	for i := 0; i < len(states); i += 8 {
		if s := binary.LittleEndian.Uint64(states[i:]); s&(s>>1)&0x5555555555555555 != 0 {
			return fmt.Errorf("%w: unknown block state in chunk %d", ErrDamaged, c)
		}
	}
	n := (l.size+BlockSize-1)/BlockSize - c*chunkBlocks
	if n >= chunkBlocks {
		return nil
	}
	for i := n; i < chunkBlocks; i++ {
		if states[i/4]>>(2*(i%4))&3 != stateAbsent {
			return fmt.Errorf("%w: block state beyond the disk's end", ErrDamaged)
		}
	}
	return nil
}

// mapSum binds all pages of a map into the header: the CRC-32C of (page number, page CRC) of each page that is there.
type mapSum uint32

func (s *mapSum) add(page int64, crc uint32) {
	var b [12]byte
	binary.LittleEndian.PutUint64(b[:], uint64(page))
	binary.LittleEndian.PutUint32(b[8:], crc)
	*s = mapSum(crc32.Update(uint32(*s), castagnoli, b[:]))
}

// encodePage finishes a page whose states are filled in.
func encodePage(b []byte, page int64, generation uint64) uint32 {
	le := binary.LittleEndian
	t := b[pageChunks*chunkStates:]
	le.PutUint32(t, pageMagic)
	le.PutUint64(t[8:], uint64(page))
	le.PutUint64(t[16:], generation)
	crc := crc32.Checksum(b[:pageSize-4], castagnoli)
	le.PutUint32(b[pageSize-4:], crc)
	return crc
}
