package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const childEnv = "VIGIA_STORE_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		child(dir)
	}
	os.Exit(m.Run())
}

// child counts up under one key for ever, and says what was acknowledged.
func child(dir string) {
	ctx := context.Background()
	s, err := Open(ctx, Options{Dir: dir})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	it, err := Get[int64](ctx, s, "count")
	if err != nil && !errors.Is(err, ErrNotFound) {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for n := it.Value + 1; ; n++ {
		if _, err := Put(ctx, s, "count", n); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println(n)
	}
}

func TestKilledStoreLosesNothing(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "store")
	last := int64(0)
	for round := range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for first := true; lines.Scan(); first = false {
			if strings.HasPrefix(lines.Text(), "error") {
				t.Errorf("round %d: %s", round, lines.Text())
			}
			fmt.Sscan(lines.Text(), &last)
			if first {
				time.AfterFunc(time.Duration(rand.IntN(80))*time.Millisecond, func() { cmd.Process.Kill() })
			}
		}
		cmd.Wait()
		s, err := Open(ctx, Options{Dir: dir})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		it, err := Get[int64](ctx, s, "count")
		if err != nil || it.Value < last || it.Value > last+1 {
			t.Errorf("round %d: %d acknowledged, %d found, %v", round, last, it.Value, err)
		}
		s.Close()
	}
	t.Logf("%d writes acknowledged", last)
}

func TestSecondDaemonIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := open(t, dir)
	_, err := Open(context.Background(), Options{Dir: dir})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) || !strings.Contains(err.Error(), dir) {
		t.Errorf("%v: must name the process and the directory", err)
	}
	s.Close()
	open(t, dir)
}

// TestDeadHolder: a child that a killed daemon had just made has its lock until it executes its program. It is waited for.
func TestDeadHolder(t *testing.T) {
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	left, err := LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "lock"), fmt.Appendln(nil, dead.Process.Pid), 0o600); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(200*time.Millisecond, func() { left.Release() })
	next, err := LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	next.Release()
}

// Files of the store are damaged, one after the other. Never does that end the process, or pass in silence where a
// value was hit.
func TestDamagedFiles(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "store")
	s := open(t, dir)
	for i := range 50 {
		if _, err := Put(ctx, s, fmt.Sprint("machines/m", i), machine{fmt.Sprint("m", i), int64(i)}); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	db, _ := filepath.Glob(filepath.Join(dir, "etcd/member/snap/db"))
	logs, _ := filepath.Glob(filepath.Join(dir, "etcd/member/wal/*.wal"))
	if len(db) != 1 || len(logs) == 0 {
		t.Fatal(db, logs)
	}
	damage := func(what, file string, how func([]byte) []byte) {
		t.Run(what, func(t *testing.T) {
			whole, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			defer os.WriteFile(file, whole, 0o600)
			os.WriteFile(file, how(append([]byte(nil), whole...)), 0o600)
			s, err := Open(ctx, Options{Dir: dir})
			if err == nil {
				s.Close()
				t.Fatal("opened")
			}
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("%v: not ErrCorrupt", err)
			}
		})
	}
	zero := func(from, to int) func([]byte) []byte {
		return func(b []byte) []byte { clear(b[from:min(to, len(b))]); return b }
	}
	damage("db-metas", db[0], zero(0, 8192))
	damage("db-all-pages", db[0], zero(8192, 1<<30))
	damage("db-cut", db[0], func(b []byte) []byte { return b[:5*4096] })
	damage("db-empty", db[0], func([]byte) []byte { return nil })
	damage("db-noise", db[0], func(b []byte) []byte {
		r := rand.New(rand.NewPCG(1, 2))
		for i := 8192; i < len(b); i++ {
			b[i] = byte(r.Uint32())
		}
		return b
	})
	damage("wal-start", logs[0], zero(0, 64))
	damage("wal-flip", logs[0], func(b []byte) []byte { b[600] ^= 4; return b })
	damage("wal-gone", logs[0], func(b []byte) []byte { return nil })
	open(t, dir)
}

// A bit that flipped inside a value is found when it is read.
func TestFlippedValue(t *testing.T) {
	ctx := context.Background()
	s := open(t, filepath.Join(t.TempDir(), "store"))
	for name, raw := range map[string]string{
		"flipped": strings.Replace(mustEncode(t, machine{"web", 1}), "web", "wea", 1),
		"newer":   "2" + mustEncode(t, machine{"web", 1})[1:],
		"empty":   "",
		"alien":   `{"name":"web"}`,
	} {
		if _, err := s.client.Put(ctx, s.prefix+"machines/"+name, raw); err != nil {
			t.Fatal(err)
		}
		if _, err := Get[machine](ctx, s, "machines/"+name); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Put(ctx, s, "machines/good", machine{"good", 1}); err != nil {
		t.Fatal(err)
	}
	all, err := List[machine](ctx, s, "machines/")
	if !errors.Is(err, ErrCorrupt) || len(all) != 1 {
		t.Errorf("list: %v, %v: the good one must come, with the error", all, err)
	}
}

func mustEncode(t *testing.T, v any) string {
	t.Helper()
	text, err := encode(v)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestBadInput(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	s := open(t, filepath.Join(dir, "store"))
	for _, key := range []string{"", "/x", "a b", "a\n", "ü", strings.Repeat("k", MaxKey+1)} {
		if _, err := Put(ctx, s, key, 1); !errors.Is(err, ErrKey) {
			t.Errorf("key %.20q: %v", key, err)
		}
	}
	if _, err := Put(ctx, s, "big", strings.Repeat("x", MaxValue)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("big value: %v", err)
	}
	if _, err := Put(ctx, s, "fits", strings.Repeat("x", MaxValue-2)); err != nil {
		t.Errorf("largest value: %v", err)
	}
	if _, err := Open(ctx, Options{}); err == nil {
		t.Error("opened nothing")
	}
	file := filepath.Join(dir, "file")
	os.WriteFile(file, nil, 0o600)
	if _, err := Open(ctx, Options{Dir: file}); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a file for a directory: %v", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, Options{Endpoints: []string{"http://127.0.0.1:9"}}); !errors.Is(err, ErrUnreachable) {
		t.Errorf("nobody there: %v", err)
	}
}

// A state directory may lie deeper than a unix socket's path may be long.
func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("deep/", 40), "store")
	s := open(t, dir)
	if _, err := Put(context.Background(), s, "a", 1); err != nil {
		t.Error(err)
	}
}
