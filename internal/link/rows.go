package link

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// A view of a guest can have more rows than fit in a frame, and a guest chooses how many: they come through a pipe that goes
// along with the call, a line of JSON each. Both ends bound them.
const (
	MaxRows     = 1 << 18
	MaxRowBytes = 64 << 20 // of all rows of one view
)

// Rows is the answer of a view: how many rows went into the pipe.
type Rows struct {
	Count int `json:"count"`
}

// ErrTooMany: a view has more rows than are passed on.
var ErrTooMany = errors.New("too many rows")

// WriteRows writes all rows, or nothing where they are too many.
func WriteRows[T any](w io.Writer, rows []T) error {
	if len(rows) > MaxRows {
		return fmt.Errorf("%w: %d", ErrTooMany, len(rows))
	}
	out := bufio.NewWriterSize(w, 64<<10)
	enc := json.NewEncoder(out)
	for i := range rows {
		if err := enc.Encode(&rows[i]); err != nil {
			return err
		}
	}
	return out.Flush()
}

// ReadRows reads rows until the other end closes.
func ReadRows[T any](r io.Reader) ([]T, error) {
	limited := &io.LimitedReader{R: r, N: MaxRowBytes}
	dec := json.NewDecoder(bufio.NewReaderSize(limited, 64<<10))
	var rows []T
	for {
		var row T
		err := dec.Decode(&row)
		switch {
		case limited.N == 0 || len(rows) == MaxRows:
			return nil, fmt.Errorf("%w: more than %d, or %d bytes", ErrTooMany, MaxRows, MaxRowBytes)
		case err == io.EOF:
			return rows, nil
		case err != nil:
			return nil, fmt.Errorf("%w: rows: %w", ErrProtocol, err)
		}
		rows = append(rows, row)
	}
}
