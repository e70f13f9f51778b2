package host

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Room below which a finding is no longer ok.
const (
	littleMemory = 2 << 30
	littleShared = 1 << 30
	littleDisk   = 10 << 30
	noDisk       = 512 << 20
)

// parseMeminfo reads one field of /proc/meminfo, in bytes.
func parseMeminfo(text, field string) (uint64, bool) {
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(line, ":")
		if !ok || key != field {
			continue
		}
		words := strings.Fields(value)
		if len(words) == 0 {
			return 0, false
		}
		n, err := strconv.ParseUint(words[0], 10, 64)
		if err != nil || n > 1<<52 {
			return 0, false
		}
		if len(words) > 1 && words[1] == "kB" {
			n *= 1024
		}
		return n, true
	}
	return 0, false
}

func (h *Host) findMemory(context.Context) Finding {
	text, err := h.read("/proc/meminfo")
	if err != nil {
		return Finding{Status: Degraded, Seen: err.Error()}
	}
	total, _ := parseMeminfo(text, "MemTotal")
	free, _ := parseMeminfo(text, "MemAvailable")
	f := Finding{Status: OK, Seen: fmt.Sprintf("%s, %s available", bytesOf(total), bytesOf(free))}
	if free < littleMemory {
		f.Status = Degraded
		f.Consequence = "room for few machines: each needs its memory and about 100 MiB"
	}
	return f
}

// free asks the file system that holds a path, or will hold it.
func free(path string) (total, available uint64, err error) {
	for {
		var st unix.Statfs_t
		err = unix.Statfs(path, &st)
		if err == nil {
			return st.Blocks * uint64(st.Bsize), st.Bavail * uint64(st.Bsize), nil
		}
		up := filepath.Dir(path)
		if !os.IsNotExist(err) || up == path {
			return 0, 0, err
		}
		path = up
	}
}

func (h *Host) findShared(context.Context) Finding {
	total, available, err := free(h.at("/dev/shm"))
	if err != nil {
		return Finding{Status: Missing, Seen: err.Error(), Consequence: "no machine can run: a guest's memory is a file there", Remedy: "mount -t tmpfs tmpfs /dev/shm"}
	}
	f := Finding{Status: OK, Seen: fmt.Sprintf("/dev/shm %s, %s free", bytesOf(total), bytesOf(available))}
	if available < littleShared {
		f.Status = Degraded
		f.Consequence = "a guest's memory is a file in /dev/shm: what is free bounds all machines together"
		f.Remedy = "mount -o remount,size=75% /dev/shm"
	}
	return f
}

func (h *Host) findSpace(context.Context) Finding {
	if h.State == "" {
		return Finding{Status: OK, Seen: "no state directory given"}
	}
	_, available, err := free(h.State)
	f := Finding{Status: OK, Seen: fmt.Sprintf("%s free for %s", bytesOf(available), h.State)}
	switch {
	case err != nil:
		return Finding{Status: Missing, Seen: err.Error(), Consequence: "nothing can be kept", Remedy: "name another directory by --state"}
	case available < noDisk:
		f.Status, f.Consequence = Missing, "no image can be built, and machines are paused when their disk can't grow"
	case available < littleDisk:
		f.Status, f.Consequence = Degraded, "an image takes about 1 GiB while it is built; a machine's disk grows with what its guest writes"
	default:
		return f
	}
	f.Remedy = "make room, or name another directory by --state"
	return f
}

func (h *Host) findHugePages(context.Context) Finding {
	shmem, err := h.read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
	if err != nil {
		return Finding{Status: Degraded, Seen: "no transparent huge pages", Consequence: "a checkpoint pauses a machine of much memory longer"}
	}
	mode := chosen(shmem)
	f := Finding{Status: OK, Seen: "for shared memory: " + mode}
	if mode == "never" || mode == "deny" {
		f.Status = Degraded
		f.Consequence = "a checkpoint pauses a machine of much memory longer: 50 ms instead of 15 ms at 2 GiB with 100 MiB changed"
		f.Remedy = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
	}
	return f
}

// chosen is the word in brackets of "always [madvise] never".
func chosen(s string) string {
	_, rest, ok := strings.Cut(s, "[")
	word, _, closed := strings.Cut(rest, "]")
	if !ok || !closed {
		return strings.TrimSpace(s)
	}
	return word
}
