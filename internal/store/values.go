package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// version is that of the value format.
const version = "1"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Item is a value, its key and the revision of its last change.
type Item[T any] struct {
	Key      string
	Value    T
	Revision int64
}

func encode(v any) (string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("encode: %w", err)
	}
	if len(b) > MaxValue {
		return "", fmt.Errorf("%w: %d bytes", ErrTooLarge, len(b))
	}
	return fmt.Sprintf("%s %08x %s", version, crc32.Checksum(b, castagnoli), b), nil
}

func decode(raw []byte, v any) error {
	head, rest, ok := bytes.Cut(raw, []byte(" "))
	sum, body, ok2 := bytes.Cut(rest, []byte(" "))
	if !ok || !ok2 {
		return fmt.Errorf("%w: not a value", ErrCorrupt)
	}
	if string(head) != version {
		return fmt.Errorf("%w: format %q, this vigia knows %s: it may be from a newer one", ErrCorrupt, head, version)
	}
	want, err := strconv.ParseUint(string(sum), 16, 32)
	if err != nil || len(sum) != 8 || uint32(want) != crc32.Checksum(body, castagnoli) {
		return fmt.Errorf("%w: its sum is wrong", ErrCorrupt)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("%w: %v", ErrCorrupt, err)
	}
	return nil
}

func item[T any](s *Store, kv *mvccpb.KeyValue) (Item[T], error) {
	it := Item[T]{Key: strings.TrimPrefix(string(kv.Key), s.prefix), Revision: kv.ModRevision}
	if err := decode(kv.Value, &it.Value); err != nil {
		return it, fmt.Errorf("%s: %w", it.Key, err)
	}
	return it, nil
}

// Get reads one value; ErrNotFound where there is none.
func Get[T any](ctx context.Context, s *Store, name string) (Item[T], error) {
	key, err := s.key(name)
	if err != nil {
		return Item[T]{}, err
	}
	r, err := s.kv.Get(ctx, key)
	if err != nil {
		return Item[T]{}, failure("read", name, err)
	}
	if len(r.Kvs) == 0 {
		return Item[T]{}, fmt.Errorf("%s: %w", name, ErrNotFound)
	}
	return item[T](s, r.Kvs[0])
}

// List reads all values whose key begins with prefix, in the order of their keys. A damaged one does not hide the
// others: they come with the error.
func List[T any](ctx context.Context, s *Store, prefix string) ([]Item[T], error) {
	r, err := s.kv.Get(ctx, s.prefix+prefix, clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByKey, clientv3.SortAscend))
	if err != nil {
		return nil, failure("list", prefix, err)
	}
	var bad error
	items := make([]Item[T], 0, len(r.Kvs))
	for _, kv := range r.Kvs {
		it, err := item[T](s, kv)
		if err != nil {
			bad = errors.Join(bad, err)
			continue
		}
		items = append(items, it)
	}
	return items, bad
}

// Put writes a value whatever is there, and returns its revision.
func Put[T any](ctx context.Context, s *Store, name string, v T) (int64, error) {
	return write(ctx, s, name, v, nil, nil)
}

// Create writes a value where there is none; ErrExists where there is.
func Create[T any](ctx context.Context, s *Store, name string, v T) (int64, error) {
	return write(ctx, s, name, v, func(key string) clientv3.Cmp {
		return clientv3.Compare(clientv3.CreateRevision(key), "=", 0)
	}, ErrExists)
}

// Update writes a value whose last change is still revision; ErrConflict where it isn't, or where it is gone.
func Update[T any](ctx context.Context, s *Store, name string, revision int64, v T) (int64, error) {
	if revision <= 0 {
		return 0, fmt.Errorf("%s: %w: revision %d", name, ErrConflict, revision)
	}
	return write(ctx, s, name, v, func(key string) clientv3.Cmp {
		return clientv3.Compare(clientv3.ModRevision(key), "=", revision)
	}, ErrConflict)
}

func write[T any](ctx context.Context, s *Store, name string, v T, when func(key string) clientv3.Cmp, otherwise error) (int64, error) {
	key, err := s.key(name)
	if err != nil {
		return 0, err
	}
	text, err := encode(v)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	txn := s.kv.Txn(ctx)
	if when != nil {
		txn = txn.If(when(key))
	}
	r, err := txn.Then(clientv3.OpPut(key, text)).Commit()
	if err != nil {
		return 0, failure("write", name, err)
	}
	if !r.Succeeded {
		return 0, fmt.Errorf("%s: %w", name, otherwise)
	}
	return r.Header.Revision, nil
}

// Modify reads a value, lets change change it, and writes it back, as often as it takes. Where change fails nothing is
// written and its error returned.
func Modify[T any](ctx context.Context, s *Store, name string, change func(*T) error) (Item[T], error) {
	for {
		it, err := Get[T](ctx, s, name)
		if err != nil {
			return it, err
		}
		if err := change(&it.Value); err != nil {
			return it, err
		}
		revision, err := Update(ctx, s, name, it.Revision, it.Value)
		if errors.Is(err, ErrConflict) && ctx.Err() == nil {
			continue
		}
		it.Revision = revision
		return it, err
	}
}

// Delete removes a value; ErrNotFound where there is none.
func (s *Store) Delete(ctx context.Context, name string) error {
	key, err := s.key(name)
	if err != nil {
		return err
	}
	r, err := s.kv.Delete(ctx, key)
	if err != nil {
		return failure("delete", name, err)
	}
	if r.Deleted == 0 {
		return fmt.Errorf("%s: %w", name, ErrNotFound)
	}
	return nil
}

// DeleteAt removes a value whose last change is still revision; ErrConflict where it isn't.
func (s *Store) DeleteAt(ctx context.Context, name string, revision int64) error {
	key, err := s.key(name)
	if err != nil {
		return err
	}
	r, err := s.kv.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).Then(clientv3.OpDelete(key)).Commit()
	if err != nil {
		return failure("delete", name, err)
	}
	if !r.Succeeded {
		return fmt.Errorf("%s: %w", name, ErrConflict)
	}
	return nil
}

// failure names what was being done, and knows etcd's words for a full or absent store.
func failure(what, name string, err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		err = ErrFull
	case errors.Is(err, rpctypes.ErrNoLeader), errors.Is(err, rpctypes.ErrTimeout):
		err = fmt.Errorf("%w: %v", ErrUnreachable, err)
	}
	return fmt.Errorf("%s %s: %w", what, name, err)
}
