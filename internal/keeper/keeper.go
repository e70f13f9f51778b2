// Package keeper is the process that takes a machine's memory at a checkpoint and puts it back.
//
// It reads everything a guest has in memory, so it is confined like a guard: no path, no network, no other process, and of the
// machine's memory a descriptor for reading. What it writes is files that the daemon opened, in the format of package page.
//
// There are two lives of it. The one that is started at a machine's first checkpoint stays: it holds the descriptor by which
// QEMU's memory is protected (package protect), answers the guest's writes, and so knows what was written since the last
// checkpoint. It ends with its daemon; the guest goes on, unprotected, and the next checkpoint reads all of memory. The
// other life puts a checkpoint's memory into a file, and ends.
//
//	daemon: keep ─▶ begin ─▶         ─▶ finish
//	guard:                  stop, arm, cont
package keeper

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"lukechampine.com/blake3"

	"vigia/internal/checkpoint"
	"vigia/internal/checkpoint/page"
	"vigia/internal/checkpoint/protect"
	"vigia/internal/jail"
	"vigia/internal/link"
)

// Command is the sub-command that main hands to Main.
const Command = checkpoint.KeeperCommand

// maxDevices bounds the state of a machine's devices, which QEMU writes: a q35 of ours has 120 KB.
const maxDevices = 64 << 20

// workersOf a restoration.
const restorers = 2

// Keeper is one keeper.
type Keeper struct {
	op sync.Mutex // one call at a time, but for arm

	saver *saver
	chain page.Chain
	files []*os.File // of chain

	job                    *job // the checkpoint that was begun
	devices, packedDevices *os.File
	armedAt                time.Time
	armMu                  sync.Mutex
}

// Main is `vigia keeper`: it confines itself and serves its daemon, on descriptor 3, until that is gone.
func Main([]string) error {
	footprint := link.NewFootprint()
	if _, err := jail.Confine(jail.Keeper); err != nil {
		return err
	}
	debug.SetGCPercent(50)
	sock, err := connected(os.NewFile(3, "control"))
	if err != nil {
		return err
	}
	footprint.TrimLater(nil)
	k := &Keeper{}
	conn := link.New(sock, k.handle)
	<-conn.Done()
	return nil
}

func connected(f *os.File) (*net.UnixConn, error) {
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("not a unix socket")
	}
	return u, nil
}

func (k *Keeper) handle(_ context.Context, r link.Request) (link.Response, error) {
	k.op.Lock()
	defer k.op.Unlock()
	h := map[string]func(link.Request) (any, error){
		link.CallKeep: k.keep, link.CallChain: k.takeChain, link.CallBegin: k.begin,
		link.CallFinish: k.finish, link.CallAbort: k.abort, link.CallRestore: k.restore,
	}[r.Method]
	if h == nil {
		closeFiles(r.Files)
		return link.Response{}, fmt.Errorf("keeper has no call %q", r.Method)
	}
	body, err := h(r)
	return link.Response{Body: body}, err
}

// keep takes the machine's memory.
func (k *Keeper) keep(r link.Request) (any, error) {
	var cfg link.Keep
	if err := r.Decode(&cfg); err != nil {
		closeFiles(r.Files)
		return nil, err
	}
	files, err := link.Files(cfg.Files, r.Files)
	if err != nil {
		return nil, err
	}
	ram := files[link.FileRAM]
	if k.saver != nil || ram == nil || cfg.Memory == 0 || cfg.Memory%page.Size != 0 || cfg.Memory/page.Size > page.MaxPages {
		closeFiles(r.Files)
		return nil, errors.New("keep: no memory was given, or it was given twice")
	}
	mem := memory{r: ram, file: ram, pages: cfg.Memory / page.Size}
	if cfg.Private {
		mem.file, mem.base = nil, int64(cfg.Base)
	}
	var prot *protect.Memory
	if f := files[link.FileProtector]; f != nil {
		if prot, err = protect.Take(f, cfg.Base, cfg.Memory); err != nil {
			ram.Close()
			return nil, err
		}
	}
	k.saver = newSaver(mem, prot)
	return nil, nil
}

// takeChain gathers a chain; with Adopt it is that of the machine's last checkpoint.
func (k *Keeper) takeChain(r link.Request) (any, error) {
	var c link.Chain
	if err := r.Decode(&c); err != nil {
		closeFiles(r.Files)
		return nil, err
	}
	if c.First {
		k.dropChain()
	}
	k.files = append(k.files, r.Files...)
	if len(c.Sums) != len(r.Files) {
		return nil, errors.New("chain: sums and files do not match")
	}
	for i, f := range r.Files {
		sum, err := hex.DecodeString(c.Sums[i])
		if err != nil || len(sum) != len(page.Sum{}) {
			return nil, errors.New("chain: a sum is none")
		}
		file, err := page.Open(f, page.Sum(sum))
		if err != nil {
			return nil, fmt.Errorf("memory of checkpoint %d of its chain: %w", len(k.chain), err)
		}
		k.chain = append(k.chain, file)
	}
	if !c.Last || !c.Adopt {
		return nil, nil
	}
	defer k.dropChain()
	if k.saver == nil {
		return nil, errors.New("chain: there is no machine")
	}
	return nil, k.saver.adopt(k.chain)
}

func (k *Keeper) dropChain() {
	closeFiles(k.files)
	k.files, k.chain = nil, nil
}

