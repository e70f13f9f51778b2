package daemon

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"vigia/internal/checkpoint"
	"vigia/internal/event"
	"vigia/internal/store"
	"vigia/internal/vm"
)

// A spare is a clone that is made ahead: its disk, its guard, its gate and its QEMU are there, QEMU has loaded its devices and maps the
// checkpoint's memory, and waits for the word to go. It is confined as every machine is, by processes, users and sockets of its own,
// since it has its id from the beginning; what it lacks is a name and a record. So it is nobody's: no list shows it, no rule hears
// of it, its guard does not see its memory, and it is gone with its daemon, killed or not (package guard, ahead.go).
//
// Spares are for the checkpoint that was cloned last, and begin when it was cloned a first time: a host where nobody clones pays
// nothing. They are given up when they are not asked for.
type spares struct {
	most  int
	waits func(*launch) bool // whether all of one is still there

	mu     sync.Mutex
	of     checkpoint.ID // whose they are
	ready  []*launch
	asked  time.Time // when one was asked for last
	making bool
	epoch  int // changes when those that are there, or being made, are of no use any more
}

const (
	spareRest = time.Second      // without a clone being asked for, before the next spare is made: those who wait come first
	spareIdle = 10 * time.Minute // without a clone being asked for, after which they are given up
	spareTime = time.Minute      // for one to be made
	// spareRoom is how much memory the host must have left for one to be made: it takes 60 MiB, what its guest will write comes later.
	spareRoom = 1 << 30
)

// want notes that a checkpoint is cloned, and gives a spare of it.
func (s *spares) want(id checkpoint.ID, now time.Time) (ready *launch, rest []*launch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = now
	if s.of != id {
		rest, s.ready, s.of = s.ready, nil, id
		s.epoch++
	}
	for len(s.ready) > 0 && ready == nil {
		l := s.ready[0]
		if s.ready = s.ready[1:]; s.waits(l) {
			ready = l
		} else {
			rest = append(rest, l)
		}
	}
	return ready, rest
}

// waits says whether all of a spare is still there.
func (l *launch) waits() bool {
	select {
	case <-l.qemu.Done():
		return false
	default:
	}
	guard, gate := l.bothWorkers()
	_, _, missing := l.missing(guard, gate)
	return !missing
}

// next says whether one more is to be made now, of which checkpoint; who asks makes it and then says put.
func (s *spares) next(now time.Time) (of checkpoint.ID, epoch int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.making || s.of == "" || len(s.ready) >= s.most || now.Sub(s.asked) < spareRest {
		return "", 0, false
	}
	s.making = true
	return s.of, s.epoch, true
}

// put takes one that was made, nil where that failed; it is refused where it is of no use any more.
func (s *spares) put(l *launch, epoch int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.making = false
	if epoch != s.epoch {
		return l == nil
	}
	if l == nil {
		s.of = "" // until it is cloned again
		return true
	}
	s.ready = append(s.ready, l)
	return true
}

// drop gives all up; with an id, those of that checkpoint.
func (s *spares) drop(id checkpoint.ID) []*launch {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id != "" && s.of != id {
		return nil
	}
	gone := s.ready
	s.ready = nil
	s.epoch++
	if id != "" {
		s.of = ""
	}
	return gone
}

// forgotten gives all up where nobody has asked for long.
func (s *spares) forgotten(now time.Time) []*launch {
	s.mu.Lock()
	old := s.of != "" && now.Sub(s.asked) > spareIdle
	id := s.of
	s.mu.Unlock()
	if !old {
		return nil
	}
	return s.drop(id)
}

// keepSpares is called each second.
func (d *Daemon) keepSpares(now time.Time) {
	if d.spares.most == 0 {
		return
	}
	d.discard(d.spares.forgotten(now))
	id, epoch, ok := d.spares.next(now)
	if !ok {
		return
	}
	if !d.spawn(func() { d.makeSpare(id, epoch) }) {
		d.spares.put(nil, epoch)
	}
}

// makeSpare makes one, and leaves it to the spares.
func (d *Daemon) makeSpare(id checkpoint.ID, epoch int) {
	l, err := d.ahead(id)
	if err != nil {
		d.log.Warn("no clone could be made ahead", "checkpoint", id, "error", err)
		d.spares.put(nil, epoch)
		return
	}
	if !d.spares.put(l, epoch) {
		d.discard([]*launch{l})
	}
}

