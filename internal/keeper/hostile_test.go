package keeper

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"vigia/internal/checkpoint/page"
	"vigia/internal/link"
)

// memoryFile is what QEMU is given to write its devices' state into: it keeps a descriptor, and may do with it what it likes.
func memoryFile(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("devices", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "devices")
	t.Cleanup(func() { f.Close() })
	return f
}

func created(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestHostileDevices: QEMU writes too much, nothing, or takes away what it wrote. It is refused, and no more than the bound is read.
func TestHostileDevices(t *testing.T) {
	for name, size := range map[string]int64{"nothing": 0, "a byte too much": maxDevices + 1, "a terabyte": 1 << 40} {
		in, out := memoryFile(t), created(t)
		if err := in.Truncate(size); err != nil {
			t.Fatal(err)
		}
		if _, _, err := pack(in, out); err == nil || !strings.Contains(err.Error(), "state of the devices") {
			t.Errorf("%s: %v", name, err)
		}
		if info, _ := out.Stat(); info.Size() != 0 {
			t.Errorf("%s: %d bytes were written", name, info.Size())
		}
	}
	in, out := memoryFile(t), created(t)
	in.WriteString("state")
	size, sum, err := pack(in, out)
	if err != nil || size == 0 {
		t.Fatal(err)
	}
	back := memoryFile(t)
	packed, _ := os.Open(out.Name())
	defer packed.Close()
	if err := unpack(packed, back, strings.Repeat("0", len(sum))); !errors.Is(err, page.ErrDamaged) {
		t.Errorf("a state of another sum: %v", err)
	}
	packed.Seek(0, 0)
	if err := unpack(packed, back, sum); err != nil {
		t.Error(err)
	}
}

// TestStrangeCalls: a guard that was taken over may say "the guest stands still" and nothing else; a keeper's calls out of their order
// are refused, and it lives.
func TestStrangeCalls(t *testing.T) {
	g := newGuest(t, 16, false)
	k := &Keeper{saver: g.s}
	for _, method := range []string{link.CallKeep, link.CallChain, link.CallBegin, link.CallFinish, link.CallAbort, link.CallRestore, "", "arms"} {
		if _, err := k.fromGuard(t.Context(), link.Request{Method: method}); err == nil || !strings.Contains(err.Error(), "may not ask") {
			t.Errorf("a guard asks for %q: %v", method, err)
		}
	}
	if _, err := k.fromGuard(t.Context(), link.Request{Method: link.CallArm}); err == nil {
		t.Error("memory was taken for no checkpoint")
	}
	if _, err := k.handle(t.Context(), link.Request{Method: link.CallFinish}); err == nil {
		t.Error("a checkpoint that nobody began was finished")
	}
	if err := g.s.begin(created(t), page.ID{1}, page.ID{}); err != nil {
		t.Fatal(err)
	}
	defer g.s.abort()
	for i := range 3 {
		if _, err := k.fromGuard(t.Context(), link.Request{Method: link.CallArm}); (err == nil) != (i == 0) {
			t.Errorf("taken %d times: %v", i+1, err)
		}
	}
	if _, err := k.handle(t.Context(), link.Request{Method: link.CallArm}); err == nil {
		t.Error("a daemon has no business with the instant")
	}
}
