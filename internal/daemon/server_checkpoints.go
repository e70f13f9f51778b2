package daemon

import (
	"context"
	"fmt"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api/vigiav1"
	"vigia/internal/checkpoint"
	"vigia/internal/inventory"
	"vigia/internal/vm"
)

type checkpointsServer struct{ d *Daemon }

// maxLabel bounds a checkpoint's label, in bytes.
const maxLabel = 200

func checkLabel(s string) error {
	if len(s) > maxLabel || !utf8.ValidString(s) {
		return fmt.Errorf("%w: label: use at most %d bytes of text", vm.ErrInvalid, maxLabel)
	}
	for _, r := range s {
		if r < 0x20 || r == 0x7f {
			return fmt.Errorf("%w: label: has a control character", vm.ErrInvalid)
		}
	}
	return nil
}

func (s checkpointsServer) Take(ctx context.Context, r *connect.Request[vigiav1.TakeCheckpointRequest]) (*connect.Response[vigiav1.Checkpoint], error) {
	m, err := s.d.machine(r.Msg.Name)
	if err == nil {
		err = checkLabel(r.Msg.Label)
	}
	if err != nil {
		return nil, err
	}
	if r.Msg.AsItIs {
		ctx = withoutFreezing(ctx)
	}
	rec, err := m.checkpoint(ctx, r.Msg.Label, r.Msg.Stable)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(shown(rec)), nil
}

func (s checkpointsServer) List(_ context.Context, r *connect.Request[vigiav1.ListCheckpointsRequest]) (*connect.Response[vigiav1.ListCheckpointsResponse], error) {
	keep := func(*checkpoint.Record) bool { return true }
	if r.Msg.Name != "" {
		m, err := s.d.machine(r.Msg.Name)
		if err != nil {
			return nil, err
		}
		keep = func(c *checkpoint.Record) bool { return c.Machine == m.id() }
	}
	out := &vigiav1.ListCheckpointsResponse{}
	for _, rec := range s.d.checkpoints.List(keep) {
		out.Checkpoints = append(out.Checkpoints, shown(rec))
	}
	if r.Msg.Name == "" {
		for id, why := range s.d.checkpoints.Damaged() {
			out.Checkpoints = append(out.Checkpoints, &vigiav1.Checkpoint{Id: string(id), Damaged: why.Error()})
		}
	}
	return connect.NewResponse(out), nil
}

func (s checkpointsServer) Change(_ context.Context, r *connect.Request[vigiav1.ChangeCheckpointRequest]) (*connect.Response[vigiav1.Checkpoint], error) {
	rec, err := s.d.findCheckpoint(r.Msg.Id)
	if err == nil {
		err = checkLabel(r.Msg.GetLabel())
	}
	if err == nil {
		err = s.d.checkpoints.Change(rec.ID, func(c *checkpoint.Record) {
			if r.Msg.Label != nil {
				c.Label = *r.Msg.Label
			}
			if r.Msg.Stable != nil {
				c.Stable = *r.Msg.Stable
			}
		})
	}
	if err == nil {
		rec, err = s.d.checkpoints.Get(rec.ID)
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(shown(rec)), nil
}

func (s checkpointsServer) Remove(_ context.Context, r *connect.Request[vigiav1.CheckpointRequest]) (*connect.Response[vigiav1.RemoveResponse], error) {
	if id, err := checkpoint.ParseID(r.Msg.Id); err == nil && s.d.checkpoints.Damaged()[id] != nil {
		return connect.NewResponse(&vigiav1.RemoveResponse{}), s.d.checkpoints.Remove(id)
	}
	rec, err := s.d.findCheckpoint(r.Msg.Id)
	if err == nil {
		err = s.d.removeCheckpoint(rec, "asked for")
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.RemoveResponse{}), nil
}

// target finds the machine and the checkpoint that a rollback is about.
func (s checkpointsServer) target(r *vigiav1.RollbackRequest) (m *machine, to checkpoint.Record, err error) {
	if m, err = s.d.machine(r.Name); err != nil {
		return nil, to, err
	}
	if r.Checkpoint == "" {
		to, err = m.stable()
	} else {
		to, err = s.d.findCheckpoint(r.Checkpoint)
	}
	if err == nil {
		err = m.canRollBack(to)
	}
	return m, to, err
}

func (s checkpointsServer) Rollback(ctx context.Context, r *connect.Request[vigiav1.RollbackRequest]) (*connect.Response[vigiav1.RollbackResponse], error) {
	m, to, err := s.target(r.Msg)
	if err != nil {
		return nil, err
	}
	found, err := m.rollback(ctx, to, rollbackOrder{reason: "asked for", atOnce: r.Msg.AtOnce, vulnerabilities: r.Msg.Vulnerabilities})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.RollbackResponse{Machine: m.show(ctx), Left: string(found.left.ID), Reopens: reopened(found.items)}), nil
}

