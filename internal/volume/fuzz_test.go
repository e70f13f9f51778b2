package volume

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"
)

// wire is a connection whose far end has said everything already and never listens.
type wire struct {
	io.Reader
	sent int
}

func (w *wire) Write(p []byte) (int, error)      { w.sent += len(p); return len(p), nil }
func (w *wire) Close() error                     { return nil }
func (w *wire) LocalAddr() net.Addr              { return nil }
func (w *wire) RemoteAddr() net.Addr             { return nil }
func (w *wire) SetDeadline(time.Time) error      { return nil }
func (w *wire) SetReadDeadline(time.Time) error  { return nil }
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

func option(opt uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, optMagic)
	b = binary.BigEndian.AppendUint32(b, opt)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...)
}

func FuzzNegotiation(f *testing.F) {
	flags := []byte{0, 0, 0, 3}
	name := []byte{0, 0, 0, 4, 'd', 'i', 's', 'k'}
	// What QEMU 7.2 sends: structured replies, the allocation context, GO.
	meta := append(append(append([]byte(nil), name...), 0, 0, 0, 1, 0, 0, 0, 15), metaContextName...)
	f.Add(bytes.Join([][]byte{flags, option(optStructuredReply, nil), option(optSetMeta, meta), option(optGo, append(name, 0, 1, 0, 3))}, nil))
	f.Add(bytes.Join([][]byte{flags, option(optList, nil), option(optListMeta, append(name, 0, 0, 0, 0)), option(optAbort, nil)}, nil))
	f.Add(append(flags, option(optExportName, []byte("disk"))...))
	f.Add(append(flags, option(99, make([]byte, 9000))...))
	f.Fuzz(func(t *testing.T, in []byte) {
		w := &wire{Reader: bytes.NewReader(in)}
		n := negotiator{rw: w, name: "disk", size: 1 << 20, flags: txHasFlags}
		if a, err := n.run(); err != nil && a != (agreed{}) {
			t.Fatal("an error and a value")
		}
		if w.sent > 18+len(in)*64+256 {
			t.Fatalf("%d bytes in, %d out", len(in), w.sent)
		}
	})
}

func FuzzTransmission(f *testing.F) {
	f.Add(byte(3), bytes.Join([][]byte{
		rawRequest(0, cmdRead, 1, 0, 4096), append(rawRequest(cmdFlagFUA, cmdWrite, 2, 4096, 512), make([]byte, 512)...),
		rawRequest(0, cmdFlush, 3, 0, 0), rawRequest(0, cmdTrim, 4, 8192, 65536), rawRequest(cmdFlagNoHole, cmdWriteZeroes, 5, 100, 5000),
		rawRequest(cmdFlagReqOne, cmdBlockStatus, 6, 0, 1<<20), rawRequest(0, cmdRead, 7, 0, 1<<20), rawRequest(0, cmdDisc, 8, 0, 0)}, nil))
	f.Add(byte(0), rawRequest(cmdFlagDF, cmdRead, 1, 1000, 1<<19))
	f.Add(byte(1), append(rawRequest(0, cmdWrite, 2, 1<<20-512, 1024), make([]byte, 1024)...))
	f.Fuzz(func(t *testing.T, mode byte, in []byte) {
		if len(in) > 1<<20 {
			return
		}
		over := newCrashFile(pages{}, 0)
		if err := create(over, CreateOptions{Size: 1<<20 + 512}); err != nil {
			t.Fatal(err)
		}
		v, err := open(nil, over, Options{})
		if err != nil {
			t.Fatal(err)
		}
		w := &wire{Reader: bytes.NewReader(in)}
		newSession(w, nil, v, agreed{structured: mode&1 != 0, allocation: mode&2 != 0}).run()
		if rep, err := Check(over, over.size); err != nil || !rep.Sound() {
			t.Fatal("a client damaged the layer", rep.Damage, err)
		}
	})
}

// sampleLayer is a small layer with a map and a log.
func sampleLayer(f testing.TB) pages {
	file := newCrashFile(pages{}, 0)
	if err := create(file, CreateOptions{Size: 3 << 20, ID: ID{1}}); err != nil {
		f.Fatal(err)
	}
	v, err := open(nil, file, Options{})
	if err != nil {
		f.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 1))
	for i := range 300 {
		v.WriteAt(pattern(4096, uint64(i)), r.Int64N(700)*4096)
		v.Flush()
	}
	return file.now
}

// FuzzLayer changes a good layer anywhere in its structure, or replaces it. What opens must read without a panic, and
// what the checker finds sound must open.
func FuzzLayer(f *testing.F) {
	good := sampleLayer(f)
	size := geometryOf(3 << 20).fileSize(3 << 20)
	f.Add(int64(0), []byte(magic), false)
	f.Add(int64(152), []byte{1, 0, 0, 0}, true)
	f.Add(int64(8192+24), []byte{0xff, 0xff, 0xff, 0x7f}, true)
	f.Add(int64(8192+32), []byte{9, 0, 0, 0, 0xff}, true)
	f.Add(int64(1<<20+8192), []byte{0xff, 0xff}, true)
	f.Add(int64(88), []byte{0, 0, 0, 0, 0, 4}, true)
	f.Fuzz(func(t *testing.T, at int64, change []byte, mend bool) {
		g := geometryOf(3 << 20)
		if at < 0 || at+int64(len(change)) > g.dataOff || len(change) > 8192 {
			return
		}
		file := newCrashFile(good, size)
		file.WriteAt(change, at)
		if mend {
			mendSums(file)
		}
		rep, err := Check(file, size)
		if err != nil {
			t.Fatal(err)
		}
		v, err := open(nil, file, Options{})
		if err != nil && v != nil {
			t.Fatal("an error and a value")
		}
		if err != nil && rep.Sound() && !rep.Frozen && rep.Parent.IsZero() && !rep.Encrypted {
			t.Fatalf("sound, but: %v", err)
		}
		if err == nil {
			v.ReadAt(make([]byte, v.Size()), 0)
			v.WriteAt(make([]byte, 10), 5000)
			v.Flush()
		}
	})
}

// mendSums makes the checksums right again, so that what lies behind them is reached.
func mendSums(f *crashFile) {
	for slot := range int64(2) {
		var b [headerSize]byte
		f.ReadAt(b[:], slot*headerSize)
		binary.LittleEndian.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
		f.WriteAt(b[:], slot*headerSize)
	}
	var b [BlockSize]byte
	f.ReadAt(b[:], 2*headerSize)
	if binary.LittleEndian.Uint32(b[24:]) < 30 {
		binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
		f.WriteAt(b[:], 2*headerSize)
	}
}

func FuzzCheck(f *testing.F) {
	good := sampleLayer(f)
	var head [3 * headerSize]byte
	good.ReadAt(head[:], 0)
	f.Add(head[:headerSize])
	f.Add(head[:])
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := Check(bytes.NewReader(b), int64(len(b))); err != nil {
			t.Fatal(err)
		}
		Check(bytes.NewReader(b), 1<<62) // a size that lies: the error is the reader's
	})
}
