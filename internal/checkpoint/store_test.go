package checkpoint

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func add(t *testing.T, s *Store, parent ID, layers ...string) ID {
	t.Helper()
	d, err := s.Begin()
	if err != nil {
		t.Fatal(err)
	}
	f, err := d.Create(FileMemory)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := d.Commit(Record{Machine: "0123456789abcdef", Parent: parent, Time: time.Now(), Layers: layers}); err != nil {
		t.Fatal(err)
	}
	return d.ID
}

// TestTree: what others lie on outlives its removal, and no longer than needed.
func TestTree(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	a := add(t, s, "", "l1")
	b := add(t, s, a, "l1", "l2")
	c := add(t, s, b, "l1", "l2", "l3")
	d := add(t, s, b, "l1", "l2", "l4")
	if err := s.Remove(b); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(b); !errors.Is(err, ErrNotFound) {
		t.Errorf("a removed checkpoint: %v", err)
	}
	if err := s.Remove(b); !errors.Is(err, ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	s = open(t, dir)
	chain, err := s.Chain(c)
	if err != nil || len(chain) != 3 || chain[0].ID != a || chain[2].ID != c {
		t.Errorf("chain: %v %v", chain, err)
	}
	if n := len(s.Of("0123456789abcdef")); n != 3 {
		t.Errorf("%d are listed", n)
	}
	if err := s.Remove(c); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Chain(d); err != nil {
		t.Errorf("the sibling: %v", err)
	}
	if used, ok := s.Layers(); !ok || used["l3"] || !used["l4"] {
		t.Errorf("layers: %v", used)
	}
	if err := s.Remove(d); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
	if err := s.Remove(a); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

// TestCrashes: what a crash leaves is swept, and damage is named.
func TestCrashes(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	a := add(t, s, "")
	if _, err := s.Begin(); err != nil {
		t.Fatal(err)
	}
	os.Mkdir(filepath.Join(dir, leaving+"0000000000000000"), 0o700)
	os.WriteFile(filepath.Join(dir, string(a), "."+FileRecord), []byte("half"), 0o600)
	s = open(t, dir)
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
	if err := s.Change(a, func(r *Record) { r.Label = "good" }); err != nil {
		t.Fatal(err)
	}
	if r, err := open(t, dir).Get(a); err != nil || r.Label != "good" {
		t.Errorf("%+v %v", r, err)
	}
	path := filepath.Join(dir, string(a), FileRecord)
	raw, _ := os.ReadFile(path)
	for at := range raw {
		bad := append([]byte(nil), raw...)
		bad[at] ^= 1
		os.WriteFile(path, bad, 0o600)
		if _, err := readRecord(path); !errors.Is(err, ErrDamaged) {
			t.Fatalf("byte %d flipped: %v", at, err)
		}
	}
	s = open(t, dir)
	if _, err := s.Get(a); !errors.Is(err, ErrDamaged) {
		t.Errorf("damaged: %v", err)
	}
	if _, ok := s.Layers(); ok {
		t.Error("layers are said to be known though a record is not")
	}
	if err := s.Remove(a); err != nil {
		t.Error(err)
	}
}
