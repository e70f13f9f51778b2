package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// maxRecipe bounds a recipe file, in bytes: recipes are a page of YAML.
const maxRecipe = 1 << 20

func (a *app) imageCmd() *cobra.Command {
	c := &cobra.Command{Use: "image", Short: "Build, import and list images", RunE: needsCommand, Args: cobra.ArbitraryArgs}
	c.AddCommand(a.imageBuildCmd(), a.imageImportCmd(), a.imageLsCmd(), a.imageRmCmd(), a.imageVerifyCmd())
	return c
}

func (a *app) imageBuildCmd() *cobra.Command {
	req := &vigiav1.BuildRequest{}
	c := &cobra.Command{
		Use:   "build RECIPE",
		Short: "Build an image from a recipe",
		Long: "Build an image from a recipe: one of the built-in ones (debian, with systemd; tiny, with a script as init), or a\n" +
			"YAML file, which is told by a '/' or by .yaml or .yml at its end; - reads it from the standard input.",
		Args: oneArg("RECIPE"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			if err := a.readRecipe(ctx, req, args[0]); err != nil {
				return err
			}
			stream, err := c.Images.Build(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			return a.imageMade(stream)
		}),
	}
	c.Flags().StringVar(&req.Name, "name", "", "the image's `name` (default: the recipe's)")
	c.Flags().BoolVar(&req.Reuse, "reuse", false, "take an image that this very recipe made before, where there is one")
	return c
}

func (a *app) readRecipe(ctx context.Context, req *vigiav1.BuildRequest, arg string) error {
	if arg != "-" && !strings.Contains(arg, "/") && !strings.HasSuffix(arg, ".yaml") && !strings.HasSuffix(arg, ".yml") {
		req.Recipe = arg
		return nil
	}
	in := a.input(ctx)
	if arg != "-" {
		f, err := os.Open(arg)
		if err != nil {
			return fmt.Errorf("recipe: %w", err)
		}
		defer f.Close()
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, maxRecipe+1))
	switch {
	case err != nil:
		return fmt.Errorf("recipe %s: %w", arg, err)
	case len(text) > maxRecipe:
		return usagef("recipe %s: larger than %s", arg, formatSize(maxRecipe))
	case len(strings.TrimSpace(string(text))) == 0:
		return usagef("recipe %s: is empty", arg)
	}
	req.RecipeYaml, req.RecipeFile = text, arg
	return nil
}

func (a *app) imageImportCmd() *cobra.Command {
	req := &vigiav1.ImportRequest{}
	c := &cobra.Command{
		Use:   "import FILE",
		Short: "Make an image of a qcow2 or raw disk",
		Long: "Make an image of a qcow2 or raw disk. The kernel and its initrd are found in the disk's own /boot, where they\n" +
			"are not given.",
		Args: oneArg("FILE"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			req.File = args[0]
			for _, f := range []struct {
				what string
				path *string
			}{{"disk", &req.File}, {"kernel", &req.Kernel}, {"initrd", &req.Initrd}} {
				if err := absolute(f.what, f.path); err != nil {
					return err
				}
			}
			if req.Name == "" {
				req.Name = nameOf(req.File)
			}
			if req.Name == "" {
				return usagef("disk %s: no name can be made of its file's: give one with --name", args[0])
			}
			stream, err := c.Images.Import(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			return a.imageMade(stream)
		}),
	}
	f := c.Flags()
	f.StringVar(&req.Name, "name", "", "the image's `name` (default: made from the file's)")
	f.StringVar(&req.Kernel, "kernel", "", "kernel `file`")
	f.StringVar(&req.Initrd, "initrd", "", "initrd `file`")
	f.StringVar(&req.Cmdline, "cmdline", "", "the kernel's command `line`")
	return c
}

