package qmp

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRealQEMU runs the QEMU that machines run on, without a machine, and asks it things.
func TestRealQEMU(t *testing.T) {
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs qemu-system-x86_64: run script/setup")
	}
	sock := filepath.Join(t.TempDir(), "qmp")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	file, _ := l.File()
	cmd := exec.CommandContext(t.Context(), path, "-nodefaults", "-no-user-config", "-machine", "none", "-display", "none", "-S",
		"-chardev", "socket,id=q,fd=3,server=on,wait=off", "-mon", "chardev=q,mode=control")
	cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	conn, err := net.Dial("unix", sock) // waits in the backlog until QEMU is there
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	l.Close()
	file.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := New(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	var status struct {
		Status string `json:"status"`
	}
	if err := c.Run(ctx, "query-status", nil, &status); err != nil || status.Status != "prelaunch" {
		t.Errorf("query-status: %q, %v", status.Status, err)
	}
	var refused *Error
	if err := c.Run(ctx, "open-the-gates", nil, nil); !errors.As(err, &refused) {
		t.Errorf("an unknown command: %v", err)
	}
	if err := c.Run(ctx, "quit", nil, nil); err != nil {
		t.Error(err)
	}
	var last string
	for e := range c.Events() {
		last = e.Name
	}
	if last != "SHUTDOWN" {
		t.Errorf("last event %q", last)
	}
	if err := c.Run(ctx, "query-status", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}

func TestHostileQEMU(t *testing.T) {
	long := `{"QMP":{},"x":"` + strings.Repeat("a", MaxMessage) + `"}` + "\n"
	for name, tc := range map[string]struct{ greeting, rest string }{
		"no greeting":    {`{"event":"STOP"}` + "\n", ""},
		"endless line":   {long, ""},
		"not JSON":       {"boo\n", ""},
		"neither":        {`{"QMP":{}}` + "\n", "{}\n"},
		"cut short":      {`{"QMP":{}}` + "\n", `{"retu`},
		"wrong id":       {`{"QMP":{}}` + "\n", `{"return":{},"id":77}` + "\n"},
		"id not a count": {`{"QMP":{}}` + "\n", `{"return":{},"id":"x"}` + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			here, there := net.Pipe()
			go func() {
				fmt.Fprint(there, tc.greeting)
				bufio.NewReader(there).ReadString('\n')
				fmt.Fprint(there, tc.rest)
				there.Close()
			}()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if _, err := New(ctx, here); err == nil {
				t.Error("was believed")
			}
			here.Close()
		})
	}
}

func FuzzReadMessage(f *testing.F) {
	f.Add(`{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2"}, "capabilities": ["oob"]}}` + "\n")
	f.Add(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}` + "\n")
	f.Add(`{"error": {"class": "CommandNotFound", "desc": "The command x has not been found"}, "id": 3}` + "\n")
	f.Fuzz(func(t *testing.T, s string) {
		in := bufio.NewReader(strings.NewReader(s))
		for range 100 {
			if _, err := readMessage(in); err != nil {
				return
			}
		}
	})
}
