package daemon

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api/vigiav1"
	"vigia/internal/event"
	"vigia/internal/image"
	"vigia/internal/vm"
)

type imagesServer struct{ d *Daemon }

// Build makes an image of a recipe; the steps are streamed.
func (s imagesServer) Build(ctx context.Context, r *connect.Request[vigiav1.BuildRequest], stream *connect.ServerStream[vigiav1.Progress]) error {
	var recipe image.Recipe
	var err error
	if len(r.Msg.RecipeYaml) > 0 {
		recipe, err = image.Parse(r.Msg.RecipeFile, r.Msg.RecipeYaml, os.DirFS(filepath.Dir(r.Msg.RecipeFile)))
	} else {
		recipe, err = builtin(r.Msg.Recipe)
	}
	if err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	name := r.Msg.Name
	if name == "" {
		name = recipe.Name
	}
	if name, err = vm.ParseName(name); err != nil {
		return err
	}
	return s.stream(stream, func(p image.Progress) (image.Image, error) {
		if img, ok := s.d.images.FindRecipe(recipe.Digest()); ok && r.Msg.Reuse {
			return img, s.d.images.Tag(img.ID, name)
		}
		return s.d.images.Build(ctx, recipe, name, p)
	})
}

// builtin finds a recipe that comes with vigia. Names alone: the daemon reads no file because a request names it so.
func builtin(name string) (image.Recipe, error) {
	if !slices.Contains(image.Builtin(), name) {
		return image.Recipe{}, fmt.Errorf("no recipe %q: built in are %s; a file of your own is named with its path", event.Text([]byte(name)), strings.Join(image.Builtin(), ", "))
	}
	return image.Load(name)
}

// Import takes a disk that somebody else made.
func (s imagesServer) Import(ctx context.Context, r *connect.Request[vigiav1.ImportRequest], stream *connect.ServerStream[vigiav1.Progress]) error {
	name, err := vm.ParseName(r.Msg.Name)
	if err != nil {
		return err
	}
	return s.stream(stream, func(p image.Progress) (image.Image, error) {
		return s.d.images.Import(ctx, r.Msg.File, name, image.ImportOptions{Kernel: r.Msg.Kernel, Initrd: r.Msg.Initrd, Cmdline: r.Msg.Cmdline}, p)
	})
}

func (s imagesServer) stream(stream *connect.ServerStream[vigiav1.Progress], work func(image.Progress) (image.Image, error)) error {
	var mu sync.Mutex
	img, err := work(func(step string, done, total int64) {
		mu.Lock()
		defer mu.Unlock()
		stream.Send(&vigiav1.Progress{Step: step, Done: done, Total: total})
	})
	if err != nil {
		return err
	}
	return stream.Send(&vigiav1.Progress{Step: "done", Image: imageMessage(img.Info)})
}

func imageMessage(i image.Info) *vigiav1.Image {
	return &vigiav1.Image{Name: i.Name, Id: i.ID, Bytes: i.Bytes, Created: timestamppb.New(i.Created), Recipe: i.Recipe, Kernel: i.Kernel, DiskBytes: i.Disk}
}

func (s imagesServer) List(context.Context, *connect.Request[vigiav1.ListImagesRequest]) (*connect.Response[vigiav1.ListImagesResponse], error) {
	list, err := s.d.images.List()
	if err != nil {
		return nil, err
	}
	out := &vigiav1.ListImagesResponse{}
	for _, i := range list {
		out.Images = append(out.Images, imageMessage(i))
	}
	return connect.NewResponse(out), nil
}

// Remove deletes an image that no machine is on.
func (s imagesServer) Remove(ctx context.Context, r *connect.Request[vigiav1.ImageRequest]) (*connect.Response[vigiav1.RemoveResponse], error) {
	img, err := s.d.images.Get(r.Msg.Name)
	if err != nil && !errors.Is(err, image.ErrCorrupt) {
		return nil, err
	}
	for _, m := range s.d.all() {
		if m.rec.Spec.ImageID == img.ID {
			return nil, fmt.Errorf("image %s: machine %s is on it: %w: remove the machine first", r.Msg.Name, m.name(), errState)
		}
	}
	if err := s.d.images.Remove(r.Msg.Name); err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.RemoveResponse{}), nil
}

// Verify reads an image whole and compares it with its id.
func (s imagesServer) Verify(ctx context.Context, r *connect.Request[vigiav1.ImageRequest]) (*connect.Response[vigiav1.VerifyImageResponse], error) {
	img, err := s.d.images.Get(r.Msg.Name)
	if err != nil {
		return nil, err
	}
	if _, err := s.d.images.Verify(ctx, img.ID); err != nil {
		return nil, err
	}
	return connect.NewResponse(&vigiav1.VerifyImageResponse{Id: img.ID}), nil
}

type eventsServer struct{ d *Daemon }

