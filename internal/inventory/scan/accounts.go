package scan

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// What an account's password lets it do.
const (
	PasswordNone   = "none"   // empty: whoever comes may enter
	PasswordLocked = "locked" // no password fits
	PasswordSet    = "set"
)

// Account is a line of passwd with its line of shadow.
type Account struct {
	Name     string    `json:"name"`
	UID      uint32    `json:"uid"`
	Shell    string    `json:"shell"`
	Home     string    `json:"home"`
	Groups   []string  `json:"groups,omitempty"` // those of /etc/group that list it
	Password string    `json:"password"`         // none, locked or set
	Print    string    `json:"print,omitempty"`  // fingerprint of the hash
	Changed  time.Time `json:"changed,omitzero"` // the password, to the day
	Expires  time.Time `json:"expires,omitzero"` // the account
}

// Login reports whether the account has a shell that lets somebody in.
func (a Account) Login() bool {
	base := a.Shell[strings.LastIndexByte(a.Shell, '/')+1:]
	return base != "nologin" && base != "false" && base != "sync"
}

// Key is a public key that opens an account, or that a host shows.
type Key struct {
	User    string `json:"user,omitempty"`
	File    string `json:"file"`
	Type    string `json:"type"`
	Print   string `json:"print"` // SHA256:…, as ssh-keygen -l has it
	Comment string `json:"comment,omitempty"`
}

func (r *reader) release() {
	for line := range bytes.Lines(r.file("/etc/os-release", maxFile)) {
		if v, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("PRETTY_NAME=")); ok {
			r.Release = text(bytes.Trim(v, `"'`))
		}
	}
}

func (r *reader) accounts() {
	list := parsePasswd(r.file("/etc/passwd", maxFile))
	parseShadow(r.file("/etc/shadow", maxFile), list)
	parseGroup(r.file("/etc/group", maxFile), list)
	for _, name := range slices.Sorted(maps.Keys(list)) {
		if !room(r, r.Accounts, "accounts") {
			return
		}
		a := list[name]
		r.Accounts = append(r.Accounts, *a)
		if a.Home == "" {
			continue
		}
		for _, file := range []string{".ssh/authorized_keys", ".ssh/authorized_keys2"} {
			r.keysOf(a.Name, join(a.Home, file))
		}
	}
}

func parsePasswd(b []byte) map[string]*Account {
	list := map[string]*Account{}
	for line := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) != 7 || f[0] == "" || f[0][0] == '#' || len(list) > maxEntries {
			continue
		}
		uid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			continue
		}
		a := &Account{Name: text(f[0]), UID: uint32(uid), Home: text(f[5]), Shell: text(f[6])}
		a.password(f[1])
		list[a.Name] = a
	}
	return list
}

func parseShadow(b []byte, list map[string]*Account) {
	for line := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) < 8 {
			continue
		}
		a := list[text(f[0])]
		if a == nil {
			continue
		}
		a.password(f[1])
		changed, _ := strconv.ParseInt(f[2], 10, 64)
		expires, _ := strconv.ParseInt(f[7], 10, 64)
		a.Changed, a.Expires = days(changed), days(expires)
	}
}

// password reads the second field. "x" in passwd points to shadow, and is no hash that anything fits.
func (a *Account) password(field string) {
	a.Print = ""
	switch {
	case field == "":
		a.Password = PasswordNone
	case len(field) < 8 || field[0] == '!' || field[0] == '*':
		a.Password = PasswordLocked
	default:
		a.Password = PasswordSet
	}
	if hash := strings.TrimLeft(field, "!"); len(hash) >= 8 {
		sum := sha256.Sum256([]byte(hash))
		a.Print = hex.EncodeToString(sum[:8])
	}
}

func parseGroup(b []byte, list map[string]*Account) {
	for line := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) != 4 || f[3] == "" {
			continue
		}
		for member := range strings.SplitSeq(f[3], ",") {
			if a := list[text(member)]; a != nil && len(a.Groups) < 256 {
				a.Groups = append(a.Groups, text(f[0]))
			}
		}
	}
}

func (r *reader) keysOf(user, file string) {
	for _, k := range parseKeys(r.file(file, maxFile)) {
		if !room(r, r.Keys, "authorized keys") {
			return
		}
		k.User, k.File = user, text(file)
		r.Keys = append(r.Keys, k)
	}
}

func parseKeys(b []byte) (list []Key) {
	for line := range bytes.Lines(b) {
		key, comment, _, _, err := ssh.ParseAuthorizedKey(line)
		if err != nil || len(list) == maxEntries {
			continue
		}
		list = append(list, Key{Type: text(key.Type()), Print: ssh.FingerprintSHA256(key), Comment: text(comment)})
	}
	return list
}

func (r *reader) hostKeys() {
	for _, e := range r.dir("/etc/ssh") {
		name := e.Name()
		if !strings.HasPrefix(name, "ssh_host_") || !strings.HasSuffix(name, ".pub") || len(r.HostKeys) > 64 {
			continue
		}
		file := join("/etc/ssh", name)
		for _, k := range parseKeys(r.file(file, maxFile)) {
			k.File = text(file)
			r.HostKeys = append(r.HostKeys, k)
		}
	}
}

func (r *reader) sudo() {
	files := []string{"/etc/sudoers", "/etc/doas.conf"}
	for _, e := range r.dir("/etc/sudoers.d") {
		// sudoers(5): files whose names contain a dot or end in ~ are passed over.
		if name := e.Name(); !strings.ContainsRune(name, '.') && !strings.HasSuffix(name, "~") && e.Mode().IsRegular() {
			files = append(files, join("/etc/sudoers.d", name))
		}
	}
	for _, file := range files {
		r.Sudo = r.appendLines(r.Sudo, file)
	}
}

// firewall takes the rule files that Debian's packages load at boot.
func (r *reader) firewall() {
	files := []string{"/etc/nftables.conf", "/etc/iptables/rules.v4", "/etc/iptables/rules.v6", "/etc/ufw/user.rules", "/etc/ufw/user6.rules", "/etc/ufw/ufw.conf", "/etc/hosts.allow", "/etc/hosts.deny"}
	for _, e := range r.dir("/etc/nftables.d") {
		if e.Mode().IsRegular() {
			files = append(files, join("/etc/nftables.d", e.Name()))
		}
	}
	for _, file := range files {
		r.Firewall = r.appendLines(r.Firewall, file)
	}
}

func (r *reader) appendLines(list []Line, file string) []Line {
	for _, s := range lines(r.file(file, maxFile)) {
		if !room(r, list, "lines of "+file) {
			break
		}
		list = append(list, Line{text(file), s})
	}
	return list
}

// lines returns the lines that say something: joined where a backslash ends them, without comments and empty ones.
// sudoers' "#include" and "#includedir" are no comments, nor is a user id "#0".
func lines(b []byte) (list []string) {
	b = bytes.ReplaceAll(b, []byte("\\\n"), []byte(" "))
	for line := range strings.Lines(string(b)) {
		s := strings.Join(strings.Fields(line), " ")
		if i := strings.Index(s, " # "); i >= 0 {
			s = s[:i]
		}
		comment := strings.HasPrefix(s, "#") && !strings.HasPrefix(s, "#include") && (len(s) < 2 || s[1] < '0' || s[1] > '9')
		if s == "" || comment {
			continue
		}
		list = append(list, text(s))
	}
	return list
}
