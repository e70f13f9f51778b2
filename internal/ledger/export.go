package ledger

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/sys/unix"
)

// exportHead is the first line of an export.
type exportHead struct {
	Format string `json:"format"` // "vigia-ledger-1"
	Key    string `json:"key"`
	From   uint64 `json:"from"`
	To     uint64 `json:"to"`
	Head   string `json:"head"` // signed, of the whole ledger
}

// exportLine is one entry. An entry that is JSON on one line stands as it is, any other as base64.
type exportLine struct {
	Index uint64          `json:"index"`
	Leaf  Hash            `json:"leaf_hash"`
	Entry json.RawMessage `json:"entry,omitempty"`
	Data  []byte          `json:"data,omitempty"`
	Path  []Hash          `json:"path,omitempty"` // where the export isn't the whole ledger
}

const exportFormat = "vigia-ledger-1"

// maxLine bounds a line of an export that is read: an entry in base64, its path, the rest.
const maxLine = 2*MaxEntry + 16<<10

// Export writes entries [from, to) as JSON lines that prove themselves: the first line has the key and the signed
// head, each further line an entry and its leaf hash. Of a part of the ledger each line also has the way to the root.
// It needs no daemon; to is cut to the ledger's size.
func Export(ctx context.Context, dir string, w io.Writer, from, to uint64) error {
	lock, err := os.Open(filepath.Join(dir, batchLock))
	if err == nil {
		defer lock.Close()
		if err := flock(lock, unix.LOCK_SH); err != nil {
			return fmt.Errorf("lock %s: %w", batchLock, err)
		}
	}
	vkey, err := ReadKey(dir)
	if err != nil {
		return err
	}
	text, err := readFull(dir, checkpointFile, maxHead)
	if err != nil {
		return err
	}
	head, err := ParseHead(text, vkey)
	if err != nil {
		return err
	}
	to = min(to, head.Size)
	from = min(from, to)
	buffered := bufio.NewWriter(w)
	lines := json.NewEncoder(buffered)
	lines.SetEscapeHTML(false)
	if err := lines.Encode(exportHead{exportFormat, vkey, from, to, head.Note}); err != nil {
		return err
	}
	read := bundleReader(dir, func() uint64 { return head.Size })
	for e, err := range readEntries(ctx, read, from, to) {
		if err != nil {
			return err
		}
		line := exportLine{Index: e.Index, Leaf: Hash(rfc6962.DefaultHasher.HashLeaf(e.Data))}
		if line.Entry = plainJSON(e.Data); line.Entry == nil {
			line.Data = e.Data
		}
		if to-from < head.Size {
			if line.Path, err = inclusion(ctx, dir, e.Index, head.Size); err != nil {
				return err
			}
		}
		if err := lines.Encode(line); err != nil {
			return err
		}
	}
	return buffered.Flush()
}

// plainJSON returns data if the encoder will write the very same bytes.
func plainJSON(data []byte) json.RawMessage {
	var out bytes.Buffer
	if json.Compact(&out, data) != nil || !bytes.Equal(out.Bytes(), data) || string(data) == "null" {
		return nil
	}
	return data
}

// VerifyExport checks an export against the key, and returns the head of the ledger it was taken from. Each entry is
// passed to each, which may be nil.
func VerifyExport(r io.Reader, vkey string, each func(Entry) error) (Head, error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	verifier, err := checkKey(vkey)
	if err != nil {
		return Head{}, err
	}
	var first exportHead
	if !lines.Scan() || json.Unmarshal(lines.Bytes(), &first) != nil || first.Format != exportFormat {
		return Head{}, fmt.Errorf("%w: not an export", ErrCorrupt)
	}
	head, err := parseHead([]byte(first.Head), verifier)
	if err != nil {
		return Head{}, err
	}
	if first.From > first.To || first.To > head.Size || first.Key != vkey {
		return Head{}, fmt.Errorf("%w: the export's first line", ErrCorrupt)
	}
	whole := ranges.NewEmptyRange(0)
	part := first.To-first.From < head.Size
	at := first.From
	for ; lines.Scan(); at++ {
		e, leaf, path, err := parseLine(lines.Bytes(), at)
		if err != nil {
			return Head{}, err
		}
		if part {
			err = checkInclusion(at, leaf[:], path, head)
		} else {
			err = whole.Append(leaf[:], nil)
		}
		if err == nil && each != nil {
			err = each(e)
		}
		if err != nil {
			return Head{}, err
		}
	}
	if err := lines.Err(); err != nil {
		return Head{}, fmt.Errorf("%w: line after entry %d: %v", ErrCorrupt, at, err)
	}
	if at != first.To {
		return Head{}, fmt.Errorf("%w: the export ends at entry %d, want %d", ErrMissing, at, first.To)
	}
	if !part {
		err = checkRoot(whole, head)
	}
	return head, err
}

// checkRoot compares the tree of all entries with a head.
func checkRoot(whole *compact.Range, head Head) error {
	root := rfc6962.DefaultHasher.EmptyRoot()
	if whole.End() > 0 {
		var err error
		if root, err = whole.GetRootHash(nil); err != nil {
			return err
		}
	}
	if !bytes.Equal(root, head.Root[:]) {
		return fmt.Errorf("%w: of %d entries, signed %s", ErrForked, head.Size, head.Time.Format("2006-01-02 15:04:05"))
	}
	return nil
}

func parseLine(b []byte, index uint64) (Entry, Hash, []Hash, error) {
	var line exportLine
	if err := json.Unmarshal(b, &line); err != nil {
		return Entry{}, Hash{}, nil, fmt.Errorf("%w: entry %d: %v", ErrCorrupt, index, err)
	}
	e := Entry{Index: line.Index, Data: line.Data}
	if line.Entry != nil {
		e.Data = line.Entry
	}
	leaf := Hash(rfc6962.DefaultHasher.HashLeaf(e.Data))
	if line.Index != index || leaf != line.Leaf {
		return Entry{}, Hash{}, nil, fmt.Errorf("%w: entry %d of the export", ErrCorrupt, index)
	}
	return e, leaf, line.Path, nil
}
