package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "stub"}, "capabilities": ["oob"]}}` + "\r\n"

// monitor is a QMP that behaves.
func (s *stub) monitor(c net.Conn) {
	c.Write([]byte(greeting))
	s.answer(c, func(string) {})
}

// answer answers commands as QEMU does; after is told of each.
func (s *stub) answer(c net.Conn, after func(command string)) {
	in := bufio.NewScanner(c)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var m struct {
			Execute string `json:"execute"`
			ID      uint64 `json:"id"`
		}
		if json.Unmarshal(in.Bytes(), &m) != nil {
			continue
		}
		body := "{}"
		switch m.Execute {
		case "query-status":
			body = `{"status": "running", "running": true}`
		case "quit":
			fmt.Fprintf(c, `{"return": {}, "id": %d}`+"\r\n", m.ID)
			fmt.Fprint(c, event("SHUTDOWN", `{"guest": false, "reason": "host-qmp-quit"}`))
			os.Exit(0)
		}
		fmt.Fprintf(c, `{"return": %s, "id": %d}`+"\r\n", body, m.ID)
		if m.Execute == "cont" {
			s.letGo()
		}
		after(m.Execute)
	}
}

func event(name, data string) string {
	return fmt.Sprintf(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": %q, "data": %s}`+"\r\n", name, data)
}

// afterCont behaves until the guest is let go, and then does f beside it.
func (s *stub) afterCont(f func(net.Conn)) func(net.Conn) {
	return func(c net.Conn) {
		c.Write([]byte(greeting))
		s.answer(c, func(command string) {
			if command == "cont" {
				go f(c)
			}
		})
	}
}

func same(text string) func() []byte {
	b := []byte(text)
	return func() []byte { return b }
}

// wrongAnswers are answers to what nobody asked, of the wrong shape, or too large.
func wrongAnswers() func() []byte {
	lines := []string{
		`{"return": {}, "id": 18446744073709551615}`, `{"return": {}, "id": 0}`, `{"error": {"class": "X", "desc": "y"}, "id": 77}`,
		`{"return": {"status": 7}, "id": 3}`, `{"return": "` + strings.Repeat("x", 1<<20) + `", "id": 5}`,
		event("RESET", `{"guest": 7}`), event("SHUTDOWN", `[]`), event(strings.Repeat("E", 1<<18), `{}`), event("STOP", `"x"`),
	}
	i := 0
	return func() []byte {
		i++
		return []byte(lines[i%len(lines)] + "\r\n")
	}
}
