package store

import (
	"context"
	"fmt"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Change is one step of a key's life. A deleted key has the zero value.
type Change[T any] struct {
	Item[T]
	Deleted bool
	Err     error // a damaged value, or the end of the watch
}

// Watch gives every change of keys that begin with prefix, from revision on (0: from now on; what List returned plus
// one: without a gap). The channel closes when ctx ends, when the store closes, or after a Change with Err and no Key:
// the watch was lost, because the revisions asked for are no longer kept, or the cluster is gone. List again then.
func Watch[T any](ctx context.Context, s *Store, prefix string, revision int64) <-chan Change[T] {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.ctx, cancel)
	opts := []clientv3.OpOption{clientv3.WithPrefix()}
	if revision > 0 {
		opts = append(opts, clientv3.WithRev(revision))
	}
	changes := make(chan Change[T])
	events := s.client.Watch(clientv3.WithRequireLeader(ctx), s.prefix+prefix, opts...)
	go func() {
		defer close(changes)
		defer cancel()
		defer stop()
		for r := range events {
			for _, ev := range r.Events {
				if !send(ctx, changes, change[T](s, ev)) {
					return
				}
			}
			if err := r.Err(); err != nil {
				send(ctx, changes, Change[T]{Err: fmt.Errorf("watch %s: %w", prefix, err)})
				return
			}
		}
	}()
	return changes
}

func change[T any](s *Store, ev *clientv3.Event) Change[T] {
	if ev.Type == clientv3.EventTypeDelete {
		return Change[T]{Item: Item[T]{Key: strings.TrimPrefix(string(ev.Kv.Key), s.prefix), Revision: ev.Kv.ModRevision}, Deleted: true}
	}
	it, err := item[T](s, ev.Kv)
	return Change[T]{Item: it, Err: err}
}

func send[T any](ctx context.Context, to chan<- Change[T], c Change[T]) bool {
	select {
	case to <- c:
		return true
	case <-ctx.Done():
		return false
	}
}
