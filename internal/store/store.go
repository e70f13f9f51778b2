// Package store keeps what vigia wants and knows: machines, images, quarantines, the last ledger head. It is a small
// typed face on etcd.
//
// # Idea
//
// A key holds one JSON value. etcd gives every change a revision, one number that only grows: Update names the
// revision it read and fails with ErrConflict if somebody was faster, and a machine's key revision serves as the
// fencing token that the disk server and the launcher check. Nothing is locked.
//
// On one host etcd runs inside the daemon, with no socket at all: no other process can speak to it. On many it is a
// cluster, given by its URLs; the code above is the same.
//
// # Format
//
// Keys are "/vigia/<kind>/<name>". A value is text, one line:
//
//	1 9ae0daaf {"name":"web","memory":268435456}
//
// the format's version, the CRC-32C of what follows the second space, in hexadecimal, and the JSON. The sum finds bits
// that flipped in the database file, which bbolt itself would not notice. doc/store.md has the rest.
//
//	s, err := store.Open(ctx, store.Options{Dir: dir})
//	rev, err := store.Create(ctx, s, "machines/web", spec)
//	item, err := store.Get[Spec](ctx, s, "machines/web")
//	_, err = store.Update(ctx, s, "machines/web", item.Revision, spec)
package store

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// Errors, each wrapped with the key, directory or address it is about.
var (
	ErrNotFound    = errors.New("not found")
	ErrExists      = errors.New("exists already")
	ErrConflict    = errors.New("changed meanwhile")
	ErrLocked      = errors.New("in use by another vigia")
	ErrCorrupt     = errors.New("stored state is damaged")
	ErrUnreachable = errors.New("store can't be reached")
	ErrTooLarge    = errors.New("value too large for the store")
	ErrKey         = errors.New("not a key")
	ErrFull        = errors.New("store is full")
)

// MaxValue is the largest encoded value in bytes, MaxKey the longest key.
const (
	MaxValue = 1 << 20
	MaxKey   = 512
)

// prefix is put before every key, so that a shared cluster can be.
const prefix = "/vigia/"

// Options of Open: either Dir alone, or Endpoints.
type Options struct {
	// Dir is where the embedded store keeps its files. It is locked: a second daemon on it gets ErrLocked.
	Dir string
	// Endpoints are the URLs of an etcd cluster to use in place of the embedded one.
	Endpoints []string
	// Prefix is put before every key. Empty: "/vigia/".
	Prefix string
	// TLS, User and Password are for the cluster.
	TLS            *tls.Config
	User, Password string
}

// Store is an open store. Its methods may be called from several goroutines.
type Store struct {
	client *clientv3.Client
	kv     clientv3.KV
	prefix string
	etcd   *embed.Etcd
	lock   *Lock
	cancel context.CancelFunc
	ctx    context.Context
	once   sync.Once
	err    error
}

// Open opens the store and waits until it answers.
func Open(ctx context.Context, opts Options) (*Store, error) {
	s := &Store{prefix: opts.Prefix}
	if s.prefix == "" {
		s.prefix = prefix
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	var err error
	switch {
	case len(opts.Endpoints) > 0:
		err = s.connect(ctx, opts)
	case opts.Dir != "":
		err = s.embed(ctx, opts.Dir)
	default:
		err = errors.New("open the store: neither a directory nor an address was given")
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	s.kv = s.client.KV
	return s, nil
}

// connect dials a cluster and makes sure that it answers.
func (s *Store) connect(ctx context.Context, opts Options) error {
	client, err := clientv3.New(clientv3.Config{
		Context: s.ctx, Endpoints: opts.Endpoints, TLS: opts.TLS, Username: opts.User, Password: opts.Password,
		DialTimeout: 5 * time.Second, DialKeepAliveTime: 30 * time.Second, DialKeepAliveTimeout: 10 * time.Second,
		MaxCallSendMsgSize: 2 * MaxValue, Logger: zap.NewNop(),
	})
	if err != nil {
		return fmt.Errorf("%w: %v: %v", ErrUnreachable, opts.Endpoints, err)
	}
	s.client = client
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := client.Get(ctx, s.prefix, clientv3.WithCountOnly(), clientv3.WithPrefix()); err != nil {
		return fmt.Errorf("%w: %v: %v", ErrUnreachable, opts.Endpoints, err)
	}
	return nil
}

// Close ends watches and lets go of the directory. What was put is already durable.
func (s *Store) Close() error {
	s.once.Do(func() {
		s.cancel()
		if s.client != nil {
			s.client.Close()
		}
		if s.etcd != nil {
			s.etcd.Close()
		}
		if s.lock != nil {
			s.err = s.lock.Release()
		}
	})
	return s.err
}

func (s *Store) key(name string) (string, error) {
	if name == "" || len(name) > MaxKey || name[0] == '/' {
		return "", fmt.Errorf("%w: %.64q", ErrKey, name)
	}
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c >= 0x7f {
			return "", fmt.Errorf("%w: %.64q: character %q", ErrKey, name, c)
		}
	}
	return s.prefix + name, nil
}
