package volume

import (
	"bytes"
	"errors"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
)

// next makes a new overlay over what v has on top, ready for Swap.
func next(t testing.TB, v *Volume) *Next {
	t.Helper()
	n, err := v.Prepare(newOverlay(t, v.Size(), v.ID()))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestSwapUnderLoad: each of ten layers is what the disk was at the instant of its swap, although somebody writes all the time.
func TestSwapUnderLoad(t *testing.T) {
	v := freshVolume(t, 8<<20)
	var round atomic.Int64
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for at := int64(0); ; at = (at + 1) % 512 {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			// Every block says which round it was written in, twice: a torn one would be seen.
			p := bytes.Repeat([]byte{byte(round.Load())}, BlockSize)
			if _, err := v.WriteAt(p, at*BlockSize); err != nil {
				stopped <- err
				return
			}
		}
	}()
	var frozen []*os.File
	top := v.top.f.(*osFile).File
	for range 10 {
		round.Add(1)
		n := next(t, v)
		id, done, err := v.Swap(n)
		if err != nil {
			t.Fatal(err)
		}
		last := byte(round.Load())
		if err := v.Flush(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		default:
			if rep, err := Check(top, v.top.geo.fileSize(v.size)); err != nil || !rep.Frozen {
				t.Fatal("a flush came back before the layer below was frozen")
			}
			<-done
		}
		rep, err := Check(top, v.top.geo.fileSize(v.size))
		if err != nil || !rep.Sound() || !rep.Frozen || rep.ID != id {
			t.Fatalf("%+v %v", rep, err)
		}
		frozen, top = append(frozen, top), n.l.f.(*osFile).File
		for _, b := range readLayers(t, frozen) {
			if b > last {
				t.Fatal("a layer has what was written after it was frozen")
			}
		}
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
}

// readLayers reads the first byte of each block of a chain of its own over the same files.
func readLayers(t *testing.T, files []*os.File) []byte {
	t.Helper()
	var own []*os.File
	for _, f := range files {
		g, err := os.Open(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		own = append(own, g)
	}
	v, err := Open(own, nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	p, firsts := make([]byte, v.Size()), []byte{}
	if _, err := v.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(p); at += BlockSize {
		if !bytes.Equal(p[at+1:at+BlockSize], p[at:at+BlockSize-1]) {
			t.Fatal("a block is torn")
		}
		firsts = append(firsts, p[at])
	}
	return firsts
}

// TestSwapRefuses: what is not a fresh overlay over the one in use does not get on top, and the volume goes on as it was.
func TestSwapRefuses(t *testing.T) {
	v := freshVolume(t, 4<<20)
	used := newOverlay(t, 4<<20, v.ID())
	u, err := Open([]*os.File{}, newOverlay(t, 4<<20, ID{}), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if _, err := v.Prepare(newOverlay(t, 8<<20, v.ID())); !errors.Is(err, ErrParent) {
		t.Error("another size:", err)
	}
	stranger, err := v.Prepare(newOverlay(t, 4<<20, u.ID()))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := v.Swap(stranger); !errors.Is(err, ErrParent) {
		t.Error("another parent:", err)
	}
	g := geometryOf(4 << 20)
	if _, err := used.WriteAt(encodeLive(HostBoot()), g.liveOff); err != nil {
		t.Fatal(err)
	}
	if _, err := used.WriteAt([]byte{1}, g.liveOff+liveHeader); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Prepare(used); !errors.Is(err, ErrNotEmpty) {
		t.Error("a used one:", err)
	}
	if _, err := v.WriteAt(pattern(9000, 3), 100); err != nil {
		t.Fatal(err)
	}
	if err := v.Flush(); err != nil {
		t.Fatal(err)
	}
}

// TestSwapFails: when the host cannot write the frozen layer, requests go on over it, flushes say so, and the one that comes
// when the host can ends it. What a failed sync may have lost is written again.
func TestSwapFails(t *testing.T) {
	for _, what := range []string{"sync", "write", "read"} {
		v, f, s := sickVolume(t, Options{})
		p := pattern(3*BlockSize, 8)
		if _, err := v.WriteAt(p, 1<<20); err != nil {
			t.Fatal(err)
		}
		n, err := v.prepare(memoryOverlay(t, v))
		if err != nil {
			t.Fatal(err)
		}
		s.set(what, syscall.EIO, -1)
		_, done, err := v.Swap(n)
		if err != nil {
			t.Fatal(err)
		}
		if err := <-done; !errors.Is(err, syscall.EIO) {
			t.Fatalf("%s: %v", what, err)
		}
		lost := f.done()
		if _, err := v.WriteAt([]byte("goes on"), 2<<20); err != nil {
			t.Fatal(err)
		}
		if err := v.Flush(); !errors.Is(err, syscall.EIO) {
			t.Fatalf("%s: flush: %v", what, err)
		}
		s.set(what, syscall.EIO, 0)
		if err := v.Flush(); err != nil {
			t.Fatal(err)
		}
		if rep, err := Check(f, f.size); err != nil || !rep.Sound() || !rep.Frozen {
			t.Fatalf("%s: %+v %v", what, rep, err)
		}
		if what == "sync" && !rewritten(f, lost, p, 1<<20) {
			t.Fatal("data that a failed sync lost was not written again")
		}
	}
}

func memoryOverlay(t *testing.T, v *Volume) *crashFile {
	t.Helper()
	f := newCrashFile(pages{}, 0)
	if err := create(f, CreateOptions{Size: v.Size(), Parent: v.ID()}); err != nil {
		t.Fatal(err)
	}
	return f
}

// rewritten says that the operations from lost on put p at off of the disk.
func rewritten(f *crashFile, lost int, p []byte, off int64) bool {
	again := pages{}
	for _, o := range f.ops[lost:] {
		for n := o.off / BlockSize; !o.sync && n*BlockSize < o.off+o.n; n++ {
			o.apply(again, n)
		}
	}
	got := make([]byte, len(p))
	again.ReadAt(got, geometryOf(4<<20).dataOff+off)
	return bytes.Equal(got, p)
}

// TestSwapClosed: a volume that is closed while its layer waits for room says that it is not frozen; the next Open ends it.
func TestSwapClosed(t *testing.T) {
	stalled := make(chan error, 1)
	v, f, s := sickVolume(t, Options{OnStall: func(err error) { stalled <- err }})
	if _, err := v.WriteAt(pattern(5000, 1), 0); err != nil {
		t.Fatal(err)
	}
	over := memoryOverlay(t, v)
	n, err := v.prepare(over)
	if err != nil {
		t.Fatal(err)
	}
	s.set("sync", syscall.ENOSPC, -1)
	_, done, err := v.Swap(n)
	if err != nil {
		t.Fatal(err)
	}
	<-stalled
	if err := v.Close(); err == nil {
		t.Fatal("closed without a word")
	}
	if err := <-done; err == nil {
		t.Fatal("said to be frozen")
	}
	s.set("sync", syscall.ENOSPC, 0)
	again, err := open([]file{f}, over, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Flush(); err != nil {
		t.Fatal(err)
	}
	if rep, err := Check(f, f.size); err != nil || !rep.Frozen {
		t.Fatalf("%+v %v", rep, err)
	}
}
