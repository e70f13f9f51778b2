package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"time"
)

// attacks change parts of a machine that otherwise behaves. A test names each.
var attacks = map[string]func(*stub, *parts){
	"qmp-endless": func(s *stub, p *parts) {
		p.qmp = s.afterCont(func(c net.Conn) { flood(c, same(strings.Repeat("x", 1<<20))) })
	},
	"qmp-garbage": func(s *stub, p *parts) { p.qmp = s.afterCont(func(c net.Conn) { flood(c, same("\xff\x00{]}\n")) }) },
	"qmp-answers": func(s *stub, p *parts) { p.qmp = s.afterCont(func(c net.Conn) { flood(c, wrongAnswers()) }) },
	"qmp-nesting": func(s *stub, p *parts) { p.qmp = s.afterCont(func(c net.Conn) { flood(c, nesting()) }) },
	"qmp-resets": func(s *stub, p *parts) {
		p.qmp = s.afterCont(func(c net.Conn) { flood(c, same(event("RESET", `{"guest": true, "reason": "guest-reset"}`))) })
	},
	"qmp-silent": func(s *stub, p *parts) { p.qmp = drain },
	"qmp-stuck": func(s *stub, p *parts) {
		p.qmp = func(c net.Conn) {
			c.Write([]byte(greeting))
			s.answer(c, func(cmd string) { block(cmd == "qmp_capabilities") })
		}
	},
	"qmp-deaf": func(s *stub, p *parts) {
		p.qmp = func(c net.Conn) { c.Write([]byte(greeting)); s.answer(c, func(cmd string) { block(cmd == "cont") }) }
	},
	"nbd-begin":    func(s *stub, p *parts) { p.disk = s.negotiateBadly },
	"nbd-requests": func(s *stub, p *parts) { p.disk = s.requestBadly },
	"disk-shadow":  func(s *stub, p *parts) { p.disk = s.readShadow },
	"disk-reads":   func(s *stub, p *parts) { p.disk = s.readAll },

	"net-length": func(s *stub, p *parts) { p.net = s.frames(same("\xff\xff\xff\xff")) },
	"net-zero":   func(s *stub, p *parts) { p.net = s.frames(same("\x00\x00\x00\x00")) },
	"net-storm":  func(s *stub, p *parts) { p.net = s.frames(s.storm) },
	"net-flows": func(s *stub, p *parts) {
		p.net = s.frames(func() []byte { return s.syn(benchNet(), uint16(1024+time.Now().UnixNano()%60000), 80) })
	},
	"net-names": func(s *stub, p *parts) { p.net = s.frames(s.names()) },
	"net-deaf": func(s *stub, p *parts) {
		p.net = func(c net.Conn) {
			<-s.going
			flood(c, func() []byte {
				return append(s.arp(), s.ip(1, gatewayIP, append([]byte{8, 0, 0, 0}, make([]byte, 1000)...))...)
			})
		}
	},

	"console-flood": func(s *stub, p *parts) { p.console = s.shout(same(strings.Repeat("y\n", 32<<10))) },
	"console-lines": func(s *stub, p *parts) { p.console = s.shout(same(strings.Repeat("x", 1<<20) + "\n")) },
	"console-escape": func(s *stub, p *parts) {
		p.console = s.shout(same(strings.Repeat("\x1b]0;\x07\x1b[2J\x9b\x00\xff\u202e\r", 4096) + "\n"))
	},

	"agent-endless": func(s *stub, p *parts) {
		p.agent = func(c net.Conn) { go drain(c); flood(c, same("\xff"+strings.Repeat("x", 1<<20))) }
	},
	"agent-marks": func(s *stub, p *parts) {
		p.agent = func(c net.Conn) { go drain(c); flood(c, same(strings.Repeat("\xff", 1<<20))) }
	},
	"agent-lies":  func(s *stub, p *parts) { p.agent = lyingAgent },
	"agent-large": func(s *stub, p *parts) { p.agent = largeAgent },
	"agent-deaf":  func(s *stub, p *parts) { p.agent = func(c net.Conn) { time.Sleep(time.Hour) } },
}

func block(yes bool) {
	if yes {
		select {}
	}
}

// nesting is JSON as deep as one message may be, as an event and as an answer.
func nesting() func() []byte {
	deep := strings.Repeat("[", 1<<20)
	lines := [][]byte{
		[]byte(`{"event": "X", "data": ` + deep + strings.Repeat("]", 1<<20) + "}\r\n"),
		[]byte(`{"return": ` + strings.Repeat(`{"a":`, 1<<18) + "1" + strings.Repeat("}", 1<<18) + `, "id": 9}` + "\r\n"),
	}
	i := 0
	return func() []byte { i++; return lines[i%2] }
}

// shout writes 100 MB on the serial line, then behaves.
func (s *stub) shout(next func() []byte) func(net.Conn) {
	return func(c net.Conn) {
		<-s.going
		for sent := 0; sent < 100<<20; {
			n, err := c.Write(next())
			if sent += n; err != nil {
				return
			}
		}
		s.serial(c)
	}
}

// agentSync answers guest-sync-delimited rightly, so that the lies are heard, and everything else by reply.
func agentSync(c net.Conn, reply func(command string) []byte) {
	in := bufio.NewReader(c)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		var m struct {
			Execute   string `json:"execute"`
			Arguments struct {
				ID int64 `json:"id"`
			} `json:"arguments"`
		}
		json.Unmarshal(bytes.TrimLeft(line, "\xff"), &m)
		if m.Execute == "guest-sync-delimited" {
			fmt.Fprintf(c, "\xff{\"return\": %d}\n", m.Arguments.ID)
			continue
		}
		c.Write(reply(m.Execute))
	}
}

func lyingAgent(c net.Conn) {
	i := 0
	agentSync(c, func(command string) []byte {
		i++
		lies := map[string][]string{
			"guest-exec":        {`{"return": {"pid": -9223372036854775808}}`, `{"return": []}`, `{"return": {"pid": 1e99}}`},
			"guest-exec-status": {`{"return": {"exited": true, "exitcode": 99999999999, "out-data": "!!"}}`, `{"return": {"exited": "no"}}`, `{"return": {"exited": true, "signal": -1, "out-data": "` + strings.Repeat("QUFB", 1<<20) + `"}}`},
			"guest-file-open":   {`{"return": 7}`},
			"guest-file-read":   {`{"return": {"count": -5, "buf-b64": "` + strings.Repeat("QUFB", 1<<18) + `", "eof": false}}`, `{"return": {"count": 48, "buf-b64": "", "eof": false}}`},
			"guest-file-write":  {`{"return": {"count": -1}}`, `{"return": {"count": 1099511627776}}`},
		}[command]
		if len(lies) == 0 {
			return []byte("{\"error\": {\"class\": \"x\", \"desc\": \"" + strings.Repeat("no ", 1<<20) + "\"}}\n")
		}
		return append([]byte(lies[i%len(lies)]), '\n')
	})
}

// largeAgent says as much as it may, and a little more.
func largeAgent(c net.Conn) {
	big := strings.Repeat("QUFB", 5<<20)
	agentSync(c, func(command string) []byte {
		if command == "guest-exec" {
			return []byte(`{"return": {"pid": 1}}` + "\n")
		}
		return []byte(`{"return": {"exited": true, "exitcode": 0, "out-data": "` + big + `", "err-data": "` + big + `"}}` + "\n")
	})
}
