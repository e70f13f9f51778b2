package memory

import (
	"runtime/debug"
	"unsafe"
)

// PageSize is how much a Pager hands out at once.
const PageSize = 4096

// Pager hands out whole pages of guest-physical memory, to be read in place: most of what a view reads lies in pages that it has
// just read from, and 8 bytes at a time each read would cost more in calls than in memory. It is for one goroutine.
type Pager interface {
	// Page returns the page that pa lies in, nil where there is none. What it points to is valid until the window closes or
	// another page is asked for.
	Page(pa uint64) *[PageSize]byte
	// Forget gives up what is kept of pages: the next Page has them as they are then.
	Forget()
}

// Windowed is a Physical that can be read by pages, while f runs. A page that can't be read after all ends f with ErrNoRAM, by
// way of a panic that Window catches: what f has locked must be unlocked by defer.
type Windowed interface {
	Window(f func(Pager) error) error
}

// ramPages are the pages of a mapping: they are never copied.
type ramPages RAM

func (r *ramPages) Page(pa uint64) *[PageSize]byte {
	off, ok := locate(r.layout, pa&^(PageSize-1), PageSize)
	if !ok || off%PageSize != 0 {
		return nil
	}
	return (*[PageSize]byte)(r.data[off:])
}

func (r *ramPages) Forget() {}

// Window runs f with the mapping's own pages. Should the file be cut short meanwhile, f ends.
func (r *RAM) Window(f func(Pager) error) (err error) {
	if r.sealed || len(r.data) == 0 {
		return f((*ramPages)(r))
	}
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		switch x := recover().(type) {
		case nil:
		case interface{ Addr() uintptr }:
			if at := x.Addr() - uintptr(unsafe.Pointer(&r.data[0])); at >= uintptr(len(r.data)) {
				panic(x)
			}
			err = ErrNoRAM
		default:
			panic(x)
		}
	}()
	return f((*ramPages)(r))
}

// maxKept pages are kept of a window on a process: 16 MiB.
const maxKept = 4096

// keptPages are copies of pages, each read by one call.
type keptPages struct {
	process *Process
	at      map[uint64]*[PageSize]byte
	free    []*[PageSize]byte
}

func (k *keptPages) Page(pa uint64) *[PageSize]byte {
	pa &^= PageSize - 1
	if page := k.at[pa]; page != nil {
		return page
	}
	if len(k.at) == maxKept {
		k.Forget()
	}
	var page *[PageSize]byte
	if n := len(k.free); n > 0 {
		page, k.free = k.free[n-1], k.free[:n-1]
	} else {
		page = new([PageSize]byte)
	}
	if k.process.ReadPhys(pa, page[:]) != nil {
		k.free = append(k.free, page)
		return nil
	}
	k.at[pa] = page
	return page
}

func (k *keptPages) Forget() {
	for _, page := range k.at {
		k.free = append(k.free, page)
	}
	clear(k.at)
}

// Window runs f with pages that are read once each. The pages' room is kept for the next window.
func (p *Process) Window(f func(Pager) error) error {
	p.mu.Lock()
	kept := p.kept
	p.kept = nil
	p.mu.Unlock()
	if kept == nil { // the first one, or another goroutine has it
		kept = &keptPages{process: p, at: make(map[uint64]*[PageSize]byte)}
	}
	defer func() {
		kept.Forget()
		kept.free = kept.free[:min(len(kept.free), keptBetween)]
		p.mu.Lock()
		p.kept = kept
		p.mu.Unlock()
	}()
	return f(kept)
}

// keptBetween pages of room stay between two windows: 4 MiB.
const keptBetween = 1024
