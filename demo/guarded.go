package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api/vigiav1"
)

// caught is what vigia saw, from its own record.
type caught struct {
	read, rise, alert, cut *vigiav1.Event
	quarantined            time.Time
}

func field(e *vigiav1.Event, name string) string {
	if e == nil || e.Fields == nil {
		return ""
	}
	v := e.Fields.Fields[name]
	if v == nil {
		return ""
	}
	if n := v.GetNumberValue(); n != 0 {
		return fmt.Sprintf("%g", n)
	}
	return v.GetStringValue()
}

// waitForQuarantine follows the machine's events until the quarantine, and keeps the four that tell the story.
func (s *stage) waitForQuarantine(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
	defer cancel()
	stream, err := s.Client.Events.List(ctx, connect.NewRequest(&vigiav1.ListEventsRequest{Machine: machineName, Follow: true,
		Since: timestamppb.New(s.loggedIn.Add(-time.Minute))}))
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		e := stream.Msg()
		switch e.Kind {
		case "disk.read":
			if p := field(e, "path"); slices.Contains([]string{"/etc/shadow", "/etc/gshadow"}, p) {
				s.read = e
				s.progress("disk read of %s", p)
			}
		case "cpu.usage":
			s.progress("load %s %% of a core, busiest: %s", field(e, "percent"), field(e, "process"))
			if field(e, "process") == "john" && s.rise == nil {
				s.rise = e
			}
		case "policy.alert":
			if field(e, "rule") == "password-cracking" {
				s.alert = e
			}
		case "response.quarantined":
			s.cut = e
			s.quarantined = e.Time.AsTime()
			return s.whole()
		}
	}
	return errors.Join(errors.New("no quarantine came"), stream.Err())
}

// whole checks that the story has all its parts, and that they name the culprit.
func (s *stage) whole() error {
	for name, e := range map[string]*vigiav1.Event{"read of the password file": s.read, "rise of the load by john": s.rise, "alert": s.alert} {
		if e == nil {
			return fmt.Errorf("quarantined without an event for the %s", name)
		}
	}
	s.progress("%s read, load by %s (pid %s), alert %s, quarantined", field(s.read, "path"), field(s.rise, "process"), field(s.rise, "pid"), field(s.alert, "rule"))
	return nil
}

// knock tries to leave the machine: a connection to its gateway's name server, which is as near as outside can be.
const knock = `timeout 5 bash -c 'exec 3<>/dev/tcp/10.77.0.1/53' 2>/dev/null && echo open || echo shut`

// networkWorks makes the later check mean something.
func (s *stage) networkWorks(ctx context.Context) error {
	out, err := s.Console(ctx, machineName, knock)
	if err == nil && !strings.Contains(out, "open") {
		err = fmt.Errorf("the machine can't reach its gateway before anything has happened: %q", out)
	}
	return err
}

// dropped is how many frames the gate has refused.
func (s *stage) dropped(ctx context.Context) (uint64, error) {
	m, err := s.Show(ctx, machineName)
	if err != nil {
		return 0, err
	}
	if m.State != "quarantined" || m.Network == nil {
		return 0, fmt.Errorf("the machine is %s", m.State)
	}
	return m.Network.Dropped, nil
}

func (s *stage) nothingPasses(ctx context.Context) error {
	before, err := s.dropped(ctx)
	if err != nil {
		return err
	}
	out, err := s.Console(ctx, machineName, knock)
	if err != nil {
		return err
	}
	if !strings.Contains(out, "shut") {
		return fmt.Errorf("the quarantined machine reached its gateway: %q", out)
	}
	after, err := s.dropped(ctx)
	if err != nil {
		return err
	}
	if after <= before {
		return errors.New("the machine tried, but no frame was dropped")
	}
	s.progress("%d frames dropped at the gate while it tried", after-before)
	return nil
}

func (s *stage) wipeLogs(ctx context.Context) error {
	out, err := s.Console(ctx, machineName, "rm -rf /var/log/*; ls -A /var/log | wc -l; id -un")
	if err != nil {
		return err
	}
	if words := strings.Fields(out); len(words) != 2 || words[0] != "0" || words[1] != "root" {
		return fmt.Errorf("the logs were not wiped: %q", out)
	}
	s.progress("inside, nothing is left of what happened")
	return nil
}

// ledgerHasAll reads the record again, after the wipe, and finds every event of the story under its id.
func (s *stage) ledgerHasAll(ctx context.Context) error {
	want := map[string]bool{s.read.Id: true, s.rise.Id: true, s.alert.Id: true, s.cut.Id: true}
	stream, err := s.Client.Events.List(ctx, connect.NewRequest(&vigiav1.ListEventsRequest{Machine: machineName}))
	if err != nil {
		return err
	}
	defer stream.Close()
	n := 0
	for stream.Receive() {
		n++
		delete(want, stream.Msg().Id)
	}
	if err := stream.Err(); err != nil {
		return err
	}
	if len(want) > 0 {
		return fmt.Errorf("%d events of the story are not in the ledger", len(want))
	}
	s.progress("%d events of this machine, read, load, alert and quarantine among them", n)
	return nil
}

// timeline prints what happened, by the host's clock.
func (s *stage) timeline() {
	t0 := s.loggedIn
	fmt.Fprintf(s.w, "\nTimeline (seconds from the intruder's login; ● what vigia saw from outside, ○ what the intruder did)\n\n")
	type line struct {
		at   time.Time
		mark string
		text string
	}
	read := s.read.Time.AsTime()
	lines := []line{
		{s.loggedIn, "○", "logs in as " + user},
		{read, "●", fmt.Sprintf("disk.read             %s, inode %s", field(s.read, "path"), field(s.read, "inode"))},
		{s.stole, "○", "has /etc/shadow and /etc/gshadow"},
		{s.cracking, "○", "runs john"},
		{s.rise.Time.AsTime(), "●", fmt.Sprintf("cpu.usage             %s %% of a core; %s, pid %s: %s", field(s.rise, "percent"), field(s.rise, "process"), field(s.rise, "pid"), field(s.rise, "cmdline"))},
		{s.alert.Time.AsTime(), "●", fmt.Sprintf("policy.alert          %s (%s)", field(s.alert, "rule"), field(s.alert, "severity"))},
		{s.quarantined, "●", fmt.Sprintf("response.quarantined  %s flows cut, %.1f ms after the last event the rule needed", field(s.cut, "flows"), 1000*s.cut.Fields.Fields["seconds"].GetNumberValue())},
	}
	slices.SortStableFunc(lines, func(a, b line) int { return a.at.Compare(b.at) })
	for _, l := range lines {
		fmt.Fprintf(s.w, "  %+7.2f  %s  %s\n", l.at.Sub(t0).Seconds(), l.mark, l.text)
	}
	fmt.Fprintf(s.w, "\nEvery step held. %.0f s in all.\n", time.Since(s.began).Seconds())
}
