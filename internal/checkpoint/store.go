package checkpoint

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"vigia/internal/vm"
)

// Names of a checkpoint's files.
const (
	FileRecord  = "record.json"
	FileMemory  = "memory"
	FileDevices = "devices"

	making   = ".new-"
	leaving  = ".old-"
	maxBytes = 1 << 20 // of a record
)

// Store is the checkpoints of one state directory. Its methods may be called from many goroutines.
type Store struct {
	dir string

	mu      sync.Mutex
	all     map[ID]Record
	damaged map[ID]error
}

// Open reads all records, and removes what a crash left half made or half removed.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{dir: dir, all: map[ID]Record{}, damaged: map[ID]error{}}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), making) || strings.HasPrefix(e.Name(), leaving) {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return nil, err
			}
			continue
		}
		id, err := ParseID(e.Name())
		if err != nil {
			continue // not ours
		}
		r, err := readRecord(filepath.Join(dir, e.Name(), FileRecord))
		if err == nil && r.ID != id {
			err = fmt.Errorf("%w: its record is %s's", ErrDamaged, r.ID)
		}
		if err != nil {
			s.damaged[id] = err
			continue
		}
		s.all[id] = r
	}
	return s, nil
}

// A record's file is the SHA-256 of what follows, in hexadecimal digits, a newline, and the record as JSON.
func readRecord(path string) (Record, error) {
	info, err := os.Stat(path)
	if err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if info.Size() > maxBytes {
		return Record{}, fmt.Errorf("%w: a record of %d bytes", ErrDamaged, info.Size())
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	sum, body, ok := bytes.Cut(raw, []byte("\n"))
	if h := sha256.Sum256(body); !ok || string(sum) != hex.EncodeToString(h[:]) {
		return Record{}, fmt.Errorf("%w: its record has not the sum it should", ErrDamaged)
	}
	var r Record
	if err := json.Unmarshal(body, &r); err != nil {
		return Record{}, fmt.Errorf("%w: its record: %w", ErrDamaged, err)
	}
	return r, nil
}

func writeRecord(path string, r Record) error {
	body, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	sum := sha256.Sum256(body)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(append([]byte(hex.EncodeToString(sum[:])+"\n"), body...)); err != nil {
		return err
	}
	return f.Sync()
}

// Draft is a checkpoint being made.
type Draft struct {
	s   *Store
	ID  ID
	dir string
}

// Begin makes room for a new checkpoint.
func (s *Store) Begin() (*Draft, error) {
	d := &Draft{s: s, ID: NewID()}
	d.dir = filepath.Join(s.dir, making+string(d.ID))
	return d, os.Mkdir(d.dir, 0o700)
}

// Create makes one of its files, empty, for writing.
func (d *Draft) Create(name string) (*os.File, error) {
	return os.OpenFile(filepath.Join(d.dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
}

// Commit makes the checkpoint be: whoever wrote its files has synced them.
func (d *Draft) Commit(r Record) error {
	r.ID = d.ID
	err := writeRecord(filepath.Join(d.dir, FileRecord), r)
	if err == nil {
		err = syncDir(d.dir)
	}
	if err == nil {
		err = os.Rename(d.dir, filepath.Join(d.s.dir, string(d.ID)))
	}
	if err == nil {
		err = syncDir(d.s.dir)
	}
	if err != nil {
		return fmt.Errorf("record of checkpoint %s: %w", d.ID, err)
	}
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	d.s.all[r.ID] = r
	return nil
}

// Discard gives it up.
func (d *Draft) Discard() { os.RemoveAll(d.dir) }

// Get returns one that is not removed.
func (s *Store) Get(id ID) (Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.all[id]
	if err := s.damaged[id]; err != nil {
		return Record{}, fmt.Errorf("checkpoint %s: %w", id, err)
	}
	if !ok || r.Removed {
		return Record{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	return r, nil
}

// List returns those that keep accepts, the oldest first.
func (s *Store) List(keep func(*Record) bool) []Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Record
	for _, r := range s.all {
		if !r.Removed && keep(&r) {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b Record) int { return a.Time.Compare(b.Time) })
	return out
}

// Damaged returns those whose records can't be read, and why.
func (s *Store) Damaged() map[ID]error {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[ID]error{}
	for id, err := range s.damaged {
		out[id] = err
	}
	return out
}

// Chain returns a checkpoint and all that its memory lies on, the oldest first.
func (s *Store) Chain(id ID) ([]Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var chain []Record
	for at := id; at != ""; {
		r, ok := s.all[at]
		if !ok {
			return nil, fmt.Errorf("checkpoint %s lies on %s: %w", id, at, errors.Join(ErrDamaged, s.damaged[at]))
		}
		if len(chain) > len(s.all) {
			return nil, fmt.Errorf("checkpoint %s: %w: it lies on itself", id, ErrDamaged)
		}
		chain, at = append(chain, r), r.Parent
	}
	slices.Reverse(chain)
	return chain, nil
}

// Open opens a file of a checkpoint for reading.
func (s *Store) Open(id ID, name string) (*os.File, error) {
	return os.Open(filepath.Join(s.dir, string(id), name))
}

// Change edits a record.
func (s *Store) Change(id ID, edit func(*Record)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.all[id]
	if !ok {
		return fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	edit(&r)
	return s.rewrite(r)
}

// rewrite puts a record in the old one's place. The caller holds mu.
func (s *Store) rewrite(r Record) error {
	dir := filepath.Join(s.dir, string(r.ID))
	next := filepath.Join(dir, "."+FileRecord)
	if err := writeRecord(next, r); err != nil {
		return err
	}
	if err := os.Rename(next, filepath.Join(dir, FileRecord)); err != nil {
		return err
	}
	s.all[r.ID] = r
	return syncDir(dir)
}

// Remove takes a checkpoint away. Others that lie on it are not harmed: its files stay until they are gone.
func (s *Store) Remove(id ID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.all[id]
	if !ok && s.damaged[id] == nil || r.Removed {
		return fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	if s.children(id) > 0 {
		if !ok {
			return fmt.Errorf("checkpoint %s: others lie on it", id)
		}
		r.Removed = true
		return s.rewrite(r)
	}
	for id != "" {
		parent := s.all[id].Parent
		if err := s.erase(id); err != nil {
			return err
		}
		if p, ok := s.all[parent]; !ok || !p.Removed || s.children(parent) > 0 {
			return nil
		}
		id = parent
	}
	return nil
}

func (s *Store) children(id ID) (n int) {
	for _, r := range s.all {
		if r.Parent == id {
			n++
		}
	}
	return n
}

func (s *Store) erase(id ID) error {
	old := filepath.Join(s.dir, leaving+string(id))
	if err := os.Rename(filepath.Join(s.dir, string(id)), old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	delete(s.all, id)
	delete(s.damaged, id)
	if err := syncDir(s.dir); err != nil {
		return err
	}
	return os.RemoveAll(old)
}

// Layers are the disk layers that checkpoints need. A damaged record's are not known: then ok is false, and nobody may take
// layers away.
func (s *Store) Layers() (used map[string]bool, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	used = map[string]bool{}
	for _, r := range s.all {
		if r.Removed {
			continue // its memory is needed, its disk is not: each child names its own layers
		}
		for _, l := range r.Layers {
			used[l] = true
		}
	}
	return used, len(s.damaged) == 0
}

// Of returns the checkpoints of a machine.
func (s *Store) Of(m vm.ID) []Record { return s.List(func(r *Record) bool { return r.Machine == m }) }

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
