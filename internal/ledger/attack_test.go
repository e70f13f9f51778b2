package ledger

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Every bit of a small ledger, in every file, is flipped: each must be found, and by a named error.
func TestEveryBitCounts(t *testing.T) {
	dir, vkey := made(t, 2)
	flipAll(t, dir, vkey, func(size int64) []int64 {
		bits := make([]int64, size*8)
		for i := range bits {
			bits[i] = int64(i)
		}
		return bits
	})
}

// Of a larger one, with full tiles and a second level, some of every file.
func TestSampledBitsOfALargerLedger(t *testing.T) {
	dir, vkey := made(t, 700, 300, 44)
	r := rand.New(rand.NewPCG(1, 2))
	flipAll(t, dir, vkey, func(size int64) []int64 {
		bits := []int64{0, size*8 - 1}
		for range 15 {
			bits = append(bits, r.Int64N(size*8))
		}
		return bits
	})
}

func flipAll(t *testing.T, dir, vkey string, choose func(size int64) []int64) {
	t.Helper()
	if err := verify(dir, vkey); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, name := range filesIn(t, dir) {
		path := filepath.Join(dir, name)
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(whole) == 0 {
			os.WriteFile(path, []byte{0}, 0o600)
			expectNamed(t, name+" grew", verify(dir, vkey))
			os.WriteFile(path, nil, 0o600)
			continue
		}
		for _, bit := range choose(int64(len(whole))) {
			broken := bytes.Clone(whole)
			broken[bit/8] ^= 1 << (bit % 8)
			os.WriteFile(path, broken, 0o600)
			err := verify(dir, vkey)
			if err == nil {
				t.Fatalf("%s: bit %d of byte %d (%q) flipped and not found", name, bit%8, bit/8, whole[bit/8])
			}
			expectNamed(t, name, err)
			n++
		}
		os.WriteFile(path, whole, 0o600)
	}
	if err := verify(dir, vkey); err != nil {
		t.Fatalf("put back, and still: %v", err)
	}
	t.Logf("%d flips, all found", n)
}

var named = []error{ErrKey, ErrSignature, ErrCorrupt, ErrMissing, ErrUnexpected, ErrUnsealed, ErrRolledBack, ErrForked}

func expectNamed(t *testing.T, what string, err error) {
	t.Helper()
	for _, n := range named {
		if errors.Is(err, n) {
			return
		}
	}
	t.Errorf("%s: %v: not a named error", what, err)
}

func TestTruncation(t *testing.T) {
	dir, vkey := made(t, 700, 44)
	for _, name := range filesIn(t, dir) {
		if name == keyFile || strings.HasSuffix(name, ".lock") || name == versionFile {
			continue // not part of what an auditor gets
		}
		path := filepath.Join(dir, name)
		whole, _ := os.ReadFile(path)
		os.Remove(path)
		if err := verify(dir, vkey); !errors.Is(err, ErrMissing) {
			t.Errorf("%s removed: %v", name, err)
		}
		os.WriteFile(path, whole[:len(whole)-1], 0o600)
		if err := verify(dir, vkey); err == nil {
			t.Errorf("%s shortened: not found", name)
		} else {
			expectNamed(t, name, err)
		}
		os.WriteFile(path, whole, 0o600)
	}
}

func TestReordering(t *testing.T) {
	dir, vkey := made(t, 600)
	swap := func(a, b string) {
		x, _ := os.ReadFile(filepath.Join(dir, a))
		y, _ := os.ReadFile(filepath.Join(dir, b))
		os.WriteFile(filepath.Join(dir, a), y, 0o600)
		os.WriteFile(filepath.Join(dir, b), x, 0o600)
	}
	swap("tile/entries/000", "tile/entries/001")
	if err := verify(dir, vkey); !errors.Is(err, ErrCorrupt) {
		t.Errorf("bundles swapped: %v", err)
	}
	swap("tile/0/000", "tile/0/001")
	if err := verify(dir, vkey); err == nil {
		t.Error("bundles and their hashes swapped: not found")
	}
	swap("tile/entries/000", "tile/entries/001")
	if err := verify(dir, vkey); !errors.Is(err, ErrCorrupt) {
		t.Errorf("hashes swapped: %v", err)
	}
	swap("tile/0/000", "tile/0/001")
	path := filepath.Join(dir, "tile/entries/000")
	whole, _ := os.ReadFile(path)
	one := 2 + len(entries(0, 1)[0])
	os.WriteFile(path, append(append(bytes.Clone(whole[one:2*one]), whole[:one]...), whole[2*one:]...), 0o600)
	if err := verify(dir, vkey); !errors.Is(err, ErrCorrupt) {
		t.Errorf("entries swapped: %v", err)
	}
}

