package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"vigia/internal/event"
	"vigia/internal/jail"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// A machine that is recorded runs under software emulation, counting its instructions, and QEMU logs whatever enters it and at which
// instruction: time, typed characters, frames, the order in which disk requests end. A machine that replays it begins with the same
// disk, is given the log in place of the world, and does the same again, instruction by instruction, with all of vigia's eyes on
// it and at its own pace. Whether it really did is not assumed: at the end console and disk are compared.

// recording is what is known of a machine's last run, beside QEMU's log of it.
type recording struct {
	Began   time.Time `json:"began"`            // what the guest's clock said
	Layers  []string  `json:"layers,omitempty"` // of the disk as it was then, over the image's
	From    int64     `json:"from"`             // where in the console's log it begins
	To      int64     `json:"to"`               // and ends
	Whole   bool      `json:"whole"`            // QEMU has closed its log
	Verdict string    `json:"verdict,omitempty"`
	Exact   bool      `json:"exact"`
}

// replaying says whose recording a machine replays.
type replaying struct {
	Of        vm.ID     `json:"of"`
	Name      string    `json:"name"`
	Recording recording `json:"recording"`
}

// recordLogMost bounds QEMU's log, in bytes; a busy guest writes 2 MB a second. Beyond it QEMU ends.
const recordLogMost = 64 << 30

// A replay that executes nothing for so long has lost its way: QEMU waits for an event that does not come.
const (
	replayLook  = 3 * time.Second
	replayStill = 10 // looks
)

// compareConsole bounds what is compared of two consoles, in bytes: the first part of the log, which is never overwritten.
const compareConsole = 16 << 20

func (l layout) recordingLog(id vm.ID) string { return filepath.Join(l.machine(id), "recording.log") }

// consoleSize is how long the first part of a machine's console log is, in bytes.
func (l layout) consoleSize(id vm.ID) int64 {
	info, err := os.Stat(l.consoleLogs(id)[0])
	if err != nil {
		return 0
	}
	return info.Size()
}

// replayMode is QEMU's word for what is done with the machine's events; empty for a machine like any other.
func (r *record) replayMode() string {
	switch {
	case r.Replays != nil:
		return "replay"
	case r.Spec.Record:
		return "record"
	}
	return ""
}

func (r *record) began() time.Time {
	switch {
	case r.Replays != nil:
		return r.Replays.Recording.Began
	case r.Recording != nil:
		return r.Recording.Began
	}
	return time.Time{}
}

func (r *record) recordMost() uint64 {
	if r.replayMode() == "record" {
		return recordLogMost
	}
	return 0
}

func (r *record) recordingText() string {
	rec := r.Recording
	switch {
	case r.Replays != nil:
		return "replays the last run of " + r.Replays.Name
	case !r.Spec.Record:
		return ""
	case rec == nil:
		return "on, nothing is recorded yet"
	case r.Run != nil:
		return "is being recorded"
	case !rec.Whole:
		return "of the last run is cut short: it was ended by force, and can't be replayed"
	case rec.Verdict == "":
		return "of the last run is there, not yet replayed: whether it is exact is not known"
	}
	return rec.Verdict
}

// makeLog makes the file for QEMU's log, and keeps the disk as it is now.
func (l *launch) makeLog(ctx context.Context) error {
	switch l.rec.replayMode() {
	case "record":
		return l.makeRecording(ctx)
	case "replay":
		// Another user's QEMU wrote it, and this machine's reads it through a bind; nobody else comes by the directory.
		return os.Chmod(l.d.files.recordingLog(l.id()), 0o444)
	}
	return nil
}

func (l *launch) makeRecording(ctx context.Context) error {
	path := l.d.files.recordingLog(l.id())
	os.Remove(path) // a replay of it has it under a name of its own
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("recording: %w", err)
	}
	defer f.Close()
	if err := l.give(f); err != nil {
		return fmt.Errorf("recording: %w", err)
	}
	from := l.d.files.consoleSize(l.id())
	if l.record().Pending == "" { // else a start that came to nothing has done it
		over, err := l.pushLayer(ctx)
		if err != nil {
			return err
		}
		over.Close() // the guard opens it, and puts the one below in order
	}
	return l.change(ctx, func(r *record) {
		r.Recording = &recording{Began: time.Now().UTC().Truncate(time.Second), Layers: r.Layers, From: from}
	})
}

// endRecording notes the end of a run; the caller has the lock. What was there may be being read elsewhere, and stays.
func (m *machine) endRecording(exit jail.Exit) {
	if m.rec.Recording == nil || m.rec.Replays != nil {
		return
	}
	ended := *m.rec.Recording
	ended.To = m.d.files.consoleSize(m.id())
	ended.Whole = exit.Known && exit.Signal == 0 && exit.Code == 0
	m.rec.Recording = &ended
}

