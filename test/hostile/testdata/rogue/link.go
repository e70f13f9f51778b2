package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"vigia/internal/jail"
	"vigia/internal/link"
)

const source = "badc0ffee0ddf00d"

// peer is a daemon's connection, as one who means it ill sees it.
type peer struct {
	*net.UnixConn
	mu   sync.Mutex
	next uint64
	name string // of the machine, once the daemon has told it
}

type call struct {
	ID     uint64          `json:"id"`
	Method string          `json:"method,omitempty"`
	Reply  bool            `json:"reply,omitempty"`
	Cancel bool            `json:"cancel,omitempty"`
	Files  int             `json:"files,omitempty"`
	Body   json.RawMessage `json:"body,omitempty"`
}

// takenOver confines itself as the real one does and behaves until the machine starts.
func takenOver(name, as string) error {
	profile := jail.Guard
	if name == "gate" {
		profile = jail.Gate
	}
	if _, err := jail.Confine(profile); err != nil {
		return err
	}
	l, err := link.Control()
	if err != nil {
		return err
	}
	attack := attacks[as]
	if attack == nil {
		return errors.New("no such attack: " + as)
	}
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		p := &peer{UnixConn: c, next: 1}
		go func() {
			p.behave(as)
			attack(p)
			p.Close()
		}()
	}
}

// behave answers until the call that lets the machine go.
func (p *peer) behave(as string) {
	for {
		c, err := p.read()
		if err != nil {
			return
		}
		body := "{}"
		switch c.Method {
		case link.CallHello:
			body = fmt.Sprintf(`{"source":%q,"pid":1,"configured":true}`, source)
			if as == "long-hello" {
				body = `{"source":"` + strings.Repeat("a", 1<<20) + `","configured":true}`
			}
		case link.CallConfigure:
			var cfg struct{ Name string }
			json.Unmarshal(c.Body, &cfg)
			p.name = cfg.Name
		}
		p.reply(c.ID, body)
		if c.Method == link.CallRun || c.Method == link.CallFrames {
			return
		}
	}
}

// read takes a frame, and lets its descriptors go.
func (p *peer) read() (c call, err error) {
	var head [4]byte
	oob := make([]byte, 4096)
	n, oobn, _, _, err := p.ReadMsgUnix(head[:], oob)
	if err != nil || n == 0 {
		return c, io.EOF
	}
	if messages, err := syscall.ParseSocketControlMessage(oob[:oobn]); err == nil {
		for i := range messages {
			fds, _ := syscall.ParseUnixRights(&messages[i])
			for _, fd := range fds {
				syscall.Close(fd)
			}
		}
	}
	if _, err := io.ReadFull(p, head[n:]); err != nil {
		return c, err
	}
	b := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(p, b); err != nil {
		return c, err
	}
	return c, json.Unmarshal(b, &c)
}

func frame(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}

func (p *peer) write(b []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, err := p.Write(b)
	return err == nil
}

func (p *peer) reply(id uint64, body string) bool {
	return p.write(frame(fmt.Sprintf(`{"id":%d,"reply":true,"body":%s}`, id, body)))
}

// calls sends one call after the other and waits for no answer.
func (p *peer) calls(body func(n uint64) string) {
	for n := uint64(1); p.write(frame(fmt.Sprintf(`{"id":%d,"method":"events","body":%s}`, n, body(n)))); n++ {
	}
}

// answer answers all calls in the background, so that nothing is suspected.
func (p *peer) answer(body string) {
	go func() {
		for {
			c, err := p.read()
			if err != nil {
				return
			}
			if !c.Reply && !c.Cancel {
				p.reply(c.ID, body)
			}
		}
	}()
}

func event(machine, source string, seq uint64, kind, fields string) string {
	return fmt.Sprintf(`{"id":"%s-%016x","machine":%q,"time":%q,"kind":%q,"fields":%s}`, source, seq, machine, time.Now().UTC().Format(time.RFC3339Nano), kind, fields)
}

// events are batches of true form.
func (p *peer) events(kind, fields string) func(uint64) string {
	return func(n uint64) string {
		var all []string
		for i := range uint64(100) {
			all = append(all, event(p.name, source, n*100+i, kind, fields))
		}
		return `{"events":[` + strings.Join(all, ",") + `]}`
	}
}

func pipes(n int) (fds []int) {
	r, w, err := os.Pipe()
	if err != nil {
		os.Exit(1)
	}
	for range n / 2 {
		fds = append(fds, int(r.Fd()), int(w.Fd()))
	}
	return fds
}