func TestUnexpectedFiles(t *testing.T) {
	dir, vkey := made(t, 300)
	for _, name := range []string{"note.txt", "tile/entries/001.p/45", "tile/entries/002", "tile/2/000", ".state/x", "tile/0/000.p/3"} {
		path := filepath.Join(dir, name)
		os.MkdirAll(filepath.Dir(path), 0o700)
		os.WriteFile(path, []byte("x"), 0o600)
		if err := verify(dir, vkey); !errors.Is(err, ErrUnexpected) {
			t.Errorf("%s: %v", name, err)
		}
		os.Remove(path)
	}
	os.Symlink("/etc/passwd", filepath.Join(dir, "tile/link"))
	if err := verify(dir, vkey); !errors.Is(err, ErrUnexpected) {
		t.Errorf("symlink: %v", err)
	}
}

// Put back whole to an earlier state, with valid signatures: only a head kept elsewhere can tell, and it does.
func TestRollback(t *testing.T) {
	ctx := context.Background()
	dir, vkey := made(t, 300, 20)
	old := copyDir(t, dir)
	l := open(t, dir)
	appendAll(t, l, entries(320, 50))
	since := l.Head()
	shut(t, l)

	if _, err := Verify(ctx, dir, vkey, VerifyOptions{Since: &since}); err != nil {
		t.Fatalf("the true one: %v", err)
	}
	if _, err := Verify(ctx, old, vkey, VerifyOptions{Since: &since}); !errors.Is(err, ErrRolledBack) {
		t.Errorf("the old one: %v", err)
	}
	// The list of heads alone tells of a checkpoint and tiles put back.
	heads, _ := os.ReadFile(filepath.Join(dir, headsName))
	os.WriteFile(filepath.Join(old, headsName), heads, 0o600)
	if err := verify(old, vkey); !errors.Is(err, ErrRolledBack) {
		t.Errorf("all but the heads put back: %v", err)
	}
	if _, err := Open(ctx, old, Options{}); err == nil {
		t.Error("and it was opened")
	}
}

// Another history under the same key: whoever owns the key can sign one, but not make it contain the old heads.
func TestFork(t *testing.T) {
	ctx := context.Background()
	dir, vkey := made(t, 10)
	fork := copyDir(t, dir)
	l := open(t, dir)
	appendAll(t, l, entries(10, 5))
	since := l.Head()
	shut(t, l)
	f := open(t, fork)
	appendAll(t, f, entries(100, 9))
	shut(t, f)
	if err := verify(fork, vkey); err != nil {
		t.Fatalf("the fork by itself: %v", err)
	}
	if _, err := Verify(ctx, fork, vkey, VerifyOptions{Since: &since}); !errors.Is(err, ErrForked) {
		t.Errorf("the fork against the true head: %v", err)
	}
	other, _ := made(t, 3)
	if err := verify(other, vkey); !errors.Is(err, ErrKey) && !errors.Is(err, ErrSignature) {
		t.Errorf("another ledger under this key: %v", err)
	}
}

// A tail that was written but never sealed is an error to Verify; Open takes it out and hands it over.
func TestUnsealedTail(t *testing.T) {
	ctx := context.Background()
	dir, vkey := made(t, 250)
	l := open(t, dir)
	if _, err := l.tree.append(entries(250, 20)); err != nil { // as if killed before the head was signed
		t.Fatal(err)
	}
	shut(t, l)
	if err := verify(dir, vkey); !errors.Is(err, ErrUnsealed) {
		t.Errorf("verify: %v", err)
	}
	l = open(t, dir)
	if n := len(l.Unsealed()); n != 20 || l.Head().Size != 250 {
		t.Errorf("%d unsealed, head of %d", n, l.Head().Size)
	}
	if err := verify(dir, vkey); err != nil {
		t.Errorf("after Open: %v", err)
	}
	if at, err := l.Append(ctx, l.Unsealed()[0]); err != nil || at != 250 {
		t.Errorf("append after: %d, %v", at, err)
	}
}

func TestSecondWriterIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	open(t, dir)
	if _, err := Open(context.Background(), dir, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("%v", err)
	}
}

func TestKeys(t *testing.T) {
	ctx := context.Background()
	dir, _ := made(t, 3)
	st, err := os.Stat(filepath.Join(dir, keyFile))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	key := filepath.Join(dir, keyFile)
	os.Chmod(key, 0o644)
	if _, err := Open(ctx, dir, Options{}); !errors.Is(err, ErrKey) {
		t.Errorf("readable key: %v", err)
	}
	os.Remove(key)
	if _, err := Open(ctx, dir, Options{}); !errors.Is(err, ErrKey) {
		t.Errorf("lost key: %v", err)
	}
	os.WriteFile(key, []byte("nonsense\n"), 0o600)
	if _, err := Open(ctx, dir, Options{}); !errors.Is(err, ErrKey) {
		t.Errorf("broken key: %v", err)
	}
	if _, err := Open(ctx, filepath.Join(t.TempDir(), "x"), Options{Origin: "two words"}); !errors.Is(err, ErrKey) {
		t.Errorf("bad origin: %v", err)
	}
}

func TestTooLargeAndClosed(t *testing.T) {
	ctx := context.Background()
	l := open(t, filepath.Join(t.TempDir(), "ledger"))
	if _, err := l.Append(ctx, make([]byte, MaxEntry+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := l.Append(ctx, make([]byte, MaxEntry)); err != nil {
		t.Errorf("as large as may be: %v", err)
	}
	shut(t, l)
	if _, err := l.Append(ctx, []byte("x")); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

func TestExport(t *testing.T) {
	ctx := context.Background()
	dir, vkey := made(t, 300, 7)
	l := open(t, dir)
	appendAll(t, l, [][]byte{[]byte("not json"), []byte(`{"a": 1}`), []byte(`{"h":"<&>\u2028"}`), {}, []byte("null")})
	want := l.Head()
	shut(t, l)
	for _, part := range [][2]uint64{{0, 1 << 60}, {250, 312}, {5, 5}, {311, 400}} {
		var out bytes.Buffer
		if err := Export(ctx, dir, &out, part[0], part[1]); err != nil {
			t.Fatal(err)
		}
		n := uint64(0)
		head, err := VerifyExport(bytes.NewReader(out.Bytes()), vkey, func(e Entry) error { n++; return nil })
		if err != nil || head.Root != want.Root || n != min(part[1], 312)-part[0] {
			t.Errorf("%v: %d entries, %v", part, n, err)
		}
		exportAttacks(t, out.Bytes(), vkey)
	}
}

func exportAttacks(t *testing.T, export []byte, vkey string) {
	t.Helper()
	check := func(what string, b []byte) {
		t.Helper()
		seen := 0
		if _, err := VerifyExport(bytes.NewReader(b), vkey, func(Entry) error { seen++; return nil }); err == nil {
			t.Errorf("%s: not found", what)
		}
	}
	lines := bytes.SplitAfter(export, []byte("\n"))
	lines = lines[:len(lines)-1]
	check("last line gone", bytes.Join(append([][]byte{}, lines[:len(lines)-1]...), nil))
	if len(lines) > 3 {
		check("line left out", bytes.Join(append(append([][]byte{}, lines[:2]...), lines[3:]...), nil))
		check("entry changed", bytes.Replace(export, []byte(`percent`), []byte(`percenT`), 1))
	}
}

func TestProof(t *testing.T) {
	ctx := context.Background()
	dir, vkey := made(t, 300, 7)
	l := open(t, dir)
	for _, i := range []uint64{0, 255, 256, 306} {
		p, err := l.Prove(ctx, i)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Check(vkey); err != nil {
			t.Errorf("entry %d: %v", i, err)
		}
		p.Entry[3] ^= 1
		if _, err := p.Check(vkey); !errors.Is(err, ErrCorrupt) {
			t.Errorf("entry %d changed: %v", i, err)
		}
	}
	if _, err := l.Prove(ctx, 307); !errors.Is(err, ErrMissing) {
		t.Errorf("no such entry: %v", err)
	}
}
