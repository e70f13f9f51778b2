package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// pieceSize is the length of the pieces that a part is hashed in.
//
// The hash of a part is the SHA-256 of the SHA-256s, 32 bytes each, of its pieces of 1 MiB; the last piece may be
// shorter, and an empty part has none. A disk layer is a sparse file of the disk's full size: its holes are pieces of
// zeros whose hash is known, so that an empty terabyte costs nothing.
const pieceSize = 1 << 20

var zeroPiece = sync.OnceValue(func() [sha256.Size]byte { return sha256.Sum256(make([]byte, pieceSize)) })

// measure hashes a part.
func measure(ctx context.Context, f *os.File, progress func(done, total int64)) (part, error) {
	info, err := f.Stat()
	if err != nil {
		return part{}, err
	}
	size := info.Size()
	sum := sha256.New()
	buf := make([]byte, pieceSize)
	data := nextData(f, 0, size)
	for at := int64(0); at < size; at += pieceSize {
		if ctx.Err() != nil {
			return part{}, context.Cause(ctx)
		}
		n := min(pieceSize, size-at)
		if at+n <= data && n == pieceSize {
			zero := zeroPiece()
			sum.Write(zero[:])
			continue
		}
		if k, err := f.ReadAt(buf[:n], at); int64(k) != n {
			if err == io.EOF || err == nil {
				err = io.ErrUnexpectedEOF
			}
			return part{}, err
		}
		piece := sha256.Sum256(buf[:n])
		sum.Write(piece[:])
		data = nextData(f, at+n, size)
		if progress != nil {
			progress(at+n, size)
		}
	}
	return part{size, hex.EncodeToString(sum.Sum(nil))}, nil
}

// nextData finds where data begins at or after an offset; size where only a hole follows.
func nextData(f *os.File, at, size int64) int64 {
	if at >= size {
		return size
	}
	off, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return size
	case err != nil:
		return at // the file system knows no holes
	}
	return off
}
