package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api/vigiav1"
	"vigia/internal/event"
	"vigia/internal/jail"
	"vigia/internal/link"
	"vigia/internal/store"
	"vigia/internal/vm"
)

// What a machine gets where nothing is said.
const (
	defaultMemory = 512 << 20
	defaultCPUs   = 1
	statusTime    = 2 * time.Second // for a guard or gate to say how it is
)

type machinesServer struct{ d *Daemon }

// named runs f on a machine and answers with how it is then.
func (s machinesServer) named(ctx context.Context, name string, f func(*machine) error) (*connect.Response[vigiav1.Machine], error) {
	m, err := s.d.machine(name)
	if err != nil {
		return nil, err
	}
	if err := f(m); err != nil {
		return nil, err
	}
	return connect.NewResponse(m.show(ctx)), nil
}

// Run makes a machine and starts it. A machine that can't be started is not kept.
func (s machinesServer) Run(ctx context.Context, r *connect.Request[vigiav1.RunRequest]) (*connect.Response[vigiav1.Machine], error) {
	spec, err := s.spec(r.Msg)
	if err != nil {
		return nil, err
	}
	if !s.d.begin() { // what is made is started, or removed again, before the daemon ends
		return nil, errEnding
	}
	defer s.d.tasks.Done()
	keep, err := parseKeep(r.Msg.CheckpointEvery, r.Msg.Keep)
	if err == nil && keep != nil && spec.Record {
		err = fmt.Errorf("%w: a machine that is recorded can't be saved in the middle: leave out the one or the other", vm.ErrInvalid)
	}
	if err != nil {
		return nil, err
	}
	m, err := s.d.createFrom(ctx, record{Spec: spec, Keep: keep})
	if err != nil {
		return nil, err
	}
	if err := m.start(ctx); err != nil {
		s.d.remove(context.WithoutCancel(ctx), m)
		return nil, err
	}
	return connect.NewResponse(m.show(ctx)), nil
}

// spec reads a request; every word in it may be wrong.
func (s machinesServer) spec(r *vigiav1.RunRequest) (vm.Spec, error) {
	now := time.Now().UTC()
	spec := vm.Spec{Name: r.Name, ID: vm.NewID(), Memory: r.MemoryBytes, CPUs: int(r.Cpus), Net: vm.Net{Mode: r.Net},
		Additions: r.Additions, Owner: r.Owner, Purpose: r.Purpose, Labels: r.Labels, Probe: r.Probe, Record: r.Record, Created: now}
	var err error
	if spec.Keep, err = vm.ParseKeep(r.KeepInputs); err != nil {
		return spec, err
	}
	if spec.Memory == 0 {
		spec.Memory = defaultMemory
	}
	if spec.CPUs == 0 {
		spec.CPUs = defaultCPUs
	}
	if spec.Net.Mode == "" {
		spec.Net.Mode = vm.NetNAT
	}
	for _, p := range r.Publish {
		publish, err := vm.ParsePublish(p)
		if err != nil {
			return spec, err
		}
		spec.Publish = append(spec.Publish, publish)
	}
	if len(spec.Publish) > 0 && spec.Net.Mode == vm.NetOff {
		return spec, fmt.Errorf("%w: ports are published, but the network is off", vm.ErrInvalid)
	}
	if spec.Net.Rules, err = parseRules(r.Rules); err != nil {
		return spec, err
	}
	if r.Ttl != "" {
		ttl, err := vm.ParseTTL(r.Ttl)
		if err != nil {
			return spec, err
		}
		spec.Expires = now.Add(ttl)
	}
	if err := spec.Check(); err != nil {
		return spec, err
	}
	if spec.Net.Mode == vm.NetReplay {
		return spec, fmt.Errorf("%w: net %q: use nat or off", vm.ErrInvalid, spec.Net.Mode)
	}
	if spec.Record && s.d.accelerator != "tcg" {
		return spec, fmt.Errorf("%w: a recording needs software emulation: start the daemon with: vigia serve --accelerator tcg", vm.ErrInvalid)
	}
	img, err := s.d.images.Get(r.Image)
	if err != nil {
		return spec, err
	}
	spec.Image, spec.ImageID = r.Image, img.ID
	return spec, nil
}

