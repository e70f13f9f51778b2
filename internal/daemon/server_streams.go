package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api/vigiav1"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// Console joins the caller to the serial line. The daemon only carries the bytes.
func (s machinesServer) Console(ctx context.Context, stream *connect.BidiStream[vigiav1.ConsoleInput, vigiav1.ConsoleOutput]) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	m, err := s.d.machine(first.Name)
	if err != nil {
		return err
	}
	line, theirs, err := socketPair()
	if err != nil {
		return err
	}
	defer line.Close()
	_, err = m.callGuard(ctx, link.CallConsole, nil, nil, theirs)
	theirs.Close()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { line.Close() })
	defer stop()
	go func() {
		line.Write(first.Data)
		for {
			in, err := stream.Receive()
			if err != nil {
				if !errors.Is(err, io.EOF) {
					line.Close()
				}
				return
			}
			if _, err := line.Write(in.Data); err != nil {
				return
			}
		}
	}()
	return pump(line, func(b []byte) error { return stream.Send(&vigiav1.ConsoleOutput{Data: b}) })
}

// ConsoleLog gives the kept log: its beginning, and the two tails in the order in which they were written.
func (s machinesServer) ConsoleLog(ctx context.Context, r *connect.Request[vigiav1.MachineRequest], stream *connect.ServerStream[vigiav1.ConsoleOutput]) error {
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return err
	}
	paths := s.d.files.consoleLogs(m.id())
	parts := paths[:]
	a, aerr := os.Stat(parts[1])
	b, berr := os.Stat(parts[2])
	if aerr == nil && berr == nil && a.Size() > 0 && (b.Size() == 0 || b.ModTime().Before(a.ModTime())) {
		parts[1], parts[2] = parts[2], parts[1]
	}
	for _, path := range parts {
		f, err := os.Open(path)
		if err != nil {
			continue // a machine that never ran has none
		}
		err = pump(f, func(b []byte) error { return stream.Send(&vigiav1.ConsoleOutput{Data: b}) })
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// Exec runs a command through the guest agent, where the machine has one.
func (s machinesServer) Exec(ctx context.Context, r *connect.Request[vigiav1.ExecRequest], stream *connect.ServerStream[vigiav1.ExecOutput]) error {
	if len(r.Msg.Command) == 0 {
		return fmt.Errorf("%w: no command", vm.ErrInvalid)
	}
	m, err := s.agent(r.Msg.Name)
	if err != nil {
		return err
	}
	timeout := time.Duration(r.Msg.TimeoutSeconds * float64(time.Second))
	if timeout <= 0 {
		timeout = time.Hour
	}
	outRead, outWrite, err := os.Pipe()
	if err != nil {
		return err
	}
	defer outRead.Close()
	errRead, errWrite, err := os.Pipe()
	if err != nil {
		outWrite.Close()
		return err
	}
	defer errRead.Close()
	var result link.ExecResult
	done := make(chan error, 1)
	go func() {
		_, err := m.callGuard(ctx, link.CallExec, link.Exec{Command: r.Msg.Command, Stdin: r.Msg.Stdin, Timeout: timeout}, &result, outWrite, errWrite)
		outWrite.Close()
		errWrite.Close()
		done <- err
	}()
	var mu sync.Mutex
	send := func(o *vigiav1.ExecOutput) error {
		mu.Lock()
		defer mu.Unlock()
		return stream.Send(o)
	}
	var wg sync.WaitGroup
	wg.Go(func() { pump(outRead, func(b []byte) error { return send(&vigiav1.ExecOutput{Stdout: b}) }) })
	wg.Go(func() { pump(errRead, func(b []byte) error { return send(&vigiav1.ExecOutput{Stderr: b}) }) })
	err = <-done
	wg.Wait()
	if err != nil {
		return err
	}
	return send(&vigiav1.ExecOutput{Done: true, ExitCode: int32(result.ExitCode), Signal: int32(result.Signal), Truncated: result.Truncated})
}

// agent finds a machine that has the guest channel.
func (s machinesServer) agent(name string) (*machine, error) {
	m, err := s.d.machine(name)
	if err != nil {
		return nil, err
	}
	if !m.rec.Spec.Has(vm.AdditionExec) {
		return nil, fmt.Errorf("machine %s has no guest channel: %w: it was not run with --additions exec", name, errState)
	}
	return m, nil
}

// copyLimit is the largest file that is copied out of a guest, in bytes.
const copyLimit = 1 << 40

// CopyIn writes a stream into a file of the guest.
func (s machinesServer) CopyIn(ctx context.Context, stream *connect.ClientStream[vigiav1.CopyInRequest]) (*connect.Response[vigiav1.CopyInResponse], error) {
	if !stream.Receive() {
		return nil, fmt.Errorf("%w: no file named", vm.ErrInvalid)
	}
	first := stream.Msg()
	m, err := s.agent(first.Name)
	if err != nil {
		return nil, err
	}
	to := link.Copy{Path: first.Path, Mode: first.Mode}
	data := first.Data
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	go func() {
		defer write.Close()
		for {
			if _, err := write.Write(data); err != nil || !stream.Receive() {
				return
			}
			data = stream.Msg().Data
		}
	}()
	var done link.Copied
	_, err = m.callGuard(ctx, link.CallCopyIn, to, &done, read)
	read.Close()
	if err == nil {
		err = stream.Err()
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.CopyInResponse{Bytes: uint64(done.Bytes)}), nil
}

// CopyOut reads a file of the guest.
func (s machinesServer) CopyOut(ctx context.Context, r *connect.Request[vigiav1.CopyOutRequest], stream *connect.ServerStream[vigiav1.Chunk]) error {
	m, err := s.agent(r.Msg.Name)
	if err != nil {
		return err
	}
	return s.piped(ctx, m.callGuard, link.CallCopyOut, link.Copy{Path: r.Msg.Path, Limit: copyLimit}, stream)
}

// Capture streams a machine's frames until the caller goes.
func (s machinesServer) Capture(ctx context.Context, r *connect.Request[vigiav1.CaptureRequest], stream *connect.ServerStream[vigiav1.Chunk]) error {
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return err
	}
	_, gate := m.bothWorkers()
	switch {
	case m.running() == nil:
		return m.errNotRunning()
	case m.rec.Spec.Net.Mode != vm.NetNAT:
		return fmt.Errorf("machine %s has no network: %w", m.name(), errState)
	case gate.gone():
		return fmt.Errorf("machine %s: its gate is being replaced: %w: try again", m.name(), errState)
	}
	return s.piped(ctx, gate.conn.Call, link.CallCapture, link.Capture{SnapLength: r.Msg.SnapLength}, stream)
}