// absolute makes a path one that the daemon can open, and finds out early that it is not there.
func absolute(what string, path *string) error {
	if *path == "" {
		return nil
	}
	abs, err := filepath.Abs(*path)
	if err != nil {
		return err
	}
	info, err := os.Stat(abs)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if info.IsDir() {
		return fmt.Errorf("%s %s: is a directory", what, *path)
	}
	*path = abs
	return nil
}

var notName = regexp.MustCompile(`[^a-z0-9]+`)

// nameOf makes an image's name of a file's: "Debian_12 (1).qcow2" becomes debian-12-1.
func nameOf(file string) string {
	base := filepath.Base(file)
	base = strings.ToLower(strings.TrimSuffix(base, filepath.Ext(base)))
	name := strings.Trim(notName.ReplaceAllString(base, "-"), "-")
	return strings.TrimRight(name[:min(len(name), 63)], "-")
}

type progressStream = connect.ServerStreamForClient[vigiav1.Progress]

// imageMade follows a build or import to its end and prints the image.
func (a *app) imageMade(stream *progressStream) error {
	image, err := a.follow(stream)
	if err != nil {
		return err
	}
	if image == nil {
		return errors.New("the daemon ended the work without an image; see its log")
	}
	if a.json() {
		return a.printJSON(image)
	}
	return a.printf("%s %s %s\n", plain(image.GetName()), plain(image.GetId()), formatSize(image.GetBytes()))
}

// follow shows progress until the stream ends.
func (a *app) follow(stream *progressStream) (image *vigiav1.Image, err error) {
	defer stream.Close()
	bars := newProgress(a.std.Err)
	defer func() { bars.end(err == nil) }()
	for stream.Receive() {
		p := stream.Msg()
		if p.GetImage() != nil {
			image = p.GetImage()
			continue
		}
		bars.step(p.GetStep(), p.GetDone(), p.GetTotal())
	}
	return image, stream.Err()
}

func (a *app) imageLsCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List images",
		Args:  cobra.NoArgs,
		RunE: a.remote(func(ctx context.Context, c *api.Client, _ []string) error {
			res, err := c.Images.List(ctx, connect.NewRequest(&vigiav1.ListImagesRequest{}))
			if err != nil {
				return err
			}
			if a.json() {
				return printList(a, res.Msg.GetImages())
			}
			t := newTable("NAME", "ID", ">SIZE", ">DISK", "RECIPE", "KERNEL", "CREATED")
			for _, i := range res.Msg.GetImages() {
				t.add(i.GetName(), shortID(i.GetId()), formatSize(i.GetBytes()), formatSize(i.GetDiskBytes()), i.GetRecipe(), i.GetKernel(),
					a.when(i.GetCreated()))
			}
			return a.printTable(t)
		}),
	}
}

// shortID keeps as much of a content address as tells images apart; -o json has all of it.
func shortID(id string) string { return id[:min(len(id), 16)] }

func (a *app) imageRmCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME",
		Short: "Remove an image that no machine uses",
		Args:  oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			if _, err := c.Images.Remove(ctx, connect.NewRequest(&vigiav1.ImageRequest{Name: args[0]})); err != nil {
				return err
			}
			if a.json() {
				return a.printValue(map[string]string{"name": args[0], "state": "removed"})
			}
			return a.printf("%s removed\n", plain(args[0]))
		}),
		ValidArgsFunction: a.imageNames,
	}
}

func (a *app) imageVerifyCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "verify NAME",
		Short: "Read an image again and compare it with its content address",
		Args:  oneArg("NAME"),
		RunE: a.remote(func(ctx context.Context, c *api.Client, args []string) error {
			res, err := c.Images.Verify(ctx, connect.NewRequest(&vigiav1.ImageRequest{Name: args[0]}))
			if err != nil {
				return err
			}
			if a.json() {
				return a.printJSON(res.Msg)
			}
			return a.printf("%s is intact: %s\n", plain(args[0]), plain(res.Msg.GetId()))
		}),
		ValidArgsFunction: a.imageNames,
	}
}
