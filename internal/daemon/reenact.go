package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api/vigiav1"
	"vigia/internal/checkpoint"
	"vigia/internal/event"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// A re-enactment is a clone of a checkpoint that is given again what had entered the machine since. It is cut off: its gate has no
// network, the recorded answers are all it hears. All of vigia's eyes are on it, also those that were not on the machine then. What it does
// is told by its events, like any machine's; the last of them is replay.given.

// reenacting says what a clone is given again.
type reenacting struct {
	Of         vm.ID         `json:"of"`
	Name       string        `json:"name"`
	Checkpoint checkpoint.ID `json:"checkpoint"`
	From       time.Time     `json:"from"`
	Wait       time.Duration `json:"wait,omitempty"`
	Given      bool          `json:"given,omitempty"` // replay.given was told
}

// Bounds of a re-enactment: until the clone is seen into before anything is given, how long it has for what was given last,
// and how much longer than planned all of it may take.
const (
	reenactReady  = 30 * time.Second
	reenactSettle = 3 * time.Second
	reenactMost   = 8 * 24 * time.Hour
)

// reenact makes the clone and begins to give it its inputs.
func (d *Daemon) reenact(ctx context.Context, m *machine, from checkpoint.Record, name string, wait time.Duration) (*machine, error) {
	if from.Machine != m.id() {
		return nil, fmt.Errorf("checkpoint %s is of %s, not of %s: %w", from.ID, from.Name, m.name(), errState)
	}
	if m.record().Spec.Keep.Off {
		return nil, fmt.Errorf("what enters %s is not kept: %w: it was run with --keep-inputs off", m.name(), errState)
	}
	from, unpin, err := d.held(from)
	if err != nil {
		return nil, err
	}
	defer unpin()
	if name == "" {
		name = m.name() + "-replay"
	}
	if _, err := vm.ParseName(name); err != nil {
		return nil, err
	}
	spec := from.Spec
	spec.Name, spec.ID, spec.Created, spec.Expires, spec.Publish = name, vm.NewID(), time.Now().UTC(), time.Time{}, nil
	spec.Probe, spec.Keep = "", vm.Keep{Off: true}
	again, err := d.createFrom(ctx, record{Spec: spec, Layers: from.Layers, Checkpoint: from.ID, Resume: from.ID, Origin: from.Origin, Shares: true,
		Reenacts: &reenacting{Of: m.id(), Name: m.name(), Checkpoint: from.ID, From: from.Time, Wait: wait}})
	if err != nil {
		return nil, err
	}
	if err := again.start(ctx); err != nil {
		d.remove(context.WithoutCancel(ctx), again)
		return nil, fmt.Errorf("replay %s from %s: %w", m.name(), from.ID, err)
	}
	d.spawn(func() { again.playInputs() })
	return again, nil
}

// playInputs gives a clone all it is to be given, and tells what that was.
func (m *machine) playInputs() {
	ctx, cancel := context.WithTimeout(m.d.ctx, reenactMost)
	defer cancel()
	r := m.running()
	if r == nil {
		return
	}
	go func() {
		waitFor(ctx, r.ended, reenactMost)
		cancel()
	}()
	began := time.Now()
	m.awaitEyes(ctx)
	net, channel, err := m.playBoth(ctx)
	waitFor(ctx, r.ended, reenactSettle)
	if err == nil && ctx.Err() != nil {
		err = errors.New("it ended before all was given")
	}
	m.tellGiven(net, channel, time.Since(began), err)
}

// awaitEyes waits until it is seen what the clone's processes do: what is given before would go unseen.
func (m *machine) awaitEyes(ctx context.Context) {
	for end := time.Now().Add(reenactReady); time.Now().Before(end) && ctx.Err() == nil; waitFor(ctx, nil, 100*time.Millisecond) {
		var s link.GuardStatus
		if _, err := m.callGuard(ctx, link.CallGuardStatus, nil, &s); err == nil && strings.HasPrefix(s.Introspection, "attached") &&
			(strings.HasPrefix(s.Probe, "probed: ") || strings.HasPrefix(s.Probe, "sampled: ")) {
			return
		}
	}
}

// playBoth lets gate and guard give what each has, at one pace.
func (m *machine) playBoth(ctx context.Context) (net, channel link.Played, err error) {
	var wg sync.WaitGroup
	var gateErr, guardErr error
	if _, gate := m.bothWorkers(); !gate.gone() {
		wg.Go(func() { _, gateErr = gate.conn.Call(ctx, link.CallPlay, nil, &net) })
	}
	wg.Go(func() {
		play, files := m.d.openPlay(*m.rec.Reenacts)
		defer closeFiles(files)
		_, guardErr = m.callGuard(ctx, link.CallPlay, play, &channel, files...)
	})
	wg.Wait()
	return net, channel, errors.Join(gateErr, guardErr)
}

// tellGiven tells the end. What the workers say was read from what outsiders sent: it is capped.
func (m *machine) tellGiven(net, channel link.Played, took time.Duration, err error) {
	re := *m.record().Reenacts
	until := net.Until
	if channel.Until.After(until) {
		until = channel.Until
	}
	const most = 16
	gaps := []string{}
	for _, g := range append(net.Gaps, channel.Gaps...) {
		if text := event.Text([]byte(g)); len(gaps) < most && (len(gaps) == 0 || gaps[len(gaps)-1] != text) {
			gaps = append(gaps, text)
		}
	}
	f := event.Fields{"of": re.Name, "checkpoint": string(re.Checkpoint), "from": stamp(re.From), "flows_in": int64(net.FlowsIn), "flows_out": int64(net.FlowsOut),
		"names": int64(net.Names), "typed": channel.Typed, "calls": int64(channel.Calls), "bytes": net.Bytes, "late": int64(net.Late), "refused": int64(net.Refused),
		"unasked": int64(net.Unasked), "older": int64(net.Older), "older_bytes": net.OlderBytes, "gaps": gaps, "seconds": took.Seconds(), "complete": err == nil}
	if !until.IsZero() {
		f["until"] = stamp(until)
	}
	if err != nil {
		f["reason"] = event.Text([]byte(err.Error()))
	}
	m.change(context.WithoutCancel(m.d.ctx), func(r *record) {
		re.Given = true
		r.Reenacts = &re
	})
	m.d.bus.emit(m.name(), event.ReplayGiven, f)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// cutShort tells of a re-enactment whose daemon died in the middle of it.
func (m *machine) cutShort() {
	if re := m.record().Reenacts; re != nil && !re.Given {
		m.tellGiven(link.Played{}, link.Played{}, 0, errors.New("the daemon ended while it was given its inputs: begin again"))
	}
}

// Reenact makes a clone and gives it what had entered the machine.
func (s checkpointsServer) Reenact(ctx context.Context, r *connect.Request[vigiav1.ReenactRequest]) (*connect.Response[vigiav1.Machine], error) {
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return nil, err
	}
	wait := time.Duration(r.Msg.WaitSeconds * float64(time.Second))
	if r.Msg.WaitSeconds < 0 || r.Msg.WaitSeconds > 86400 {
		return nil, fmt.Errorf("%w: wait %g: use 0 to 86400 seconds", vm.ErrInvalid, r.Msg.WaitSeconds)
	}
	from, err := s.d.findCheckpoint(r.Msg.Checkpoint)
	if err != nil {
		return nil, err
	}
	if !s.d.begin() {
		return nil, errEnding
	}
	defer s.d.tasks.Done()
	again, err := s.d.reenact(ctx, m, from, r.Msg.NewName, wait)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(again.show(ctx)), nil
}