// Reopens compares and leaves all as it is: what it saved of the present state is removed again.
func (s checkpointsServer) Reopens(ctx context.Context, r *connect.Request[vigiav1.RollbackRequest]) (*connect.Response[vigiav1.ReopensResponse], error) {
	began := time.Now()
	m, to, err := s.target(r.Msg)
	if err != nil {
		return nil, err
	}
	found, err := m.reopens(ctx, to, r.Msg.Vulnerabilities, "to compare with "+string(to.ID))
	if found.left.ID != "" {
		if rerr := s.d.removeCheckpoint(found.left, "it was made to compare with"); err == nil {
			err = rerr
		}
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.ReopensResponse{Checkpoint: string(to.ID), Reopens: reopened(found.items), TookMs: time.Since(began).Seconds() * 1000}), nil
}

func reopened(items []inventory.Item) (list []*vigiav1.Reopened) {
	for _, i := range items {
		list = append(list, &vigiav1.Reopened{Kind: i.Kind, Subject: i.Subject, Detail: i.Detail, Severity: string(i.Severity)})
	}
	return list
}

// stable is the last checkpoint of the machine that was marked as one to fall back to.
func (m *machine) stable() (checkpoint.Record, error) {
	of := m.d.checkpoints.List(func(r *checkpoint.Record) bool { return r.Machine == m.id() && r.Stable })
	if len(of) == 0 {
		return checkpoint.Record{}, fmt.Errorf("%w: %s has no stable one: mark one with: vigia checkpoint mark ID --stable", checkpoint.ErrNotFound, m.name())
	}
	return of[len(of)-1], nil
}

func (s checkpointsServer) Clone(ctx context.Context, r *connect.Request[vigiav1.CloneRequest]) (*connect.Response[vigiav1.Machine], error) {
	o := cloneOrder{name: r.Msg.NewName, owner: r.Msg.Owner, purpose: r.Msg.Purpose, connect: r.Msg.Connect}
	if _, err := vm.ParseName(o.name); err != nil {
		return nil, err
	}
	if r.Msg.Ttl != "" {
		ttl, err := vm.ParseTTL(r.Msg.Ttl)
		if err != nil {
			return nil, err
		}
		o.expires = time.Now().UTC().Add(ttl)
	}
	if err := o.read(r.Msg); err != nil {
		return nil, err
	}
	from, err := s.source(ctx, r.Msg)
	if err != nil {
		return nil, err
	}
	m, err := s.d.clone(ctx, from, o)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(m.show(ctx)), nil
}

// source is what a clone goes on from: the checkpoint named, or the machine as it is now.
func (s checkpointsServer) source(ctx context.Context, r *vigiav1.CloneRequest) (checkpoint.Record, error) {
	if r.Checkpoint != "" {
		return s.d.findCheckpoint(r.Checkpoint)
	}
	if _, err := s.d.machine(r.NewName); err == nil {
		return checkpoint.Record{}, fmt.Errorf("machine %s %w: choose another name", r.NewName, errExists)
	}
	m, err := s.d.machine(r.Name)
	if err != nil {
		return checkpoint.Record{}, err
	}
	return m.checkpoint(ctx, "for the clone "+r.NewName, false)
}

// Keep sets how often a machine is saved by itself, and how many of those are kept.
func (s checkpointsServer) Keep(ctx context.Context, r *connect.Request[vigiav1.KeepRequest]) (*connect.Response[vigiav1.Machine], error) {
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return nil, err
	}
	k, err := parseKeep(r.Msg.Every, r.Msg.Keep)
	if err == nil {
		err = m.setKeep(ctx, k)
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(m.show(ctx)), nil
}

func shown(r checkpoint.Record) *vigiav1.Checkpoint {
	return &vigiav1.Checkpoint{Id: string(r.ID), Machine: r.Name, MachineId: string(r.Machine), Time: timestamppb.New(r.Time), Label: r.Label,
		Stable: r.Stable, Parent: string(r.Parent), PauseMs: r.PauseSeconds * 1000, TookMs: r.Seconds * 1000, Bytes: r.Bytes(),
		MemoryBytes: r.MemoryBytes, DevicesBytes: r.DevicesBytes, DiskBytes: r.DiskBytes, Pages: r.Pages, How: r.How, Why: r.Why,
		Disk: r.Disk, DiskWhy: r.DiskWhy, FrozenMs: r.FrozenSeconds * 1000, Image: r.Spec.Image, MachineMemoryBytes: r.Spec.Memory, Scheduled: r.Scheduled}
}
