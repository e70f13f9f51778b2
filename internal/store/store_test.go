package store

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"
)

type machine struct {
	Name   string `json:"name"`
	Memory int64  `json:"memory"`
}

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(context.Background(), Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestValues(t *testing.T) {
	ctx := context.Background()
	began := time.Now()
	s := open(t, filepath.Join(t.TempDir(), "store"))
	t.Logf("ready in %v", time.Since(began))
	rev, err := Create(ctx, s, "machines/web", machine{"web", 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Create(ctx, s, "machines/web", machine{}); !errors.Is(err, ErrExists) {
		t.Fatalf("second create: %v", err)
	}
	next, err := Update(ctx, s, "machines/web", rev, machine{"web", 2})
	if err != nil || next <= rev {
		t.Fatalf("update: %d, %v", next, err)
	}
	if _, err := Update(ctx, s, "machines/web", rev, machine{"web", 3}); !errors.Is(err, ErrConflict) {
		t.Fatalf("late update: %v", err)
	}
	it, err := Get[machine](ctx, s, "machines/web")
	if err != nil || it.Value.Memory != 2 || it.Revision != next || it.Key != "machines/web" {
		t.Fatalf("get: %+v, %v", it, err)
	}
	if _, err := Get[machine](ctx, s, "machines/db"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("get of nothing: %v", err)
	}
	if _, err := Put(ctx, s, "machines/db", machine{"db", 9}); err != nil {
		t.Fatal(err)
	}
	all, err := List[machine](ctx, s, "machines/")
	if err != nil || len(all) != 2 || all[0].Value.Name != "db" {
		t.Fatalf("list: %+v, %v", all, err)
	}
	if err := s.Delete(ctx, "machines/db"); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(ctx, "machines/db"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("second delete: %v", err)
	}
}