func parseRules(texts []string) ([]vm.NetRule, error) {
	if len(texts) > 256 {
		return nil, fmt.Errorf("%w: %d network rules: use at most 256", vm.ErrInvalid, len(texts))
	}
	var out []vm.NetRule
	for _, t := range texts {
		r, err := vm.ParseNetRule(t)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// forget takes a machine out of the daemon's list and its files off the disk.
func (d *Daemon) forget(m *machine) {
	d.mu.Lock()
	delete(d.machines, m.name())
	d.mu.Unlock()
	os.RemoveAll(d.files.machine(m.id()))
	d.sweepRun(m.id())
}

// remove deletes a machine that does not run: first the record, so that a crash leaves files without a record, which
// the next start sweeps, and never a record without files.
func (d *Daemon) remove(ctx context.Context, m *machine) error {
	if err := d.store.Delete(ctx, machineKey(m.id())); err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	m.mu.Lock()
	m.removed = true
	m.mu.Unlock()
	d.forget(m)
	d.bus.emit(m.name(), event.MachineRemoved, nil)
	return nil
}

func (s machinesServer) List(ctx context.Context, _ *connect.Request[vigiav1.ListMachinesRequest]) (*connect.Response[vigiav1.ListMachinesResponse], error) {
	all := s.d.all()
	slices.SortFunc(all, func(a, b *machine) int { return strings.Compare(a.name(), b.name()) })
	out := &vigiav1.ListMachinesResponse{Machines: make([]*vigiav1.Machine, len(all))}
	var wg sync.WaitGroup
	for i, m := range all {
		wg.Go(func() { out.Machines[i] = m.brief() })
	}
	wg.Wait()
	return connect.NewResponse(out), nil
}

func (s machinesServer) Show(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.Machine], error) {
	return s.named(ctx, r.Msg.Name, func(*machine) error { return nil })
}

func (s machinesServer) Start(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.Machine], error) {
	return s.named(ctx, r.Msg.Name, func(m *machine) error {
		if e := m.rec.Spec.Expires; !e.IsZero() && time.Now().After(e) {
			return fmt.Errorf("machine %s expired at %s: %w", m.name(), e.Format(time.RFC3339), errState)
		}
		return m.start(ctx)
	})
}

func (s machinesServer) Stop(ctx context.Context, r *connect.Request[vigiav1.StopRequest]) (*connect.Response[vigiav1.Machine], error) {
	grace := graceTime
	if t := r.Msg.TimeoutSeconds; t < 0 || t > 3600 {
		return nil, fmt.Errorf("%w: timeout %gs: use 0 to 3600", vm.ErrInvalid, t)
	} else if t > 0 {
		grace = time.Duration(t * float64(time.Second))
	}
	return s.named(ctx, r.Msg.Name, func(m *machine) error { return m.stop(ctx, r.Msg.Force, grace) })
}

func (s machinesServer) Pause(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.Machine], error) {
	return s.named(ctx, r.Msg.Name, func(m *machine) error { return m.pause(ctx, "asked for") })
}

func (s machinesServer) Resume(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.Machine], error) {
	return s.named(ctx, r.Msg.Name, func(m *machine) error { return m.resume(ctx, "asked for") })
}

func (s machinesServer) Quarantine(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.Machine], error) {
	return s.named(ctx, r.Msg.Name, func(m *machine) error { return m.quarantine(ctx, "", time.Time{}) })
}

func (s machinesServer) Release(ctx context.Context, r *connect.Request[vigiav1.MachineRequest]) (*connect.Response[vigiav1.Machine], error) {
	return s.named(ctx, r.Msg.Name, func(m *machine) error { return m.release(ctx) })
}

func (s machinesServer) SetRules(ctx context.Context, r *connect.Request[vigiav1.SetRulesRequest]) (*connect.Response[vigiav1.Machine], error) {
	rules, err := parseRules(r.Msg.Rules)
	if err != nil {
		return nil, err
	}
	return s.named(ctx, r.Msg.Name, func(m *machine) error { return m.setRules(ctx, rules) })
}

func (s machinesServer) Remove(ctx context.Context, r *connect.Request[vigiav1.RemoveRequest]) (*connect.Response[vigiav1.RemoveResponse], error) {
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return nil, err
	}
	if st := m.state(); st != vm.Stopped && st != vm.Failed {
		if !r.Msg.Force {
			return nil, fmt.Errorf("machine %s is %s: %w: stop it first, or use --force", m.name(), st, errState)
		}
		if err := m.stop(ctx, true, 0); err != nil && !errors.Is(err, errState) {
			return nil, err
		}
	}
	unlock, err := m.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if m.running() != nil {
		return nil, fmt.Errorf("machine %s was started again: %w", m.name(), errState)
	}
	if !s.d.begin() {
		return nil, errEnding
	}
	defer s.d.tasks.Done()
	if err := s.d.remove(context.WithoutCancel(ctx), m); err != nil {
		return nil, err
	}
	s.d.sweepLayers()
	return connect.NewResponse(&vigiav1.RemoveResponse{}), nil
}

