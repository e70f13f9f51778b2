package image

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

//go:embed recipes
var builtin embed.FS

// Builtin lists the names of the recipes that come with vigia.
func Builtin() []string {
	names, _ := fs.Glob(builtin, "recipes/*.yaml")
	for i, n := range names {
		names[i] = strings.TrimSuffix(filepath.Base(n), ".yaml")
	}
	slices.Sort(names)
	return names
}

// builtinDigest covers every file that comes with vigia and ends up in images.
var builtinDigest = sync.OnceValue(func() string {
	h := sha256.New()
	fs.WalkDir(builtin, ".", func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !strings.HasSuffix(p, ".yaml") {
			text, _ := builtin.ReadFile(p)
			fmt.Fprintf(h, "%s %d\n%s", p, len(text), text)
		}
		return nil
	})
	return hex.EncodeToString(h.Sum(nil))
})

// Load reads a recipe: a built-in one by its name, else a file by its path.
func Load(nameOrPath string) (Recipe, error) {
	if slices.Contains(Builtin(), nameOrPath) {
		text, _ := builtin.ReadFile("recipes/" + nameOrPath + ".yaml")
		beside, _ := fs.Sub(builtin, "recipes")
		return Parse(nameOrPath+".yaml", text, beside)
	}
	f, err := os.Open(nameOrPath)
	if errors.Is(err, fs.ErrNotExist) {
		return Recipe{}, fmt.Errorf("%w %q: neither a file nor built in: built in are %s", ErrRecipe, nameOrPath, strings.Join(Builtin(), ", "))
	}
	if err != nil {
		return Recipe{}, fmt.Errorf("%w: %w", ErrRecipe, err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxRecipe+1))
	if err != nil {
		return Recipe{}, fmt.Errorf("%w: %w", ErrRecipe, err)
	}
	return Parse(nameOrPath, text, os.DirFS(filepath.Dir(nameOrPath)))
}

// Parse reads the text of a recipe. The file's name is for errors and, without directory and .yaml, the default
// of the recipe's name; beside holds the host files that the recipe names (nil: none may be named).
func Parse(file string, text []byte, beside fs.FS) (Recipe, error) {
	if len(text) > maxRecipe {
		return Recipe{}, fmt.Errorf("%w: %s: longer than %d bytes", ErrRecipe, file, maxRecipe)
	}
	var r Recipe
	var tree *ast.File
	err := noPanic(func() (err error) {
		tree, err = parser.ParseBytes(text, 0)
		return err
	})
	if err != nil {
		return Recipe{}, located(file, err)
	}
	if len(tree.Docs) > 1 {
		return Recipe{}, fmt.Errorf("%w: %s: has %d documents, want one", ErrRecipe, file, len(tree.Docs))
	}
	if len(tree.Docs) == 0 || tree.Docs[0].Body == nil {
		return Recipe{}, fmt.Errorf("%w: %s: is empty", ErrRecipe, file)
	}
	if alias := findAlias(tree.Docs[0].Body); alias != nil {
		return Recipe{}, fmt.Errorf("%w: %s:%d: aliases are not used in recipes", ErrRecipe, file, alias.GetToken().Position.Line)
	}
	if err := noPanic(func() error { return yaml.NodeToValue(tree.Docs[0].Body, &r, yaml.Strict()) }); err != nil {
		return Recipe{}, located(file, err)
	}
	err = r.finish(file, beside)
	if w := (*wrong)(nil); errors.As(err, &w) {
		return Recipe{}, fmt.Errorf("%w: %s:%d: %w", ErrRecipe, file, lineOf(tree, w.path), w)
	}
	if err != nil {
		return Recipe{}, fmt.Errorf("%w: %s: %w", ErrRecipe, file, err)
	}
	return r, nil
}

// finish checks the recipe as written, reads its host files, then puts its base under it. Checking comes first,
// since afterwards the places of a list are no longer those of the text.
func (r *Recipe) finish(file string, beside fs.FS) error {
	if r.Name == "" {
		r.Name = strings.TrimSuffix(strings.TrimSuffix(filepath.Base(file), ".yaml"), ".yml")
	}
	var base Recipe
	if r.From != "" {
		if !slices.Contains(Builtin(), r.From) {
			return wrongf("from", "unknown recipe %q: built in are %s", r.From, strings.Join(Builtin(), ", "))
		}
		var err error
		if base, err = Load(r.From); err != nil {
			return err
		}
	}
	r.inherit(base)
	r.defaults()
	if w := r.check(); w != nil {
		return w
	}
	if err := r.readSources(beside); err != nil {
		return err
	}
	r.join(base)
	if w := r.check(); w != nil { // a user both here and in the base
		return fmt.Errorf("with %s under it: %s", r.From, w.Error())
	}
	return nil
}

// readSources reads the host files a recipe names.
func (r *Recipe) readSources(beside fs.FS) error {
	var total int64
	for i := range r.Files {
		f := &r.Files[i]
		if f.Source == "" {
			total += int64(len(f.Content))
			f.Data, f.Content = []byte(f.Content), ""
			continue
		}
		at := fmt.Sprintf("files[%d].source", i)
		if beside == nil {
			return wrongf(at, "host files cannot be named here")
		}
		name := filepath.ToSlash(filepath.Clean(f.Source))
		if !fs.ValidPath(name) {
			return wrongf(at, "%q is not beside the recipe: use a relative path without ..", f.Source)
		}
		info, err := fs.Stat(beside, name)
		if err != nil {
			return wrongf(at, "%v", err)
		}
		if total += info.Size(); !info.Mode().IsRegular() || total > maxFiles {
			return wrongf(at, "%q is not a regular file, or all files together are over %d MiB", f.Source, maxFiles>>20)
		}
		text, err := fs.ReadFile(beside, name)
		if err != nil {
			return wrongf(at, "%v", err)
		}
		f.Data, f.Source = text, ""
	}
	if total > maxFiles {
		return wrongf("files", "all files together are over %d MiB", maxFiles>>20)
	}
	return nil
}

// noPanic makes an error of a panic of the YAML library, which a few broken texts cause: an anchor without a value in
// place of a list is one.
func noPanic(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = errors.New("not valid YAML")
		}
	}()
	return f()
}

// located adds file and line to an error of the YAML decoder.
func located(file string, err error) error {
	var at yaml.Error
	if errors.As(err, &at) && at.GetToken() != nil {
		return fmt.Errorf("%w: %s:%d: %s", ErrRecipe, file, at.GetToken().Position.Line, firstLine(at.GetMessage()))
	}
	return fmt.Errorf("%w: %s: %s", ErrRecipe, file, firstLine(err.Error()))
}

// lineOf finds the line of a place in the tree, or of the nearest place above that exists.
func lineOf(tree *ast.File, place string) int {
	for place != "$" && place != "" {
		if p, err := yaml.PathString(place); err == nil {
			if node, err := p.FilterFile(tree); err == nil && node != nil && node.GetToken() != nil {
				return node.GetToken().Position.Line
			}
		}
		place = place[:max(strings.LastIndexAny(place, ".["), 0)]
	}
	return 1
}

type aliasFinder struct{ found ast.Node }

func (v *aliasFinder) Visit(n ast.Node) ast.Visitor {
	if n.Type() == ast.AliasType && v.found == nil {
		v.found = n
	}
	return v
}

func findAlias(n ast.Node) ast.Node {
	v := &aliasFinder{}
	ast.Walk(v, n)
	return v.found
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}
