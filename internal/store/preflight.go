package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.uber.org/zap"
)

// preflight reads the files of the embedded store before etcd does, since etcd opens its database on a goroutine of
// its own, where a damaged page ends the process. A store that was never begun passes.
func preflight(data string) error {
	db := filepath.Join(data, "member", "snap", "db")
	if err := checkDB(db); err != nil {
		return fmt.Errorf("%w: %s: %v", ErrCorrupt, db, err)
	}
	logs := filepath.Join(data, "member", "wal")
	if err := checkWAL(logs, db); err != nil {
		return fmt.Errorf("%w: %s: %v", ErrCorrupt, logs, err)
	}
	return nil
}

// checkDB walks every page that is in use. Faults of the mapped file and bbolt's own panics become errors.
func checkDB(path string) (err error) {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Size() == 0 {
		return errors.New("the file is empty")
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%v", r)
		}
	}()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return walk(b, 0) })
	})
}

func walk(b *bolt.Bucket, depth int) error {
	if depth > 8 {
		return errors.New("buckets nested too deep")
	}
	var last []byte
	return b.ForEach(func(k, v []byte) error {
		if last != nil && bytes.Compare(last, k) >= 0 {
			return fmt.Errorf("key %x is out of order", k)
		}
		last = k
		if v == nil {
			sub := b.Bucket(k)
			if sub == nil {
				return fmt.Errorf("bucket %q is gone", k)
			}
			return walk(sub, depth+1)
		}
		return nil
	})
}

// checkWAL reads the write-ahead log from its last snapshot on, by its own sums. A torn last record is what a crash
// leaves; etcd cuts it off.
func checkWAL(dir, db string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(db); err == nil {
			return errors.New("the write-ahead log is missing")
		}
		return nil
	}
	snaps, err := wal.ValidSnapshotEntries(zap.NewNop(), dir)
	if err != nil {
		return err
	}
	at := &walpb.Snapshot{}
	if n := len(snaps); n > 0 {
		at = snaps[n-1]
	}
	_, err = wal.Verify(zap.NewNop(), dir, at)
	return err
}