// ahead makes a clone up to its first instruction.
func (d *Daemon) ahead(id checkpoint.ID) (*launch, error) {
	ctx, cancel := context.WithTimeout(d.ctx, spareTime)
	defer cancel()
	if free, err := availableMemory(); err == nil && free < spareRoom {
		return nil, fmt.Errorf("the host has only %d MiB of memory left", free>>20)
	}
	unpin, err := d.pin(id)
	if err != nil {
		return nil, err
	}
	defer unpin()
	from, err := d.checkpoints.Get(id)
	if err != nil {
		return nil, err
	}
	spec := from.Spec
	spec.ID, spec.Publish = vm.NewID(), nil
	spec.Name = string(spec.ID) // until it has one
	m := newMachine(d, cloneRecord(from, spec))
	m.ahead = true
	if err := d.makeDisk(m); err != nil {
		os.RemoveAll(d.files.machine(m.id()))
		return nil, err
	}
	l := newLaunch(m)
	l.back.push(func() { os.RemoveAll(d.files.machine(m.id())) })
	if err := l.follow(ctx, l.first()); err != nil {
		l.back.unwind()
		return nil, err
	}
	d.log.Debug("a clone was made ahead", "checkpoint", id, "ms", l.pace.String())
	return l, nil
}

// cloneRecord is a clone's, in quarantine.
func cloneRecord(from checkpoint.Record, spec vm.Spec) record {
	return record{Spec: spec, Quarantined: true, Layers: from.Layers, Checkpoint: from.ID, Resume: from.ID, Origin: from.Origin, Shares: true}
}

// discard ends spares.
func (d *Daemon) discard(all []*launch) {
	for _, l := range all {
		l.back.unwind()
	}
}

// claim gives a spare its name and its record and lets it go. Where that fails it is gone, as a clone that failed is.
func (d *Daemon) claim(ctx context.Context, l *launch, rec record) (*machine, error) {
	m := l.machine
	m.mu.Lock()
	rec.Spec.ID = m.id() // its processes, its directories and its user are of that
	m.rec, m.ahead = rec, false
	m.mu.Unlock()
	l.pace = newPace()
	l.state.Started = time.Now().UTC()
	if err := d.enter(m); err != nil {
		l.back.unwind()
		return nil, err
	}
	unlock, err := m.lock(ctx)
	if err == nil {
		defer unlock()
		err = d.keepRecord(ctx, m)
	}
	if err != nil {
		l.back.unwind()
		d.forget(m)
		return nil, err
	}
	l.pace.mark("record")
	if !d.begin() {
		l.back.unwind()
		return m, errEnding
	}
	defer d.tasks.Done()
	return m, l.start(ctx, func(ctx context.Context) error {
		err := l.follow(ctx, append([]step{{"named", l.named}}, l.last()...))
		d.log.Debug("a spare's way", "machine", m.name(), "ms", l.pace.String())
		return err
	})
}

// named tells the workers what they are of, and the gate what was asked for.
func (l *launch) named(ctx context.Context) error {
	guard, gate := l.bothWorkers()
	for _, w := range []*worker{guard, gate} {
		if w == nil {
			continue
		}
		if err := w.rename(ctx, l.name()); err != nil {
			return err
		}
	}
	if gate == nil {
		return nil
	}
	return l.settleGate(ctx, gate)
}

// enter gives a machine its name among those there are.
func (d *Daemon) enter(m *machine) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.machines[m.name()] != nil {
		return fmt.Errorf("machine %s %w: choose another name, or remove it with: vigia rm %s", m.name(), errExists, m.name())
	}
	d.machines[m.name()] = m
	return nil
}

// keepRecord puts a new machine into the store, and tells of it.
func (d *Daemon) keepRecord(ctx context.Context, m *machine) error {
	spec := m.rec.Spec
	if _, err := store.Create(ctx, d.store, machineKey(spec.ID), m.rec); err != nil {
		return fmt.Errorf("record of %s: %w", spec.Name, err)
	}
	d.bus.emit(spec.Name, event.MachineCreated, event.Fields{"image": spec.Image, "image_id": spec.ImageID, "id": string(spec.ID), "owner": spec.Owner, "purpose": spec.Purpose})
	return nil
}

// availableMemory is what the host can still give, in bytes.
func availableMemory() (uint64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "MemAvailable:"); ok {
			var kib uint64
			_, err := fmt.Sscan(rest, &kib)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/meminfo: no MemAvailable")
}