// begin prepares a checkpoint. The guard says when the instant is, on a socket of its own.
func (k *Keeper) begin(r link.Request) (any, error) {
	var b link.Begin
	if err := r.Decode(&b); err != nil {
		closeFiles(r.Files)
		return nil, err
	}
	files, err := link.Files(b.Files, r.Files)
	if err != nil {
		return nil, err
	}
	out, devices, packed, sock := files[link.FileOut], files[link.FileDevices], files[link.FileDevicesOut], files[link.FileKeeper]
	if k.saver == nil || k.devices != nil || out == nil || devices == nil || packed == nil || sock == nil {
		closeFiles(r.Files)
		return nil, errors.New("begin: something was not given, or a checkpoint is being taken")
	}
	id, err := parseID(b.ID)
	parent, perr := parseID(b.Parent)
	c, cerr := connected(sock)
	if err = errors.Join(err, perr, cerr); err == nil {
		err = k.saver.begin(out, id, parent)
	} else {
		out.Close()
	}
	if err != nil {
		if c != nil {
			c.Close()
		}
		devices.Close()
		packed.Close()
		return nil, err
	}
	k.devices, k.packedDevices, k.job = devices, packed, k.saver.current()
	link.New(c, k.fromGuard)
	return nil, nil
}

func parseID(s string) (page.ID, error) {
	if s == "" {
		return page.ID{}, nil
	}
	b, err := hex.DecodeString(s)
	if err != nil || len(b) > len(page.ID{}) {
		return page.ID{}, fmt.Errorf("checkpoint %q is no id", s)
	}
	var id page.ID
	copy(id[:], b)
	return id, nil
}

// fromGuard answers the guard: the guest stands still.
func (k *Keeper) fromGuard(_ context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	if r.Method != link.CallArm {
		return link.Response{}, fmt.Errorf("a guard may not ask for %q", r.Method)
	}
	k.armMu.Lock()
	defer k.armMu.Unlock()
	k.armedAt = time.Now()
	return link.Response{}, k.saver.arm()
}

func (k *Keeper) finish(r link.Request) (any, error) {
	closeFiles(r.Files)
	if k.devices == nil {
		return nil, errors.New("finish: no checkpoint is being taken")
	}
	defer k.closeDevices()
	stats, err := k.job.finish()
	if err != nil {
		return nil, err
	}
	k.armMu.Lock()
	since := k.armedAt
	k.armMu.Unlock()
	saved := link.Saved{Pages: stats.Pages, Same: stats.Same, Bytes: stats.Bytes, Sum: hex.EncodeToString(stats.Sum[:])}
	saved.DevicesSize, saved.DevicesSum, err = pack(k.devices, k.packedDevices)
	saved.Seconds = time.Since(since).Seconds()
	return saved, err
}

func (k *Keeper) abort(r link.Request) (any, error) {
	closeFiles(r.Files)
	if k.saver != nil {
		k.saver.abort()
	}
	k.closeDevices()
	return nil, nil
}

func (k *Keeper) closeDevices() {
	if k.devices != nil {
		k.devices.Close()
		k.packedDevices.Close()
	}
	k.job, k.devices, k.packedDevices = nil, nil, nil
}

// pack compresses the state of the devices, and waits until it is on the disk.
func pack(in, out *os.File) (int64, string, error) {
	raw, err := io.ReadAll(io.NewSectionReader(in, 0, maxDevices+1))
	if err != nil {
		return 0, "", fmt.Errorf("state of the devices: %w", err)
	}
	if len(raw) == 0 || len(raw) > maxDevices {
		return 0, "", fmt.Errorf("state of the devices: %d bytes or more", len(raw))
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return 0, "", err
	}
	b := enc.EncodeAll(raw, nil)
	if _, err := out.Write(b); err != nil {
		return 0, "", err
	}
	sum := blake3.Sum256(b)
	return int64(len(b)), hex.EncodeToString(sum[:]), out.Sync()
}

func unpack(in, out *os.File, want string) error {
	b, err := io.ReadAll(io.LimitReader(in, maxDevices+1))
	if err != nil {
		return err
	}
	if sum := blake3.Sum256(b); hex.EncodeToString(sum[:]) != want {
		return fmt.Errorf("state of the devices: %w", page.ErrDamaged)
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxDevices))
	if err != nil {
		return err
	}
	defer dec.Close()
	raw, err := dec.DecodeAll(b, nil)
	if err != nil {
		return fmt.Errorf("state of the devices: %w", err)
	}
	_, err = out.WriteAt(raw, 0)
	return err
}

// restore puts the chain's memory into a file, and the devices' state into another. A file that is not given is not made; all is
// compared with its digests in any case.
func (k *Keeper) restore(r link.Request) (any, error) {
	defer closeFiles(r.Files)
	defer k.dropChain()
	var q link.Restore
	if err := r.Decode(&q); err != nil {
		return nil, err
	}
	if len(q.Files) != len(r.Files) {
		return nil, errors.New("restore: names and files do not match")
	}
	files := map[string]*os.File{}
	for i, name := range q.Files {
		files[name] = r.Files[i]
	}
	if in, out := files[link.FileDevicesOut], files[link.FileDevices]; in != nil && out != nil {
		if err := unpack(in, out, q.DevicesSum); err != nil {
			return nil, err
		}
	}
	put := func([]byte, int64) error { return nil }
	if out := files[link.FileOut]; out != nil {
		put = func(b []byte, off int64) error {
			_, err := out.WriteAt(b, off)
			return err
		}
	}
	return nil, k.chain.Restore(restorers, put)
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
