// Package additions speaks to the guest agent (qemu-guest-agent, qga/qapi-schema.json in QEMU's source) over the one
// narrow channel that a machine has where a person asked for it.
//
// The guest answers, so every answer is a claim: it is size-capped, matched to its question by an id that the guest
// can't guess in advance (guest-sync-delimited), and never trusted for anything but showing it.
package additions

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Limits, in bytes: one answer on the wire, and what one command may print in all.
const (
	maxAnswer = 24 << 20
	MaxOutput = 16 << 20
	chunk     = 48 << 10 // of a copied file; the agent's own limit on a read is 48 MiB
)

// ErrNoAgent is returned when the guest does not answer; ErrProtocol when it answers nonsense.
var (
	ErrNoAgent  = errors.New("the guest agent does not answer: is qemu-guest-agent installed and running in the guest?")
	ErrProtocol = errors.New("the guest agent's answer makes no sense")
)

// Error is what the guest agent says it could not do.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return "guest agent: " + e.Desc }

// Agent is the connection to one guest's agent. Calls are made one at a time.
type Agent struct {
	turn chan struct{} // holds one token: whoever has it speaks
	conn net.Conn
	in   *bufio.Reader
}

// New makes an agent of the channel's connection. Nothing is sent until the first call.
func New(conn net.Conn) *Agent {
	a := &Agent{turn: make(chan struct{}, 1), conn: conn, in: bufio.NewReaderSize(conn, 4<<10)}
	a.turn <- struct{}{}
	return a
}

// take waits for the turn to speak, as long as ctx lasts: another's call may wait minutes for its answer.
func (a *Agent) take(ctx context.Context) (giveBack func(), err error) {
	select {
	case <-a.turn:
		return func() { a.turn <- struct{}{} }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%w (it is busy with another call)", ErrNoAgent)
	}
}

// Close ends the channel.
func (a *Agent) Close() error { return a.conn.Close() }

// Result is how a command ended.
type Result struct {
	ExitCode  int    `json:"exit_code"`
	Signal    int    `json:"signal"`
	Stdout    []byte `json:"-"`
	Stderr    []byte `json:"-"`
	Truncated bool   `json:"truncated"`
}

// Exec runs a command in the guest and waits for its end. The agent keeps at most 16 MiB of its output.
func (a *Agent) Exec(ctx context.Context, command []string, stdin []byte) (Result, error) {
	if len(command) == 0 {
		return Result{}, errors.New("no command")
	}
	args := map[string]any{"path": command[0], "arg": command[1:], "capture-output": true}
	if len(stdin) > 0 {
		args["input-data"] = base64.StdEncoding.EncodeToString(stdin)
	}
	var started struct {
		PID int64 `json:"pid"`
	}
	if err := a.call(ctx, "guest-exec", args, &started); err != nil {
		return Result{}, err
	}
	wait := 10 * time.Millisecond
	for {
		var status struct {
			Exited       bool   `json:"exited"`
			ExitCode     int    `json:"exitcode"`
			Signal       int    `json:"signal"`
			Out          []byte `json:"out-data"`
			Err          []byte `json:"err-data"`
			OutTruncated bool   `json:"out-truncated"`
			ErrTruncated bool   `json:"err-truncated"`
		}
		if err := a.call(ctx, "guest-exec-status", map[string]any{"pid": started.PID}, &status); err != nil {
			return Result{}, err
		}
		if status.Exited {
			r := Result{ExitCode: status.ExitCode, Signal: status.Signal, Truncated: status.OutTruncated || status.ErrTruncated}
			r.Stdout, r.Truncated = capped(status.Out, r.Truncated)
			r.Stderr, r.Truncated = capped(status.Err, r.Truncated)
			return r, nil
		}
		select {
		case <-time.After(wait):
			wait = min(wait*2, 500*time.Millisecond)
		case <-ctx.Done():
			return Result{}, ctx.Err()
		}
	}
}

func capped(b []byte, truncated bool) ([]byte, bool) {
	if len(b) > MaxOutput {
		return b[:MaxOutput], true
	}
	return b, truncated
}

