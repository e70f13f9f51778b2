package scan

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"vigia/internal/volume/ext4"
)

// disk makes an ext4 file system of a tree: names that end in "/" are directories. A mode before the content, as "04755 ",
// is the file's.
func disk(t *testing.T, tree map[string]string) *ext4.FS {
	t.Helper()
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		mke2fs = "/sbin/mke2fs"
	}
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	for name, content := range tree {
		at := filepath.Join(root, name)
		mode := os.FileMode(0o644)
		if rest, ok := strings.CutPrefix(content, "04755 "); ok {
			content, mode = rest, 0o755|os.ModeSetuid
		}
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(at, mode); err != nil {
			t.Fatal(err)
		}
	}
	img := filepath.Join(dir, "img")
	if out, err := exec.Command(mke2fs, "-q", "-t", "ext4", "-d", root, img, "8M").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	fsys, err := ext4.Open(f, 0, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	return fsys
}

const testKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEXiKb2wG0SkjFcVvCyzHqkFZMmh0kBTYoI5JfWVQqWP mallory@far"

var tree = map[string]string{
	"etc/os-release":                   "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n",
	"etc/passwd":                       "root:x:0:0:root:/root:/bin/bash\nalice:x:1000:1000::/home/alice:/bin/bash\nbob:x:1001:1001::/home/bob:/bin/sh\ndaemon:x:1:1::/:/usr/sbin/nologin\nguest:x:1002:1002::/home/guest:/bin/sh\nbroken:x\n",
	"etc/shadow":                       "root:*:19000:0:99999:7:::\nalice:$6$salt$" + strings.Repeat("a", 86) + ":20000:0:99999:7::20500:\nbob:!$6$salt$" + strings.Repeat("b", 86) + ":20001:0:99999:7:::\nguest::20001:0:99999:7:::\n",
	"etc/group":                        "sudo:x:27:alice,bob\nusers:x:100:\n",
	"etc/sudoers":                      "# a comment\nDefaults   env_reset\nalice ALL=(ALL) \\\n  NOPASSWD: ALL # why\n#includedir /etc/sudoers.d\n",
	"etc/sudoers.d/extra":              "%ops ALL=(ALL) ALL\n",
	"etc/sudoers.d/old.bak":            "nobody ALL=(ALL) ALL\n",
	"home/alice/.ssh/authorized_keys":  "# mine\nrestrict,command=\"/bin/true\" " + testKey + "\nnot a key\n",
	"etc/ssh/ssh_host_ed25519_key.pub": strings.Replace(testKey, "mallory@far", "root@web", 1) + "\n",
	"var/lib/dpkg/status":              "Package: openssl\nStatus: install ok installed\nArchitecture: amd64\nVersion: 3.0.11-1\nDescription: x\n Package: liar\n\nPackage: gone\nStatus: deinstall ok config-files\nVersion: 1\n\nPackage: libssl3\nStatus: install ok installed\nArchitecture: amd64\nSource: openssl (3.0.11-1~src)\nVersion: 3.0.11-1\n",
	"etc/systemd/system/multi-user.target.wants/telnet.service": "",
	"etc/nftables.conf": "#!/usr/sbin/nft -f\nflush ruleset\n  tcp   dport 23 drop\n",
	"usr/bin/su":        "04755 binary",
	"usr/bin/ls":        "binary",
}

