package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"vigia/internal/vm"
)

// ErrRecipe is wrapped by every error about what a recipe says; the text names the file and the line.
var ErrRecipe = errors.New("recipe")

// Inits a recipe may choose.
const (
	InitSystemd = "systemd" // a usual Debian boot
	InitScript  = "script"  // busybox init and one script: boots three times as fast, for tests
)

// Limits of a recipe: its text, and all its files together.
const (
	maxRecipe = 1 << 20
	maxFiles  = 64 << 20
)

// Recipe says what goes into an image. Load makes one from a file; the zero value is not buildable.
//
// A recipe loaded from a file holds everything it needs: contents of host files are read when it is loaded.
type Recipe struct {
	Name       string   `yaml:"name" json:"name"` // defaults to the file's name without .yaml
	From       string   `yaml:"from" json:"from,omitempty"`
	Suite      string   `yaml:"suite" json:"suite,omitempty"`
	Mirror     string   `yaml:"mirror" json:"mirror,omitempty"`
	Components []string `yaml:"components" json:"components,omitempty"`
	Variant    string   `yaml:"variant" json:"variant,omitempty"`
	Kernel     string   `yaml:"kernel" json:"kernel,omitempty"` // package
	Cmdline    string   `yaml:"cmdline" json:"cmdline,omitempty"`
	Size       string   `yaml:"size" json:"size,omitempty"` // of the disk
	Hostname   string   `yaml:"hostname" json:"hostname,omitempty"`
	Init       string   `yaml:"init" json:"init,omitempty"`
	Docs       bool     `yaml:"docs" json:"docs,omitempty"` // keep manual pages and translations
	Packages   []string `yaml:"packages" json:"packages,omitempty"`
	Root       Root     `yaml:"root" json:"root,omitzero"`
	Users      []User   `yaml:"users" json:"users,omitempty"`
	Files      []File   `yaml:"files" json:"files,omitempty"`
	Commands   []string `yaml:"commands" json:"commands,omitempty"`
	Services   Services `yaml:"services" json:"services,omitzero"`
}

// Root is what the recipe says of the superuser. Without a password and keys nobody logs in as root but on the
// serial console, which belongs to the machine's owner.
type Root struct {
	Password string   `yaml:"password" json:"password,omitempty"`
	Hash     string   `yaml:"hash" json:"hash,omitempty"` // as in /etc/shadow
	SSHKeys  []string `yaml:"ssh_keys" json:"ssh_keys,omitempty"`
	SSHLogin bool     `yaml:"ssh_login" json:"ssh_login,omitempty"` // with the password
}

// User is an account to create.
type User struct {
	Name     string   `yaml:"name" json:"name"`
	UID      int      `yaml:"uid" json:"uid,omitempty"`
	Password string   `yaml:"password" json:"password,omitempty"`
	Hash     string   `yaml:"hash" json:"hash,omitempty"`
	Crypt    string   `yaml:"crypt" json:"crypt,omitempty"` // how Password is hashed: yescrypt, sha512 or md5
	Shell    string   `yaml:"shell" json:"shell,omitempty"`
	Groups   []string `yaml:"groups" json:"groups,omitempty"`
	Sudo     bool     `yaml:"sudo" json:"sudo,omitempty"`
	SSHKeys  []string `yaml:"ssh_keys" json:"ssh_keys,omitempty"`
}

// File is a file to put into the root, its content given here or read from a file of the host.
type File struct {
	Path    string `yaml:"path" json:"path"`
	Mode    string `yaml:"mode" json:"mode,omitempty"`   // octal; 0644
	Owner   string `yaml:"owner" json:"owner,omitempty"` // user or user:group; root:root
	Content string `yaml:"content" json:"-"`
	Source  string `yaml:"source" json:"-"`         // beside the recipe
	Data    []byte `yaml:"-" json:"data,omitempty"` // either of the two, once loaded
}

// Services of systemd, by unit name. With init: script they have no effect.
type Services struct {
	Enable  []string `yaml:"enable" json:"enable,omitempty"`
	Disable []string `yaml:"disable" json:"disable,omitempty"`
	Mask    []string `yaml:"mask" json:"mask,omitempty"`
}

// Digest identifies what the recipe asks for: two recipes with one digest differ at most in their comments.
// What the mirror served is not part of it.
func (r *Recipe) Digest() string {
	text, err := json.Marshal(r)
	if err != nil {
		panic(err) // strings, numbers and lists only
	}
	sum := sha256.Sum256(append([]byte("vigia recipe 1\n"+builtinDigest()), text...))
	return hex.EncodeToString(sum[:])
}

func (f *File) mode() int64 {
	n, err := strconv.ParseInt(f.Mode, 8, 32)
	if f.Mode == "" || err != nil {
		return 0o644
	}
	return n & 0o7777
}

func (r *Recipe) diskSize() uint64 {
	n, _ := vm.ParseSize(r.Size)
	return n
}