// WriteFile copies src into a file of the guest, which is made or emptied first, and gives it the mode.
func (a *Agent) WriteFile(ctx context.Context, path string, mode uint32, src io.Reader) (int64, error) {
	handle, err := a.open(ctx, path, "w")
	if err != nil {
		return 0, err
	}
	total, err := a.write(ctx, handle, src)
	if cerr := a.call(ctx, "guest-file-close", map[string]any{"handle": handle}, nil); err == nil {
		err = cerr
	}
	if err == nil && mode != 0 {
		var r Result
		if r, err = a.Exec(ctx, []string{"chmod", fmt.Sprintf("%o", mode&0o7777), path}, nil); err == nil && r.ExitCode != 0 {
			err = fmt.Errorf("chmod %s in the guest: exit code %d", path, r.ExitCode)
		}
	}
	return total, err
}

func (a *Agent) open(ctx context.Context, path, mode string) (int64, error) {
	var handle int64
	err := a.call(ctx, "guest-file-open", map[string]any{"path": path, "mode": mode}, &handle)
	return handle, err
}

func (a *Agent) write(ctx context.Context, handle int64, src io.Reader) (int64, error) {
	buf := make([]byte, chunk)
	var total int64
	for {
		n, err := io.ReadFull(src, buf)
		for sent := 0; sent < n; {
			var wrote struct {
				Count int `json:"count"`
			}
			args := map[string]any{"handle": handle, "buf-b64": base64.StdEncoding.EncodeToString(buf[sent:n])}
			if werr := a.call(ctx, "guest-file-write", args, &wrote); werr != nil {
				return total, werr
			}
			if wrote.Count <= 0 || wrote.Count > n-sent {
				return total, fmt.Errorf("%w: wrote %d of %d bytes", ErrProtocol, wrote.Count, n-sent)
			}
			sent += wrote.Count
			total += int64(wrote.Count)
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return total, nil
		case err != nil:
			return total, err
		}
	}
}

// ReadFile copies a file of the guest into dst, at most limit bytes.
func (a *Agent) ReadFile(ctx context.Context, path string, dst io.Writer, limit int64) (int64, error) {
	handle, err := a.open(ctx, path, "r")
	if err != nil {
		return 0, err
	}
	defer a.call(ctx, "guest-file-close", map[string]any{"handle": handle}, nil)
	var total int64
	for {
		var got struct {
			Count int64  `json:"count"`
			Data  []byte `json:"buf-b64"`
			EOF   bool   `json:"eof"`
		}
		if err := a.call(ctx, "guest-file-read", map[string]any{"handle": handle, "count": chunk}, &got); err != nil {
			return total, err
		}
		if len(got.Data) > chunk || (len(got.Data) == 0 && !got.EOF) {
			return total, fmt.Errorf("%w: a read of %d bytes gave %d", ErrProtocol, chunk, len(got.Data))
		}
		total += int64(len(got.Data))
		if total > limit {
			return total, fmt.Errorf("%s in the guest is larger than %d bytes", path, limit)
		}
		if _, err := dst.Write(got.Data); err != nil {
			return total, err
		}
		if got.EOF {
			return total, nil
		}
	}
}

// Shutdown asks the guest to power itself off. The agent does not answer this one when it succeeds.
func (a *Agent) Shutdown(ctx context.Context) error {
	giveBack, err := a.take(ctx)
	if err != nil {
		return err
	}
	defer giveBack()
	if err := a.sync(ctx); err != nil {
		return err
	}
	return a.send(ctx, "guest-shutdown", map[string]any{"mode": "powerdown"})
}

// Ping reports whether an agent answers.
func (a *Agent) Ping(ctx context.Context) error { return a.call(ctx, "guest-ping", nil, nil) }

// call synchronizes the channel, which may hold answers of an agent that was restarted, and asks.
func (a *Agent) call(ctx context.Context, command string, args map[string]any, out any) error {
	_, err := a.asked(ctx, command, args, out)
	return err
}

