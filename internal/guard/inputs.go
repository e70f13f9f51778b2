package guard

import (
	"bytes"
	"context"
	"errors"
	"io"
	"time"

	"vigia/internal/event"
	"vigia/internal/inputs"
	"vigia/internal/link"
)

// keepInputs begins to keep what is typed and what comes through the guest channel. A guard that does so already goes on as it is.
func (g *Guard) keepInputs(_ context.Context, r link.Request) (link.Response, error) {
	var k link.KeepInputs
	err := r.Decode(&k)
	if err != nil || g.inputs.Load() != nil {
		closeFiles(r.Files)
		return link.Response{}, err
	}
	log, err := inputs.Open(r.Files, inputs.Bounds{Bytes: k.Bytes, Age: k.Age})
	if err != nil {
		closeFiles(r.Files)
		return link.Response{}, err
	}
	log.Add(inputs.Record{Kind: inputs.Began, Flow: uint64(k.Run.UnixNano())})
	if !g.inputs.CompareAndSwap(nil, log) {
		log.Close()
	}
	return link.Response{}, nil
}

func (g *Guard) keepTyped(b []byte) {
	g.inputs.Load().Add(inputs.Record{Kind: inputs.Typed, Data: b})
}

// keepCommand keeps a command with its input.
func (g *Guard) keepCommand(e link.Exec) {
	log := g.inputs.Load()
	words := inputs.CommandData(e.Command)
	if log == nil || len(words) > inputs.MaxData {
		return
	}
	id := log.NextFlow()
	log.Add(inputs.Record{Kind: inputs.Command, Flow: id, Data: words})
	if len(e.Stdin) > 0 {
		log.Add(inputs.Record{Kind: inputs.Data, Flow: id, Data: e.Stdin})
	}
	log.Add(inputs.Record{Kind: inputs.Closed, Flow: id})
}

// copied is a file on its way into the guest.
type copied struct {
	io.Reader
	log *inputs.Log
	id  uint64
}

func (g *Guard) keepCopy(c link.Copy, from io.Reader) *copied {
	k := &copied{Reader: from, log: g.inputs.Load()}
	if k.log != nil {
		k.id = k.log.NextFlow()
		k.log.Add(inputs.Record{Kind: inputs.Copy, Flow: k.id, Data: inputs.CopyData(c.Path, c.Mode)})
	}
	return k
}

func (c *copied) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	if n > 0 {
		c.log.Add(inputs.Record{Kind: inputs.Data, Flow: c.id, Data: b[:n]})
	}
	return n, err
}

func (c *copied) done(err error) {
	if err == nil {
		c.log.Add(inputs.Record{Kind: inputs.Closed, Flow: c.id})
	}
}

// play gives what was typed on another machine, and what came through its guest channel.
func (g *Guard) play(ctx context.Context, r link.Request) (link.Response, error) {
	var p link.Play
	if err := r.Decode(&p); err != nil || p.Gate < 0 || p.Guard < 0 || p.Gate+p.Guard != len(r.Files) {
		closeFiles(r.Files)
		return link.Response{}, errors.Join(err, errors.New("play: its files do not match"))
	}
	others := inputs.OpenScript(r.Files[:p.Gate], p.From)
	s := inputs.OpenScript(r.Files[p.Gate:], p.From)
	pl := &player{g: g, began: time.Now(), pace: inputs.NewPace(p.From, p.Wait, s, others)}
	pl.done.Until, pl.done.Gaps = s.Until, s.Gaps
	typed := make(chan struct{})
	go func() {
		defer close(typed)
		pl.typed(ctx, s.Typed)
	}()
	calls := pl.calls(ctx, s.Calls)
	<-typed
	pl.done.Calls = calls
	return link.Response{Body: pl.done}, nil
}

// player gives one script.
type player struct {
	g     *Guard
	began time.Time
	pace  inputs.Pace
	done  link.Played
}

// until waits until something is due.
func (p *player) until(ctx context.Context, at time.Time) bool {
	t := time.NewTimer(time.Until(p.began.Add(p.pace.At(at))))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// typedPause is how much time between two keys makes two events of them.
const typedPause = 500 * time.Millisecond

func (p *player) typed(ctx context.Context, parts []inputs.Part) {
	for i, part := range parts {
		if !p.until(ctx, part.Time) {
			return
		}
		if i == 0 || part.Time.Sub(parts[i-1].Time) > typedPause || bytes.IndexByte(parts[i-1].Data, '\n') >= 0 {
			p.tell("console", part.Time, 0, keys(parts[i:]))
		}
		if _, err := p.g.console.conn.Write(part.Data); err != nil {
			return
		}
		p.done.Typed += int64(len(part.Data))
	}
}

// keys joins what was typed as one line.
func keys(parts []inputs.Part) (line []byte) {
	for i, part := range parts {
		if i > 0 && part.Time.Sub(parts[i-1].Time) > typedPause {
			break
		}
		line = append(line, part.Data...)
		if len(line) > playTells || bytes.IndexByte(part.Data, '\n') >= 0 {
			break
		}
	}
	return line
}

// playTells is how many bytes an event tells.
const playTells = 256

func (p *player) tell(source string, at time.Time, id uint64, text []byte) {
	p.g.out.Emit(event.InputGiven, event.Fields{"source": source, "recorded": at.UTC().Format(time.RFC3339Nano),
		"flow": int64(id), "bytes": int64(len(text)), "text": event.Text(text[:min(len(text), playTells)])})
}

// callTime bounds a command that is given again.
const callTime = time.Minute

// calls gives commands and copies, one after the other. One whose input is not whole is left out.
func (p *player) calls(ctx context.Context, calls []*inputs.Call) (given int) {
	for _, c := range calls {
		if !p.until(ctx, c.Time) {
			return given
		}
		if p.g.agent == nil || !c.Whole || len(c.Words) == 0 && !c.Copy {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, callTime)
		if c.Copy {
			p.tell("copy", c.Time, c.ID, []byte(c.Path))
			p.g.agent.WriteFile(ctx, c.Path, c.Mode, bytes.NewReader(c.Input))
		} else {
			p.tell("command", c.Time, c.ID, bytes.TrimSuffix(bytes.ReplaceAll(inputs.CommandData(c.Words), []byte{0}, []byte(" ")), []byte(" ")))
			p.g.agent.Exec(ctx, c.Words, c.Input)
		}
		cancel()
		given++
	}
	return given
}