// defaults fills what is left open.
func (r *Recipe) defaults() {
	set := func(p *string, v string) {
		if *p == "" {
			*p = v
		}
	}
	set(&r.Suite, "bookworm")
	set(&r.Variant, "minbase")
	set(&r.Kernel, "linux-image-cloud-amd64")
	set(&r.Size, "2G")
	set(&r.Init, InitSystemd)
	set(&r.Hostname, strings.ReplaceAll(r.Name, "_", "-"))
	if len(r.Components) == 0 {
		r.Components = []string{"main"}
	}
}

// inherit takes from the base what the recipe leaves open.
func (r *Recipe) inherit(base Recipe) {
	take := func(p *string, v string) {
		if *p == "" {
			*p = v
		}
	}
	take(&r.Suite, base.Suite)
	take(&r.Mirror, base.Mirror)
	take(&r.Variant, base.Variant)
	take(&r.Kernel, base.Kernel)
	take(&r.Size, base.Size)
	take(&r.Init, base.Init)
	r.Docs = r.Docs || base.Docs
	if len(r.Components) == 0 {
		r.Components = base.Components
	}
	if r.Root.Password == "" && r.Root.Hash == "" {
		r.Root.Password, r.Root.Hash, r.Root.SSHLogin = base.Root.Password, base.Root.Hash, r.Root.SSHLogin || base.Root.SSHLogin
	}
}

// join puts the base's lists before the recipe's.
func (r *Recipe) join(base Recipe) {
	r.Cmdline = strings.TrimSpace(base.Cmdline + " " + r.Cmdline)
	r.Packages = slices.Concat(base.Packages, r.Packages)
	r.Users = slices.Concat(base.Users, r.Users)
	r.Files = slices.Concat(base.Files, r.Files)
	r.Commands = slices.Concat(base.Commands, r.Commands)
	r.Root.SSHKeys = slices.Concat(base.Root.SSHKeys, r.Root.SSHKeys)
	r.Services.Enable = slices.Concat(base.Services.Enable, r.Services.Enable)
	r.Services.Disable = slices.Concat(base.Services.Disable, r.Services.Disable)
	r.Services.Mask = slices.Concat(base.Services.Mask, r.Services.Mask)
}

// wrong is a complaint about one place of a recipe, which Load turns into a file and a line.
type wrong struct{ path, why string }

func (w *wrong) Error() string { return strings.TrimPrefix(w.path, "$.") + ": " + w.why }

func wrongf(path, format string, args ...any) *wrong {
	return &wrong{"$." + path, fmt.Sprintf(format, args...)}
}

// pattern is a regular expression that is compiled when it is first asked. This package is part of every process of ours, workers too,
// and long repetitions take milliseconds to compile: 7 of a start's 20.
type pattern struct{ compiled func() *regexp.Regexp }

func newPattern(expression string) pattern {
	return pattern{sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expression) })}
}

// MatchString says whether s is of the pattern.
func (p pattern) MatchString(s string) bool { return p.compiled().MatchString(s) }

