package inputs

import (
	"io"
	"os"
	"time"
)

// section is a file as it is when it is opened: its writer may go on.
func section(f *os.File) (Segment, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.NewSectionReader(f, 0, info.Size()), nil
}

// OpenScript reads a log's files and makes a script of them. A log that can't be read is a script with a gap. The files are closed.
func OpenScript(files []*os.File, from time.Time) *Script {
	k, err := readFiles(files)
	s := NewScript(k, from)
	if err != nil {
		s.Gaps = []string{err.Error()}
	}
	return s
}

func readFiles(files []*os.File) (Kept, error) {
	var segments []Segment
	var failed error
	for _, f := range files {
		defer f.Close()
		s, err := section(f)
		if err != nil {
			failed = err
			continue
		}
		segments = append(segments, s)
	}
	if failed != nil {
		return Kept{}, failed
	}
	return Read(segments)
}
