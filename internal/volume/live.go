package volume

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"os"
	"strings"
	"sync"
)

// The live map is what lets a guest go on when its guard is killed. A write that was answered but not flushed may be
// lost in a power cut, which the guest knows, but not while the guest runs on. Its data is in the host's page cache; which
// blocks it is of was only in the memory of the guard. So each change of the map is also written, not synced, to an
// area of the file that is believed only in the boot of the host that wrote it, when the page cache cannot have lost
// any of it.
const (
	liveMagic  = 0x56494c56 // "VLIV"
	liveHeader = 4096
)

// Boot names one boot of the host; zero is none.
type Boot [16]byte

// HostBoot is the host's boot id. The file it is read from is read once: a process that confines itself calls this before.
var HostBoot = sync.OnceValue(func() (b Boot) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Boot{}
	}
	raw, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(text)), "-", ""))
	if err != nil || len(raw) != len(b) {
		return Boot{}
	}
	return Boot(raw)
})

func encodeLive(b Boot) []byte {
	p := make([]byte, liveHeader)
	binary.LittleEndian.PutUint32(p, liveMagic)
	copy(p[8:], b[:])
	binary.LittleEndian.PutUint32(p[4:], crc32.Checksum(p[8:], castagnoli))
	return p
}

// openLive gives chunk what a killed process of this boot left, or begins anew. It says if the map is kept from now on.
func (l *layer) openLive(boot Boot, chunk func(c int64, states []byte)) (live bool, err error) {
	at := l.geo.liveOff
	head := make([]byte, liveHeader)
	if err := readFull(l.f, head, at); err != nil {
		return false, err
	}
	live = boot != Boot{}
	if live && string(head) == string(encodeLive(boot)) {
		return true, l.loadLive(chunk)
	}
	if uniform(head) != 0 {
		if err := zeroArea(l.f, at, l.geo.liveSz); err != nil {
			return false, fmt.Errorf("clear the live map: %w", err)
		}
	}
	if live {
		_, err = l.f.WriteAt(encodeLive(boot), at)
	}
	return live, err
}

func (l *layer) loadLive(chunk func(c int64, states []byte)) error {
	geo := l.geo
	buf := make([]byte, min(geo.liveSz-liveHeader, 256<<10))
	for off := int64(0); off < geo.liveSz-liveHeader; off += int64(len(buf)) {
		b := buf[:min(int64(len(buf)), geo.liveSz-liveHeader-off)]
		if err := readFull(l.f, b, geo.liveOff+liveHeader+off); err != nil {
			return err
		}
		for i := 0; i < len(b); i += chunkStates {
			st := b[i : i+chunkStates]
			if uniform(st) == 0 {
				continue
			}
			c := (off + int64(i)) / chunkStates
			if err := l.checkStates(c, st); err != nil {
				return err
			}
			chunk(c, st)
		}
	}
	return nil
}

// putLive writes the states of the chunks from first to last. The caller holds write.
func (v *Volume) putLive(first, last int64) error {
	if !v.live {
		return nil
	}
	for first <= last {
		n := min(last-first+1, 64)
		var buf [64 * chunkStates]byte
		for i := range n {
			v.m.states(first+i, v.topSrc, buf[i*chunkStates:(i+1)*chunkStates])
		}
		b, at := buf[:n*chunkStates], v.top.geo.liveOff+liveHeader+first*chunkStates
		if err := v.stall.try(func() error { _, err := v.top.f.WriteAt(b, at); return err }); err != nil {
			return err
		}
		first += n
	}
	return nil
}

// zeroArea makes an area of the file read as zeros.
func zeroArea(f file, at, n int64) error {
	err := f.Punch(at, n)
	if err != errNoPunch {
		return err
	}
	zero := make([]byte, 64<<10)
	for end := at + n; at < end; at += int64(len(zero)) {
		if _, err := f.WriteAt(zero[:min(int64(len(zero)), end-at)], at); err != nil {
			return err
		}
	}
	return nil
}