// List gives the events of the past from the ledger, then, if asked, those that come, without a gap between.
func (s eventsServer) List(ctx context.Context, r *connect.Request[vigiav1.ListEventsRequest], stream *connect.ServerStream[vigiav1.Event]) error {
	want := filter{machine: r.Msg.Machine, kinds: r.Msg.Kinds}
	if r.Msg.Since != nil {
		want.since = r.Msg.Since.AsTime().UnixNano()
	}
	if err := want.check(); err != nil {
		return err
	}
	live := s.d.bus.follow()
	defer s.d.bus.unfollow(live)
	if err := stream.Send(nil); err != nil { // the headers: the caller knows that it follows, though nothing has happened yet
		return err
	}
	waiting := s.d.bus.waiting() // taken, and not yet in the ledger
	past := map[string]bool{}
	give := func(e event.Event) error {
		if !want.match(e) {
			return nil
		}
		message, err := eventMessage(e)
		if err != nil {
			return err
		}
		return stream.Send(message)
	}
	for entry, err := range s.d.ledger.Read(ctx, 0, s.d.ledger.Head().Size) {
		if err != nil {
			return err
		}
		e, err := event.Unmarshal(entry.Data)
		if err != nil {
			continue // an older version's kind
		}
		if e.Time.UnixNano() > live.since {
			past[e.ID] = true
		}
		if err := give(e); err != nil {
			return err
		}
	}
	for _, raw := range waiting {
		if e, err := event.Unmarshal(raw); err == nil && !past[e.ID] {
			past[e.ID] = true
			if err := give(e); err != nil {
				return err
			}
		}
	}
	for r.Msg.Follow {
		select {
		case e, ok := <-live.events:
			if !ok {
				return connect.NewError(connect.CodeResourceExhausted, errors.New("this reader is too slow: ask again with --since"))
			}
			if past[e.ID] {
				continue
			}
			if err := give(e); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

type filter struct {
	machine string
	kinds   []string
	since   int64
}

func (f filter) check() error {
	for _, k := range f.kinds {
		if !slices.ContainsFunc(allKinds(), func(kind event.Kind) bool { return kindMatches(k, kind) }) {
			return fmt.Errorf("%w: no event kind %q: kinds are named as in disk.read, or disk.* for all of a family", vm.ErrInvalid, k)
		}
	}
	return nil
}

func allKinds() (out []event.Kind) {
	for k := range event.Kinds {
		out = append(out, k)
	}
	return out
}

func kindMatches(pattern string, kind event.Kind) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(string(kind), prefix)
	}
	return string(kind) == pattern || (strings.HasSuffix(pattern, ".") && strings.HasPrefix(string(kind), pattern))
}

func (f filter) match(e event.Event) bool {
	return (f.machine == "" || e.Machine == f.machine) && e.Time.UnixNano() >= f.since &&
		(len(f.kinds) == 0 || slices.ContainsFunc(f.kinds, func(k string) bool { return kindMatches(k, e.Kind) }))
}

func eventMessage(e event.Event) (*vigiav1.Event, error) {
	fields := map[string]any{}
	for k, v := range e.Fields {
		if list, ok := v.([]string); ok {
			anys := make([]any, len(list))
			for i := range list {
				anys[i] = list[i]
			}
			v = anys
		}
		fields[k] = v
	}
	s, err := structpb.NewStruct(fields)
	if err != nil {
		return nil, err
	}
	return &vigiav1.Event{Id: e.ID, Time: timestamppb.New(e.Time), Machine: e.Machine, Kind: string(e.Kind), Fields: s}, nil
}

type policyServer struct{ d *Daemon }

func (s policyServer) list() *vigiav1.ListRulesResponse {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	out := &vigiav1.ListRulesResponse{}
	for _, r := range s.d.rules {
		out.Rules = append(out.Rules, &vigiav1.Rule{Id: r.ID, Title: r.Title, Severity: string(r.Severity), Respond: r.Respond, Source: r.File})
	}
	return out
}

func (s policyServer) List(context.Context, *connect.Request[vigiav1.ListRulesRequest]) (*connect.Response[vigiav1.ListRulesResponse], error) {
	return connect.NewResponse(s.list()), nil
}

func (s policyServer) Reload(ctx context.Context, _ *connect.Request[vigiav1.ReloadRequest]) (*connect.Response[vigiav1.ListRulesResponse], error) {
	if err := s.d.reloadRules(ctx); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return connect.NewResponse(s.list()), nil
}

type ledgerServer struct{ d *Daemon }

func (s ledgerServer) Head(context.Context, *connect.Request[vigiav1.HeadRequest]) (*connect.Response[vigiav1.HeadResponse], error) {
	h := s.d.ledger.Head()
	return connect.NewResponse(&vigiav1.HeadResponse{Size: h.Size, Root: hex.EncodeToString(h.Root[:]), Time: timestamppb.New(h.Time), Note: h.Note}), nil
}

type daemonServer struct{ d *Daemon }

func (s daemonServer) Info(context.Context, *connect.Request[vigiav1.InfoRequest]) (*connect.Response[vigiav1.InfoResponse], error) {
	return connect.NewResponse(&vigiav1.InfoResponse{Version: s.d.opts.Version, Pid: int64(os.Getpid()), StateDir: s.d.files.root,
		Accelerator: s.d.accelerator, Started: timestamppb.New(s.d.started)}), nil
}
