package ledger

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
	"sync"
	"testing"
	"time"
)

const childEnv = "VIGIA_LEDGER_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		child(dir)
	}
	os.Exit(m.Run())
}

// child appends for ever, from two goroutines, and says what was acknowledged.
func child(dir string) {
	ctx := context.Background()
	l, err := Open(ctx, dir, Options{})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	var mu sync.Mutex
	for g := range 2 {
		go func() {
			r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), uint64(g)))
			for {
				var batch [][]byte
				text := fmt.Sprintf("%d-%d", os.Getpid(), r.Uint64())
				for i := range 1 + r.IntN(90) {
					batch = append(batch, fmt.Appendf(nil, "%s-%d", text, i))
				}
				first, err := l.AppendAll(ctx, batch)
				if err != nil {
					fmt.Println("error", err)
					os.Exit(1)
				}
				mu.Lock()
				fmt.Println(first, len(batch), text)
				mu.Unlock()
			}
		}()
	}
	select {}
}

// A writer is killed again and again, at any instant. Each time the ledger opens, holds every acknowledged entry in
// its place, and verifies against the last head known.
func TestKilledWriterLosesNothing(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "ledger")
	type ack struct {
		first uint64
		n     int
		text  string
	}
	var acks []ack
	var since *Head
	for round := range 10 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		wait := time.Duration(rand.IntN(60_000)) * time.Microsecond
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			var a ack
			if strings.HasPrefix(lines.Text(), "error") {
				t.Errorf("round %d: %s", round, lines.Text())
			}
			if _, err := fmt.Sscan(lines.Text(), &a.first, &a.n, &a.text); err == nil {
				acks = append(acks, a)
			}
			if n == 0 {
				time.AfterFunc(wait, func() { cmd.Process.Kill() })
			}
		}
		cmd.Wait()
		l, err := Open(ctx, dir, Options{})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if _, err := Verify(ctx, dir, l.Key(), VerifyOptions{Since: since}); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		head := l.Head()
		since = &head
		all, err := l.Tail(ctx, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range acks {
			for i := range a.n {
				if at := a.first + uint64(i); at >= head.Size || string(all[at].Data) != fmt.Sprintf("%s-%d", a.text, i) {
					t.Fatalf("round %d: entry %d was acknowledged and is not there", round, at)
				}
			}
		}
		shut(t, l)
	}
	t.Logf("%d acknowledged batches, %d entries", len(acks), since.Size)
}

