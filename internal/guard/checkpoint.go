package guard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"vigia/internal/link"
	"vigia/internal/machine"
	"vigia/internal/memory"
	"vigia/internal/vm"
	"vigia/internal/volume"
)

// instantTime bounds how long a guest stands still for a checkpoint, whatever hangs; it goes on after it.
const instantTime = 20 * time.Second

// running is the run state of a QEMU whose guest goes on after a checkpoint; in any other it stays as it is.
const running = "running"

// pause and resume wait for the end of an instant: it lets the guest go on if it ran before.
func (g *Guard) pause(ctx context.Context, r link.Request) (link.Response, error) {
	g.halting.Lock()
	defer g.halting.Unlock()
	return monitorCall((*machine.Monitor).Pause)(g, ctx, r)
}

func (g *Guard) resume(ctx context.Context, r link.Request) (link.Response, error) {
	g.halting.Lock()
	defer g.halting.Unlock()
	if m, err := g.qemu(ctx); err == nil && m.Ending().Ended == vm.EndedPanic {
		closeFiles(r.Files)
		return link.Response{}, errors.New("the guest's kernel has panicked: it stands still until it is ended")
	}
	if g.unthawed.Load() { // somebody paused it before it could hear that it may write again
		defer func() { go thaw(g.ctx, g.agent, thawTimes, thawWait) }()
	}
	return monitorCall((*machine.Monitor).Continue)(g, ctx, r)
}

// hand gives QEMU a descriptor.
func (g *Guard) hand(ctx context.Context, r link.Request) (link.Response, error) {
	defer closeFiles(r.Files)
	m, err := g.qemu(ctx)
	if err != nil {
		return link.Response{}, err
	}
	if len(r.Files) != 1 {
		return link.Response{}, errors.New("hand: one descriptor is wanted")
	}
	fd, err := m.Hand(ctx, r.Files[0])
	return link.Response{Body: link.Handed{FD: fd.Number, Set: fd.Set}}, err
}

func (g *Guard) takeBack(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	var h link.Handed
	if err := r.Decode(&h); err != nil {
		return link.Response{}, err
	}
	m, err := g.qemu(ctx)
	if err != nil {
		return link.Response{}, err
	}
	return link.Response{}, m.TakeBack(ctx, machine.FD{Number: h.FD, Set: h.Set})
}

// incoming loads the devices' state into a QEMU that waits for it.
func (g *Guard) incoming(ctx context.Context, r link.Request) (link.Response, error) {
	defer closeFiles(r.Files)
	m, err := g.qemu(ctx)
	if err != nil {
		return link.Response{}, err
	}
	if len(r.Files) != 1 {
		return link.Response{}, errors.New("incoming: no state was given")
	}
	return link.Response{}, m.LoadDevices(ctx, r.Files[0])
}

// memory lets views look at the memory of a QEMU that has it for itself.
func (g *Guard) memory(_ context.Context, r link.Request) (link.Response, error) {
	var q link.Memory
	if err := r.Decode(&q); err != nil || len(r.Files) != 1 {
		closeFiles(r.Files)
		return link.Response{}, errors.Join(err, errors.New("memory: one descriptor is wanted"))
	}
	mem, err := memory.NewProcess(r.Files[0], q.Base, memory.Q35Layout(g.cfg.Memory))
	if err != nil {
		closeFiles(r.Files)
		return link.Response{}, err
	}
	g.views.use(mem)
	g.checker.sight.begin()
	return link.Response{}, nil
}

// settled waits for the end of a checkpoint that a dead daemon began: until then which overlay is in use may still change.
func (g *Guard) settled(_ context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	g.saving.Lock()
	defer g.saving.Unlock()
	return link.Response{}, nil
}

// replace puts a layer in the place of those it is made of. The guest goes on meanwhile.
func (g *Guard) replace(_ context.Context, r link.Request) (link.Response, error) {
	if len(r.Files) != 1 {
		closeFiles(r.Files)
		return link.Response{}, errors.New("replace: one layer is wanted")
	}
	n, err := g.disk.vol.Replace(r.Files[0])
	if err != nil {
		closeFiles(r.Files)
		return link.Response{}, err
	}
	return link.Response{Body: link.Replaced{Fewer: n}}, nil
}

