package kernel

import (
	"bytes"
	"compress/bzip2"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"
)

// unpack tells the kinds of payload apart by their first bytes. The kernel's build appends the unpacked size as 4 bytes
// to all of them (gzip has it as its own trailer); it is taken as a promise to hold the packer to, within maxVmlinux.
func unpack(payload []byte) ([]byte, error) {
	size := int64(binary.LittleEndian.Uint32(payload[len(payload)-4:]))
	if size > maxVmlinux {
		return nil, fmt.Errorf("%w: payload says it unpacks to %d bytes", ErrTooLarge, size)
	}
	body := payload[:len(payload)-4]
	var out []byte
	var err error
	switch {
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		out, err = unpackLZ4(body[4:], int(size))
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		out, err = unpackZstd(body, int(size))
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		var r *gzip.Reader
		if r, err = gzip.NewReader(bytes.NewReader(payload)); err == nil {
			r.Multistream(false)
			out, err = drain(r, size)
		}
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		out, err = unpackXZ(body, size)
	case bytes.HasPrefix(payload, []byte("BZh")):
		out, err = drain(bzip2.NewReader(bytes.NewReader(body)), size)
	case bytes.HasPrefix(payload, []byte{0x5d, 0x00, 0x00}):
		var r *lzma.Reader
		if r, err = (lzma.ReaderConfig{DictCap: 8 << 20}).NewReader(bytes.NewReader(body)); err == nil {
			out, err = drain(r, size)
		}
	case bytes.HasPrefix(payload, []byte("\x7fELF")):
		return payload, nil // CONFIG_KERNEL_UNCOMPRESSED
	default:
		return nil, fmt.Errorf("%w: unknown packing, it begins with % x", ErrCompression, payload[:4])
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCompression, err)
	}
	return out, nil
}

// drain reads exactly size bytes.
func drain(r io.Reader, size int64) ([]byte, error) {
	var out bytes.Buffer // grows with what comes, not with what is promised
	n, err := io.Copy(&out, io.LimitReader(r, size))
	if err != nil {
		return nil, err
	}
	if n != size {
		return nil, fmt.Errorf("%d bytes where %d were promised", n, size)
	}
	return out.Bytes(), nil
}

// lz4Block is the most that one block of the legacy frame unpacks to.
const lz4Block = 8 << 20

// unpackLZ4 reads the legacy frame: blocks, each with its packed size in 4 bytes before it.
func unpackLZ4(b []byte, size int) ([]byte, error) {
	if len(b)*255 < size {
		return nil, fmt.Errorf("%d bytes can't hold %d", len(b), size)
	}
	out := make([]byte, size)
	done := 0
	for len(b) > 0 && done < size {
		if len(b) < 4 {
			return nil, io.ErrUnexpectedEOF
		}
		n := int(binary.LittleEndian.Uint32(b))
		b = b[4:]
		if n > len(b) {
			return nil, io.ErrUnexpectedEOF
		}
		got, err := lz4.UncompressBlock(b[:n], out[done:min(size, done+lz4Block)])
		if err != nil {
			return nil, err
		}
		done, b = done+got, b[n:]
	}
	if done != size {
		return nil, fmt.Errorf("%d bytes where %d were promised", done, size)
	}
	return out, nil
}

func unpackZstd(b []byte, size int) ([]byte, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxVmlinux), zstd.IgnoreChecksum(true))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	out, err := d.DecodeAll(b, make([]byte, 0, size))
	if err == nil && len(out) != size {
		err = fmt.Errorf("%d bytes where %d were promised", len(out), size)
	}
	return out, err
}