// replay makes a machine that does again what m did in its last run.
func (d *Daemon) replay(ctx context.Context, m *machine, name string) (*machine, error) {
	rec := m.record()
	switch {
	case !rec.Spec.Record:
		return nil, fmt.Errorf("%s is not recorded: %w: run it with --record", m.name(), errState)
	case rec.Run != nil:
		return nil, fmt.Errorf("%s runs, its recording has no end yet: %w: stop it, then replay", m.name(), errState)
	case rec.Recording == nil || !rec.Recording.Whole:
		return nil, fmt.Errorf("the last run of %s was ended by force, its recording is cut short: %w: end it with: vigia stop", m.name(), errState)
	}
	if name == "" {
		name = m.name() + "-replay"
	}
	if _, err := vm.ParseName(name); err != nil {
		return nil, err
	}
	spec := rec.Spec
	spec.Name, spec.ID, spec.Created, spec.Publish, spec.Record = name, vm.NewID(), time.Now().UTC(), nil, false
	spec.Probe = "" // what nobody watched the first time is watched now
	if spec.Net.Mode == vm.NetNAT {
		spec.Net.Mode = vm.NetReplay
	}
	again, err := d.createFrom(ctx, record{Spec: spec, Layers: rec.Recording.Layers, Origin: rec.origin(),
		Replays: &replaying{Of: m.id(), Name: m.name(), Recording: *rec.Recording}})
	if err != nil {
		return nil, err
	}
	err = os.Link(d.files.recordingLog(m.id()), d.files.recordingLog(again.id()))
	if err == nil {
		err = again.start(ctx)
	}
	if err != nil {
		d.remove(context.WithoutCancel(ctx), again)
		return nil, fmt.Errorf("replay %s: %w", m.name(), err)
	}
	return again, nil
}

// watchReplay ends a replay that does not get on.
func (d *Daemon) watchReplay(m *machine, r *run) {
	if m.rec.Replays == nil {
		return
	}
	d.spawn(func() {
		var last int64
		still := 0
		for !waitFor(d.ctx, r.ended, replayLook) && d.ctx.Err() == nil {
			var s link.GuardStatus
			if _, err := m.callGuard(d.ctx, link.CallGuardStatus, nil, &s); err != nil || m.record().Paused {
				continue
			}
			if still++; s.Instructions != last {
				last, still = s.Instructions, 0
			}
			if still >= replayStill {
				m.note(fmt.Sprintf("the replay stands still at instruction %d: what comes next in the recording does not happen", last))
				r.qemu.Kill()
				return
			}
		}
	})
}

// judgeReplay compares what a replay that has ended did with what was recorded, and keeps the verdict with both. rec is from before the end.
func (m *machine) judgeReplay(rec record, exit jail.Exit) {
	if rec.Replays == nil || rec.Run == nil {
		return
	}
	seconds := time.Since(rec.Run.Started).Seconds()
	m.d.spawn(func() {
		err := m.compareReplay(rec, exit)
		exact := err == nil
		verdict := "exact: replayed to its end with the same console and the same disk, byte by byte"
		if err != nil {
			verdict = "not known to be exact: " + event.Text([]byte(err.Error()))
		}
		ctx := context.WithoutCancel(m.d.ctx)
		m.change(ctx, func(r *record) { r.Reason = verdict })
		if of, ferr := m.d.machine(rec.Replays.Name); ferr == nil && of.id() == rec.Replays.Of {
			of.change(ctx, func(r *record) {
				if r.Recording != nil && r.Recording.Began.Equal(rec.Replays.Recording.Began) {
					again := *r.Recording
					again.Verdict, again.Exact = verdict, exact
					r.Recording = &again
				}
			})
		}
		m.d.bus.emit(m.name(), event.ReplayEnded, event.Fields{"of": rec.Replays.Name, "exact": exact, "reason": verdict, "seconds": seconds})
	})
}

func (m *machine) compareReplay(rec record, exit jail.Exit) error {
	if reason := m.record().Reason; !exit.Known || exit.Signal != 0 || exit.Code != 0 {
		return fmt.Errorf("the replay did not come to its end: %s", reason)
	}
	of, err := m.d.machine(rec.Replays.Name)
	if err != nil || of.id() != rec.Replays.Of {
		return errors.New("the machine that was recorded is gone: there is nothing to compare with")
	}
	unlock, err := of.lock(m.d.ctx)
	if err != nil {
		return err
	}
	defer unlock()
	was := of.record()
	if was.Run != nil || was.Recording == nil || !was.Recording.Began.Equal(rec.Replays.Recording.Began) {
		return errors.New("the machine that was recorded has run again: its console and disk are not what they were")
	}
	if err := sameConsole(m.d.files.consoleLogs(of.id())[0], m.d.files.consoleLogs(m.id())[0], *was.Recording); err != nil {
		return err
	}
	return m.sameDisk(of)
}

func sameConsole(recorded, replayed string, r recording) error {
	a, err := readPart(recorded, r.From, r.To-r.From)
	if err != nil {
		return err
	}
	b, err := readPart(replayed, 0, compareConsole)
	if err != nil {
		return err
	}
	if n := min(len(a), len(b)); !bytes.Equal(a[:n], b[:n]) || (len(a) != len(b) && int(r.From)+len(a) < compareConsole) {
		return fmt.Errorf("the console differs: %d bytes were recorded, %d replayed", len(a), len(b))
	}
	return nil
}

func readPart(path string, from, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.NewSectionReader(f, from, min(n, compareConsole)))
}

func (m *machine) sameDisk(of *machine) error {
	ctx, cancel := context.WithTimeout(m.d.ctx, compareTime)
	defer cancel()
	a, err1 := of.openChain(of.record().Layers)
	defer func() { closeFiles(a) }()
	b, err2 := m.openChain(m.record().Layers)
	defer func() { closeFiles(b) }()
	overA, err3 := os.OpenFile(m.d.files.overlay(of.id()), os.O_RDWR, 0)
	overB, err4 := os.OpenFile(m.d.files.overlay(m.id()), os.O_RDWR, 0)
	defer func() { closeFiles([]*os.File{overA, overB}) }()
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	d, err := m.d.convert.Same(ctx, a, overA, b, overB)
	if err == nil && d.At >= 0 {
		err = fmt.Errorf("the disk differs from byte %d on", d.At)
	}
	return err
}