// asked is call, and says whether the guest may have heard the command: what fails before is as if it was never asked.
func (a *Agent) asked(ctx context.Context, command string, args map[string]any, out any) (heard bool, err error) {
	giveBack, err := a.take(ctx)
	if err != nil {
		return false, err
	}
	defer giveBack()
	if err := a.sync(ctx); err != nil {
		return false, err
	}
	if err := a.send(ctx, command, args); err != nil {
		return true, err
	}
	answer, err := a.receive(ctx, 5*time.Minute)
	if err != nil {
		return true, err
	}
	if out == nil {
		return true, nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return true, fmt.Errorf("%w: %s: %v", ErrProtocol, command, err)
	}
	return true, nil
}

func (a *Agent) send(ctx context.Context, command string, args map[string]any) error {
	b, err := json.Marshal(struct {
		Execute   string         `json:"execute"`
		Arguments map[string]any `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return err
	}
	a.conn.SetWriteDeadline(deadline(ctx, 10*time.Second))
	if _, err := a.conn.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("%w (%v)", ErrNoAgent, err)
	}
	return nil
}

// sync sends a 0xff, which makes the agent forget a half-read command, and a random number that it answers behind a
// 0xff of its own: what came before that is old.
func (a *Agent) sync(ctx context.Context) error {
	var b [8]byte
	rand.Read(b[:])
	want := int64(binary.LittleEndian.Uint64(b[:]) >> 2)
	a.conn.SetWriteDeadline(deadline(ctx, 10*time.Second))
	if _, err := a.conn.Write([]byte{0xff}); err != nil {
		return fmt.Errorf("%w (%v)", ErrNoAgent, err)
	}
	if err := a.send(ctx, "guest-sync-delimited", map[string]any{"id": want}); err != nil {
		return err
	}
	for range 100 {
		if err := a.skipTo(ctx, 0xff); err != nil {
			return err
		}
		answer, err := a.receive(ctx, 10*time.Second)
		var refused *Error
		if errors.As(err, &refused) || errors.Is(err, ErrProtocol) {
			continue
		}
		if err != nil {
			return err
		}
		var got int64
		if json.Unmarshal(answer, &got) == nil && got == want {
			return nil
		}
	}
	return fmt.Errorf("%w: it does not synchronize", ErrProtocol)
}

// deadline is when to give up: after most, or with ctx where that ends before.
func deadline(ctx context.Context, most time.Duration) time.Time {
	t := time.Now().Add(most)
	if d, ok := ctx.Deadline(); ok && d.Before(t) {
		t = d
	}
	return t
}

func (a *Agent) skipTo(ctx context.Context, mark byte) error {
	a.conn.SetReadDeadline(deadline(ctx, 10*time.Second))
	for range maxAnswer {
		b, err := a.in.ReadByte()
		if err != nil {
			return noAnswer(err)
		}
		if b == mark {
			return nil
		}
	}
	return fmt.Errorf("%w: more than %d bytes without an answer", ErrProtocol, maxAnswer)
}

func (a *Agent) receive(ctx context.Context, most time.Duration) (json.RawMessage, error) {
	a.conn.SetReadDeadline(deadline(ctx, most))
	var line []byte
	for {
		part, err := a.in.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxAnswer {
			return nil, fmt.Errorf("%w: longer than %d bytes", ErrProtocol, maxAnswer)
		}
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return nil, noAnswer(err)
		}
	}
	return parse(line)
}

func parse(line []byte) (json.RawMessage, error) {
	var m struct {
		Return json.RawMessage `json:"return"`
		Error  *Error          `json:"error"`
	}
	if err := json.Unmarshal(line, &m); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrProtocol, err)
	}
	if m.Error != nil {
		if len(m.Error.Desc) > 1000 {
			m.Error.Desc = m.Error.Desc[:1000]
		}
		return nil, m.Error
	}
	return m.Return, nil
}

func noAnswer(err error) error {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return ErrNoAgent
	}
	return fmt.Errorf("%w (%v)", ErrNoAgent, err)
}
