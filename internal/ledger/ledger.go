// Package ledger keeps a tamper-evident record: entries are appended, never changed, and anyone holding the
// record's public key can check a copy of it without the program that wrote it.
//
// # Idea
//
// The entries are the leaves of a Merkle tree (RFC 6962 hashing). A head is a tree's size, its root hash and a time,
// signed: it commits to every entry below its size, in order. Change, drop, swap or add one entry and the root is
// another. Each batch of entries is sealed by a new head before Append returns, so no acknowledged entry is ever
// without a signature.
//
// # Format
//
// A directory in the public tlog-tiles layout (c2sp.org/tlog-tiles), written by Tessera's POSIX driver, with signed
// checkpoints (c2sp.org/tlog-checkpoint, c2sp.org/signed-note):
//
//	checkpoint          the newest head
//	heads               heads of the past, oldest first (thinned when it grows past 4 MiB)
//	key, key.pub        the signing key (mode 0600) and its public half
//	tile/entries/…      the entries, 256 to a file
//	tile/0/… tile/1/…   the tree's hashes, 256 to a file
//	.state/…            Tessera's own state and the locks
//
// Between two batches the directory holds exactly the files of its newest head; whatever else is found there is an
// error to Verify. doc/ledger-format.md has every byte, and what the ledger can and can't prove.
//
// # Use
//
//	l, err := ledger.Open(ctx, dir, ledger.Options{})
//	index, err := l.Append(ctx, entry) // durable and sealed
//	head := l.Head()                   // keep a copy elsewhere
//	report, err := ledger.Verify(ctx, dir, vkey, ledger.VerifyOptions{Since: &head})
package ledger

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"
)

// MaxEntry is the largest entry in bytes; the bundle format has two bytes for a length.
const MaxEntry = 1<<16 - 1

// maxBatch is how many entries are sealed by one head at most.
const maxBatch = 1024

// Errors of opening and appending.
var (
	ErrLocked   = errors.New("the ledger is in use by another process") // Open
	ErrClosed   = errors.New("the ledger is closed")                    // Append, AppendAll
	ErrTooLarge = errors.New("entry too large for the ledger")          // Append, AppendAll
	ErrKey      = errors.New("the ledger's key can't be used")          // Open, Verify
)

// Errors of checking, each wrapped with the file or entry it was found at. Open returns them too, for the part it
// checks.
var (
	ErrSignature  = errors.New("a head's signature does not hold")
	ErrCorrupt    = errors.New("content does not match its hash")
	ErrMissing    = errors.New("part of the ledger is missing")
	ErrUnexpected = errors.New("a file is not part of the ledger")
	ErrUnsealed   = errors.New("entries lie beyond the newest signed head")
	ErrRolledBack = errors.New("the ledger is older than a head known to exist")
	ErrForked     = errors.New("the ledger does not contain a head it once had")
)

// Options of Open. The zero value is right for a new ledger of this host.
type Options struct {
	// Origin names the ledger in its heads, as a key name: no spaces, no plus sign. Used when the key is made;
	// empty: "vigia/" and random digits.
	Origin string
	// Key is the path of the signing key. Empty: "key" in the ledger's directory.
	Key string
	// Now is the clock for heads. Nil: time.Now.
	Now func() time.Time
}

// Hash is a SHA-256 hash, written in base64.
type Hash [32]byte

func (h Hash) String() string               { return base64.StdEncoding.EncodeToString(h[:]) }
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads what MarshalText wrote, and only that form.
func (h *Hash) UnmarshalText(b []byte) error {
	raw, err := base64.StdEncoding.Strict().DecodeString(string(b))
	if err != nil || len(raw) != len(h) || base64.StdEncoding.EncodeToString(raw) != string(b) {
		return fmt.Errorf("not a hash: %q", b)
	}
	copy(h[:], raw)
	return nil
}

// Log is an open ledger. Its methods may be called from several goroutines.
type Log struct {
	dir    string
	now    func() time.Time
	signer note.Signer
	vkey   string

	tree   *tree
	heads  *headsFile
	writer *os.File // locked for as long as the Log is open
	batch  *os.File // locked while files change; Verify shares it

	unsealed [][]byte
	requests chan *request
	done     chan struct{} // closed when the writing goroutine has ended
	closing  sync.RWMutex
	closed   bool

	mu   sync.Mutex
	head Head
}

// Open opens the ledger in dir, making it and its key at first. What a crash left behind is put in order: the
// ledger is exactly as its newest signed head says. It fails with ErrLocked where another process has it open, and
// with an error of checking where the directory isn't what its newest head says; it does not read the whole ledger,
// Verify does.
func Open(ctx context.Context, dir string, opts Options) (_ *Log, err error) {
	quietTessera()
	l := &Log{dir: dir, now: opts.Now, requests: make(chan *request, 4*maxBatch), done: make(chan struct{})}
	if l.now == nil {
		l.now = time.Now
	}
	if err := os.MkdirAll(filepath.Join(dir, stateDir), 0o700); err != nil {
		return nil, fmt.Errorf("make the ledger: %w", err)
	}
	defer func() {
		if err != nil {
			l.release()
		}
	}()
	if l.writer, err = lockFile(filepath.Join(dir, writerLock), true); err != nil {
		return nil, err
	}
	if l.batch, err = os.OpenFile(filepath.Join(dir, batchLock), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("open the ledger: %w", err)
	}
	keyPath := opts.Key
	if keyPath == "" {
		keyPath = filepath.Join(dir, keyFile)
	}
	if l.signer, l.vkey, err = loadKey(dir, keyPath, opts.Origin); err != nil {
		return nil, err
	}
	if err := l.recover(ctx); err != nil {
		return nil, err
	}
	go l.write()
	return l, nil
}

// Close seals what was appended and lets go of the directory. Appends that come later fail with ErrClosed.
func (l *Log) Close(ctx context.Context) error {
	l.closing.Lock()
	first := !l.closed
	l.closed = true
	if first {
		close(l.requests)
	}
	l.closing.Unlock()
	select {
	case <-l.done:
	case <-ctx.Done():
		return fmt.Errorf("close the ledger: %w", ctx.Err())
	}
	if first {
		l.release()
	}
	return nil
}

func (l *Log) release() {
	if l.tree != nil {
		l.tree.stop()
	}
	if l.heads != nil {
		l.heads.close()
	}
	for _, f := range []*os.File{l.batch, l.writer} {
		if f != nil {
			f.Close()
		}
	}
}

// Head returns the newest head: every entry below its size is sealed and durable.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Key returns the public key in the form that Verify and public tools take.
func (l *Log) Key() string { return l.vkey }

// Unsealed returns entries that a crash left written but not sealed, hence never acknowledged. Open took them out:
// the ledger signs nothing that wasn't given to this process. The caller may append them anew.
func (l *Log) Unsealed() [][]byte { return l.unsealed }
