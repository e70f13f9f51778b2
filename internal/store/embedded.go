package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	member = "vigia" // the embedded member's name, and the first part of its files' paths

	// A single member hears no one: the tick is only the period of a timer, and what it costs idle. Elections end
	// after at most two election times, which a start has to wait for.
	tickMs     = 50
	electionMs = 250

	quota       = 256 << 20 // of the database file; vigia's state is a few MB
	keep        = "1000"    // revisions kept for watchers before compaction
	defragAt    = 32        // MiB that a start may win by rewriting the file
	walSegment  = 4 << 20   // etcd reserves two segments at once: by default 64 MiB each
	snapshot    = 5000      // entries in the write-ahead log before a snapshot: keeps memory and the log small
	startLimit  = 30 * time.Second
	maxWalFiles = 3
)

var segmentOnce sync.Once

// embed starts etcd in this process. It listens nowhere: the client is joined to it in memory, which also frees the
// state directory from the 108 bytes that a unix socket's path may have.
func (s *Store) embed(ctx context.Context, dir string) (err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the store: %w", err)
	}
	if s.lock, err = LockDir(dir); err != nil {
		return err
	}
	data := filepath.Join(dir, "etcd")
	if err := preflight(data); err != nil {
		return err
	}
	segmentOnce.Do(func() { wal.SegmentSizeBytes = walSegment })
	if s.etcd, err = start(config(data)); err != nil {
		return err
	}
	limit := time.NewTimer(startLimit)
	defer limit.Stop()
	select {
	case <-s.etcd.Server.ReadyNotify():
	case err := <-s.etcd.Err():
		return fmt.Errorf("start the store in %s: %w", dir, err)
	case <-limit.C:
		return fmt.Errorf("start the store in %s: not ready after %v", dir, startLimit)
	case <-ctx.Done():
		return fmt.Errorf("start the store in %s: %w", dir, ctx.Err())
	}
	s.client = v3client.New(s.etcd.Server)
	return nil
}

func config(data string) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name = member
	cfg.Dir = data
	self := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}} // a name for the one member; nothing listens there
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = self, self
	cfg.InitialCluster = member + "=" + self[0].String()
	cfg.TickMs, cfg.ElectionMs = tickMs, electionMs
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = snapshot, snapshot
	cfg.MaxSnapFiles, cfg.MaxWalFiles = 2, maxWalFiles
	cfg.QuotaBackendBytes = quota
	cfg.MaxRequestBytes = 2 * MaxValue
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModeRevision, keep
	cfg.BootstrapDefragThresholdMegabytes = defragAt
	cfg.UnsafeNoFsync = false
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(quietLogger())
	return cfg
}

// quietLogger says nothing, and makes a panic of what etcd would end the process for.
func quietLogger() *zap.Logger {
	return zap.New(zapcore.NewNopCore(), zap.WithFatalHook(zapcore.WriteThenPanic), zap.WithPanicHook(zapcore.WriteThenPanic))
}

// start starts etcd, which panics on files it can't make sense of.
func start(cfg *embed.Config) (e *embed.Etcd, err error) {
	defer func() {
		if r := recover(); r != nil {
			e, err = nil, fmt.Errorf("%w: %s: %v", ErrCorrupt, cfg.Dir, r)
		}
	}()
	e, err = embed.StartEtcd(cfg)
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return nil, fmt.Errorf("start the store: %w", err)
		}
		return nil, fmt.Errorf("start the store in %s: %w", cfg.Dir, err)
	}
	return e, nil
}
