package additions

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// guest plays the agent's side: reply gets each command and returns what to say, literally.
func guest(t *testing.T, reply func(command string, args map[string]any) string) *Agent {
	t.Helper()
	here, there := net.Pipe()
	t.Cleanup(func() { here.Close(); there.Close() })
	go func() {
		in := bufio.NewReader(there)
		for {
			line, err := in.ReadBytes('\n')
			if err != nil {
				return
			}
			var q struct {
				Execute   string         `json:"execute"`
				Arguments map[string]any `json:"arguments"`
			}
			dec := json.NewDecoder(bytes.NewReader(bytes.Trim(line, "\xff")))
			dec.UseNumber()
			if err := dec.Decode(&q); err != nil {
				return
			}
			if _, err := io.WriteString(there, reply(q.Execute, q.Arguments)); err != nil {
				return
			}
		}
	}()
	return New(here)
}

// synced answers the synchronization as an honest agent does, and leaves the rest to f.
func synced(f func(command string, args map[string]any) string) func(string, map[string]any) string {
	return func(command string, args map[string]any) string {
		if command == "guest-sync-delimited" {
			return fmt.Sprintf("\xff{\"return\": %v}\n", args["id"])
		}
		return f(command, args)
	}
}

func TestCommandAndItsOutput(t *testing.T) {
	polls := 0
	a := guest(t, synced(func(command string, args map[string]any) string {
		if command == "guest-exec" {
			return `{"return":{"pid":7}}` + "\n"
		}
		if polls++; polls == 1 {
			return `{"return":{"exited":false}}` + "\n"
		}
		return `{"return":{"exited":true,"exitcode":3,"out-data":"` + base64.StdEncoding.EncodeToString([]byte("hello")) + `"}}` + "\n"
	}))
	r, err := a.Exec(t.Context(), []string{"id"}, nil)
	if err != nil || r.ExitCode != 3 || string(r.Stdout) != "hello" {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestLyingAgent(t *testing.T) {
	for name, reply := range map[string]func(string, map[string]any) string{
		"old answers first, for ever": func(string, map[string]any) string { return "\xff{\"return\": 12345}\n" },
		"refuses to synchronize":      func(string, map[string]any) string { return "\xff{\"error\":{\"class\":\"x\",\"desc\":\"no\"}}\n" },
		"pid is text":                 synced(func(string, map[string]any) string { return `{"return":{"pid":"x"}}` + "\n" }),
		"not JSON":                    synced(func(string, map[string]any) string { return "boo\n" }),
		"nested without end":          synced(func(string, map[string]any) string { return strings.Repeat("[", 20000) + "\n" }),
		"bad base64": synced(func(c string, _ map[string]any) string {
			if c == "guest-exec" {
				return `{"return":{"pid":7}}` + "\n"
			}
			return `{"return":{"exited":true,"out-data":"***"}}` + "\n"
		}),
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if r, err := guest(t, reply).Exec(ctx, []string{"id"}, nil); err == nil {
				t.Errorf("is believed: %+v", r)
			}
		})
	}
}

func TestAgentThatGivesMoreThanAsked(t *testing.T) {
	data := base64.StdEncoding.EncodeToString(make([]byte, chunk+1))
	a := guest(t, synced(func(command string, _ map[string]any) string {
		if command == "guest-file-open" {
			return `{"return":5}` + "\n"
		}
		return `{"return":{"count":1,"buf-b64":"` + data + `","eof":false}}` + "\n"
	}))
	if _, err := a.ReadFile(t.Context(), "/x", io.Discard, 1<<20); !errors.Is(err, ErrProtocol) {
		t.Errorf("a read of more than was asked for: %v", err)
	}
}

func TestEndlessFileIsCut(t *testing.T) {
	data := base64.StdEncoding.EncodeToString(make([]byte, 1000))
	a := guest(t, synced(func(command string, _ map[string]any) string {
		if command == "guest-file-open" {
			return `{"return":5}` + "\n"
		}
		return `{"return":{"count":1000,"buf-b64":"` + data + `","eof":false}}` + "\n"
	}))
	if n, err := a.ReadFile(t.Context(), "/dev/zero", io.Discard, 10000); err == nil || n > 11000 {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestSilentGuest(t *testing.T) {
	here, there := net.Pipe()
	defer there.Close()
	go io.Copy(io.Discard, there)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := New(here).Ping(ctx); !errors.Is(err, ErrNoAgent) {
		t.Errorf("%v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"return": {"pid": 712}}`))
	f.Add([]byte(`{"error": {"class": "GenericError", "desc": "Invalid parameter"}}`))
	f.Add([]byte(`{"return": {"exitcode": 0, "out-data": "aGVsbG8=", "exited": true}}`))
	f.Fuzz(func(t *testing.T, b []byte) { parse(b) })
}
