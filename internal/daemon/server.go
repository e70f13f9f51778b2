package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1/vigiav1connect"
	"vigia/internal/checkpoint"
	"vigia/internal/event"
	"vigia/internal/image"
	"vigia/internal/link"
	"vigia/internal/machine/additions"
	"vigia/internal/vm"
)

// Bounds of the API: connections at one time, and how long a client may take over a request's head or stay idle.
const (
	maxConnections = 256
	headTime       = 10 * time.Second
	idleTime       = 2 * time.Minute
)

// caller is who is at the other end of a connection, as the kernel says (SO_PEERCRED).
type caller struct{ uid, pid int }

type callerKey struct{}

// serve opens the API on the state directory's socket.
func (d *Daemon) serve(back *undo) error {
	dir, err := openSocketDir(d.files.root)
	if err != nil {
		return err
	}
	defer dir.close()
	old := syscall.Umask(0o177) // owner only from the first instant
	l, err := dir.listen(api.SocketName)
	syscall.Umask(old)
	if err != nil {
		return fmt.Errorf("API: %w", err)
	}
	mux := http.NewServeMux()
	opts := []connect.HandlerOption{connect.WithInterceptors(access{d}), connect.WithReadMaxBytes(api.MaxMessage), connect.WithRecover(d.recovered)}
	mount := func(path string, h http.Handler) { mux.Handle(path, h) }
	mount(vigiav1connect.NewMachinesHandler(machinesServer{d}, opts...))
	mount(vigiav1connect.NewCheckpointsHandler(checkpointsServer{d}, opts...))
	mount(vigiav1connect.NewViewsHandler(viewsServer{d}, opts...))
	mount(vigiav1connect.NewImagesHandler(imagesServer{d}, opts...))
	mount(vigiav1connect.NewEventsHandler(eventsServer{d}, opts...))
	mount(vigiav1connect.NewPolicyHandler(policyServer{d}, opts...))
	mount(vigiav1connect.NewLedgerHandler(ledgerServer{d}, opts...))
	mount(vigiav1connect.NewDaemonHandler(daemonServer{d}, opts...))
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Handler: attentive(d.toldAll(mux)), Protocols: &protocols, ReadHeaderTimeout: headTime, IdleTimeout: idleTime,
		ErrorLog: log.New(io.Discard, "", 0), // a client's mistakes are his
		HTTP2:    &http.HTTP2Config{MaxConcurrentStreams: 64, SendPingTimeout: time.Minute, PingTimeout: 20 * time.Second},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(context.WithValue(ctx, callerKey{}, peer(c)), clientKey{}, c)
		},
		BaseContext: func(net.Listener) context.Context { return d.ctx }}
	go server.Serve(&limited{Listener: l, open: map[*client]bool{}})
	back.push(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		if server.Shutdown(ctx) != nil { // those who follow events, or a console, are cut off
			server.Close()
		}
		os.Remove(d.files.path(api.SocketName))
	})
	return nil
}

func peer(c net.Conn) caller {
	if client, ok := c.(*client); ok {
		c = client.Conn
	}
	who := caller{-1, -1}
	sock, ok := c.(*net.UnixConn)
	if !ok {
		return who
	}
	raw, err := sock.SyscallConn()
	if err != nil {
		return who
	}
	raw.Control(func(fd uintptr) {
		if cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			who = caller{int(cred.Uid), int(cred.Pid)}
		}
	})
	return who
}

func (d *Daemon) recovered(_ context.Context, spec connect.Spec, _ http.Header, p any) error {
	d.log.Error("a call panicked", "call", spec.Procedure, "panic", p)
	return connect.NewError(connect.CodeInternal, errors.New("vigia has a bug: its log tells more"))
}

// access makes every call an event: who asked for what, and what was refused.
type access struct{ d *Daemon }

type notedKey struct{}

// toldAll tells of requests that did not become a call: with a body that can't be read, or to what there is not. Those are
// joined, since nothing comes of them.
func (d *Daemon) toldAll(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var noted atomic.Bool
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), notedKey{}, &noted)))
		if noted.Load() {
			return
		}
		who, _ := r.Context().Value(callerKey{}).(caller)
		call := event.Text([]byte(r.URL.Path))
		d.asked.Emit(event.Alike{Sort: "unread " + strconv.Itoa(who.uid) + " " + call, Sum: []string{"count"}}, event.Event{Kind: event.AccessCall,
			Fields: event.Fields{"call": call, "uid": int64(who.uid), "pid": int64(who.pid), "error": "not a request that can be read, or to what there is not"}})
	})
}

