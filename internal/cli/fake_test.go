package cli_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
	"vigia/internal/api/vigiav1/vigiav1connect"
)

// fake is a daemon at the API's edge: what it says is fixed, what it is told it keeps.
type fake struct {
	vigiav1connect.UnimplementedMachinesHandler
	mu        sync.Mutex
	machines  []*vigiav1.Machine
	files     map[string][]byte // of every machine
	following chan struct{}     // closed once a client follows events
	detached  chan struct{}     // closed once a console client went away
}

// hostile is what a guest calls a process to take over the terminal of who looks.
const hostile = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u009b31m\n\tend"

var epoch = time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)

func newFake() *fake {
	return &fake{
		following: make(chan struct{}),
		detached:  make(chan struct{}),
		files:     map[string][]byte{"/etc/motd": []byte("welcome\n")},
		machines: []*vigiav1.Machine{{
			Name: "web", Id: "0123456789abcdef", State: "running", Accelerator: "tcg", Pid: 4242, GuardPid: 4243, GatePid: 4244,
			Image: "debian", ImageId: "b3-aaaa", MemoryBytes: 512 << 20, Cpus: 2, Publish: []string{"127.0.0.1:8080:80/tcp"},
			Net: "nat", Rules: []string{"deny out tcp any:25"}, Owner: "ana", Created: timestamppb.New(epoch),
			Labels: map[string]string{"tier": "front"}, Introspection: "attached",
			Isolation: []*vigiav1.Isolation{
				{Subject: "qemu", Measure: "seccomp", InForce: true},
				{Subject: "guard", Measure: "landlock", Detail: "this kernel has none"},
			},
			Disk:    &vigiav1.Disk{SizeBytes: 2 << 30, UsedBytes: 3 << 20, Layers: 1, Reads: 10, Files: "named (ext4)"},
			Network: &vigiav1.NetStats{FramesIn: 5, FramesOut: 6},
		}},
	}
}

// serve listens on the state directory's socket until stop.
func (f *fake) serve(state string) (stop func(), err error) {
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, err
	}
	dir, err := os.Open(state)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), api.SocketName))
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // by then the descriptor in its address may be another test's
	mux := http.NewServeMux()
	mux.Handle(vigiav1connect.NewMachinesHandler(f))
	mux.Handle(vigiav1connect.NewViewsHandler(fakeViews{f: f}))
	mux.Handle(vigiav1connect.NewImagesHandler(fakeImages{}))
	mux.Handle(vigiav1connect.NewEventsHandler(fakeEvents{f}))
	mux.Handle(vigiav1connect.NewPolicyHandler(fakePolicy{}))
	mux.Handle(vigiav1connect.NewLedgerHandler(fakeLedger{}))
	mux.Handle(vigiav1connect.NewDaemonHandler(fakeDaemon{}))
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s := &http.Server{Handler: mux, Protocols: &protocols}
	go s.Serve(l)
	return func() {
		s.Close()
		os.Remove(filepath.Join(state, api.SocketName))
	}, nil
}

func serveFake(state string) (stop func(), err error) { return newFake().serve(state) }

func fail(code connect.Code, format string, v ...any) error {
	return connect.NewError(code, fmt.Errorf(format, v...))
}

// change finds a machine and, with f, changes it.
func (f *fake) change(name string, change func(*vigiav1.Machine)) (*connect.Response[vigiav1.Machine], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.machines {
		if m.Name == name {
			if change != nil {
				change(m)
			}
			return connect.NewResponse(m), nil
		}
	}
	if strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return nil, fail(connect.CodeInvalidArgument, "invalid value: name %q: use 1 to 63 of a-z, 0-9 and '-'", name)
	}
	return nil, fail(connect.CodeNotFound, "no machine %q", name)
}

type machineReq = *connect.Request[vigiav1.MachineRequest]
type machineRes = *connect.Response[vigiav1.Machine]

func (f *fake) to(req machineReq, state string) (machineRes, error) {
	return f.change(req.Msg.Name, func(m *vigiav1.Machine) { m.State = state })
}

