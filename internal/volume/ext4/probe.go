package ext4

import (
	"errors"
	"io"
)

// magics tells contents apart that this package names but does not read. The first that fits wins.
var magics = []struct {
	kind         string
	at           int64
	magic        string
	labelAt, len int64
	uuidAt       int64
}{
	{"luks", 0, "LUKS\xba\xbe", 0, 0, 0}, // before all: what lies under it can't be seen
	{"raid", 4096, "\xfc\x4e\x2b\xa9", 4096 + 32, 32, 0},
	{"raid", 0, "\xfc\x4e\x2b\xa9", 32, 32, 0},
	{"lvm", 512, "LABELONE", 0, 0, 0},
	{"lvm", 0, "LABELONE", 0, 0, 0},
	{"lvm", 1024, "LABELONE", 0, 0, 0},
	{"xfs", 0, "XFSB", 108, 12, 32},
	{"btrfs", 65600, "_BHRfS_M", 65536 + 299, 256, 65536 + 32},
	{"f2fs", 1024, "\x10\x20\xf5\xf2", 0, 0, 1024 + 108},
	{"erofs", 1024, "\xe2\xe1\xf5\xe0", 1024 + 64, 16, 1024 + 48},
	{"squashfs", 0, "hsqs", 0, 0, 0},
	{"ntfs", 3, "NTFS    ", 0, 0, 0},
	{"vfat", 82, "FAT32   ", 71, 11, 0},
	{"vfat", 54, "FAT16   ", 43, 11, 0},
	{"vfat", 54, "FAT12   ", 43, 11, 0},
	{"iso9660", 32769, "CD001", 32768 + 40, 32, 0},
	{"swap", 4086, "SWAPSPACE2", 1024 + 28, 16, 1024 + 12},
	{"swap", 65526, "SWAPSPACE2", 1024 + 28, 16, 1024 + 12},
	{"swap", 4086, "SWAP-SPACE", 0, 0, 0},
}

// probe names what lies in size bytes from off on.
func probe(r io.ReaderAt, off, size int64) (Filesystem, error) {
	f := Filesystem{Offset: off, Size: size, Kind: "unknown"}
	for _, m := range magics {
		b, err := peek(r, f, m.at, int64(len(m.magic)))
		if err != nil {
			return f, err
		}
		if string(b) != m.magic {
			continue
		}
		f.Kind = m.kind
		if f.Label, err = peekLabel(r, f, m.labelAt, m.len); err != nil {
			return f, err
		}
		if m.uuidAt == 0 {
			return f, nil
		}
		if b, err = peek(r, f, m.uuidAt, 16); len(b) == 16 {
			f.UUID = formatUUID(b)
		}
		return f, err
	}
	b, err := peek(r, f, superOffset, superSize)
	if err != nil || len(b) < superSize || le.Uint16(b[0x38:]) != superMagic {
		return f, err
	}
	f.Kind, f.Label, f.UUID = "ext4", label(b[0x78:0x88]), formatUUID(b[0x68:0x78])
	if sb, err := parseSuper(b, size); err == nil {
		f.Kind = sb.kind()
	}
	return f, nil
}

func peekLabel(r io.ReaderAt, f Filesystem, at, n int64) (string, error) {
	if n == 0 {
		return "", nil
	}
	b, err := peek(r, f, at, n)
	s := label(b)
	for len(s) > 0 && s[len(s)-1] == ' ' {
		s = s[:len(s)-1]
	}
	return s, err
}

// peek reads n bytes of f, or nothing where f is too short.
func peek(r io.ReaderAt, f Filesystem, at, n int64) ([]byte, error) {
	if at > f.Size-n {
		return nil, nil
	}
	b := make([]byte, n)
	got, err := r.ReadAt(b, f.Offset+at)
	if got == len(b) || err == nil || errors.Is(err, io.EOF) {
		if got < len(b) {
			return nil, nil
		}
		return b, nil
	}
	return nil, err
}
