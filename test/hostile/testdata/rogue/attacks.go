package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
)

// attacks begin once the machine was let go. A test names each.
var attacks = map[string]func(*peer){
	"garbage": func(p *peer) {
		for p.write([]byte("\x00\x00\x00\x08{]\xff\xfe\x00\x01\x02\x03")) {
		}
	},
	"huge": func(p *peer) { p.write([]byte("\xff\xff\xff\xff")); p.pour(strings.Repeat("x", 1<<20)) },
	"zero": func(p *peer) { p.pour(strings.Repeat("\x00", 1<<16)) },
	"large": func(p *peer) {
		p.pour(string(frame(`{"id":1,"method":"x","body":"` + strings.Repeat("x", 2<<20-64) + `"}`)))
	},
	"half": func(p *peer) {
		p.write([]byte("\x00\x1f\xff\xff"))
		for p.write([]byte("x")) {
			time.Sleep(50 * time.Millisecond)
		}
	},
	"nesting": func(p *peer) {
		p.calls(func(uint64) string { return strings.Repeat("[", 1<<20) + strings.Repeat("]", 1<<20-200) })
	},
	"large-calls": func(p *peer) {
		p.answer("{}")
		p.calls(func(uint64) string { return `{"events":["` + strings.Repeat("y", 2<<20-200) + `"]}` })
	},
	"endless-lines": func(p *peer) {
		p.answer("{}")
		p.calls(p.events("console.line", `{"line":"`+strings.Repeat("z", 1000)+`"}`))
	},
	"endless-facts": func(p *peer) {
		p.answer("{}")
		p.calls(p.events("file.changed", `{"path":"/etc/shadow","change":"mode","detail":"`+strings.Repeat("z", 1000)+`"}`))
	},
	"same-id": func(p *peer) {
		for p.write(frame(`{"id":7,"method":"events","body":{"events":[]}}`)) {
		}
	},
	"other-machine": func(p *peer) { p.once(event("calm", source, 1, "console.line", `{"line":"lies"}`)) },
	"other-source":  func(p *peer) { p.once(event(p.name, "0123456789abcdef", 1, "console.line", `{"line":"lies"}`)) },
	"other-kind":    func(p *peer) { p.once(event(p.name, source, 1, "policy.alert", `{"rule":7}`)) },
	"daemons-kind": func(p *peer) {
		p.answer("{}")
		p.once(event(p.name, source, 1, "response.done", `{"response":"quarantine","rule":"lies"}`))
	},
	"other-workers-kind": func(p *peer) {
		kind := `net.flow`
		if os.Args[1] == "gate" {
			kind = `disk.read`
		}
		p.answer("{}")
		p.once(event(p.name, source, 1, kind, `{}`))
	},
	"no-kind": func(p *peer) { p.once(event(p.name, source, 1, "no.such", `{}`)) },
	"other-calls": func(p *peer) {
		p.answer("{}")
		for n := 1; p.write(frame(fmt.Sprintf(`{"id":%d,"method":"configure","body":{}}`, n))); n++ {
		}
	},
	"replies": func(p *peer) {
		for n := 1000; p.write(frame(fmt.Sprintf(`{"id":%d,"reply":true,"body":{"x":[1,2,3]},"error":"no"}`, n))); n++ {
		}
	},
	"cancels": func(p *peer) {
		for n := 1; p.write(frame(fmt.Sprintf(`{"id":%d,"cancel":true}`, n))); n++ {
		}
	},
	"descriptors": func(p *peer) {
		fds := pipes(64)
		for n := 1; ; n++ {
			b := frame(fmt.Sprintf(`{"id":%d,"method":"events","files":64,"body":{"events":[]}}`, n))
			if _, _, err := p.WriteMsgUnix(b, syscall.UnixRights(fds...), nil); err != nil {
				return
			}
		}
	},
	"unclaimed": func(p *peer) {
		fds := pipes(64)
		for {
			if _, _, err := p.WriteMsgUnix([]byte("\x00"), syscall.UnixRights(fds...), nil); err != nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	},
	"silent": func(p *peer) {
		for {
			if _, err := p.read(); err != nil {
				return
			}
		}
	},
	// It reads nothing, and answers what it does not read: the daemon's side of the socket fills.
	"deaf": func(p *peer) {
		go p.calls(p.events("console.line", `{"line":"x"}`))
		for n := uint64(1); p.reply(n, "{}"); n++ {
			time.Sleep(10 * time.Microsecond)
		}
	},
	"large-answers": func(p *peer) {
		body := `{"introspection":"` + strings.Repeat("a", 1<<20) + `","files":"` + strings.Repeat("\\u0007", 1<<17) + `"}`
		p.answer(body)
		select {}
	},
	"refusing": func(p *peer) {
		for {
			c, err := p.read()
			if err != nil || !p.write(frame(fmt.Sprintf(`{"id":%d,"reply":true,"error":"no"}`, c.ID))) {
				return
			}
		}
	},
	"wrong-answers": func(p *peer) { p.answer(`[{"disk_size":"x"},7,null]`); select {} },
	"long-hello":    func(p *peer) { select {} },
}

func (p *peer) pour(text string) {
	for p.write([]byte(text)) {
	}
}

func (p *peer) once(event string) {
	p.write(frame(`{"id":1,"method":"events","body":{"events":[` + event + `]}}`))
	for {
		if _, err := p.read(); err != nil {
			return
		}
	}
}
