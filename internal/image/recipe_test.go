package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/rogpeppe/go-internal/txtar"
)

// TestBadRecipes reads testdata/bad-recipes.txtar: each file is a recipe, whose first line is a comment with a regular
// expression that its error must match.
func TestBadRecipes(t *testing.T) {
	cases, err := txtar.ParseFile("testdata/bad-recipes.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cases.Files {
		t.Run(c.Name, func(t *testing.T) {
			first, _, _ := strings.Cut(string(c.Data), "\n")
			want := regexp.MustCompile(strings.TrimPrefix(first, "# "))
			_, err := Parse(c.Name, c.Data, fstest.MapFS{})
			if !errors.Is(err, ErrRecipe) || !want.MatchString(err.Error()) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %q\n does not match %q", err, want)
			}
		})
	}
}

func TestBuiltinRecipes(t *testing.T) {
	if got := Builtin(); !slices.Equal(got, []string{"debian", "tiny"}) {
		t.Fatalf("built in are %q", got)
	}
	for _, name := range Builtin() {
		r, err := Load(name)
		if err != nil {
			t.Fatal(err)
		}
		if r.Name != name || r.Suite != "bookworm" || len(r.Packages) == 0 || r.Root.Password != "" || r.Root.Hash != "" || len(r.Users) != 0 {
			t.Errorf("%s: %+v", name, r)
		}
		if !slices.Contains(r.Packages, "openssh-server") || !slices.Contains(r.Packages, "qemu-guest-agent") {
			t.Errorf("%s lacks sshd or the agent: %q", name, r.Packages)
		}
	}
	tiny, _ := Load("tiny")
	if tiny.Init != InitScript || slices.ContainsFunc(tiny.Packages, func(p string) bool { return strings.Contains(p, "systemd") }) {
		t.Errorf("tiny is not a script init: %s %q", tiny.Init, tiny.Packages)
	}
}

func TestDemoRecipe(t *testing.T) {
	r, err := Load("../../recipes/demo.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(r.Packages, "john") || !slices.Contains(r.Packages, "systemd-sysv") || !slices.ContainsFunc(r.Users, func(u User) bool { return u.Sudo && u.Password != "" }) {
		t.Errorf("the demo has no john, no base or nobody to be: %+v", r)
	}
}

func TestBaseGoesUnderneath(t *testing.T) {
	base, err := Load("tiny")
	if err != nil {
		t.Fatal(err)
	}
	r, err := Parse("own.yaml", []byte("from: tiny\nsize: 3G\npackages: [john]\ncommands: [last]\nroot: {password: x, ssh_login: true}\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if r.Name != "own" || r.Hostname != "own" || r.Size != "3G" || r.Init != base.Init || !r.Root.SSHLogin {
		t.Errorf("%+v", r)
	}
	if !slices.Equal(r.Packages, append(slices.Clone(base.Packages), "john")) || r.Commands[len(r.Commands)-1] != "last" || len(r.Files) != len(base.Files) {
		t.Errorf("lists are not base first: %q %q", r.Packages, r.Commands)
	}
}

func TestHostFiles(t *testing.T) {
	binary := []byte{0, 0xff, 0xfe, '\n'}
	beside := fstest.MapFS{"bin/tool": {Data: binary}, "dir": {Mode: os.ModeDir}}
	r, err := Parse("r.yaml", []byte("files: [{path: /usr/bin/tool, mode: '4755', source: ./bin/tool}]\n"), beside)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(r.Files[0].Data, binary) || r.Files[0].mode() != 0o4755 {
		t.Errorf("%+v", r.Files[0])
	}
	text, _ := json.Marshal(r)
	var again Recipe
	if err := json.Unmarshal(text, &again); err != nil || !bytes.Equal(again.Files[0].Data, binary) || again.Digest() != r.Digest() {
		t.Errorf("a recipe does not survive JSON: %v %s", err, text)
	}
	for _, bad := range []string{"../x", "/etc/passwd", "dir", "absent"} {
		_, err := Parse("r.yaml", []byte("suite: bookworm\nfiles:\n  - path: /x\n    source: "+bad+"\n"), beside)
		if err == nil || !strings.Contains(err.Error(), "r.yaml:4: files[0].source") {
			t.Errorf("source %s: %v", bad, err)
		}
	}
}

func TestDigest(t *testing.T) {
	parse := func(text string) string {
		r, err := Parse("r.yaml", []byte(text), nil)
		if err != nil {
			t.Fatal(err)
		}
		return r.Digest()
	}
	one := parse("suite: bookworm # a comment\n")
	if parse("# other\nsuite: bookworm\nsize: 2G\n") != one {
		t.Error("comments and defaults change the digest")
	}
	if parse("suite: bookworm\npackages: [john]\n") == one {
		t.Error("a package does not change the digest")
	}
}

func TestLoadUnknown(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "absent.yaml"))
	if !errors.Is(err, ErrRecipe) || !strings.Contains(err.Error(), "built in are debian, tiny") {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	cases, _ := txtar.ParseFile("testdata/bad-recipes.txtar")
	for _, c := range cases.Files {
		f.Add(c.Data)
	}
	for _, name := range Builtin() {
		text, _ := builtin.ReadFile("recipes/" + name + ".yaml")
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := Parse("f.yaml", text, fstest.MapFS{})
		if err != nil {
			if !errors.Is(err, ErrRecipe) {
				t.Fatal(err)
			}
			return
		}
		if w := r.check(); w != nil {
			t.Fatalf("parsed but not valid: %v", w)
		}
		if len(r.Digest()) != 64 {
			t.Fatal("no digest")
		}
	})
}
