package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// What enters a machine is kept from its first checkpoint on: without one there is nothing from which it could be given again. Gate and
// guard each write a log, a ring of files that are opened here and never read here.

// segments is how many files each worker's log has. Most of what enters comes from the network.
var segments = map[string]int{"gate": 14, "guard": 2}

const allSegments = 16

func (l layout) inputs(id vm.ID) string { return filepath.Join(l.machine(id), "inputs") }

// keeps says whether what enters the machine is to be kept.
func (m *machine) keeps() bool {
	rec := m.record()
	if rec.Spec.Keep.Off || rec.replayMode() != "" || rec.Reenacts != nil {
		return false
	}
	return rec.Checkpoint != "" || len(m.d.checkpoints.List(func(r *checkpoint.Record) bool { return r.Machine == m.id() })) > 0
}

// beginInputs clears away, at a start, what nothing can be done with any more.
func (m *machine) beginInputs() {
	if !m.keeps() {
		os.RemoveAll(m.d.files.inputs(m.id()))
	}
}

// keepInputs lets a worker keep what enters from now on, where that is wanted. run is when the machine's run began.
func (m *machine) keepInputs(ctx context.Context, run time.Time, w *worker) {
	if m.keeps() {
		m.keepWith(ctx, run, w)
	}
}

// keepMore makes sure, before a checkpoint, that what enters after it is kept.
func (m *machine) keepMore(ctx context.Context, r *run) {
	rec := m.record()
	if rec.Spec.Keep.Off || rec.Reenacts != nil || rec.Run == nil {
		return
	}
	guard, gate := m.bothWorkers()
	for _, w := range []*worker{guard, gate} {
		if !w.gone() {
			m.keepWith(ctx, rec.Run.Started, w)
		}
	}
}

// keepWith hands a worker the files of its log, once. Without them the machine works as it did: what is missing is told when
// somebody asks for it.
func (m *machine) keepWith(ctx context.Context, run time.Time, w *worker) {
	if w.keeps.Swap(true) {
		return
	}
	err := m.giveLog(ctx, run, w)
	if err != nil {
		w.keeps.Store(false)
		m.d.log.Warn("what enters a machine is not kept", "machine", m.name(), "worker", w.name, "error", err)
	}
}

func (m *machine) giveLog(ctx context.Context, run time.Time, w *worker) error {
	dir := m.d.files.inputs(m.id())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	n := segments[w.name]
	files := make([]*os.File, 0, n)
	defer func() { closeFiles(files) }()
	for i := range n {
		f, err := os.OpenFile(filepath.Join(dir, w.name+"."+strconv.Itoa(i)), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	bytes, age := m.rec.Spec.Keep.Bounds()
	ctx, cancel := context.WithTimeout(ctx, gateTime)
	defer cancel()
	_, err := w.conn.Call(ctx, link.CallKeepInputs, link.KeepInputs{Run: run, Bytes: int64(bytes) * int64(n) / allSegments, Age: age}, nil, files...)
	return err
}

// openPlay opens what a clone is given again. What is not there is not given: its workers say so.
func (d *Daemon) openPlay(r reenacting) (p link.Play, files []*os.File) {
	p = link.Play{From: r.From, Wait: r.Wait}
	dir := d.files.inputs(r.Of)
	for _, log := range []struct {
		name  string
		count *int
	}{{"gate", &p.Gate}, {"guard", &p.Guard}} {
		for i := range segments[log.name] {
			f, err := os.Open(filepath.Join(dir, log.name+"."+strconv.Itoa(i)))
			if err != nil {
				continue
			}
			files = append(files, f)
			*log.count++
		}
	}
	return p, files
}

// inputsText says what is kept of what enters the machine.
func (m *machine) inputsText(rec *record) string {
	switch {
	case rec.Reenacts != nil:
		return "given again, those of " + rec.Reenacts.Name + " since checkpoint " + string(rec.Reenacts.Checkpoint)
	case rec.Spec.Keep.Off:
		return "not kept"
	}
	bytes, age := rec.Spec.Keep.Bounds()
	bounds := fmt.Sprintf("at most %s and %s", vm.FormatSize(bytes), ageText(age))
	entries, err := os.ReadDir(m.d.files.inputs(m.id()))
	if err != nil || len(entries) == 0 {
		return "kept from the first checkpoint on, " + bounds
	}
	var used int64
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			used += info.Size()
		}
	}
	return fmt.Sprintf("%d KiB kept, %s", used>>10, bounds)
}

func ageText(d time.Duration) string {
	if d%(24*time.Hour) == 0 {
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	}
	return d.String()
}
