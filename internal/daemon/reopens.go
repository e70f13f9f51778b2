package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/convert"
	"vigia/internal/event"
	"vigia/internal/inventory"
	"vigia/internal/policy"
	"vigia/internal/vm"
)

// Before a machine is rolled back, what that brings back is told: two disks are compared by a confined process, the one of the
// checkpoint and the present one. The present state is saved first, whole, and stays as a checkpoint: a rollback takes
// nothing away that is yet to be looked at. A rule may refuse. Whoever asks for a rollback, a person, a rule or a guest's panic, goes
// this way; only a person may leave it out.

// compareTime bounds a comparison. The longest part is the walk through two file systems.
const compareTime = 5 * time.Minute

// toldItems bounds the list in an event; all of it is in the answer to who asked.
const toldItems = 40

// reopening is what a comparison found.
type reopening struct {
	items   []inventory.Item
	left    checkpoint.Record // of the present state; none where the machine does not run
	seconds float64
}

// reopens compares the machine's present disk with a checkpoint's. What can't be read is an item and no error: a rollback must
// not depend on what a guest made of its disk.
func (m *machine) reopens(ctx context.Context, to checkpoint.Record, vulnerabilities, label string) (reopening, error) {
	began := time.Now()
	var found reopening
	holes, err := openHoles(vulnerabilities)
	if err != nil {
		return found, err
	}
	defer closeFiles([]*os.File{holes})
	if m.running() != nil {
		found.left, err = m.checkpoint(ctx, label, false)
	}
	if err == nil {
		found.items, err = m.compareDisks(ctx, to, found.left, holes)
	}
	if err != nil {
		if ctx.Err() != nil || errors.Is(err, vm.ErrInvalid) {
			return found, err
		}
		found.items = []inventory.Item{{Kind: "unread", Subject: "the disks", Detail: "could not be compared: " + event.Text([]byte(err.Error())), Severity: inventory.Medium}}
	}
	found.seconds = time.Since(began).Seconds()
	return found, nil
}

// rollbackOrder says who wants a rollback, and how.
type rollbackOrder struct {
	reason          string
	atOnce          bool // save nothing, list nothing and ask no rule
	vulnerabilities string
}

// rollback puts a machine back to a checkpoint of its own line, once it is told what that brings back and no rule refuses it.
func (m *machine) rollback(ctx context.Context, to checkpoint.Record, o rollbackOrder) (found reopening, err error) {
	if err := m.canRollBack(to); err != nil {
		return found, err
	}
	if !o.atOnce {
		if found, err = m.reopens(ctx, to, o.vulnerabilities, "before the rollback to "+string(to.ID)); err != nil {
			return found, err
		}
		if err := m.tellReopens(ctx, to, found); err != nil {
			return found, err
		}
	}
	return found, m.goBack(ctx, to, o.reason)
}

// openHoles opens the file of vulnerabilities that somebody named; nil where nobody did.
func openHoles(path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%w: vulnerabilities: %s: use an absolute path on the daemon's host", vm.ErrInvalid, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: vulnerabilities: %w", vm.ErrInvalid, err)
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("%w: vulnerabilities: %s is no file", vm.ErrInvalid, path)
	}
	return f, nil
}

func (m *machine) compareDisks(ctx context.Context, to, left checkpoint.Record, holes *os.File) ([]inventory.Item, error) {
	ctx, cancel := context.WithTimeout(ctx, compareTime)
	defer cancel()
	disks, done, err := m.openDisks(ctx, to, left)
	defer done()
	if err != nil {
		return nil, err
	}
	disks.Holes = holes
	return m.d.convert.Reopens(ctx, disks)
}

// openDisks opens a checkpoint's disk and another's, or where that has no ID the machine's as it lies there: it must not run then, and
// is kept from it until done is called.
func (m *machine) openDisks(ctx context.Context, then, now checkpoint.Record) (d convert.Disks, done func(), err error) {
	var back undo
	done = back.unwind
	if d.Then, err = m.openChain(m.layersOf(then.ID)); err != nil {
		closeFiles(d.Then)
		return d, done, err
	}
	back.push(func() { closeFiles(d.Then) })
	if now.ID == "" {
		unlock, err := m.lock(ctx)
		if err != nil {
			return d, done, err
		}
		back.push(unlock)
		if m.running() != nil {
			return d, done, fmt.Errorf("%s was started meanwhile: %w: ask again", m.name(), errState)
		}
		if d.Overlay, err = os.OpenFile(m.d.files.overlay(m.id()), os.O_RDWR, 0); err != nil {
			return d, done, err
		}
		back.push(func() { d.Overlay.Close() })
	}
	d.Now, err = m.openChain(m.layersOf(now.ID))
	back.push(func() { closeFiles(d.Now) })
	return d, done, err
}

// layersOf asks for a checkpoint's layers, or with none for the machine's own; they may be merged between two askings.
func (m *machine) layersOf(id checkpoint.ID) func() ([]string, error) {
	return func() ([]string, error) {
		if id == "" {
			return m.record().Layers, nil
		}
		r, err := m.d.checkpoints.Get(id)
		return r.Layers, err
	}
}

// openChain opens the image's layers and those asked for, the lowest first.
func (m *machine) openChain(ask func() ([]string, error)) ([]*os.File, error) {
	m.d.lineage.Lock() // what is named is there
	defer m.d.lineage.Unlock()
	layers, err := ask()
	if err != nil {
		return nil, err
	}
	img, err := m.d.images.Get(m.record().Spec.ImageID)
	if err != nil {
		return nil, err
	}
	files, err := img.OpenDisk()
	if err != nil {
		return nil, err
	}
	for _, name := range layers {
		f, err := os.Open(m.d.files.layer(name))
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}

// tellReopens makes the event, which the rules answer before anything is done: one that refuses ends the rollback, and one that
// asks for quarantine has the machine cut off before it goes back, until somebody has read the list and released it.
func (m *machine) tellReopens(ctx context.Context, to checkpoint.Record, found reopening) error {
	count := map[inventory.Severity]int64{}
	var worst []string
	for _, i := range found.items {
		count[i.Severity]++
		if len(worst) < toldItems {
			worst = append(worst, event.Text(fmt.Appendf(nil, "%s %s: %s: %.120s", i.Severity, i.Kind, i.Subject, i.Detail)))
		}
	}
	e, decisions := m.d.bus.ask(m.name(), event.CheckpointReopens, event.Fields{"id": string(to.ID), "left": string(found.left.ID), "items": worst, "seconds": found.seconds,
		"critical": count[inventory.Critical], "high": count[inventory.High], "medium": count[inventory.Medium], "low": count[inventory.Low]})
	for _, p := range decisions {
		if slices.Contains(p.Respond, policy.Refuse) {
			return fmt.Errorf("the rule %s refuses to roll %s back, for what that would bring back: %w: see it with: vigia rollback %s %s --dry-run", p.Rule, m.name(), errState, m.name(), to.ID)
		}
	}
	for _, p := range decisions {
		if slices.Contains(p.Respond, "quarantine") {
			return m.quarantine(ctx, p.Rule, e.Time)
		}
	}
	return nil
}