// checkpoint holds the guest for an instant, in which the devices' state is written, the disk's overlay frozen and memory
// taken by the keeper. The guest goes on whatever fails.
func (g *Guard) checkpoint(ctx context.Context, r link.Request) (link.Response, error) {
	g.saving.Lock()
	defer g.saving.Unlock()
	var c link.Checkpoint
	if err := r.Decode(&c); err != nil {
		closeFiles(r.Files)
		return link.Response{}, err
	}
	files, err := link.Files(c.Files, r.Files)
	if err != nil {
		return link.Response{}, err
	}
	devices, overlay := files[link.FileDevices], files[link.FileOverlay]
	if devices == nil || overlay == nil || files[link.FileKeeper] == nil {
		closeFiles(r.Files)
		return link.Response{}, errors.New("checkpoint: something was not given")
	}
	defer devices.Close()
	keeper, err := dialKeeper(files[link.FileKeeper])
	if err != nil {
		overlay.Close()
		return link.Response{}, err
	}
	defer keeper.Close()
	m, err := g.qemu(ctx)
	if err != nil {
		overlay.Close()
		return link.Response{}, err
	}
	// From here on the daemon's leaving changes nothing: half of this must not remain.
	ctx, cancel := context.WithTimeout(g.ctx, 3*instantTime)
	defer cancel()
	i := instant{g: g, m: m, keeper: keeper, devices: devices, overlay: overlay, freeze: c.Freeze && g.agent != nil}
	reseeds := g.reseedsSoon(ctx)
	pause, err := i.take(ctx)
	if i.frozen == nil {
		overlay.Close()
	}
	done := link.Checkpointed{PauseSeconds: pause.Seconds(), Swapped: i.frozen != nil, At: i.at, Reseeds: reseeds}
	if err != nil {
		done.Failed = err.Error()
	}
	i.files.tell(&done)
	return link.Response{Body: done}, nil
}

func dialKeeper(f *os.File) (*link.Conn, error) {
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("the keeper's socket is none")
	}
	return link.New(u, nil), nil
}

// instant is one checkpoint's.
type instant struct {
	g       *Guard
	m       *machine.Monitor
	keeper  *link.Conn
	devices *os.File
	overlay *os.File
	freeze  bool      // ask the guest to hold its file systems still
	files   *frozen   // how they stood; nil where it was not asked
	at      time.Time // from here on the guest stood still
	next    *volume.Next
	frozen  <-chan error // once the overlays are swapped: what was on top is frozen on the disk
}

func (i *instant) take(ctx context.Context) (pause time.Duration, err error) {
	disk := i.g.disk
	if err := disk.vol.Flush(); err != nil { // what it writes now need not be written beside the guest's first steps
		return 0, fmt.Errorf("flush the disk: %w", err)
	}
	if i.next, err = disk.vol.Prepare(i.overlay); err != nil {
		return 0, err
	}
	fd, err := i.m.Hand(ctx, i.devices)
	if err != nil {
		return 0, err
	}
	defer i.m.TakeBack(ctx, fd)
	if status, err := i.m.Status(ctx); err == nil && status == running && i.freeze {
		i.files = freeze(ctx, i.g.agent, disk.vol, &i.g.unthawed)
	}
	pause, err = i.hold(ctx, fd)
	i.files.thaw(i.g.ctx) // also where nothing has come of it
	if i.frozen != nil {
		disk.overlay.Store(i.overlay)
		err = errors.Join(err, <-i.frozen)
	}
	return pause, err
}

// hold is the instant itself. A guest that stood still before it stays so.
func (i *instant) hold(ctx context.Context, fd machine.FD) (pause time.Duration, err error) {
	i.g.halting.Lock() // who pauses the guest now means it
	defer i.g.halting.Unlock()
	status, err := i.m.Status(ctx)
	if err != nil {
		return 0, err
	}
	runs := status == running
	began := time.Now()
	if runs {
		if err := i.m.Pause(ctx); err != nil {
			return 0, err
		}
	}
	i.at = time.Now()
	still, cancel := context.WithTimeout(ctx, instantTime)
	err = i.still(still, fd)
	cancel()
	if runs {
		if cerr := i.m.Continue(ctx); cerr != nil {
			err = errors.Join(err, fmt.Errorf("let the guest go on: %w", cerr))
		}
	}
	return time.Since(began), err
}

// still is done while the guest stands still. The disk comes last: what fails before it leaves all as it was.
func (i *instant) still(ctx context.Context, fd machine.FD) error {
	if err := i.m.SaveDevices(ctx, fd); err != nil {
		return err
	}
	if _, err := i.keeper.Call(ctx, link.CallArm, nil, nil); err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	i.files.look()
	var err error
	_, i.frozen, err = i.g.disk.vol.Swap(i.next)
	return err
}
