package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"
)

// How a machine's devices are saved and loaded. QEMU's own migration carries memory with them; memory goes another way here
// (package checkpoint), so it is asked for the devices alone, by the command that Xen uses (qapi/migration.json). What it
// writes is a migration stream without the section that names the machine type: who loads it must not expect one, see
// [Config.Incoming].

// loadTime bounds the loading of the devices' state, loadPoll is how often QEMU is asked for it.
const (
	loadTime = 20 * time.Second
	loadPoll = time.Millisecond
)

// FD is a descriptor that QEMU was handed: its number there, and the set by which it is named.
type FD struct {
	Number int `json:"fd"`
	Set    int `json:"fdset-id"`
}

// Hand gives QEMU a descriptor.
func (m *Monitor) Hand(ctx context.Context, f *os.File) (FD, error) {
	var fd FD
	err := m.client.Run(ctx, "add-fd", nil, &fd, f)
	return fd, err
}

// TakeBack makes QEMU close it.
func (m *Monitor) TakeBack(ctx context.Context, fd FD) error {
	return m.client.Run(ctx, "remove-fd", map[string]any{"fdset-id": fd.Set}, nil)
}

// SaveDevices writes the state of all devices to a handed descriptor, which must be open for writing only. The guest stands
// still.
func (m *Monitor) SaveDevices(ctx context.Context, fd FD) error {
	return m.client.Run(ctx, "xen-save-devices-state",
		map[string]any{"filename": "/dev/fdset/" + strconv.Itoa(fd.Set), "live": false}, nil)
}

// LoadDevices makes a QEMU that was started for it load the state of its devices.
func (m *Monitor) LoadDevices(ctx context.Context, f *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, loadTime)
	defer cancel()
	const name = "devices"
	if err := m.client.Run(ctx, "getfd", map[string]any{"fdname": name}, nil, f); err != nil {
		return err
	}
	if err := m.client.Run(ctx, "migrate-incoming", map[string]any{"uri": "fd:" + name}, nil); err != nil {
		return err
	}
	for {
		status, err := m.Status(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("load the devices' state: %w", err) // QEMU ends when it can't load it
		case status != "inmigrate":
			return m.loaded(ctx)
		}
		select {
		case <-time.After(loadPoll):
		case <-ctx.Done():
			return errors.New("load the devices' state: QEMU does not come to an end with it")
		}
	}
}

// loaded asks whether it was.
func (m *Monitor) loaded(ctx context.Context) error {
	var s struct {
		Status string `json:"status"`
		Error  string `json:"error-desc"`
	}
	if err := m.client.Run(ctx, "query-migrate", nil, &s); err != nil {
		return err
	}
	if s.Status == "failed" || s.Status == "cancelled" {
		return fmt.Errorf("load the devices' state: %s %s", s.Status, s.Error)
	}
	return nil
}
