// Witness is what a guest runs while its machine is saved, put back and cloned again and again: it fills memory and files
// with what it can tell from anything else, changes them all the time, and says whether all is as it left it.
//
//	witness serve DIR    fill memory and DIR/data; end never
//	witness ask [WORD]   look at everything, print what is known as a line of JSON; a word is kept, in memory and in DIR/word
//
// A page or a block holds numbers that follow from its place and from how often it was written; how often that was is kept
// elsewhere in memory. So a page that is older or newer than the rest of memory, a file that is, and a page of a neighbour's
// are all told from what should be there. Files are read past the page cache: what is looked at is the disk.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

const (
	socket   = "/run/witness.sock"
	pages    = 32 << 20 / pageSize // of memory
	blocks   = 16 << 20 / pageSize // of the file
	stretch  = 64                  // blocks that are read at once, to look at all
	pageSize = 4096
	words    = pageSize / 8

	// batch is how many pages one change of memory writes; between two changes the witness waits.
	batch      = 32
	memoryWait = 3 * time.Millisecond
	diskWait   = 5 * time.Millisecond
	syncEvery  = 16 // blocks
)

// Answer is what `ask` prints.
type Answer struct {
	Word   string `json:"word"`
	Memory uint64 `json:"memory"` // changes of it
	Disk   uint64 `json:"disk"`
	Wrong  string `json:"wrong"` // the first thing that was not as it should be; empty: none ever
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "witness:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "serve":
		return serve(args[1])
	case len(args) > 0 && args[0] == "ask":
		return ask(strings.Join(args[1:], " "))
	}
	return errors.New("use: witness serve DIR | witness ask [WORD]")
}

func ask(word string) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Fprintln(c, word)
	line, err := bufio.NewReader(c).ReadString('\n')
	fmt.Print(line)
	return err
}

type witness struct {
	mu      sync.Mutex
	dir     string
	file    *os.File // read and written past the page cache
	word    string
	memory  []uint64 // pages
	written []uint32 // how often each page was, and each block
	stored  []uint32
	sums    [2]uint64 // of written and of stored
	unsaved int
	wrong   string
	kernel  int      // its log
	buf     []uint64 // a stretch of blocks, aligned as the disk wants it
}

func serve(dir string) error {
	w := &witness{dir: dir, memory: aligned(pages), buf: aligned(stretch), written: make([]uint32, pages), stored: make([]uint32, blocks)}
	if err := w.fill(); err != nil {
		return err
	}
	os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	go w.change(memoryWait, w.changeMemory)
	go w.change(diskWait, w.changeDisk)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		w.answer(c)
	}
}

// aligned returns so many pages of memory.
func aligned(n int) []uint64 {
	raw := make([]byte, (n+1)*pageSize)
	skip := -uintptr(unsafe.Pointer(&raw[0])) % pageSize
	return unsafe.Slice((*uint64)(unsafe.Pointer(&raw[skip])), n*words)
}

func bytesOf(page []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&page[0])), len(page)*8)
}

func (w *witness) fill() (err error) {
	if w.kernel, err = syscall.Open("/dev/kmsg", syscall.O_RDONLY|syscall.O_NONBLOCK, 0); err != nil {
		return err
	}
	if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return err
	}
	for p := range pages {
		write(w.page(p), uint64(p), 0)
	}
	name := filepath.Join(w.dir, "data")
	if w.file, err = os.OpenFile(name, os.O_CREATE|os.O_TRUNC|os.O_RDWR|syscall.O_DIRECT, 0o600); err != nil {
		return err
	}
	for b := range blocks {
		if err := w.store(b, 0); err != nil {
			return err
		}
	}
	return w.file.Sync()
}

func (w *witness) page(p int) []uint64 { return w.memory[p*words : (p+1)*words] }

// write fills a page with the numbers of its place and turn.
func write(page []uint64, place uint64, turn uint32) {
	x := first(place, turn)
	for i := range page {
		page[i] = x
		x = next(x)
	}
}

func first(place uint64, turn uint32) uint64 { return place<<32 | uint64(turn) | 1<<63 }
func next(x uint64) uint64                   { return x*6364136223846793005 + 1442695040888963407 }

// check returns where a page differs from what its place and turn demand.
func check(page []uint64, place uint64, turn uint32) error {
	x := first(place, turn)
	for i := range page {
		if page[i] != x {
			return fmt.Errorf("word %d of place %d, turn %d, is %#x and not %#x: it begins with place %d, turn %d",
				i, place, turn, page[i], x, page[0]<<1>>33, uint32(page[0]))
		}
		x = next(x)
	}
	return nil
}