var (
	suitePattern    = newPattern(`^[a-z][a-z0-9.-]{0,63}$`)
	packagePattern  = newPattern(`^[a-z0-9][a-z0-9.+-]{1,127}(:[a-z0-9-]+)?(=[A-Za-z0-9.+:~-]+|/[a-z0-9.-]+)?-?$`)
	userPattern     = newPattern(`^[a-z_][a-z0-9_-]{0,31}$`)
	ownerPattern    = newPattern(`^[a-z0-9_][a-z0-9_-]{0,31}(:[a-z0-9_][a-z0-9_-]{0,31})?$`)
	unitPattern     = newPattern(`^[A-Za-z0-9][A-Za-z0-9:_.@\\-]{0,254}$`)
	hostnamePattern = newPattern(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	hashPattern     = newPattern(`^[A-Za-z0-9./$,=*!_-]{1,512}$`)
	modePattern     = newPattern(`^[0-7]{3,5}$`)
	mirrorPattern   = newPattern(`^(https?|file|copy)://[^\s"'\\]+$`)
)

// check reports the first thing wrong with a recipe.
func (r *Recipe) check() *wrong {
	size, err := vm.ParseSize(r.Size)
	switch {
	case !suitePattern.MatchString(r.Suite):
		return wrongf("suite", "%q is not the name of a suite, such as bookworm", r.Suite)
	case r.Mirror != "" && !mirrorPattern.MatchString(r.Mirror):
		return wrongf("mirror", "%q is not an address that begins with http://, https:// or file://", r.Mirror)
	case !slices.Contains([]string{"minbase", "important", "standard"}, r.Variant):
		return wrongf("variant", "unknown variant %q: use minbase, important or standard", r.Variant)
	case !packagePattern.MatchString(r.Kernel):
		return wrongf("kernel", "%q is not the name of a package", r.Kernel)
	case err != nil:
		return wrongf("size", "%v", err)
	case size < 64<<20 || size > 16<<40:
		return wrongf("size", "%s: use 64M to 16T", r.Size)
	case !hostnamePattern.MatchString(r.Hostname):
		return wrongf("hostname", "%q is not a host name: use a-z, 0-9 and '-'", r.Hostname)
	case r.Init != InitSystemd && r.Init != InitScript:
		return wrongf("init", "unknown init %q: use systemd or script", r.Init)
	case len(r.Cmdline) > 1024 || hasControl(r.Cmdline):
		return wrongf("cmdline", "is longer than 1024 bytes or has a control character")
	case r.Root.Password != "" && r.Root.Hash != "":
		return wrongf("root", "has both a password and a hash: give one")
	case r.Root.SSHLogin && r.Root.Password == "" && r.Root.Hash == "":
		return wrongf("root.ssh_login", "needs a password or a hash to log in with")
	}
	for _, check := range []func() *wrong{r.checkLists, r.checkUsers, r.checkFiles} {
		if w := check(); w != nil {
			return w
		}
	}
	return nil
}

func (r *Recipe) checkLists() *wrong {
	for _, list := range []struct {
		path    string
		items   []string
		pattern pattern
		is      string
	}{
		{"components", r.Components, suitePattern, "component"},
		{"packages", r.Packages, packagePattern, "package"},
		{"services.enable", r.Services.Enable, unitPattern, "unit"},
		{"services.disable", r.Services.Disable, unitPattern, "unit"},
		{"services.mask", r.Services.Mask, unitPattern, "unit"},
	} {
		for i, item := range list.items {
			if !list.pattern.MatchString(item) {
				return wrongf(fmt.Sprintf("%s[%d]", list.path, i), "%q is not the name of a %s", item, list.is)
			}
		}
	}
	for i, c := range r.Commands {
		if strings.TrimSpace(c) == "" || strings.ContainsRune(c, 0) {
			return wrongf(fmt.Sprintf("commands[%d]", i), "is empty or has a zero byte")
		}
	}
	return checkSecrets("root", r.Root.Password, r.Root.Hash, r.Root.SSHKeys)
}

func (r *Recipe) checkUsers() *wrong {
	seen := map[string]bool{"root": true}
	for i, u := range r.Users {
		at := fmt.Sprintf("users[%d]", i)
		switch {
		case u.Name == "root":
			return wrongf(at+".name", "root is not created here: use the key root of the recipe")
		case !userPattern.MatchString(u.Name):
			return wrongf(at+".name", "%q is not the name of a user", u.Name)
		case seen[u.Name]:
			return wrongf(at+".name", "%q is there twice", u.Name)
		case u.UID < 0 || u.UID > 60000:
			return wrongf(at+".uid", "%d: use 1 to 60000", u.UID)
		case u.Password != "" && u.Hash != "":
			return wrongf(at, "has both a password and a hash: give one")
		case !slices.Contains([]string{"", "yescrypt", "sha512", "md5"}, u.Crypt):
			return wrongf(at+".crypt", "unknown method %q: use yescrypt, sha512 or md5", u.Crypt)
		case u.Shell != "" && (!path.IsAbs(u.Shell) || hasControl(u.Shell) || strings.ContainsAny(u.Shell, ": ")):
			return wrongf(at+".shell", "%q is not an absolute path", u.Shell)
		}
		for j, g := range u.Groups {
			if !userPattern.MatchString(g) {
				return wrongf(fmt.Sprintf("%s.groups[%d]", at, j), "%q is not the name of a group", g)
			}
		}
		if w := checkSecrets(at, u.Password, u.Hash, u.SSHKeys); w != nil {
			return w
		}
		seen[u.Name] = true
	}
	return nil
}

func checkSecrets(at, password, hash string, keys []string) *wrong {
	if len(password) > 256 || hasControl(password) {
		return wrongf(at+".password", "is longer than 256 bytes or has a control character")
	}
	if hash != "" && !hashPattern.MatchString(hash) {
		return wrongf(at+".hash", "is not a password field as in /etc/shadow")
	}
	for i, k := range keys {
		if len(strings.Fields(k)) < 2 || len(k) > 16<<10 || hasControl(k) {
			return wrongf(fmt.Sprintf("%s.ssh_keys[%d]", at, i), "is not one line of an authorized_keys file")
		}
	}
	return nil
}

func (r *Recipe) checkFiles() *wrong {
	for i, f := range r.Files {
		at := fmt.Sprintf("files[%d]", i)
		switch {
		case !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" || hasControl(f.Path):
			return wrongf(at+".path", "%q is not a clean absolute path", f.Path)
		case f.Mode != "" && !modePattern.MatchString(f.Mode):
			return wrongf(at+".mode", "%q is not an octal mode such as 0644", f.Mode)
		case f.Owner != "" && !ownerPattern.MatchString(f.Owner):
			return wrongf(at+".owner", "%q is not user or user:group", f.Owner)
		case f.Content != "" && f.Source != "":
			return wrongf(at, "has both content and source: give one")
		}
	}
	return nil
}

func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(c rune) bool { return c < 0x20 || c == 0x7f })
}
