package main

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// settle brings files into the same state in the page cache, whatever was done with them before: written back and
// dropped, and then, with warm, read in order. It matters: a run of small folios costs a large request several times
// what a large folio does, and a large folio costs a small write three times what a small one does.
func settle(warm bool, files ...string) error {
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		if err == nil && warm {
			err = readData(f)
		}
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// readData reads what is not a hole.
func readData(f *os.File) error {
	buf := make([]byte, 1<<20)
	for at := int64(0); ; {
		from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil
		}
		if err != nil {
			return err
		}
		if at, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE); err != nil {
			return err
		}
		for from < at {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), at-from)], from)
			if err != nil && err != io.EOF {
				return err
			}
			if n == 0 {
				break
			}
			from += int64(n)
		}
	}
}