func (a access) note(ctx context.Context, procedure string, message any, err error) {
	if noted, ok := ctx.Value(notedKey{}).(*atomic.Bool); ok {
		noted.Store(true)
	}
	who, _ := ctx.Value(callerKey{}).(caller)
	fields := event.Fields{"call": procedure, "uid": int64(who.uid), "pid": int64(who.pid)}
	machine := ""
	switch about := message.(type) {
	case interface{ GetName() string }:
		machine = event.Text([]byte(about.GetName()))
	case interface{ GetMachine() string }:
		machine = event.Text([]byte(about.GetMachine()))
	}
	if machine != "" {
		fields["subject"] = machine
	}
	problem := ""
	if err != nil {
		problem = event.Text([]byte(api.Message(err)))
		fields["error"] = problem
	}
	if _, merr := a.d.machine(machine); merr != nil {
		machine = ""
	}
	if !onlyAsks(procedure) {
		a.d.bus.emit(machine, event.AccessCall, fields)
		return
	}
	alike := strings.Join([]string{procedure, strconv.Itoa(who.uid), machine, problem}, " ")
	a.d.asked.Emit(event.Alike{Sort: alike, Sum: []string{"count"}}, event.Event{Machine: machine, Kind: event.AccessCall, Fields: fields})
}

// onlyAsks tells calls that change nothing: a program may repeat them as often as it likes.
func onlyAsks(procedure string) bool {
	switch procedure {
	case vigiav1connect.MachinesListProcedure, vigiav1connect.MachinesShowProcedure, vigiav1connect.MachinesConsoleLogProcedure,
		vigiav1connect.ViewsProcessesProcedure, vigiav1connect.ViewsModulesProcedure, vigiav1connect.ViewsSocketsProcedure,
		vigiav1connect.ViewsFilesProcedure, vigiav1connect.ViewsMapsProcedure, vigiav1connect.ViewsKernelProcedure,
		vigiav1connect.ViewsCheckProcedure, vigiav1connect.ImagesListProcedure, vigiav1connect.CheckpointsListProcedure, vigiav1connect.EventsListProcedure, vigiav1connect.PolicyListProcedure, vigiav1connect.LedgerHeadProcedure,
		vigiav1connect.DaemonInfoProcedure:
		return true
	}
	return false
}

// WrapUnary notes a call once it is answered and gives its error the code that clients act on.
func (a access) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		resp, err := next(ctx, req)
		err = coded(err)
		a.note(ctx, req.Spec().Procedure, req.Any(), err)
		return resp, err
	}
}

// WrapStreamingClient is not used by a server.
func (a access) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler notes a stream when its first message is there, and again if it fails.
func (a access) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		noted := &notedStream{StreamingHandlerConn: conn, access: a, ctx: ctx}
		err := coded(next(ctx, noted))
		if err != nil && ctx.Err() == nil {
			a.note(ctx, conn.Spec().Procedure, noted.first, err)
		}
		return err
	}
}

type notedStream struct {
	connect.StreamingHandlerConn
	access access
	ctx    context.Context
	first  any
}

func (s *notedStream) Receive(message any) error {
	err := s.StreamingHandlerConn.Receive(message)
	if err == nil && s.first == nil {
		arrived(s.ctx)
		s.first = message
		s.access.note(s.ctx, s.Spec().Procedure, message, nil)
	}
	return err
}

// coded gives an error the code by which clients tell a malformed request from a missing machine from a failure.
func coded(err error) error {
	var ce *connect.Error
	var remote link.RemoteError
	switch {
	case err == nil, errors.As(err, &ce):
		return err
	case errors.Is(err, vm.ErrInvalid):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, errNoMachine), errors.Is(err, image.ErrUnknown), errors.Is(err, checkpoint.ErrNotFound):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, errExists):
		return connect.NewError(connect.CodeAlreadyExists, err)
	case errors.Is(err, errState), errors.Is(err, errGivenUp), errors.Is(err, additions.ErrNoAgent):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	case errors.Is(err, fs.ErrPermission):
		return connect.NewError(connect.CodePermissionDenied, err)
	case errors.Is(err, errEnding):
		return connect.NewError(connect.CodeUnavailable, err)
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	case errors.As(err, &remote):
		return connect.NewError(connect.CodeUnknown, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}