func (f *fake) Run(_ context.Context, req *connect.Request[vigiav1.RunRequest]) (machineRes, error) {
	r := req.Msg
	if r.Image != "debian" {
		return nil, fail(connect.CodeNotFound, "no image %q: see vigia image ls", r.Image)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	m := &vigiav1.Machine{Name: r.Name, State: "running", Accelerator: "tcg", Image: r.Image, MemoryBytes: r.MemoryBytes,
		Cpus: r.Cpus, Publish: r.Publish, Net: r.Net, Rules: r.Rules, Owner: r.Owner, Purpose: r.Purpose, Labels: r.Labels,
		Additions: r.Additions, Reason: r.Ttl}
	f.machines = append(f.machines, m)
	return connect.NewResponse(m), nil
}

func (f *fake) List(context.Context, *connect.Request[vigiav1.ListMachinesRequest]) (*connect.Response[vigiav1.ListMachinesResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return connect.NewResponse(&vigiav1.ListMachinesResponse{Machines: slices.Clone(f.machines)}), nil
}

func (f *fake) Show(_ context.Context, req machineReq) (machineRes, error) {
	return f.change(req.Msg.Name, nil)
}
func (f *fake) Start(_ context.Context, req machineReq) (machineRes, error) {
	return f.to(req, "running")
}
func (f *fake) Pause(_ context.Context, req machineReq) (machineRes, error) {
	return f.to(req, "paused")
}
func (f *fake) Resume(_ context.Context, req machineReq) (machineRes, error) {
	return f.to(req, "running")
}
func (f *fake) Quarantine(_ context.Context, req machineReq) (machineRes, error) {
	return f.to(req, "quarantined")
}
func (f *fake) Release(_ context.Context, req machineReq) (machineRes, error) {
	return f.to(req, "running")
}

func (f *fake) Stop(_ context.Context, req *connect.Request[vigiav1.StopRequest]) (machineRes, error) {
	return f.change(req.Msg.Name, func(m *vigiav1.Machine) {
		m.State, m.Ended = "stopped", "stopped"
		m.Reason = fmt.Sprintf("force=%t timeout=%g", req.Msg.Force, req.Msg.TimeoutSeconds)
	})
}

func (f *fake) Remove(_ context.Context, req *connect.Request[vigiav1.RemoveRequest]) (*connect.Response[vigiav1.RemoveResponse], error) {
	m, err := f.change(req.Msg.Name, nil)
	if err != nil {
		return nil, err
	}
	if m.Msg.State == "running" && !req.Msg.Force {
		return nil, fail(connect.CodeFailedPrecondition, "machine %s runs: stop it first, or use --force", req.Msg.Name)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.machines = slices.DeleteFunc(f.machines, func(m *vigiav1.Machine) bool { return m.Name == req.Msg.Name })
	return connect.NewResponse(&vigiav1.RemoveResponse{}), nil
}

func (f *fake) SetRules(_ context.Context, req *connect.Request[vigiav1.SetRulesRequest]) (machineRes, error) {
	return f.change(req.Msg.Name, func(m *vigiav1.Machine) { m.Rules = req.Msg.Rules })
}

// Console greets with an escape sequence, echoes what is typed and hangs up at "exit".
func (f *fake) Console(ctx context.Context, s *connect.BidiStream[vigiav1.ConsoleInput, vigiav1.ConsoleOutput]) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	if _, err := f.change(first.Name, nil); err != nil {
		return err
	}
	defer func() {
		if ctx.Err() != nil {
			close(f.detached)
		}
	}()
	s.Send(&vigiav1.ConsoleOutput{Data: []byte("\x1b]0;owned\x07\x1b[31mlogin:\x1b[0m ")})
	for {
		in, err := s.Receive()
		if err != nil {
			<-ctx.Done()
			return nil
		}
		s.Send(&vigiav1.ConsoleOutput{Data: fmt.Appendf(nil, "you typed %q", in.Data)})
		if strings.Contains(string(in.Data), "exit") {
			return nil
		}
	}
}

func (f *fake) ConsoleLog(_ context.Context, req machineReq, s *connect.ServerStream[vigiav1.ConsoleOutput]) error {
	if _, err := f.change(req.Msg.Name, nil); err != nil {
		return err
	}
	s.Send(&vigiav1.ConsoleOutput{Data: []byte("[    0.000000] Linux version 6.1\r\n")})
	return s.Send(&vigiav1.ConsoleOutput{Data: []byte("login: ")})
}

// Exec knows a few commands.
func (f *fake) Exec(_ context.Context, req *connect.Request[vigiav1.ExecRequest], s *connect.ServerStream[vigiav1.ExecOutput]) error {
	if _, err := f.change(req.Msg.Name, nil); err != nil {
		return err
	}
	out := &vigiav1.ExecOutput{Done: true}
	switch c := req.Msg.Command; c[0] {
	case "cat":
		out.Stdout = req.Msg.Stdin
	case "echo":
		out.Stdout = []byte(strings.Join(c[1:], " ") + "\n")
	case "false":
		out.Stderr, out.ExitCode = []byte("no\n"), 1
	case "exit256":
		out.ExitCode = 256
	case "killed":
		out.Signal = 9
	case "long":
		out.Stdout, out.Truncated = []byte("lots"), true
	case "vanish":
		return s.Send(&vigiav1.ExecOutput{Stdout: []byte("half")})
	case "paint":
		out.Stdout = []byte(hostile + "\n")
	case "timeout":
		out.Stdout = fmt.Appendf(nil, "%g\n", req.Msg.TimeoutSeconds)
	default:
		return fail(connect.CodeNotFound, "machine %s: command %q is not there", req.Msg.Name, c[0])
	}
	return s.Send(out)
}

func (f *fake) CopyIn(_ context.Context, s *connect.ClientStream[vigiav1.CopyInRequest]) (*connect.Response[vigiav1.CopyInResponse], error) {
	var name, path string
	var data []byte
	for s.Receive() {
		if name == "" {
			name, path = s.Msg().Name, s.Msg().Path
			if path == "/full" {
				return nil, fail(connect.CodeResourceExhausted, "machine %s: no space left on device", name)
			}
		}
		data = append(data, s.Msg().Data...)
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if _, err := f.change(name, nil); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.files[path] = data
	return connect.NewResponse(&vigiav1.CopyInResponse{Bytes: uint64(len(data))}), nil
}

func (f *fake) CopyOut(_ context.Context, req *connect.Request[vigiav1.CopyOutRequest], s *connect.ServerStream[vigiav1.Chunk]) error {
	if req.Msg.Path == "/breaks" {
		s.Send(&vigiav1.Chunk{Data: []byte("half of it")})
		return fail(connect.CodeAborted, "machine %s: the agent went away", req.Msg.Name)
	}
	f.mu.Lock()
	data, ok := f.files[req.Msg.Path]
	f.mu.Unlock()
	if !ok {
		return fail(connect.CodeNotFound, "machine %s: %s is not there", req.Msg.Name, req.Msg.Path)
	}
	for len(data) > 0 {
		n := min(len(data), 100<<10)
		if err := s.Send(&vigiav1.Chunk{Data: data[:n]}); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

func (f *fake) Capture(ctx context.Context, req *connect.Request[vigiav1.CaptureRequest], s *connect.ServerStream[vigiav1.Chunk]) error {
	if _, err := f.change(req.Msg.Name, nil); err != nil {
		return err
	}
	s.Send(&vigiav1.Chunk{Data: []byte("\x0a\x0d\x0d\x0a")})
	s.Send(&vigiav1.Chunk{Data: fmt.Appendf(nil, "snap=%d", req.Msg.SnapLength)})
	<-ctx.Done()
	return ctx.Err()
}

type fakeViews struct {
	vigiav1connect.UnimplementedViewsHandler
	f *fake
}

func (v fakeViews) Processes(_ context.Context, req machineReq) (*connect.Response[vigiav1.ProcessesResponse], error) {
	if _, err := v.f.change(req.Msg.Name, nil); err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.ProcessesResponse{Processes: []*vigiav1.Process{
		{Pid: 1, Comm: "systemd", Cmdline: "/sbin/init", Exe: "/usr/lib/systemd/systemd", CpuSeconds: 1.256, Start: timestamppb.New(epoch), State: "S", Threads: 1},
		{Pid: 2, Comm: "kthreadd", Kernel: true, State: "S", Threads: 1},
		{Pid: 666, Ppid: 300, Uid: 1000, Comm: hostile, Cmdline: hostile, Exe: "/usr/sbin/john", CpuSeconds: 4000, State: "R", Threads: 2},
		{Pid: 300, Ppid: 1, Uid: 0, Suid: 33, Gid: 33, Comm: "sshd", Exe: "/usr/sbin/sshd", State: "S", Threads: 1, Groups: []uint32{7, 42},
			Capabilities: &vigiav1.Capabilities{Effective: []string{"all"}, Ambient: []string{"cap_net_raw", "cap_kill"}},
			Namespaces:   &vigiav1.Namespaces{Pid: 4026532171, Net: 4026531840}, NamespacePid: 7,
			Cgroup: "/system.slice/docker-0123.scope", Container: "0123", ContainerRuntime: "docker", Unknown: []string{"start"}},
	}}), nil
}

func (fakeViews) Modules(context.Context, machineReq) (*connect.Response[vigiav1.ModulesResponse], error) {
	return connect.NewResponse(&vigiav1.ModulesResponse{Modules: []*vigiav1.Module{{Name: "virtio_net", Address: 0xffffffffc0123000, Size: 65536}}}), nil
}

func (v fakeViews) Check(_ context.Context, req machineReq) (*connect.Response[vigiav1.CheckResponse], error) {
	if _, err := v.f.change(req.Msg.Name, nil); err != nil {
		return nil, err
	}
	res := &vigiav1.CheckResponse{TookMs: 12.3, Views: []*vigiav1.CheckedView{{Check: "processes", Name: "task list", Count: 47, TookMs: 0.2},
		{Check: "processes", Name: "cgroups", Unknown: "no symbol css_set_table"}}}
	if req.Msg.Name == "web" {
		res.Findings = []*vigiav1.Finding{{Kind: "process.hidden", Subject: hostile, Detail: "the process is missing from task list; found by pid table",
			Severity: "critical", Evidence: []*vigiav1.Evidence{{Address: 0xffff888003a40000, Note: "task_struct", Bytes: "00ff", Expected: "0000"}},
			Listed: []string{"pid table"}, Missing: []string{"task list"}, Pid: 666, Comm: hostile}}
	}
	return connect.NewResponse(res), nil
}

func (v fakeViews) Sockets(_ context.Context, req machineReq) (*connect.Response[vigiav1.SocketsResponse], error) {
	return connect.NewResponse(&vigiav1.SocketsResponse{Sockets: []*vigiav1.Socket{
		{Protocol: "tcp", Local: "0.0.0.0:22", State: "listen", Pid: 300, Comm: "sshd", Fd: 3, Owner: "process", Inode: 4711, NetNamespace: 4026531840},
		{Protocol: "tcp", Local: "10.0.2.15:22", Remote: "10.0.2.2:40000", State: "time-wait", Fd: -1, Owner: "none", Unknown: []string{"uid"}},
		{Protocol: "unix", Local: "/run/" + hostile, State: "listen", Pid: 666, Comm: hostile, Fd: 4, Owner: "process", Uid: 1000},
	}}), nil
}

func (v fakeViews) Files(_ context.Context, req *connect.Request[vigiav1.ProcessRequest]) (*connect.Response[vigiav1.FilesResponse], error) {
	all := []*vigiav1.File{
		{Pid: 300, Comm: "sshd", Type: "character", Path: "/dev/null", Mode: "rw", Filesystem: "devtmpfs", Inode: 4},
		{Pid: 666, Comm: hostile, Fd: 3, Type: "file", Path: hostile + " (deleted)", Mode: "w", Position: 12, Deleted: true, Filesystem: "tmpfs", Inode: 9},
		{Pid: 666, Comm: hostile, Fd: 4, Unknown: []string{"type", "path", "inode"}},
	}
	return connect.NewResponse(&vigiav1.FilesResponse{Files: slices.DeleteFunc(all, func(f *vigiav1.File) bool {
		return req.Msg.GetPid() != 0 && f.GetPid() != req.Msg.GetPid()
	})}), nil
}

func (v fakeViews) Maps(_ context.Context, req *connect.Request[vigiav1.ProcessRequest]) (*connect.Response[vigiav1.MapsResponse], error) {
	if req.Msg.GetPid() != 300 {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such process"))
	}
	return connect.NewResponse(&vigiav1.MapsResponse{Regions: []*vigiav1.Region{
		{Start: 0x55d0c0000000, End: 0x55d0c0010000, Permissions: "r-xp", Offset: 0x1000, File: "/usr/sbin/sshd", Inode: 77, Kind: "file"},
		{Start: 0x7f0000000000, End: 0x7f0000002000, Permissions: "rwxp", Kind: "anonymous", Marks: []string{"anonymous-executable", "writable-executable"}},
	}}), nil
}

func (v fakeViews) Kernel(context.Context, machineReq) (*connect.Response[vigiav1.KernelResponse], error) {
	return connect.NewResponse(&vigiav1.KernelResponse{Banner: "Linux version 6.1.0-56-cloud-amd64", Version: "6.1.0-56-cloud-amd64", PhysicalBase: 0x1000000,
		VirtualSlide: 0x12000000, PagingLevels: 5, CommandLine: "console=ttyS0 " + hostile, Taint: 4097, Taints: []string{"proprietary-module", "out-of-tree-module"},
		UptimeSeconds: 61.4, Processes: 3, Unknown: []string{"time"}, Missing: []string{"files: no field fdtable.max_fds"}}), nil
}

type fakeImages struct {
	vigiav1connect.UnimplementedImagesHandler
}

var debian = &vigiav1.Image{Name: "debian", Id: "b3-0123456789abcdef0123456789abcdef", Bytes: 300 << 20, DiskBytes: 2 << 30,
	Recipe: "debian", Kernel: "6.1.0-28-cloud-amd64", Created: timestamppb.New(epoch)}

func (fakeImages) Build(_ context.Context, req *connect.Request[vigiav1.BuildRequest], s *connect.ServerStream[vigiav1.Progress]) error {
	switch r := req.Msg; {
	case r.Recipe == "nope":
		return fail(connect.CodeInvalidArgument, "no recipe %q: built in are debian and tiny", r.Recipe)
	case r.Recipe == "vanish":
		return s.Send(&vigiav1.Progress{Step: "unpacking"})
	case r.Recipe == "fails":
		s.Send(&vigiav1.Progress{Step: "unpacking", Done: 3, Total: 9})
		return fail(connect.CodeInternal, "recipe fails: mmdebstrap ended with 25")
	}
	s.Send(&vigiav1.Progress{Step: "unpacking"})
	s.Send(&vigiav1.Progress{Step: "copying", Done: 10, Total: 10})
	s.Send(&vigiav1.Progress{Step: "sealing", Done: 5, Total: 10}) // and no more of it: steps may be shorter than they thought
	s.Send(&vigiav1.Progress{Step: "\x1b]0;owned\x07", Done: 11, Total: 10})
	return s.Send(&vigiav1.Progress{Image: &vigiav1.Image{Name: req.Msg.Name + req.Msg.Recipe + req.Msg.RecipeFile, Id: "b3-11", Bytes: uint64(len(req.Msg.RecipeYaml))}})
}

func (fakeImages) Import(_ context.Context, req *connect.Request[vigiav1.ImportRequest], s *connect.ServerStream[vigiav1.Progress]) error {
	return s.Send(&vigiav1.Progress{Image: &vigiav1.Image{Name: req.Msg.Name, Id: "b3-22", Recipe: filepath.Base(req.Msg.File), Kernel: filepath.Base(req.Msg.Kernel)}})
}

func (fakeImages) List(context.Context, *connect.Request[vigiav1.ListImagesRequest]) (*connect.Response[vigiav1.ListImagesResponse], error) {
	return connect.NewResponse(&vigiav1.ListImagesResponse{Images: []*vigiav1.Image{debian}}), nil
}

func (fakeImages) Remove(_ context.Context, req *connect.Request[vigiav1.ImageRequest]) (*connect.Response[vigiav1.RemoveResponse], error) {
	if req.Msg.Name == "debian" {
		return nil, fail(connect.CodeFailedPrecondition, "image debian is used by machine web")
	}
	return connect.NewResponse(&vigiav1.RemoveResponse{}), nil
}

func (fakeImages) Verify(_ context.Context, req *connect.Request[vigiav1.ImageRequest]) (*connect.Response[vigiav1.VerifyImageResponse], error) {
	if req.Msg.Name == "flipped" {
		return nil, fail(connect.CodeDataLoss, "image flipped: block 3 is not what its address says")
	}
	return connect.NewResponse(&vigiav1.VerifyImageResponse{Id: debian.Id}), nil
}

type fakeEvents struct{ f *fake }

func (e fakeEvents) List(ctx context.Context, req *connect.Request[vigiav1.ListEventsRequest], s *connect.ServerStream[vigiav1.Event]) error {
	r := req.Msg
	if r.Machine == "empty" {
		return nil
	}
	fields, err := structpb.NewStruct(map[string]any{"path": "/etc/shadow", "bytes": 4096, "watched": true})
	if err != nil {
		return err
	}
	s.Send(&vigiav1.Event{Id: "1", Time: timestamppb.New(epoch), Machine: "web", Kind: "disk.read", Fields: fields})
	asked := map[string]any{"machine": r.Machine, "kinds": strings.Join(r.Kinds, " "), "line": "\x1b[2Jsay \"hi\" all=none"}
	if r.Since != nil {
		asked["since"] = r.Since.AsTime().Format(time.RFC3339)
	}
	if fields, err = structpb.NewStruct(asked); err != nil {
		return err
	}
	s.Send(&vigiav1.Event{Id: "2", Time: timestamppb.New(epoch.Add(time.Second)), Kind: "console.line", Fields: fields})
	if r.Follow {
		close(e.f.following)
		<-ctx.Done()
	}
	return nil
}

type fakePolicy struct{}

func (fakePolicy) List(context.Context, *connect.Request[vigiav1.ListRulesRequest]) (*connect.Response[vigiav1.ListRulesResponse], error) {
	return connect.NewResponse(&vigiav1.ListRulesResponse{Rules: []*vigiav1.Rule{{Id: "password-cracking", Title: "The password file is read", Severity: "high",
		Respond: []string{"alert", "quarantine"}, Source: "built in"}}}), nil
}

func (fakePolicy) Reload(context.Context, *connect.Request[vigiav1.ReloadRequest]) (*connect.Response[vigiav1.ListRulesResponse], error) {
	return nil, fail(connect.CodeFailedPrecondition, "rules/x.yaml:3: unknown response %q; the old rules stay in force", "explode")
}

type fakeLedger struct{}

func (fakeLedger) Head(context.Context, *connect.Request[vigiav1.HeadRequest]) (*connect.Response[vigiav1.HeadResponse], error) {
	return connect.NewResponse(&vigiav1.HeadResponse{Size: 1 << 60, Root: "c0ffee", Time: timestamppb.New(epoch), Note: "vigia\n7\nroot\n\n— sig\n"}), nil
}

type fakeDaemon struct{}

func (fakeDaemon) Info(context.Context, *connect.Request[vigiav1.InfoRequest]) (*connect.Response[vigiav1.InfoResponse], error) {
	return connect.NewResponse(&vigiav1.InfoResponse{Version: "v0.1.0", Pid: 7, StateDir: "/s", Accelerator: "tcg", Started: timestamppb.New(epoch)}), nil
}
