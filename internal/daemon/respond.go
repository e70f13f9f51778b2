package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"vigia/internal/event"
	"vigia/internal/policy"
)

// Responses are what rules may ask for today.
var Responses = []string{"alert", "checkpoint", "pause", "quarantine", policy.Refuse, "restart", "rollback", "stop"}

// loadRules reads the rules that come with vigia and the owner's. An owner's rule with a shipped rule's id takes its
// place. A bad rule file ends a start: to run without a rule that somebody relies on would be worse.
func (d *Daemon) loadRules(*undo) (err error) {
	d.rules, err = ReadRules(d.rulesDir())
	return err
}

func (d *Daemon) rulesDir() string {
	if d.opts.Rules != "" {
		return d.opts.Rules
	}
	return d.files.path("rules")
}

// reloadRules puts the rules as they are now in force; a bad one leaves the old set.
func (d *Daemon) reloadRules(ctx context.Context) error {
	rules, err := ReadRules(d.rulesDir())
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.rules = rules
	d.mu.Unlock()
	if err := d.bus.exchange(rules); err != nil {
		return err
	}
	d.tellGuards(ctx)
	return nil
}

// ReadRules reads the shipped rules and those in dir.
func ReadRules(dir string) ([]policy.Rule, error) {
	rules, err := policy.Starter(Responses)
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return nil, err
	}
	slices.Sort(files)
	for _, file := range files {
		own, err := readRuleFile(file)
		if err != nil {
			return nil, err
		}
		for _, r := range own {
			rules = slices.DeleteFunc(rules, func(old policy.Rule) bool { return old.ID == r.ID })
			rules = append(rules, r)
		}
	}
	return rules, nil
}

func readRuleFile(file string) ([]policy.Rule, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if info.Size() > policy.MaxFile {
		return nil, fmt.Errorf("%s: larger than %d bytes", file, policy.MaxFile)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return policy.Parse(file, data, Responses)
}

// decided is called by the bus with its lock held: the alert becomes an event, the responses are queued.
func (d *Daemon) decided(p policy.Decision) {
	select {
	case d.responses <- p:
	default:
		d.log.Error("more alerts than can be answered, one is dropped", "rule", p.Rule, "machine", p.Machine)
		go d.asked.Emit(event.Alike{Sort: "dropped " + p.Rule + " " + p.Machine, Sum: []string{"count"}}, event.Event{Machine: p.Machine, Kind: event.ResponseFailed,
			Fields: event.Fields{"response": "alert", "rule": p.Rule, "reason": "more alerts at one time than can be answered"}})
	}
}

// respondAll carries decisions out, one goroutine each: a slow stop must not delay another machine's quarantine.
func (d *Daemon) respondAll(ctx context.Context) {
	for {
		select {
		case p := <-d.responses:
			d.spawn(func() { d.respond(ctx, p) })
		case <-ctx.Done():
			return
		}
	}
}

// respond tells the alert and carries out what the rule asks for, the network's cut first.
func (d *Daemon) respond(ctx context.Context, p policy.Decision) {
	d.bus.emit(p.Machine, event.PolicyAlert, event.Fields{"rule": p.Rule, "title": p.Title, "severity": string(p.Severity),
		"events": p.Events, "respond": p.Respond})
	d.log.Warn("alert", "rule", p.Rule, "machine", p.Machine, "severity", p.Severity)
	d.carryOutAll(ctx, p)
}

func (d *Daemon) carryOutAll(ctx context.Context, p policy.Decision) {
	ordered := slices.Clone(p.Respond)
	slices.SortStableFunc(ordered, func(a, b string) int { return urgency(a) - urgency(b) })
	for _, r := range ordered {
		d.carryOut(ctx, p, r)
	}
}

func urgency(response string) int {
	return slices.Index([]string{"quarantine", "pause", "checkpoint", "rollback", "restart", "stop", "alert"}, response)
}

// patience is how long a response may take.
func patience(response string) time.Duration {
	switch response {
	case "checkpoint":
		return checkpointTime
	case "rollback": // with saving and comparing what it leaves
		return checkpointTime + compareTime + restoreTime
	}
	return 2 * time.Minute
}

func (d *Daemon) carryOut(ctx context.Context, p policy.Decision, response string) {
	ctx, cancel := context.WithTimeout(ctx, patience(response))
	defer cancel()
	err := d.act(ctx, p, response)
	if err != nil && d.ctx.Err() != nil {
		return // the next daemon finds it unfinished
	}
	if err != nil {
		d.log.Error("a response failed", "response", response, "rule", p.Rule, "machine", p.Machine, "error", err)
		d.bus.emit(p.Machine, event.ResponseFailed, event.Fields{"response": response, "rule": p.Rule, "reason": event.Text([]byte(err.Error()))})
		return
	}
	d.bus.emit(p.Machine, event.ResponseDone, event.Fields{"response": response, "rule": p.Rule, "seconds": time.Since(p.Time).Seconds()})
}

func (d *Daemon) act(ctx context.Context, p policy.Decision, response string) error {
	if response == "alert" || response == policy.Refuse {
		return nil // the alert itself is an event; a rollback asks for refusals before it begins
	}
	m, err := d.machine(p.Machine)
	if err != nil {
		return err
	}
	switch response {
	case "quarantine":
		return m.quarantine(ctx, p.Rule, p.Time)
	case "checkpoint":
		_, err := m.checkpoint(withoutFreezing(ctx), event.Text([]byte("rule "+p.Rule)), false)
		return err
	case "rollback":
		return m.rollbackByRule(ctx, p.Rule)
	case "restart":
		return m.restartByRule(ctx, p.Rule)
	case "pause":
		return m.pause(ctx, "rule "+p.Rule)
	case "stop":
		if err := m.stop(ctx, false, graceTime); m.running() != nil {
			return err
		}
		return nil // it does not run, which is what was wanted
	}
	return errors.New("unknown response")
}
