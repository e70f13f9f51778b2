package volume

import (
	"bytes"
	"errors"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// sick makes an overlay's file fail by rule.
type sick struct {
	what  atomic.Value // string: which operation fails
	errno atomic.Value // syscall.Errno
	left  atomic.Int64 // that many more times; negative: always
}

func (s *sick) fail(what string, n int) error {
	if w, _ := s.what.Load().(string); w != what || s.left.Load() == 0 {
		return nil
	}
	s.left.Add(-1)
	return &os.PathError{Op: what, Path: "overlay", Err: s.errno.Load().(syscall.Errno)}
}

func (s *sick) set(what string, errno syscall.Errno, times int64) {
	s.errno.Store(errno)
	s.left.Store(times)
	s.what.Store(what)
}

func sickVolume(t *testing.T, o Options) (*Volume, *crashFile, *sick) {
	t.Helper()
	f := newCrashFile(pages{}, 0)
	if err := create(f, CreateOptions{Size: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	s := new(sick)
	f.fail = s.fail
	v, err := open(nil, f, o)
	if err != nil {
		t.Fatal(err)
	}
	return v, f, s
}

// TestFullDiskHoldsRequests: the guest waits while there is no room and notices nothing once there is.
func TestFullDiskHoldsRequests(t *testing.T) {
	for _, what := range []string{"write", "sync", "punch", "read"} {
		for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EIO} {
			t.Run(what+" "+errno.Error(), func(t *testing.T) { holdAndResume(t, what, errno) })
		}
	}
}

func holdAndResume(t *testing.T, what string, errno syscall.Errno) {
	stalls, resumed := make(chan error, 10), make(chan struct{}, 10)
	v, _, s := sickVolume(t, Options{
		OnStall: func(err error) { stalls <- err }, OnResume: func() { resumed <- struct{}{} }, RetryEvery: time.Hour,
	})
	p := pattern(20000, 1)
	if _, err := v.WriteAt(p, 8192); err != nil {
		t.Fatal(err)
	}
	s.set(what, errno, -1)
	done := make(chan error, 1)
	go func() {
		_, err := v.WriteAt(p, 1<<20+100)
		if err == nil {
			err = v.Trim(8192, 4096)
		}
		if err == nil {
			err = v.Flush()
		}
		if err == nil {
			_, err = v.ReadAt(make([]byte, 100), 12288)
		}
		done <- err
	}()
	if err := <-stalls; !errors.Is(err, errno) {
		t.Fatalf("stalled for %v", err)
	}
	v.Retry() // in vain: nothing has changed
	if v.Stalled() > 1 {
		t.Fatalf("%d requests held", v.Stalled())
	}
	s.set("", 0, 0)
	v.Retry()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	<-resumed
	if len(stalls) != 0 || len(resumed) != 0 {
		t.Fatal("told more than once")
	}
	got := make([]byte, len(p))
	if v.ReadAt(got, 1<<20+100); !bytes.Equal(got, p) {
		t.Fatal("what was held is not what was written")
	}
}

func TestStallEndsByItself(t *testing.T) {
	v, _, s := sickVolume(t, Options{OnStall: func(error) {}, RetryEvery: time.Millisecond})
	s.set("write", syscall.ENOSPC, 5)
	if _, err := v.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
}

func TestGiveUp(t *testing.T) {
	stalled := make(chan error, 1)
	v, _, s := sickVolume(t, Options{OnStall: func(err error) { stalled <- err }, RetryEvery: time.Hour})
	s.set("write", syscall.ENOSPC, -1)
	done := make(chan error)
	go func() { _, err := v.WriteAt([]byte("x"), 0); done <- err }()
	<-stalled
	v.GiveUp()
	if err := <-done; !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
}

// TestErrorsNobodyCanCure are not held.
func TestErrorsNobodyCanCure(t *testing.T) {
	v, _, s := sickVolume(t, Options{OnStall: func(error) { t.Error("held") }})
	s.set("write", syscall.EROFS, -1)
	if _, err := v.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EROFS) {
		t.Fatal(err)
	}
}

// TestFailedSyncWritesAgain: after a failed sync the kernel forgets what it could not write. The file here does too, as
// far as the disk goes; the flush must not come back before all of it was written a second time.
func TestFailedSyncWritesAgain(t *testing.T) {
	v, f, s := sickVolume(t, Options{OnStall: func(error) {}, RetryEvery: time.Millisecond})
	p := pattern(3*BlockSize, 1)
	if _, err := v.WriteAt(p, 2<<20); err != nil {
		t.Fatal(err)
	}
	lost := f.done()
	s.set("sync", syscall.EIO, 1)
	if err := v.Flush(); err != nil {
		t.Fatal(err)
	}
	again := pages{}
	for _, o := range f.ops[lost:] {
		for n := o.off / BlockSize; !o.sync && n*BlockSize < o.off+o.n; n++ {
			o.apply(again, n)
		}
	}
	got := make([]byte, len(p))
	again.ReadAt(got, geometryOf(4<<20).dataOff+2<<20)
	if !bytes.Equal(got, p) {
		t.Fatal("data that a failed sync lost was not written again")
	}
}

// TestFreezeInterrupted: a freeze that fails for good leaves a volume that refuses writes, and a second one ends it.
func TestFreezeInterrupted(t *testing.T) {
	for failing := range 4 {
		v, f, s := sickVolume(t, Options{})
		v.WriteAt(pattern(5000, 2), 5000)
		n := 0
		f.fail = func(what string, k int) error {
			if what == "sync" {
				if n++; n == failing+1 {
					return syscall.EIO
				}
			}
			return nil
		}
		_ = s
		if _, err := v.Freeze(); err == nil {
			t.Fatalf("freeze %d did not fail", failing)
		}
		if failing >= 2 {
			if _, err := v.WriteAt([]byte("x"), 0); !errors.Is(err, ErrSealing) {
				t.Fatalf("freeze %d: write: %v", failing, err)
			}
		}
		if _, err := v.Freeze(); err != nil {
			t.Fatal(err)
		}
		if rep, err := Check(f, f.size); err != nil || !rep.Sound() || !rep.Frozen {
			t.Fatalf("freeze %d: %+v %v", failing, rep, err)
		}
	}
}
