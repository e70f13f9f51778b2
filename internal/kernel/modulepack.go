package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"slices"
	"sort"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"debug/elf"
)

// A module pack holds the modules of one kernel, each as its file without what nobody needs to know its code: a header,
// an index sorted by name, the files packed with zstd (doc/reference-format.md).
const (
	packMagic   = "vigiamod"
	packVersion = 1
	packHeader  = 16
	packEntry   = 80 // name [56], offset u64, packed u32, size u32, checksum u32, zero u32
	packName    = 56
	maxPacked   = 1 << 14
)

// ErrPack: the bytes are not a module pack of this version, or are damaged.
var ErrPack = errors.New("bad pack of kernel modules")

// PackModules writes a pack. names are the modules' names and file names; read returns a file as it lies on disk. A file that
// is not a module is left out.
func PackModules(w io.WriterAt, files []string, read func(file string) ([]byte, error)) (int, error) {
	byName := map[string]string{}
	for _, file := range files {
		if name := ModuleName(file); name != "" && len(name) < packName {
			byName[name] = file
		}
	}
	if len(byName) > maxPacked {
		return 0, fmt.Errorf("%w: %d modules", ErrTooLarge, len(byName))
	}
	names := make([]string, 0, len(byName))
	for name := range byName {
		names = append(names, name)
	}
	slices.Sort(names)
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return 0, err
	}
	defer z.Close()
	at, le := int64(packHeader+packEntry*len(names)), binary.LittleEndian
	head := le.AppendUint32([]byte(packMagic), packVersion)
	head = le.AppendUint32(head, 0)
	var packed []byte
	count := 0
	for _, name := range names {
		b, err := read(byName[name])
		if err != nil {
			return 0, err
		}
		if b, err = unpackModule(b); err == nil {
			b, err = stripModule(b)
		}
		if err != nil {
			continue
		}
		packed = z.EncodeAll(b, packed[:0])
		entry := make([]byte, packEntry)
		copy(entry, name)
		le.PutUint64(entry[packName:], uint64(at))
		le.PutUint32(entry[packName+8:], uint32(len(packed)))
		le.PutUint32(entry[packName+12:], uint32(len(b)))
		le.PutUint32(entry[packName+16:], crc32.Checksum(b, castagnoli))
		head = append(head, entry...)
		if _, err := w.WriteAt(packed, at); err != nil {
			return 0, err
		}
		at += int64(len(packed))
		count++
	}
	le.PutUint32(head[12:], uint32(count))
	_, err = w.WriteAt(head, 0)
	return count, err
}

// ModuleName returns the name that the kernel knows a module's file by; empty for other files.
func ModuleName(file string) string {
	file = file[strings.LastIndexByte(file, '/')+1:]
	name, suffix, ok := strings.Cut(file, ".ko")
	if !ok || suffix != "" && suffix != ".xz" && suffix != ".zst" && suffix != ".gz" {
		return ""
	}
	return strings.ReplaceAll(name, "-", "_")
}

// unpackModule undoes the packing of a module's file.
func unpackModule(b []byte) ([]byte, error) {
	var r io.Reader
	var err error
	switch {
	case bytes.HasPrefix(b, []byte("\xfd7zXZ\x00")):
		r, err = xz.ReaderConfig{DictCap: maxModuleFile}.NewReader(bytes.NewReader(b))
	case bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		var d *zstd.Decoder
		if d, err = zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxModuleFile)); err == nil {
			defer d.Close()
			r = d
		}
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
		r, err = gzip.NewReader(bytes.NewReader(b))
	default:
		return b, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrModule, err)
	}
	out, err := io.ReadAll(io.LimitReader(r, maxModuleFile+1))
	if err != nil || len(out) > maxModuleFile {
		return nil, fmt.Errorf("%w: it does not unpack: %w", ErrModule, err)
	}
	return out, nil
}

// stripModule returns a module's file with zeros where there is nothing that its code depends on, which pack to nothing.
func stripModule(b []byte) ([]byte, error) {
	m, err := ParseModule(b)
	if err != nil {
		return nil, err
	}
	out := bytes.Clone(b)
	for _, s := range m.elf.Sections {
		keep := wanted(s)
		switch s.Type {
		case elf.SHT_NOBITS, elf.SHT_SYMTAB, elf.SHT_STRTAB, elf.SHT_NULL:
			continue
		case elf.SHT_RELA:
			keep = int(s.Info) < len(m.elf.Sections) && wanted(m.elf.Sections[s.Info])
		}
		if data, ok := within(out, s.Offset, s.FileSize); ok && !keep {
			clear(data)
		}
	}
	// What follows the last table is the signature.
	if end := elfEnd(out); end > 0 {
		for _, s := range m.elf.Sections {
			if s.Type != elf.SHT_NOBITS {
				end = max(end, s.Offset+s.FileSize)
			}
		}
		out = out[:min(end, uint64(len(out)))]
	}
	return out, nil
}

// ModulePack reads a pack.
type ModulePack struct {
	r     io.ReaderAt
	count int
}

// OpenModulePack reads the header of a pack of size bytes.
func OpenModulePack(r io.ReaderAt, size int64) (*ModulePack, error) {
	var head [packHeader]byte
	if err := readAll(r, head[:], 0); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPack, err)
	}
	n := binary.LittleEndian.Uint32(head[12:])
	if string(head[:8]) != packMagic || binary.LittleEndian.Uint32(head[8:]) != packVersion || n > maxPacked || packHeader+int64(n)*packEntry > size {
		return nil, fmt.Errorf("%w: its header", ErrPack)
	}
	return &ModulePack{r, int(n)}, nil
}

// Module returns the file of the module that the kernel knows by a name; fs.ErrNotExist where there is none.
func (p *ModulePack) Module(name string) ([]byte, error) {
	var entry [packEntry]byte
	var err error
	at := func(i int) string {
		if e := readAll(p.r, entry[:], packHeader+int64(i)*packEntry); e != nil {
			err = e
		}
		return string(bytes.TrimRight(entry[:packName], "\x00"))
	}
	i := sort.Search(p.count, func(i int) bool { return at(i) >= name })
	if err != nil || i == p.count || at(i) != name {
		return nil, errors.Join(err, fmt.Errorf("module %s: %w", name, fs.ErrNotExist))
	}
	le := binary.LittleEndian
	packed, size := le.Uint32(entry[packName+8:]), le.Uint32(entry[packName+12:])
	if packed > maxModuleFile || size > maxModuleFile {
		return nil, fmt.Errorf("%w: module %s", ErrPack, name)
	}
	b := make([]byte, packed)
	if err := readAll(p.r, b, int64(le.Uint64(entry[packName:])&(1<<62-1))); err != nil {
		return nil, fmt.Errorf("%w: module %s: %w", ErrPack, name, err)
	}
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxModuleFile))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	out, err := d.DecodeAll(b, make([]byte, 0, size))
	if err != nil || len(out) != int(size) || crc32.Checksum(out, castagnoli) != le.Uint32(entry[packName+16:]) {
		return nil, fmt.Errorf("%w: module %s is damaged", ErrPack, name)
	}
	return out, nil
}
