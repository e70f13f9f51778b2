package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
)

// vmlinux is an unpacked kernel: its bytes, and how addresses map to them.
type vmlinux struct {
	image    []byte
	segments []segment
	btf      []byte
	sections []*elf.Section
	end      uint64 // of the ELF file: behind it are the relocations
}

// segment is a loadable run of the image.
type segment struct {
	addr uint64
	data []byte
}

const maxSections = 1 << 12

// openVmlinux reads the ELF headers.
func openVmlinux(image []byte) (*vmlinux, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotKernel, err)
	}
	if f.Machine != elf.EM_X86_64 || f.Class != elf.ELFCLASS64 {
		return nil, fmt.Errorf("%w: ELF for %v", ErrNotKernel, f.Machine)
	}
	v := &vmlinux{image: image}
	if len(f.Progs) > maxSections || len(f.Sections) > maxSections {
		return nil, fmt.Errorf("%w: %d sections", ErrTooLarge, len(f.Sections))
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD || p.Filesz == 0 {
			continue
		}
		data, ok := within(image, p.Off, p.Filesz)
		if !ok || p.Vaddr+p.Filesz < p.Vaddr {
			return nil, fmt.Errorf("%w: cut short: a segment ends at byte %d of %d", ErrNotKernel, p.Off+p.Filesz, len(image))
		}
		v.segments = append(v.segments, segment{p.Vaddr, data})
	}
	v.sections, v.end = f.Sections, elfEnd(image)
	for _, s := range f.Sections {
		if s.Type != elf.SHT_NOBITS {
			v.end = max(v.end, min(s.Offset+s.FileSize, uint64(len(image))))
		}
		if s.Name == ".BTF" && s.Type != elf.SHT_NOBITS && s.Flags&elf.SHF_COMPRESSED == 0 {
			if data, ok := within(image, s.Offset, s.FileSize); ok {
				v.btf = data
			}
		}
	}
	return v, nil
}

// elfEnd is the end of the tables of sections and segments.
func elfEnd(image []byte) uint64 {
	le := binary.LittleEndian
	if len(image) < 64 {
		return 0
	}
	sections := le.Uint64(image[0x28:]) + uint64(le.Uint16(image[0x3a:]))*uint64(le.Uint16(image[0x3c:]))
	segments := le.Uint64(image[0x20:]) + uint64(le.Uint16(image[0x36:]))*uint64(le.Uint16(image[0x38:]))
	return min(max(sections, segments), uint64(len(image)))
}

// within returns n bytes of b at off.
func within(b []byte, off, n uint64) ([]byte, bool) {
	if off > uint64(len(b)) || n > uint64(len(b))-off {
		return nil, false
	}
	return b[off : off+n], true
}

// at returns what the image has at a link address, up to the end of the segment.
func (v *vmlinux) at(addr uint64) ([]byte, bool) {
	for _, s := range v.segments {
		if off := addr - s.addr; off < uint64(len(s.data)) {
			return s.data[off:], true
		}
	}
	return nil, false
}
