package ext4

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"unicode/utf16"
)

// Filesystem is one file system, or other content, on a disk.
type Filesystem struct {
	Offset, Size int64
	Kind         string // ext2, ext3, ext4, xfs, btrfs, f2fs, vfat, ntfs, iso9660, squashfs, erofs, swap, lvm, luks, raid or unknown
	Label, UUID  string // as far as the kind is understood
	Partition    int    // its number as Linux counts (/dev/vda1 is 1); 0 is the whole disk
	Name         string // the partition's own name (GPT)
}

// Named says whether a Tracker can name the files on it.
func (f Filesystem) Named() bool { return f.Kind == "ext2" || f.Kind == "ext3" || f.Kind == "ext4" }

// JournalOpen says whether what was last changed lies in the journal only: so it is while it is mounted and not frozen, and after a
// crash. It reads the superblock, as it is now. A file system without such a journal is never open.
func (f Filesystem) JournalOpen(r io.ReaderAt) (bool, error) {
	if f.Kind != "ext3" && f.Kind != "ext4" {
		return false, nil
	}
	b, err := peek(r, f, superOffset+0x60, 4) // s_feature_incompat
	if err != nil || len(b) < 4 {
		return false, cmp.Or(err, ErrNotExt4)
	}
	return le.Uint32(b)&incompatRecover != 0, nil
}

const (
	maxPartitions = 256
	sector        = 512
)

// Find tells which file systems lie on a disk of size bytes: one on the whole disk, or those of its MBR or GPT
// partitions. An empty disk gives an empty list. Broken tables give what could be read and [ErrPartitions].
func Find(r io.ReaderAt, size int64) ([]Filesystem, error) {
	whole, err := probe(r, 0, size)
	if err != nil {
		return nil, err
	}
	if whole.Kind != "unknown" && whole.Kind != "vfat" { // a vfat boot sector looks like an MBR, and some MBRs like vfat
		return []Filesystem{whole}, nil
	}
	parts, tableErr := partitions(r, size)
	if tableErr != nil && !errors.Is(tableErr, ErrPartitions) {
		return nil, tableErr
	}
	if len(parts) == 0 && whole.Kind == "vfat" {
		return []Filesystem{whole}, nil
	}
	var found []Filesystem
	for _, p := range parts {
		f, err := probe(r, p.Offset, p.Size)
		if err != nil {
			return found, err
		}
		f.Partition, f.Name = p.Partition, p.Name
		found = append(found, f)
	}
	return found, tableErr
}

// ErrPartitions says that a partition table contradicts itself.
var ErrPartitions = errors.New("broken partition table")

func readUpTo(r io.ReaderAt, b []byte, off int64) ([]byte, error) {
	n, err := r.ReadAt(b, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("partition table: %w", err)
	}
	return b[:n], nil
}

func partitions(r io.ReaderAt, size int64) ([]Filesystem, error) {
	b, err := readUpTo(r, make([]byte, sector), 0)
	if err != nil || len(b) < sector || b[510] != 0x55 || b[511] != 0xAA {
		return nil, err
	}
	for i := range 4 {
		if b[446+16*i+4] == 0xEE {
			return gpt(r, size)
		}
	}
	return mbr(r, b, size)
}

// mbr lists the four primary partitions, and the logical ones behind an extended one.
func mbr(r io.ReaderAt, b []byte, size int64) ([]Filesystem, error) {
	var found []Filesystem
	var extended int64
	var err error
	for i := range 4 {
		e := b[446+16*i:]
		start, n := int64(le.Uint32(e[8:]))*sector, int64(le.Uint32(e[12:]))*sector
		switch t := e[4]; {
		case e[0] != 0 && e[0] != 0x80:
			return nil, nil // text or code, not a table
		case t == 0 || n == 0:
		case start >= size:
			err = ErrPartitions
		case t == 0x05 || t == 0x0F || t == 0x85:
			extended = start
		default:
			found = append(found, Filesystem{Offset: start, Size: min(n, size-start), Partition: i + 1})
		}
	}
	if extended != 0 {
		logical, e := logicals(r, extended, size)
		return append(found, logical...), errors.Join(err, e)
	}
	return found, err
}

func logicals(r io.ReaderAt, base, size int64) ([]Filesystem, error) {
	var found []Filesystem
	for at, n := base, 5; n < 5+60; n++ { // as many as Linux takes
		b, err := readUpTo(r, make([]byte, sector), at)
		if err != nil || len(b) < sector || b[510] != 0x55 || b[511] != 0xAA {
			return found, errors.Join(err, ErrPartitions)
		}
		start, length := at+int64(le.Uint32(b[446+8:]))*sector, int64(le.Uint32(b[446+12:]))*sector
		if b[446+4] != 0 && length > 0 {
			if start >= size {
				return found, ErrPartitions
			}
			found = append(found, Filesystem{Offset: start, Size: min(length, size-start), Partition: n})
		}
		next := int64(le.Uint32(b[462+8:])) * sector
		if b[462+4] == 0 || next == 0 {
			return found, nil
		}
		if at = base + next; at >= size {
			break
		}
	}
	return found, ErrPartitions
}

// gpt tries the table at the start, with sectors of 512 and 4096 bytes, then the copy at the end.
func gpt(r io.ReaderAt, size int64) ([]Filesystem, error) {
	for _, lba := range []int64{512, 4096} {
		for _, at := range []int64{lba, size/lba*lba - lba} {
			found, err := gptAt(r, at, lba, size)
			if err == nil || !errors.Is(err, ErrPartitions) {
				return found, err
			}
		}
	}
	return nil, ErrPartitions
}

func gptAt(r io.ReaderAt, at, lba, size int64) ([]Filesystem, error) {
	if at < 0 {
		return nil, ErrPartitions
	}
	h, err := readUpTo(r, make([]byte, 92), at)
	if err != nil {
		return nil, err
	}
	if len(h) < 92 || string(h[:8]) != "EFI PART" {
		return nil, ErrPartitions
	}
	table, count, each := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if table > uint64(size/lba) || each < 128 || each > 4096 {
		return nil, ErrPartitions
	}
	b, err := readUpTo(r, make([]byte, min(count, maxPartitions)*each), int64(table)*lba)
	if err != nil {
		return nil, err
	}
	var found []Filesystem
	for n := 0; (n+1)*int(each) <= len(b); n++ {
		e := b[n*int(each):]
		first, last := le.Uint64(e[32:]), le.Uint64(e[40:])
		if bytes.Equal(e[:16], make([]byte, 16)) {
			continue
		}
		if first > last || last >= uint64(size/lba) {
			return found, fmt.Errorf("%w: partition %d", ErrPartitions, n+1)
		}
		found = append(found, Filesystem{Offset: int64(first) * lba, Size: int64(last-first+1) * lba, Partition: n + 1, Name: utf16Name(e[56:128])})
	}
	return found, nil
}

func utf16Name(b []byte) string {
	var u []uint16
	for ; len(b) >= 2 && le.Uint16(b) != 0; b = b[2:] {
		u = append(u, le.Uint16(b))
	}
	return string(utf16.Decode(u))
}
