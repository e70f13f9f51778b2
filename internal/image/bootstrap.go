package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// builders are the programs that build an image.
type builders struct{ mmdebstrap, mke2fs, tar, fakeroot string }

func findBuilders() (builders, error) {
	var b builders
	var err1, err2, err3 error
	b.mmdebstrap, err1 = findTool("mmdebstrap", "mmdebstrap")
	b.mke2fs, err2 = findTool("mke2fs", "e2fsprogs")
	b.tar, err3 = findTool("tar", "tar")
	b.fakeroot, _ = findTool("fakeroot", "fakeroot")
	return b, errors.Join(err1, err2, err3)
}

// bootstrap runs mmdebstrap: packages from the host's mirror, then the recipe's users, files and commands.
type bootstrap struct {
	recipe    Recipe
	tools     builders
	temporary *temporary
	cache     string
	epoch     int64
	progress  Progress
}

// steps are what a person is told when mmdebstrap says that it begins something.
var steps = []struct{ begins, step string }{
	{"I: running apt-get update", "fetching package lists"},
	{"I: downloading packages", "fetching packages"},
	{"I: extracting archives", "unpacking the base"},
	{"I: installing essential", "installing the base"},
	{"I: installing remaining", "installing packages"},
	{"I: running special hook: tar-in", "adding users and files"},
	{"I: cleaning package lists", "cleaning up"},
	{"I: creating tarball", "packing the root"},
}

func (b *bootstrap) run(ctx context.Context, tarball string) error {
	mode, env, err := b.mode()
	if err != nil {
		return err
	}
	overlay := b.temporary.path("overlay.tar")
	if err := create(overlay, b.writeOverlay); err != nil {
		return err
	}
	defer os.Remove(overlay)
	args, err := b.args(ctx, mode, overlay)
	if err != nil {
		return err
	}
	args = append(args, b.recipe.Suite, tarball)
	args = append(args, mirrors(b.recipe)...)
	said := &tail{line: b.report}
	b.progress.step("starting mmdebstrap")
	err = Run(ctx, Command{Path: b.tools.mmdebstrap, Args: args, Env: env, Dir: "/", Stdout: said, Stderr: said})
	return said.explain("mmdebstrap", err)
}

func (b *bootstrap) report(line string) {
	if step, ok := strings.CutPrefix(line, "step: "); ok {
		b.progress.step(step)
		return
	}
	for _, s := range steps {
		if strings.HasPrefix(line, s.begins) {
			b.progress.step(s.step)
		}
	}
}

// mode chooses how mmdebstrap gets the rights to set owners: as root plainly, else in a user namespace with the
// caller's subordinate ids.
func (b *bootstrap) mode() (mode string, env []string, err error) {
	env = []string{fmt.Sprintf("SOURCE_DATE_EPOCH=%d", b.epoch), "INITRD=No", "DEBIAN_FRONTEND=noninteractive"}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"} {
		if v := os.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	if os.Geteuid() == 0 {
		return "root", append(env, "TMPDIR="+b.temporary.dir), nil
	}
	if err := canUnshare(); err != nil {
		return "", nil, err
	}
	if b.tools.fakeroot == "" && !makesFromTar(b.tools) {
		return "", nil, fmt.Errorf("%w: mke2fs cannot read tar files here and fakeroot is missing: run script/setup, or install the package fakeroot", ErrTool)
	}
	scratch, err := b.temporary.scratch()
	return "unshare", append(env, "TMPDIR="+scratch), err
}

