package ext4

// entry is one name in a directory block. at is its offset there.
type entry struct {
	inode uint32
	kind  byte // of ftype*, or 0 where the file system does not say
	name  []byte
	at    int
}

const (
	ftypeRegular = 1
	ftypeDir     = 2
	ftypeSymlink = 7
)

// eachEntry visits the names in a directory block, but "." and "..". The inner nodes of a hashed directory look like
// blocks with one unused entry, its root like "." and ".." alone, the checksum at the end like an unused entry.
func eachEntry(b []byte, filetype bool, visit func(entry) bool) error {
	for at := 0; at+8 <= len(b); {
		n, rec := int(b[at+6]), recordLength(le.Uint16(b[at+4:]), len(b))
		if rec < 8 || rec%4 != 0 || rec > len(b)-at {
			return corrupt("directory entry of %d bytes at %d of %d", rec, at, len(b))
		}
		e := entry{inode: le.Uint32(b[at:]), at: at}
		if filetype {
			e.kind = b[at+7] & 0x7
		}
		if e.inode != 0 {
			if n == 0 || 8+n > rec || !filetype && b[at+7] != 0 {
				return corrupt("directory entry with a name of %d bytes in %d", n, rec)
			}
			e.name = b[at+8 : at+8+n]
			if !isDots(e.name) && !visit(e) {
				return nil
			}
		}
		at += rec
	}
	return nil
}

func isDots(name []byte) bool {
	return name[0] == '.' && (len(name) == 1 || len(name) == 2 && name[1] == '.')
}

// recordLength undoes the packing of lengths up to 256 KiB in 16 bits, for blocks of 64 KiB and more.
func recordLength(n uint16, block int) int {
	if block < 65536 {
		return int(n)
	}
	if n == 65535 || n == 0 {
		return block
	}
	return int(n)&65532 | int(n)&3<<16
}

// inlineEntries visits the names of a directory that lies in its inode: four bytes for the parent, then entries, then
// more of them in the attribute.
func inlineEntries(i *inode, filetype bool, visit func(entry) bool) error {
	if err := eachEntry(i.root()[4:], filetype, visit); err != nil {
		return err
	}
	return eachEntry(i.inlineTail(), filetype, visit)
}
