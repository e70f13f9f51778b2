package volume

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Sizes of the format. doc/volume-format.md is the authority; Check has its own copy of these.
const (
	BlockSize   = 4096
	chunkBlocks = 512                     // blocks in a chunk of the map
	chunkBytes  = chunkBlocks * BlockSize // 2 MiB
	chunkStates = chunkBlocks / 4         // bytes of two-bit states

	headerSize   = 4096
	pageSize     = 4096 // of the map
	pageChunks   = 31   // chunks in a map page
	minLogSize   = 1 << 20
	dataAlign    = 1 << 20
	formatLatest = 1

	// MaxSize is the largest disk: 4 TiB, whose map costs at most 8 MiB plus what is mixed of it.
	MaxSize = 4 << 40
	// MaxLayers is the longest chain, the overlay included.
	MaxLayers = 250
	sector    = 512
)

// The states of a block in a layer's map.
const (
	stateAbsent = 0 // look in the layer below
	stateData   = 1
	stateZero   = 2
)

const (
	layerWritable = 1
	layerFrozen   = 2

	flagContentID = 1 // the id is the hash of the content
)

// Errors of opening. Each is wrapped with the layer it is about.
var (
	ErrNotVolume = errors.New("not a vigia volume layer")
	ErrVersion   = errors.New("layer is of a newer format: open it with a newer vigia")
	ErrDamaged   = errors.New("layer is damaged")
	ErrNotFrozen = errors.New("layer is not frozen: only the top of a chain may be writable")
	ErrFrozen    = errors.New("overlay is frozen: make a new one over it")
	ErrParent    = errors.New("layer does not belong over the one below it")
	ErrInUse     = errors.New("overlay is in use by another process")
	ErrEncrypted = errors.New("layer is encrypted, which this version cannot read")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is a decoded header slot.
type header struct {
	generation uint64
	id, parent ID
	size       int64
	state      uint32
	flags      uint32
	mapWhich   uint32
	mapSum     uint32
	cipher     uint32
	keyID      [32]byte
	geo        geometry
}

// geometry is where the parts of a layer lie; it follows from the disk's size alone.
type geometry struct {
	chunks, pages int64
	logOff, logSz int64
	mapOff        [2]int64
	liveOff       int64
	liveSz        int64
	dataOff       int64
}

func geometryOf(size int64) geometry {
	var g geometry
	g.chunks = (size + chunkBytes - 1) / chunkBytes
	g.pages = (g.chunks + pageChunks - 1) / pageChunks
	mapSz := g.pages * pageSize
	g.logOff, g.logSz = 2*headerSize, max(minLogSize, mapSz)
	g.mapOff = [2]int64{g.logOff + g.logSz, g.logOff + g.logSz + mapSz}
	g.liveOff = g.mapOff[1] + mapSz
	g.liveSz = liveHeader + (g.chunks*chunkStates+BlockSize-1)/BlockSize*BlockSize
	g.dataOff = (g.liveOff + g.liveSz + dataAlign - 1) / dataAlign * dataAlign
	return g
}

// fileSize is the apparent size of a layer's file; the file is sparse.
func (g geometry) fileSize(size int64) int64 {
	return g.dataOff + (size+BlockSize-1)/BlockSize*BlockSize
}

func checkSize(size int64) error {
	if size <= 0 || size > MaxSize || size%sector != 0 {
		return fmt.Errorf("disk size %d: must be a multiple of %d, at most %d", size, sector, int64(MaxSize))
	}
	return nil
}

const magic = "VIGIAVOL"

func (h *header) encode() []byte {
	b := make([]byte, headerSize)
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint32(b[8:], formatLatest)
	le.PutUint32(b[12:], headerSize)
	le.PutUint64(b[16:], h.generation)
	copy(b[24:56], h.id[:])
	copy(b[56:88], h.parent[:])
	le.PutUint64(b[88:], uint64(h.size))
	le.PutUint32(b[96:], h.state)
	le.PutUint32(b[100:], h.flags)
	le.PutUint32(b[104:], BlockSize)
	le.PutUint32(b[108:], chunkBlocks)
	le.PutUint64(b[112:], uint64(h.geo.logOff))
	le.PutUint64(b[120:], uint64(h.geo.logSz))
	le.PutUint64(b[128:], uint64(h.geo.mapOff[0]))
	le.PutUint64(b[136:], uint64(h.geo.mapOff[1]))
	le.PutUint64(b[144:], uint64(h.geo.pages))
	le.PutUint32(b[152:], h.mapWhich)
	le.PutUint32(b[156:], h.mapSum)
	le.PutUint64(b[160:], uint64(h.geo.dataOff))
	le.PutUint32(b[168:], h.cipher)
	copy(b[176:208], h.keyID[:])
	le.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
	return b
}

// decodeHeader reads one slot. A slot that was torn or never written gives an error and no value.
func decodeHeader(b []byte) (header, error) {
	le := binary.LittleEndian
	if len(b) < headerSize || string(b[:8]) != magic {
		return header{}, ErrNotVolume
	}
	if le.Uint32(b[headerSize-4:]) != crc32.Checksum(b[:headerSize-4], castagnoli) {
		return header{}, fmt.Errorf("%w: header checksum", ErrDamaged)
	}
	if v := le.Uint32(b[8:]); v != formatLatest {
		return header{}, fmt.Errorf("%w (version %d)", ErrVersion, v)
	}
	h := header{
		generation: le.Uint64(b[16:]),
		id:         ID(b[24:56]), parent: ID(b[56:88]),
		size:  int64(le.Uint64(b[88:])),
		state: le.Uint32(b[96:]), flags: le.Uint32(b[100:]),
		mapWhich: le.Uint32(b[152:]), mapSum: le.Uint32(b[156:]),
		cipher: le.Uint32(b[168:]), keyID: [32]byte(b[176:208]),
	}
	if err := checkSize(h.size); err != nil {
		return header{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	h.geo = geometryOf(h.size)
	return h, h.validate(b)
}

func (h *header) validate(b []byte) error {
	le := binary.LittleEndian
	g := geometry{logOff: int64(le.Uint64(b[112:])), logSz: int64(le.Uint64(b[120:])),
		mapOff: [2]int64{int64(le.Uint64(b[128:])), int64(le.Uint64(b[136:]))},
		pages:  int64(le.Uint64(b[144:])), dataOff: int64(le.Uint64(b[160:])), chunks: h.geo.chunks,
		liveOff: h.geo.liveOff, liveSz: h.geo.liveSz}
	switch {
	case le.Uint32(b[12:]) != headerSize || le.Uint32(b[104:]) != BlockSize || le.Uint32(b[108:]) != chunkBlocks || g != h.geo:
		return fmt.Errorf("%w: header geometry", ErrDamaged)
	case h.state != layerWritable && h.state != layerFrozen:
		return fmt.Errorf("%w: unknown layer state %d", ErrDamaged, h.state)
	case h.mapWhich > 1:
		return fmt.Errorf("%w: unknown map %d", ErrDamaged, h.mapWhich)
	case h.generation == 0 || h.id.IsZero():
		return fmt.Errorf("%w: header without generation or id", ErrDamaged)
	}
	return nil
}

// readHeader picks the newer good slot of the two, and says which slot a new header has to go to first: the one whose
// loss in a power cut would leave the newest.
func readHeader(f file) (h header, first int64, err error) {
	var b [2 * headerSize]byte
	n, err := f.ReadAt(b[:], 0)
	if n < len(b) {
		if n < 8 || string(b[:8]) != magic {
			return header{}, 0, ErrNotVolume
		}
		return header{}, 0, fmt.Errorf("%w: file ends inside the header: %w", ErrDamaged, err)
	}
	h0, err0 := decodeHeader(b[:headerSize])
	h1, err1 := decodeHeader(b[headerSize:])
	switch {
	case err0 == nil && (err1 != nil || h0.generation > h1.generation):
		return h0, 1, nil
	case err1 == nil:
		return h1, 0, nil
	case errors.Is(err0, ErrNotVolume) && !errors.Is(err1, ErrNotVolume):
		return header{}, 0, err1
	}
	return header{}, 0, err0
}

// writeHeader puts h into a slot. It does not sync.
func writeHeader(f io.WriterAt, h *header, slot int64) error {
	_, err := f.WriteAt(h.encode(), slot*headerSize)
	return err
}