// Trace streams system calls until the caller goes.
func (s machinesServer) Trace(ctx context.Context, r *connect.Request[vigiav1.TraceRequest], stream *connect.ServerStream[vigiav1.Chunk]) error {
	m, err := s.d.machine(r.Msg.Name)
	if err != nil {
		return err
	}
	guard, _ := m.bothWorkers()
	switch {
	case m.running() == nil:
		return m.errNotRunning()
	case guard.gone():
		return fmt.Errorf("machine %s: its guard is being replaced: %w: try again", m.name(), errState)
	}
	return s.piped(ctx, guard.conn.Call, link.CallTrace, link.Trace{PID: r.Msg.Pid}, stream)
}

type workerCall func(ctx context.Context, method string, in, out any, files ...*os.File) ([]*os.File, error)

// piped makes a call whose output comes through a pipe, and streams it on.
func (s machinesServer) piped(ctx context.Context, call workerCall, method string, in any, stream *connect.ServerStream[vigiav1.Chunk]) error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	stop := context.AfterFunc(ctx, func() { read.Close() })
	defer stop()
	done := make(chan error, 1)
	go func() {
		_, err := call(ctx, method, in, nil, write)
		write.Close()
		done <- err
	}()
	perr := pump(read, func(b []byte) error { return stream.Send(&vigiav1.Chunk{Data: b}) })
	if err := <-done; err != nil {
		return err
	}
	return perr
}

// pump gives what r has in chunks, to its end.
func pump(r io.Reader, send func([]byte) error) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if err := send(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