// brief is what a list shows: no worker is asked.
func (m *machine) brief() *vigiav1.Machine {
	state, rec := m.state(), m.record()
	s := &rec.Spec
	out := &vigiav1.Machine{Name: s.Name, Id: string(s.ID), State: string(state), Image: s.Image, ImageId: s.ImageID,
		MemoryBytes: s.Memory, Cpus: int32(s.CPUs), Net: s.Net.Mode, Owner: s.Owner, Purpose: s.Purpose, Labels: s.Labels,
		Additions: s.Additions, Created: timestamppb.New(s.Created), Quarantined: rec.Quarantined,
		Checkpoint: string(rec.Checkpoint), Origin: string(rec.Origin), Ended: string(rec.Ended), Reason: rec.Reason, Accelerator: m.d.accelerator}
	publish := s.Publish
	if !s.Expires.IsZero() {
		out.Expires = timestamppb.New(s.Expires)
	}
	out.Recording, out.Replay = rec.recordingText(), rec.Replays.show(m.debugger())
	out.Inputs = m.inputsText(&rec)
	if k := rec.Keep; k != nil {
		out.CheckpointEverySeconds, out.Keep = k.Every.Seconds(), int32(k.Keep)
		out.NextCheckpoint = timestamppb.New(k.next(m.kept()))
	}
	if run := rec.Run; run != nil {
		publish = run.Publish
		out.Pid, out.GuardPid, out.GatePid = int64(run.QEMU.PID), int64(run.Guard.PID), int64(run.Gate.PID)
		out.Started, out.Accelerator = timestamppb.New(run.Started), run.Accelerator
		for _, process := range []string{"qemu", "guard", "gate"} {
			out.Isolation = append(out.Isolation, isolation(process, run.InForce[process])...)
		}
		if run.Accelerator == "tcg" {
			out.Isolation = append(out.Isolation, &vigiav1.Isolation{Subject: "qemu", Measure: "hardware virtualisation",
				Detail: "TCG is no isolation boundary: the guest's code is translated inside QEMU, whose jail is all there is"})
		}
	}
	for _, p := range publish {
		out.Publish = append(out.Publish, p.String())
	}
	for _, r := range s.Net.Rules {
		out.Rules = append(out.Rules, r.String())
	}
	return out
}

func isolation(process string, measures []jail.Measure) (out []*vigiav1.Isolation) {
	for _, m := range measures {
		detail := m.Detail
		if !m.InForce {
			detail = m.Why
		}
		out = append(out, &vigiav1.Isolation{Subject: process, Measure: m.Name, InForce: m.InForce, Detail: detail})
	}
	return out
}

// show is brief and what guard and gate say.
func (m *machine) show(ctx context.Context) *vigiav1.Machine {
	out := m.brief()
	m.showArrival(out)
	guard, gate := m.bothWorkers()
	ctx, cancel := context.WithTimeout(ctx, statusTime)
	defer cancel()
	if !guard.gone() {
		var g link.GuardStatus
		if _, err := guard.conn.Call(ctx, link.CallGuardStatus, nil, &g); err != nil {
			out.Introspection, out.Probe = "unknown: the guard does not answer", "unknown: the guard does not answer"
		} else {
			out.Introspection, out.Probe = g.Introspection, g.Probe
			out.Disk = &vigiav1.Disk{SizeBytes: g.DiskSize, UsedBytes: g.DiskUsed, Reads: g.Reads, Writes: g.Writes,
				Flushes: g.Flushes, Files: g.Files, Layers: int32(g.Layers), Stalled: g.Stalled}
			out.Instructions = g.Instructions
		}
	}
	if !gate.gone() {
		var g link.GateStatus
		if _, err := gate.conn.Call(ctx, link.CallGateStatus, nil, &g); err == nil {
			out.Network = &vigiav1.NetStats{FramesIn: g.FramesIn, FramesOut: g.FramesOut, Dropped: g.Dropped, Flows: int32(g.Flows)}
			if !g.FirstDrop.IsZero() {
				out.Network.FirstDrop = timestamppb.New(g.FirstDrop)
			}
		}
	}
	return out
}

// Replay makes a machine that does again what another did in its last run.
func (s machinesServer) Replay(ctx context.Context, r *connect.Request[vigiav1.ReplayRequest]) (*connect.Response[vigiav1.Machine], error) {
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return nil, err
	}
	if !s.d.begin() {
		return nil, errEnding
	}
	defer s.d.tasks.Done()
	until, err := placeIn(r.Msg.Until)
	if err != nil {
		return nil, err
	}
	again, err := s.d.replay(ctx, m, replayOptions{name: r.Msg.NewName, until: until, gdb: r.Msg.Gdb})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(again.show(ctx)), nil
}

// Seek has a replay go to another moment, ahead or behind.
func (s machinesServer) Seek(ctx context.Context, r *connect.Request[vigiav1.SeekRequest]) (*connect.Response[vigiav1.Machine], error) {
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return nil, err
	}
	to, err := vm.ParseMoment(r.Msg.To)
	if err != nil {
		return nil, err
	}
	if !s.d.begin() {
		return nil, errEnding
	}
	defer s.d.tasks.Done()
	there, err := s.d.seek(ctx, m, to)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(there.show(ctx)), nil
}

// placeIn reads a place in a recording that may be left out.
func placeIn(text string) (*vm.Moment, error) {
	if text == "" {
		return nil, nil
	}
	at, err := vm.ParseMoment(text)
	return &at, err
}
