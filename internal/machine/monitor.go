package machine

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"sync"

	"vigia/internal/event"
	"vigia/internal/machine/qmp"
	"vigia/internal/vm"
)

// Ending is what is known of how a run came to its end, from QEMU's last words.
type Ending struct {
	Ended  vm.Ended `json:"ended"` // EndedNone: QEMU said nothing
	Reason string   `json:"reason"`
}

// Monitor is a running QEMU seen through QMP. It lives in the guard.
type Monitor struct {
	client *qmp.Client
	emit   func(event.Kind, event.Fields)
	// Rebooted is called when the guest has reset its machine; it must not block.
	rebooted func()
	// panicked is called when the guest has panicked, and stands still; it must not block.
	panicked func(how string)

	mu     sync.Mutex
	ending Ending
	done   chan struct{}
	stops  chan struct{}
}

// NewMonitor takes the QMP connection over and begins to follow QEMU's events.
func NewMonitor(ctx context.Context, conn net.Conn, emit func(event.Kind, event.Fields), rebooted func(), panicked func(how string)) (*Monitor, error) {
	client, err := qmp.New(ctx, conn)
	if err != nil {
		return nil, err
	}
	m := &Monitor{client: client, emit: emit, rebooted: rebooted, panicked: panicked, done: make(chan struct{}), stops: make(chan struct{}, 1)}
	go m.follow()
	return m, nil
}

func (m *Monitor) follow() {
	defer close(m.done)
	for e := range m.client.Events() {
		switch e.Name {
		case "RESET":
			if guestDid(e.Data) {
				m.emit(event.MachineRebooted, nil)
				m.rebooted()
			}
		case "GUEST_PANICKED": // it stands still (Args: panic=pause)
			m.Panicked("the guest's kernel panicked")
			m.panicked("told by its panic device")
		case "GUEST_CRASHLOADED": // a kernel of the guest's own takes over
			m.Panicked("the guest's kernel panicked")
		case "STOP":
			select {
			case m.stops <- struct{}{}:
			default:
			}
		case "SHUTDOWN":
			m.end(shutdown(e.Data))
		}
	}
}

func guestDid(data json.RawMessage) bool {
	var d struct {
		Guest bool `json:"guest"`
	}
	return json.Unmarshal(data, &d) == nil && d.Guest
}

// shutdown reads the reason of a SHUTDOWN event (ShutdownCause in QEMU's qapi/run-state.json).
func shutdown(data json.RawMessage) Ending {
	var d struct {
		Guest  bool   `json:"guest"`
		Reason string `json:"reason"`
	}
	if err := json.Unmarshal(data, &d); err != nil {
		return Ending{vm.EndedQEMU, "unreadable SHUTDOWN event"}
	}
	switch d.Reason {
	case "guest-shutdown":
		return Ending{vm.EndedPowerOff, "the guest powered itself off"}
	case "guest-reset":
		return Ending{vm.EndedReboot, "the guest rebooted"}
	case "guest-panic":
		return Ending{vm.EndedPanic, "the guest's kernel panicked"}
	case "host-qmp-quit", "host-signal", "host-ui":
		return Ending{vm.EndedForced, "QEMU was told to end (" + d.Reason + ")"}
	case "host-error":
		return Ending{vm.EndedQEMU, "QEMU ended on an error of its own"}
	}
	return Ending{vm.EndedQEMU, "QEMU ended: " + event.Text([]byte(d.Reason))}
}

// end keeps the first word: after a panic QEMU also says SHUTDOWN.
func (m *Monitor) end(e Ending) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ending.Ended == vm.EndedNone {
		m.ending = e
	}
}

// Panicked records a panic that was seen in another way, in guest memory.
func (m *Monitor) Panicked(reason string) { m.end(Ending{vm.EndedPanic, reason}) }

// Ending says what is known so far. After QEMU's exit wait for Done first.
func (m *Monitor) Ending() Ending {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ending
}

// Done is closed when QEMU's side of the connection is gone and its last word is read.
func (m *Monitor) Done() <-chan struct{} { return m.done }

// Broken says how QEMU broke the protocol, once Done is closed; nil where it only hung up.
func (m *Monitor) Broken() error {
	if err := m.client.Err(); errors.Is(err, qmp.ErrProtocol) {
		return err
	}
	return nil
}

// Continue lets the guest run; Pause stops it between two instructions.
func (m *Monitor) Continue(ctx context.Context) error { return m.client.Run(ctx, "cont", nil, nil) }

// Pause stops the guest between two instructions.
func (m *Monitor) Pause(ctx context.Context) error { return m.client.Run(ctx, "stop", nil, nil) }

// PowerDown presses the power button: what the guest does is its own affair.
func (m *Monitor) PowerDown(ctx context.Context) error {
	return m.client.Run(ctx, "system_powerdown", nil, nil)
}

// Quit makes QEMU flush its disk and end.
func (m *Monitor) Quit(ctx context.Context) error { return m.client.Run(ctx, "quit", nil, nil) }

// Status returns QEMU's run state (RunState in qapi/run-state.json): running, paused, prelaunch, guest-panicked, …
func (m *Monitor) Status(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := m.client.Run(ctx, "query-status", nil, &s)
	return s.Status, err
}

// Instructions returns how many instructions a machine that is recorded or replayed has executed; 0 for any other.
func (m *Monitor) Instructions(ctx context.Context) (int64, error) {
	var s struct {
		Count int64 `json:"icount"`
	}
	err := m.client.Run(ctx, "query-replay", nil, &s)
	return s.Count, err
}

// Break has a machine that replays stop before it executes more than so many instructions.
func (m *Monitor) Break(ctx context.Context, instructions int64) error {
	return m.client.Run(ctx, "replay-break", map[string]int64{"icount": instructions}, nil)
}

// Unbreak takes Break back.
func (m *Monitor) Unbreak(ctx context.Context) error {
	return m.client.Run(ctx, "replay-delete-break", nil, nil)
}

// Stops has a value when QEMU has stopped the machine, whoever asked for it, since a value was last taken.
func (m *Monitor) Stops() <-chan struct{} { return m.stops }

// Registers returns what QEMU prints of all CPUs' registers. They are read as they run.
func (m *Monitor) Registers(ctx context.Context) (text string, err error) {
	err = m.client.Run(ctx, "human-monitor-command", map[string]string{"command-line": "info registers -a"}, &text)
	return text, err
}

// Close ends the connection; QEMU then listens for the next one.
func (m *Monitor) Close() error { return m.client.Close() }
