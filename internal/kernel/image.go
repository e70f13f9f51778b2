package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// Places in the setup header of a bzImage (boot.rst).
const (
	setupSects    = 0x1f1
	setupMagic    = 0x202
	setupVersion  = 0x206
	payloadOffset = 0x248
	payloadLength = 0x24c
	setupEnd      = 0x250

	payloadSince = 0x208 // boot protocol that introduced payload_offset
)

// vmlinuxOf returns the unpacked ELF image in a kernel file.
func vmlinuxOf(r io.ReaderAt, size int64) ([]byte, error) {
	if size > maxImage {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, size)
	}
	head := make([]byte, setupEnd)
	if size < setupEnd {
		return nil, fmt.Errorf("%w: %d bytes", ErrNotKernel, size)
	}
	if err := readAll(r, head, 0); err != nil {
		return nil, err
	}
	if bytes.HasPrefix(head, []byte("\x7fELF")) {
		if size > maxVmlinux {
			return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, size)
		}
		image := make([]byte, size)
		return image, readAll(r, image, 0)
	}
	payload, err := payloadOf(r, size, head)
	if err != nil {
		return nil, err
	}
	image, err := unpack(payload)
	if err != nil {
		return nil, err
	}
	if !bytes.HasPrefix(image, []byte("\x7fELF")) {
		return nil, fmt.Errorf("%w: its payload is not ELF", ErrNotKernel)
	}
	return image, nil
}

// payloadOf reads the compressed payload that the setup header points to.
func payloadOf(r io.ReaderAt, size int64, head []byte) ([]byte, error) {
	if string(head[setupMagic:setupMagic+4]) != "HdrS" {
		return nil, fmt.Errorf("%w: neither bzImage nor ELF", ErrNotKernel)
	}
	if v := binary.LittleEndian.Uint16(head[setupVersion:]); v < payloadSince {
		return nil, fmt.Errorf("%w: boot protocol %#x is older than %#x", ErrNotKernel, v, payloadSince)
	}
	sectors := int64(head[setupSects])
	if sectors == 0 {
		sectors = 4 // boot.rst: for backwards compatibility
	}
	start := (sectors+1)*512 + int64(binary.LittleEndian.Uint32(head[payloadOffset:]))
	length := int64(binary.LittleEndian.Uint32(head[payloadLength:]))
	if length > maxPayload {
		return nil, fmt.Errorf("%w: payload of %d bytes", ErrTooLarge, length)
	}
	if length < 8 || start+length > size {
		return nil, fmt.Errorf("%w: cut short: its payload ends at byte %d of %d", ErrNotKernel, start+length, size)
	}
	payload := make([]byte, length)
	return payload, readAll(r, payload, start)
}

func readAll(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read kernel: %w", err)
}
