package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// reenactment is `replay NAME@CHECKPOINT`.
type reenactment struct {
	wait   time.Duration
	as     string
	remove bool
}

// sceneTime bounds how long it is waited until the clone can be looked into.
const sceneTime = 30 * time.Second

// reenact makes a clone that is given all again, follows it, and prints what it did.
func (a *app) reenact(ctx context.Context, c *api.Client, name, checkpoint string, o reenactment) error {
	if o.wait < 0 {
		return usagef("wait %s: use 0 or more", o.wait)
	}
	begun := timestamppb.New(time.Now().Add(-time.Second))
	res, err := c.Checkpoints.Reenact(ctx, connect.NewRequest(&vigiav1.ReenactRequest{Name: name, Checkpoint: checkpoint, NewName: o.as, WaitSeconds: o.wait.Seconds()}))
	if err != nil {
		return err
	}
	clone := res.Msg.GetName()
	if o.remove {
		defer c.Machines.Remove(context.WithoutCancel(ctx), connect.NewRequest(&vigiav1.RemoveRequest{Name: clone, Force: true}))
	}
	if !a.json() {
		a.note("%s is given again what entered %s; this is not bit-exact: its clock, random numbers and the order of what it does are its own", clone, name)
	}
	s, serr := a.scene(ctx, c, clone)
	now, err := a.untilGiven(ctx, c, clone, begun)
	if err != nil {
		return err
	}
	last := now[len(now)-1]
	then, err := a.whatHappened(ctx, c, name, last.text("from"), last.text("until"))
	if err != nil {
		return err
	}
	t := makeTimeline(s, now, then)
	t.Machine, t.Of, t.Checkpoint, t.Given = clone, name, last.text("checkpoint"), last.fields
	if a.json() {
		return errors.Join(a.printValue(t), serr)
	}
	return errors.Join(a.printTimeline(t, o), serr)
}

// scene looks at the clone before it is given much.
func (a *app) scene(ctx context.Context, c *api.Client, clone string) (s scene, err error) {
	s = scene{parents: map[int64]int64{}, listens: map[int64][]string{}, channel: map[int64]bool{}}
	var ps *connect.Response[vigiav1.ProcessesResponse]
	for end := time.Now().Add(sceneTime); ; time.Sleep(200 * time.Millisecond) {
		if ps, err = c.Views.Processes(ctx, machine(clone)); err == nil {
			break
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return s, fmt.Errorf("who followed from what is not known: %w", err)
		}
	}
	for _, p := range ps.Msg.GetProcesses() {
		s.parents[p.GetPid()] = p.GetPpid()
		s.channel[p.GetPid()] = p.GetComm() == "qemu-ga"
	}
	sockets, err := c.Views.Sockets(ctx, machine(clone))
	if err != nil {
		return s, fmt.Errorf("who listened on which port is not known: %w", err)
	}
	for _, k := range sockets.Msg.GetSockets() {
		_, port, perr := net.SplitHostPort(k.GetLocal())
		if perr == nil && k.GetPid() != 0 && (strings.EqualFold(k.GetState(), "listen") || strings.HasPrefix(k.GetProtocol(), "udp")) {
			s.listens[k.GetPid()] = append(s.listens[k.GetPid()], port)
		}
	}
	return s, nil
}

// untilGiven follows the clone's events to the one that says that all was given.
func (a *app) untilGiven(ctx context.Context, c *api.Client, clone string, since *timestamppb.Timestamp) ([]happening, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Events.List(ctx, connect.NewRequest(&vigiav1.ListEventsRequest{Machine: clone, Follow: true, Since: since}))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var all []happening
	for stream.Receive() {
		h := happened(stream.Msg())
		if all = append(all, h); h.kind == "replay.given" {
			return all, nil
		}
		if h.kind == "machine.removed" {
			return nil, fmt.Errorf("%s was removed before all was given", clone)
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return nil, errors.New("the daemon ended before all was given")
}

func happened(e *vigiav1.Event) happening {
	return happening{at: e.GetTime().AsTime(), kind: e.GetKind(), fields: e.GetFields().AsMap()}
}

// whatHappened are the machine's own events of that time.
func (a *app) whatHappened(ctx context.Context, c *api.Client, name, from, until string) (all []happening, err error) {
	begin, err := time.Parse(time.RFC3339Nano, from)
	if err != nil {
		return nil, nil
	}
	end, err := time.Parse(time.RFC3339Nano, until)
	if err != nil {
		return nil, nil // nothing had entered
	}
	stream, err := c.Events.List(ctx, connect.NewRequest(&vigiav1.ListEventsRequest{Machine: name, Kinds: []string{"process.started"}, Since: timestamppb.New(begin)}))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	for stream.Receive() {
		if h := happened(stream.Msg()); !h.at.After(end.Add(3 * time.Second)) {
			all = append(all, h)
		}
	}
	return all, stream.Err()
}

func (a *app) printTimeline(t *timeline, o reenactment) error {
	h := happening{fields: t.Given}
	out := []string{fmt.Sprintf("%s since checkpoint %s of %s", plain(t.Of), plain(t.Checkpoint), plain(h.text("from")))}
	out = append(out, fmt.Sprintf("given: %d flows in, %d answered out, %d names, %d bytes; %d bytes typed; %d commands and copies", h.number("flows_in"), h.number("flows_out"),
		h.number("names"), h.number("bytes"), h.number("typed"), h.number("calls")))
	if n := h.number("older"); n > 0 {
		out = append(out, fmt.Sprintf("not given: %d bytes on %d flows that were open at the checkpoint", h.number("older_bytes"), n))
	}
	if n := h.number("late"); n > 0 {
		out = append(out, fmt.Sprintf("out of step: %d parts were given though the guest had not sent as much as it had then", n))
	}
	if n := h.number("refused"); n > 0 {
		out = append(out, fmt.Sprintf("refused: %d flows or names that it asked for and nobody had recorded", n))
	}
	if n := h.number("unasked"); n > 0 {
		out = append(out, fmt.Sprintf("not asked for: %d recorded flows of the guest's own", n))
	}
	gaps, _ := h.fields["gaps"].([]any)
	for _, g := range gaps {
		out = append(out, "missing: "+plain(fmt.Sprint(g)))
	}
	if complete, _ := h.fields["complete"].(bool); !complete {
		out = append(out, "CUT SHORT: "+plain(h.text("reason")))
	}
	out = append(append(out, ""), t.lines()...)
	p := t.Programs
	out = append(out, "", fmt.Sprintf("programs: %d then, %d of them again", p.Then, p.Again))
	for _, m := range p.Missing {
		out = append(out, "    not again: "+shown(m))
	}
	for _, n := range p.New {
		out = append(out, "    not told of then: "+shown(n))
	}
	if !o.remove {
		out = append(out, "", fmt.Sprintf("%s goes on, cut off: look with ps, check, events; then: vigia rm --force %s", plain(t.Machine), plain(t.Machine)))
	}
	return a.printf("%s\n", strings.Join(out, "\n"))
}