// canUnshare says what is missing for building without root.
func canUnshare() error {
	if _, err := findTool("newuidmap", "uidmap"); err != nil {
		return fmt.Errorf("%w: %w", ErrPrivilege, err)
	}
	me, err := user.Current()
	if err != nil {
		return err
	}
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		text, _ := os.ReadFile(file)
		found := false
		for line := range strings.Lines(string(text)) {
			owner, _, _ := strings.Cut(line, ":")
			found = found || owner == me.Username || owner == me.Uid
		}
		if !found {
			return fmt.Errorf("%w: %s has no line for %s: as root, run 'usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s', or build as root",
				ErrPrivilege, file, me.Username, me.Username)
		}
	}
	if err := exec.Command("unshare", "--user", "true").Run(); err != nil {
		return fmt.Errorf("%w: this host does not let users make user namespaces: allow them (sysctl kernel.unprivileged_userns_clone=1, or kernel.apparmor_restrict_unprivileged_userns=0), or build as root", ErrPrivilege)
	}
	return nil
}

func (b *bootstrap) args(ctx context.Context, mode, overlay string) ([]string, error) {
	r := b.recipe
	packages := slices.Concat(r.Packages, []string{r.Kernel, "kmod", "busybox-static"})
	if slices.ContainsFunc(r.Users, func(u User) bool { return u.Sudo }) {
		packages = append(packages, "sudo")
	}
	slices.Sort(packages)
	args := []string{"--mode=" + mode, "--format=tar", "--architectures=amd64", "--variant=" + r.Variant,
		"--components=" + strings.Join(r.Components, ","), "--include=" + strings.Join(slices.Compact(packages), ","),
		"--aptopt=Acquire::Retries \"3\"", "--dpkgopt=force-unsafe-io"}
	for _, line := range proxies(ctx) {
		args = append(args, "--aptopt="+line)
	}
	if !r.Docs {
		for _, p := range []string{"man", "locale", "doc", "info"} {
			args = append(args, "--dpkgopt=path-exclude=/usr/share/"+p+"/*")
		}
		args = append(args, "--dpkgopt=path-include=/usr/share/doc/*/copyright")
	}
	if b.cache != "" {
		if err := prepareCache(b.cache); err != nil {
			return nil, err
		}
		const archives = "/var/cache/apt/archives/"
		args = append(args, "--skip=download/empty", "--skip=essential/unlink", `--setup-hook=mkdir -p "$1"`+archives,
			"--setup-hook=sync-in "+quote(b.cache)+" "+archives, "--customize-hook=sync-out "+archives+" "+quote(b.cache))
	}
	return append(args, "--customize-hook=tar-in "+quote(overlay)+" /",
		`--customize-hook=chroot "$1" /bin/sh /run/image-setup`), nil
}

// cacheAge is how long a package stays in the cache after it was last fetched or used.
const cacheAge = 30 * 24 * time.Hour

// prepareCache makes the directory of the cache and drops what is old.
func prepareCache(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && strings.HasSuffix(e.Name(), ".deb") && time.Since(info.ModTime()) > cacheAge {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
	return nil
}

// writeOverlay writes the tar that is unpacked over the root: the recipe's files, and the script that does the rest.
func (b *bootstrap) writeOverlay(f *os.File) error {
	w := tar.NewWriter(f)
	put := func(name string, mode int64, data []byte) error {
		h := &tar.Header{Name: strings.TrimPrefix(name, "/"), Mode: mode, Size: int64(len(data)), ModTime: time.Unix(b.epoch, 0), Format: tar.FormatGNU}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err := w.Write(data)
		return err
	}
	// Directories are made by the script below, before: a directory in the archive would change the mode of one that
	// is there, and of a link to one.
	staged := make([]string, len(b.recipe.Files))
	for i, file := range b.recipe.Files {
		staged[i] = fmt.Sprintf("/run/image-files/%d", i)
		if err := put(staged[i], 0o600, file.Data); err != nil {
			return err
		}
	}
	if err := put("/run/image-setup", 0o700, []byte(setupScript(b.recipe, staged))); err != nil {
		return err
	}
	return w.Close()
}

// setupScript does in the root what the recipe asks for besides packages. It stops at the first error.
func setupScript(r Recipe, staged []string) string {
	var s strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&s, format+"\n", args...) }
	line("set -eu\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root")
	line("printf '%%s\\n' %s >/etc/hostname", quote(r.Hostname))
	line("printf '127.0.0.1 localhost\\n127.0.1.1 %%s\\n::1 localhost\\n' %s >/etc/hosts", quote(r.Hostname))
	line("echo 'LABEL=%s / ext4 defaults,noatime 0 0' >/etc/fstab", rootLabel)
	line("[ -L /etc/resolv.conf ] || : >/etc/resolv.conf")
	line("rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub")
	setupAccounts(line, r)
	for i, f := range r.Files {
		line("mkdir -p %s", quote(path.Dir(f.Path)))
		line("mv -f %s %s", staged[i], quote(f.Path))
		owner := f.Owner
		if owner == "" {
			owner = "root:root"
		}
		line("chown %s %s", quote(owner), quote(f.Path))
		line("chmod %04o %s", f.mode(), quote(f.Path))
	}
	for i, c := range r.Commands {
		line("echo %s >&2", quote(fmt.Sprintf("step: running command %d of %d", i+1, len(r.Commands))))
		line("sh -e -c %s || { echo %s >&2; exit 1; }", quote(c), quote(fmt.Sprintf("commands[%d] of the recipe failed: %s", i, firstLine(c))))
	}
	if r.Init == InitSystemd {
		for _, verb := range []struct {
			name  string
			units []string
		}{{"enable", r.Services.Enable}, {"disable", r.Services.Disable}, {"mask", r.Services.Mask}} {
			if len(verb.units) > 0 {
				line("systemctl --quiet %s %s", verb.name, quoteAll(verb.units))
			}
		}
	}
	line("rm -rf /run/image-files /run/image-setup")
	return s.String()
}