// The directory as a crash may leave it, one file operation after the other: copies taken while a writer is at work, with
// the newest file of each kind torn off.
func TestOpenAfterEachStep(t *testing.T) {
	ctx := context.Background()
	dir, vkey := made(t, 250, 3)
	l := open(t, dir)
	before := copyDir(t, dir)
	appendAll(t, l, entries(253, 300))
	shut(t, l)
	// In the order they are written: bundles, tiles, state, list of heads, checkpoint.
	steps := []string{"tile/entries/000", "tile/entries/001", "tile/entries/002.p/41", "tile/0/000", "tile/0/001",
		"tile/0/002.p/41", "tile/1/000.p/2", treeStateFile, headsName, checkpointFile}
	for n := range steps {
		crashed := copyDir(t, before)
		for _, name := range steps[:n+1] {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			os.MkdirAll(filepath.Dir(filepath.Join(crashed, name)), 0o700)
			if err := os.WriteFile(filepath.Join(crashed, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		os.WriteFile(filepath.Join(crashed, "tile/0/001123"), []byte("torn"), 0o600)
		os.WriteFile(filepath.Join(crashed, "checkpoint.new"), []byte("torn"), 0o600)
		c, err := Open(ctx, crashed, Options{})
		if err != nil {
			t.Errorf("after %s: %v", steps[n], err)
			continue
		}
		want := uint64(253)
		if n >= len(steps)-2 { // the head is on the list: the batch is sealed
			want = 553
		}
		if c.Head().Size != want {
			t.Errorf("after %s: %d entries, want %d", steps[n], c.Head().Size, want)
		}
		appendAll(t, c, entries(1000, 30))
		if err := verify(crashed, vkey); err != nil {
			t.Errorf("after %s: %v", steps[n], err)
		}
		shut(t, c)
	}
}

// A torn line at the end of the list of heads is cut off; a torn list without its checkpoint is not invented anew.
func TestTornHeads(t *testing.T) {
	dir, vkey := made(t, 5, 5)
	f, err := os.OpenFile(filepath.Join(dir, headsName), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString("vigia/test\n11\n")
	f.Close()
	if err := verify(dir, vkey); !errors.Is(err, ErrCorrupt) {
		t.Errorf("verify: %v", err)
	}
	l := open(t, dir)
	appendAll(t, l, entries(10, 1))
	if err := verify(dir, vkey); err != nil {
		t.Errorf("after Open: %v", err)
	}
}

// The list of heads is thinned before it grows too long, and what is left still verifies.
func TestHeadsAreThinned(t *testing.T) {
	dir, vkey := made(t, 1, 1, 1, 1, 1, 1, 1, 1)
	l := open(t, dir)
	if err := l.heads.thin(); err != nil {
		t.Fatal(err)
	}
	appendAll(t, l, entries(8, 3))
	r, err := Verify(context.Background(), dir, vkey, VerifyOptions{})
	if err != nil || r.Heads >= 10 || r.Heads < 5 {
		t.Errorf("%d heads, %v", r.Heads, err)
	}
}

// An append that fails, as on a full disk, leaves a ledger that verifies and goes on.
func TestFailedAppendIsTakenBack(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Log("root ignores modes: the directory is replaced by a file instead")
	}
	ctx := context.Background()
	dir, vkey := made(t, 250)
	l := open(t, dir)
	// The next batch fills bundle 0 and then can't write tile 0.
	blocked := filepath.Join(dir, "tile/0/000")
	if err := os.MkdirAll(filepath.Join(blocked, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := l.AppendAll(ctx, entries(250, 20)); err == nil {
		t.Fatal("written into a directory")
	}
	os.RemoveAll(blocked)
	if l.Head().Size != 250 {
		t.Errorf("head of %d", l.Head().Size)
	}
	if err := verify(dir, vkey); err != nil {
		t.Errorf("after the failure: %v", err)
	}
	appendAll(t, l, entries(250, 20))
	if err := verify(dir, vkey); err != nil {
		t.Errorf("going on: %v", err)
	}
}

func TestVerifyWhileWriting(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	l := open(t, dir)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i += 50 {
			select {
			case <-stop:
				return
			default:
				appendAll(t, l, entries(i, 50))
			}
		}
	})
	for range 20 {
		if err := verify(dir, l.Key()); err != nil {
			t.Error(err)
			break
		}
		if tail, err := l.Tail(context.Background(), 100); err != nil || uint64(len(tail)) > l.Head().Size {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
}

func FuzzParseHead(f *testing.F) {
	dir, vkey := made(f, 1)
	cp, _ := os.ReadFile(filepath.Join(dir, checkpointFile))
	f.Add(cp)
	f.Add([]byte("vigia/test\n1\nAAAA\ntime x\n\n— vigia/test AAAA\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHead(b, vkey)
		if err == nil && string(b) != string(cp) {
			t.Fatalf("another head passes: %q", h.Note)
		}
	})
}

func FuzzVerifyExport(f *testing.F) {
	dir, vkey := made(f, 3)
	var out strings.Builder
	Export(context.Background(), dir, &out, 0, 3)
	f.Add(out.String())
	f.Fuzz(func(t *testing.T, s string) {
		n := 0
		if _, err := VerifyExport(strings.NewReader(s), vkey, func(e Entry) error { n++; return nil }); err == nil && n > 3 {
			t.Fatal("more than there is")
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{1, 10, 100, 1000} {
		b.Run(fmt.Sprint("batch", size), func(b *testing.B) {
			l := open(b, filepath.Join(b.TempDir(), "ledger"))
			batch := entries(0, size)
			b.ResetTimer()
			for range b.N {
				appendAll(b, l, batch)
			}
			b.ReportMetric(float64(b.N*size)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

func BenchmarkVerify100k(b *testing.B) {
	var batches []int
	for range 100 {
		batches = append(batches, 1000)
	}
	dir, vkey := made(b, batches...)
	b.ResetTimer()
	for range b.N {
		if err := verify(dir, vkey); err != nil {
			b.Fatal(err)
		}
	}
}