func (w *witness) change(wait time.Duration, f func() error) {
	for {
		w.mu.Lock()
		w.note(f())
		w.mu.Unlock()
		time.Sleep(wait)
	}
}

// note keeps the first thing that is wrong, and says it on the serial line too.
func (w *witness) note(err error) {
	if err == nil || w.wrong != "" {
		return
	}
	w.wrong = err.Error()
	if line, oerr := os.OpenFile("/dev/ttyS0", os.O_WRONLY|syscall.O_NOCTTY, 0); oerr == nil {
		fmt.Fprintf(line, "\r\nWITNESS: WRONG: %s\r\n", w.wrong)
		line.Close()
	}
}

// changeMemory writes some pages, in order or anywhere. Each is looked at before.
func (w *witness) changeMemory() error {
	at, step := rand.IntN(pages), 1
	if rand.IntN(2) == 0 {
		step = 1 + rand.IntN(pages-1)
	}
	for range batch {
		if err := check(w.page(at), uint64(at), w.written[at]); err != nil {
			return fmt.Errorf("memory: %w", err)
		}
		w.written[at]++
		w.sums[0]++
		write(w.page(at), uint64(at), w.written[at])
		at = (at + step) % pages
	}
	return nil
}

func (w *witness) changeDisk() error {
	b := rand.IntN(blocks)
	if err := w.checkBlocks(b, 1); err != nil {
		return err
	}
	if err := w.store(b, w.stored[b]+1); err != nil {
		return err
	}
	w.stored[b]++
	w.sums[1]++
	if w.unsaved++; w.unsaved%syncEvery == 0 {
		return w.file.Sync()
	}
	return nil
}

func (w *witness) store(b int, turn uint32) error {
	block := w.buf[:words]
	write(block, uint64(pages+b), turn)
	_, err := w.file.WriteAt(bytesOf(block), int64(b)*pageSize)
	return err
}

func (w *witness) checkBlocks(first, n int) error {
	read := w.buf[:n*words]
	if _, err := w.file.ReadAt(bytesOf(read), int64(first)*pageSize); err != nil {
		return err
	}
	for i := range n {
		if err := check(read[i*words:(i+1)*words], uint64(pages+first+i), w.stored[first+i]); err != nil {
			return fmt.Errorf("disk: %w", err)
		}
	}
	return nil
}

// answer looks at everything and tells.
func (w *witness) answer(c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.note(w.all())
	if word := strings.TrimSpace(line); word != "" {
		w.note(w.keep(word))
	}
	json.NewEncoder(c).Encode(Answer{Word: w.word, Memory: w.sums[0], Disk: w.sums[1], Wrong: w.wrong})
}

func (w *witness) all() error {
	var sums [2]uint64
	for p := range pages {
		if err := check(w.page(p), uint64(p), w.written[p]); err != nil {
			return fmt.Errorf("memory: %w", err)
		}
		sums[0] += uint64(w.written[p])
	}
	for b := 0; b < blocks; b += stretch {
		if err := w.checkBlocks(b, stretch); err != nil {
			return err
		}
	}
	for _, turn := range w.stored {
		sums[1] += uint64(turn)
	}
	if sums != w.sums {
		return fmt.Errorf("%v changes were counted, %v are there", w.sums, sums)
	}
	return errors.Join(w.checkWord(), w.kernelsWord())
}

func (w *witness) keep(word string) error {
	w.word = word
	f, err := os.Create(filepath.Join(w.dir, "word"))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(word); err != nil {
		return err
	}
	return f.Sync()
}

func (w *witness) checkWord() error {
	raw, err := os.ReadFile(filepath.Join(w.dir, "word"))
	if err != nil && w.word != "" || string(raw) != w.word {
		return fmt.Errorf("the word on the disk is %q, the one in memory %q: %v", raw, w.word, err)
	}
	return nil
}

// complaints are lines of the kernel that tell of a broken disk or of broken memory.
var complaints = []string{"EXT4-fs error", "EXT4-fs warning", "I/O error", "Oops", "BUG:", "general protection", "Bad page", "Remounting filesystem", "bad_page"}

// kernelsWord reads what the guest's kernel has said since the last time.
func (w *witness) kernelsWord() error {
	buf := make([]byte, 8192)
	for {
		n, err := syscall.Read(w.kernel, buf)
		switch {
		case err == syscall.EAGAIN:
			return nil
		case err == syscall.EPIPE: // overtaken: the next read goes on with the oldest there is
			continue
		case err != nil:
			return fmt.Errorf("the kernel's log: %w", err)
		}
		for _, c := range complaints {
			if line := string(buf[:n]); strings.Contains(line, c) {
				return fmt.Errorf("the kernel says %q", line)
			}
		}
	}
}
