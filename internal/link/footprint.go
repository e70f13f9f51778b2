package link

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Footprint is how a worker stays small. Its start touches megabytes of code and constants that a guard or gate never looks at again. They are clean pages of a file: given back, they cost
// nothing until they are needed, which is a minor fault each.
type Footprint struct{ mappings [][2]uintptr }

// A worker gives its pages back every trimEvery, the heap's once in heapEvery of these: the first time with the second, when its own
// first work is done. The pages cost little to get again, some tenths of a millisecond for all that an idle guard needs, and one
// collection of garbage brings half of the program's tables in, 64 KiB at a time.
const (
	trimEvery = 10 * time.Second
	heapEvery = 6
)

// NewFootprint reads where the program is mapped; it must be called before the process confines itself. The program's
// own writable data is left alone.
func NewFootprint() Footprint {
	var f Footprint
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return f
	}
	defer maps.Close()
	self, _ := os.Readlink("/proc/self/exe")
	self = strings.TrimSuffix(self, " (deleted)")
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		words := strings.Fields(lines.Text())
		if len(words) < 6 || words[5] != self || strings.Contains(words[1], "w") {
			continue
		}
		var from, to uintptr
		if n, _ := fmt.Sscanf(words[0], "%x-%x", &from, &to); n == 2 && from < to {
			f.mappings = append(f.mappings, [2]uintptr{from, to})
		}
	}
	return f
}

// TrimLater gives the pages back now and then, and has the runtime keep the number of processors that it began with: it would
// otherwise wake each second to ask whether there are more. more gives back what the worker has mapped itself; it may be nil.
func (f Footprint) TrimLater(more func()) {
	if more == nil {
		more = func() {}
	}
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	go func() {
		ticks := time.NewTicker(trimEvery)
		for n := 1; ; n++ {
			<-ticks.C
			if n%heapEvery == 2 {
				debug.FreeOSMemory()
			}
			more()
			f.Trim()
		}
	}()
}

// Trim gives the program's pages back.
func (f Footprint) Trim() {
	for _, m := range f.mappings {
		// The pages are a file's and unchanged: what is dropped is read again from the page cache when touched.
		unix.Syscall(unix.SYS_MADVISE, m[0], m[1]-m[0], unix.MADV_DONTNEED)
	}
}
