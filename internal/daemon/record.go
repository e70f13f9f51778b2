package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

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
	Began   time.Time  `json:"began"`            // what the guest's clock said
	Layers  []string   `json:"layers,omitempty"` // of the disk as it was then, over the image's
	From    int64      `json:"from"`             // where in the console's log it begins
	To      int64      `json:"to"`               // and ends
	Whole   bool       `json:"whole"`            // QEMU has closed its log
	Shown   link.Shown `json:"shown"`            // what went over its card
	Verdict string     `json:"verdict,omitempty"`
	Exact   bool       `json:"exact"`
}

// recordLogMost bounds QEMU's log, in bytes; a busy guest writes 2 MB a second. Beyond it QEMU ends.
const recordLogMost = 64 << 30

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

// showsFrames says whether QEMU shows the guard what goes over the card.
func (r *record) showsFrames() bool {
	return r.replayMode() != "" && (r.Spec.Net.Mode == vm.NetNAT || r.Spec.Net.Mode == vm.NetReplay)
}

// shown asks a guard whose QEMU is gone what went over the card. A guard that died meanwhile does not know, and says so.
func (m *machine) shown(ctx context.Context, guard *worker) (s link.Shown) {
	if m.rec.showsFrames() && !guard.gone() {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		guard.conn.Call(ctx, link.CallShown, nil, &s)
	}
	return s
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
		return r.Replays.text()
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
	os.Remove(l.d.files.recordingTimes(l.id()))
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
func (m *machine) endRecording(exit jail.Exit, shown link.Shown) {
	if m.rec.Recording == nil || m.rec.Replays != nil {
		return
	}
	ended := *m.rec.Recording
	ended.To = m.d.files.consoleSize(m.id())
	ended.Shown = shown
	ended.Whole = exit.Known && exit.Signal == 0 && exit.Code == 0
	m.rec.Recording = &ended
}