func TestADiskIsRead(t *testing.T) {
	s, err := Read(disk(t, tree))
	if err != nil {
		t.Fatal(err)
	}
	if s.Release != "Debian GNU/Linux 12 (bookworm)" || len(s.Notes) != 0 {
		t.Errorf("release %q, notes %q", s.Release, s.Notes)
	}
	got := map[string]Account{}
	for _, a := range s.Accounts {
		got[a.Name] = a
	}
	for name, want := range map[string]string{"root": PasswordLocked, "alice": PasswordSet, "bob": PasswordLocked, "guest": PasswordNone} {
		if got[name].Password != want {
			t.Errorf("%s: password %q, want %q", name, got[name].Password, want)
		}
	}
	if a := got["alice"]; a.Print == "" || a.Changed.IsZero() || a.Expires.IsZero() || !slices.Equal(a.Groups, []string{"sudo"}) {
		t.Errorf("alice: %+v", a)
	}
	if got["daemon"].Login() || !got["bob"].Login() {
		t.Error("shells that let nobody in are not told apart")
	}
	want := []Line{{"/etc/sudoers", "Defaults env_reset"}, {"/etc/sudoers", "alice ALL=(ALL) NOPASSWD: ALL"}, {"/etc/sudoers", "#includedir /etc/sudoers.d"}, {"/etc/sudoers.d/extra", "%ops ALL=(ALL) ALL"}}
	if !slices.Equal(s.Sudo, want) {
		t.Errorf("sudo: %q", s.Sudo)
	}
	if len(s.Keys) != 1 || s.Keys[0].User != "alice" || s.Keys[0].Comment != "mallory@far" || !strings.HasPrefix(s.Keys[0].Print, "SHA256:") {
		t.Errorf("keys: %+v", s.Keys)
	}
	if len(s.HostKeys) != 1 || s.HostKeys[0].Type != "ssh-ed25519" {
		t.Errorf("host keys: %+v", s.HostKeys)
	}
	if len(s.Packages) != 2 || s.Packages[0] != (Package{"openssl", "amd64", "3.0.11-1", "openssl", "3.0.11-1"}) || s.Packages[1].SourceVersion != "3.0.11-1~src" {
		t.Errorf("packages: %+v", s.Packages)
	}
	if !slices.Equal(s.Services, []Service{{"telnet.service", "multi-user.target"}}) {
		t.Errorf("services: %+v", s.Services)
	}
	if len(s.Privileged) != 1 || s.Privileged[0].Path != "/usr/bin/su" || s.Privileged[0].Mode[0] != 'u' {
		t.Errorf("set-uid files: %+v", s.Privileged)
	}
	if len(s.Firewall) != 2 {
		t.Errorf("firewall: %q", s.Firewall)
	}
}

// TestHashesStay: what leaves tells two passwords apart and no more.
func TestHashesStay(t *testing.T) {
	list := parsePasswd([]byte("a:x:1:1::/:/bin/sh\n"))
	hash := "$6$salt$" + strings.Repeat("q", 86)
	parseShadow([]byte("a:"+hash+":1:0:9:7:::\n"), list)
	locked := parsePasswd([]byte("a:!" + hash + ":1:1::/:/bin/sh\n"))
	if strings.Contains(list["a"].Print, "q") || list["a"].Print != locked["a"].Print {
		t.Errorf("%q and, locked, %q", list["a"].Print, locked["a"].Print)
	}
}

// TestWhatCantBeReadIsSaid: an empty answer must not look like a clean one.
func TestWhatCantBeReadIsSaid(t *testing.T) {
	s, err := Read(disk(t, map[string]string{"etc/passwd": strings.Repeat("x", maxFile+1), "etc/shadow": ""}))
	if err != nil || len(s.Notes) < 2 || !strings.Contains(s.Notes[0], "/etc/passwd") {
		t.Errorf("%q, %v", s.Notes, err)
	}
}

func FuzzParsers(f *testing.F) {
	for _, content := range tree {
		f.Add([]byte(content))
	}
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		list := parsePasswd(b)
		parseShadow(b, list)
		parseGroup(b, list)
		for name, a := range list {
			if name == "" || strings.ContainsAny(a.Home+a.Shell+name, "\x1b\n") {
				t.Errorf("%+v", a)
			}
		}
		for _, p := range parseStatus(b) {
			if p.Name == "" || strings.ContainsRune(p.Version, '\x1b') {
				t.Errorf("%+v", p)
			}
		}
		for _, s := range lines(b) {
			if strings.ContainsAny(s, "\x1b\n") {
				t.Errorf("%q", s)
			}
		}
		parseKeys(bytes.Clone(b))
		parseCertificates(b)
	})
}