func setupAccounts(line func(string, ...any), r Recipe) {
	secret := func(name, password, hash, crypt string) {
		switch {
		case hash != "":
			line("printf '%%s\\n' %s | chpasswd -e", quote(name+":"+hash))
		case password != "" && crypt != "":
			line("printf '%%s\\n' %s | chpasswd -c %s", quote(name+":"+password), strings.ToUpper(crypt))
		case password != "":
			line("printf '%%s\\n' %s | chpasswd", quote(name+":"+password))
		}
	}
	keys := func(name string, list []string) {
		if len(list) == 0 {
			return
		}
		line("home=$(getent passwd %s | cut -d: -f6)", quote(name))
		line(`install -d -m 700 -o %[1]s -g "$(id -g %[1]s)" "$home/.ssh"`, quote(name))
		line(`printf '%%s\n' %s >>"$home/.ssh/authorized_keys"`, quoteAll(list))
		line(`chown %[1]s:"$(id -g %[1]s)" "$home/.ssh/authorized_keys"; chmod 600 "$home/.ssh/authorized_keys"`, quote(name))
	}
	for _, u := range r.Users {
		args := []string{"-m", "-U"}
		if u.UID != 0 {
			args = append(args, "-u", fmt.Sprint(u.UID))
		}
		shell := u.Shell
		if shell == "" {
			shell = "/bin/bash"
		}
		groups := slices.Clone(u.Groups)
		if u.Sudo {
			groups = append(groups, "sudo")
		}
		args = append(args, "-s", shell)
		if len(groups) > 0 {
			for _, g := range groups {
				line("getent group %[1]s >/dev/null || groupadd -r %[1]s", quote(g))
			}
			args = append(args, "-G", strings.Join(groups, ","))
		}
		line("useradd %s %s", quoteAll(args), quote(u.Name))
		secret(u.Name, u.Password, u.Hash, u.Crypt)
		keys(u.Name, u.SSHKeys)
	}
	secret("root", r.Root.Password, r.Root.Hash, "")
	keys("root", r.Root.SSHKeys)
	if r.Root.SSHLogin {
		line("mkdir -p /etc/ssh/sshd_config.d\necho 'PermitRootLogin yes' >/etc/ssh/sshd_config.d/05-root.conf")
	}
}

// quote makes one word of the shell out of any text.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func quoteAll(list []string) string {
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = quote(s)
	}
	return strings.Join(quoted, " ")
}
