package image

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
)

// MaxDisk is the largest disk that is imported.
const MaxDisk = 16 << 40

// Format is what kind of file a disk comes in, as qemu-img calls it, and how large the disk in it is.
type Format struct {
	Name string `json:"name"` // raw, qcow2, vmdk or vdi
	Size int64  `json:"size"`
}

// Sniff tells the format of a disk file by its first bytes, and refuses what must not be opened: files that refer to
// other files, and so would read from the host whatever their author names; encrypted ones; ones that say they are
// broken. What is none of the known formats is raw.
func Sniff(f *os.File) (Format, error) {
	info, err := f.Stat()
	if err != nil {
		return Format{}, err
	}
	if !info.Mode().IsRegular() {
		return Format{}, fmt.Errorf("%w: not a regular file", ErrFormat)
	}
	head := make([]byte, 512)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return Format{}, err
	}
	format, err := sniff(head[:n], f, info.Size())
	if err != nil {
		return Format{}, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	if format.Size <= 0 || format.Size > MaxDisk {
		return Format{}, fmt.Errorf("%w: a %s disk of %d bytes: use 1 to %d", ErrFormat, format.Name, format.Size, int64(MaxDisk))
	}
	return format, nil
}

// unsupported formats, by the bytes they begin with.
var unsupported = []struct{ magic, name string }{
	{"QED\x00", "qed"}, {"vhdxfile", "vhdx"}, {"conectix", "vpc"}, {"COWD", "vmdk3"}, {"LUKS\xba\xbe", "luks"}, {"WithoutFreeSpace", "parallels"},
	{"WithouFreSpacExt", "parallels"}, {"# Disk Descript", "vmdk descriptor"}, {"Bochs Virtual HD Image", "bochs"}, {"#!/bin/sh\n#V2.0 Format\n", "cloop"},
}

func sniff(head []byte, r io.ReaderAt, length int64) (Format, error) {
	for _, u := range unsupported {
		if bytes.HasPrefix(head, []byte(u.magic)) {
			return Format{}, fmt.Errorf("%s is not imported: convert it to qcow2 or raw first", u.name)
		}
	}
	switch {
	case bytes.HasPrefix(head, []byte("QFI\xfb")):
		return sniffQcow2(head, length)
	case bytes.HasPrefix(head, []byte("KDMV")):
		return sniffVMDK(head, r)
	case len(head) >= 0x178 && binary.LittleEndian.Uint32(head[0x40:]) == 0xbeda107f:
		return Format{"vdi", clampSize(binary.LittleEndian.Uint64(head[0x170:]))}, nil
	}
	return Format{"raw", length}, nil
}

// sniffQcow2 reads the header as docs/interop/qcow2.rst has it; all numbers are big-endian.
func sniffQcow2(h []byte, length int64) (Format, error) {
	if len(h) < 104 {
		return Format{}, fmt.Errorf("qcow2 header cut off after %d bytes", len(h))
	}
	be := binary.BigEndian
	version, bits := be.Uint32(h[4:]), be.Uint32(h[20:])
	switch {
	case version != 2 && version != 3:
		return Format{}, fmt.Errorf("qcow2 version %d is unknown", version)
	case be.Uint64(h[8:]) != 0:
		return Format{}, fmt.Errorf("this qcow2 needs a backing file: merge it first, with 'qemu-img convert -O qcow2 OLD NEW' where it comes from")
	case be.Uint32(h[32:]) != 0:
		return Format{}, fmt.Errorf("this qcow2 is encrypted")
	case bits < 9 || bits > 21:
		return Format{}, fmt.Errorf("qcow2 clusters of 2^%d bytes are not possible", bits)
	}
	if version == 3 {
		const dirty, corrupt, external, known = 1 << 0, 1 << 1, 1 << 2, 1<<5 - 1
		features := be.Uint64(h[72:])
		switch {
		case features&external != 0:
			return Format{}, fmt.Errorf("this qcow2 keeps its data in another file: merge it first, with 'qemu-img convert -O qcow2 OLD NEW' where it comes from")
		case features&corrupt != 0:
			return Format{}, fmt.Errorf("this qcow2 is marked as corrupt: repair it with 'qemu-img check -r all'")
		case features&^known != 0:
			return Format{}, fmt.Errorf("this qcow2 needs unknown features (%#x)", features)
		}
	}
	if table := be.Uint64(h[40:]); table >= uint64(length) {
		return Format{}, fmt.Errorf("this qcow2 is cut off: its table is at %d, the file has %d bytes", table, length)
	}
	return Format{"qcow2", clampSize(be.Uint64(h[24:]))}, nil
}

// maxDescriptor bounds the text in a vmdk; QEMU's own bound is the same.
const maxDescriptor = 1 << 20

// sniffVMDK reads the header of a sparse extent and looks through the descriptor in it for other files.
func sniffVMDK(h []byte, r io.ReaderAt) (Format, error) {
	if len(h) < 80 {
		return Format{}, fmt.Errorf("vmdk header cut off after %d bytes", len(h))
	}
	le := binary.LittleEndian
	capacity, at, n := le.Uint64(h[12:]), le.Uint64(h[28:]), le.Uint64(h[36:])
	if capacity == 0 || capacity > MaxDisk/512 {
		return Format{}, fmt.Errorf("this vmdk names its data in other files, or has an impossible size")
	}
	if n > maxDescriptor/512 || at > MaxDisk/512 {
		return Format{}, fmt.Errorf("this vmdk has a descriptor of %d sectors", n)
	}
	text := make([]byte, n*512)
	if k, err := r.ReadAt(text, int64(at*512)); k != len(text) {
		return Format{}, fmt.Errorf("vmdk descriptor cut off: %w", err)
	}
	lower := bytes.ToLower(text)
	if bytes.Contains(lower, []byte("parentfilenamehint")) {
		return Format{}, fmt.Errorf("this vmdk needs a parent file: merge it first, with 'qemu-img convert -O qcow2 OLD NEW' where it comes from")
	}
	return Format{"vmdk", int64(capacity) * 512}, nil
}

// clampSize keeps sizes that are too large positive, so that one check refuses them.
func clampSize(n uint64) int64 { return int64(min(n, MaxDisk+1)) }
