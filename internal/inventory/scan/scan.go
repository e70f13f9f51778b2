// Package scan reads what a guest's disk at rest says about who may enter the guest, and by what: accounts, keys, sudo's
// rules, packages, services, set-uid files, host keys, certificates, firewall rules.
//
//	state, err := scan.Read(fsys)     // a file system opened by package volume/ext4, frozen or at rest
//
// The guest wrote all of it. Nothing is run and nothing mounted; every file read is capped, every list bounded, every
// text cut and made printable. What can't be read or does not parse is left out and said in State.Notes: an absence here is
// "not seen", and the notes tell whether that may be because it was hidden.
//
// Secrets do not leave: of a password's hash a fingerprint is kept, enough to tell whether two are the same.
//
// Sources: passwd(5), shadow(5), group(5), sudoers(5), sshd(8) "AUTHORIZED_KEYS FILE FORMAT", dpkg's status file
// (deb-control(5)), systemd.unit(5), nft(8).
package scan

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"time"

	"vigia/internal/event"
	"vigia/internal/volume/ext4"
)

// Bounds of what is read. A file larger than its cap is noted and left out.
const (
	maxFile    = 4 << 20  // a configuration file, in bytes
	maxStatus  = 64 << 20 // dpkg's status file
	maxEntries = 20_000   // of a list in State, and of a directory
	maxInodes  = 2_000_000
	maxDepth   = 64
	maxNotes   = 50
)

// State is what was found.
type State struct {
	Accounts     []Account     `json:"accounts,omitempty"`
	Sudo         []Line        `json:"sudo,omitempty"`
	Keys         []Key         `json:"keys,omitempty"`
	HostKeys     []Key         `json:"host_keys,omitempty"`
	Packages     []Package     `json:"packages,omitempty"`
	Services     []Service     `json:"services,omitempty"`
	Privileged   []File        `json:"privileged,omitempty"`
	Certificates []Certificate `json:"certificates,omitempty"`
	Firewall     []Line        `json:"firewall,omitempty"`

	Release string   `json:"release"`         // PRETTY_NAME of os-release
	Notes   []string `json:"notes,omitempty"` // what could not be read
}

// Line is one line of a configuration file, without comments and with single spaces.
type Line struct {
	File string `json:"file"`
	Text string `json:"text"`
}

// File is a file whose mode lends its owner's or group's rights to whoever runs it.
type File struct {
	Path string `json:"path"`
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	Mode string `json:"mode"`
}

// Read reads all of it. Its error is about the disk; what one file lacks is a note.
func Read(fsys *ext4.FS) (State, error) {
	r := &reader{fs: fsys}
	if _, err := fsys.ReadDir("/", maxEntries); err != nil {
		return State{}, fmt.Errorf("the root directory: %w", err)
	}
	r.release()
	r.accounts()
	r.sudo()
	r.hostKeys()
	r.packages()
	r.services()
	r.firewall()
	r.tree()
	return r.State, nil
}

type reader struct {
	State
	fs     *ext4.FS
	inodes int
}

func (r *reader) note(format string, args ...any) {
	switch {
	case len(r.Notes) < maxNotes:
		r.Notes = append(r.Notes, event.Text(fmt.Appendf(nil, format, args...)))
	case len(r.Notes) == maxNotes:
		r.Notes = append(r.Notes, "more could not be read")
	}
}

// file reads a file that may be absent; nil where it is, or where it can't be read, which is noted.
func (r *reader) file(name string, limit int64) []byte {
	b, err := r.fs.ReadFile(name, limit)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			r.note("%s: %v", name, err)
		}
		return nil
	}
	return b
}

// dir lists a directory that may be absent.
func (r *reader) dir(name string) []ext4.Info {
	list, err := r.fs.ReadDir(name, maxEntries)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.note("%s: %v", name, err)
	}
	return list
}

// room reports whether a list may grow, and notes once where it may not.
func room[T any](r *reader, list []T, what string) bool {
	if len(list) == maxEntries {
		r.note("more than %d %s: the others are left out", maxEntries, what)
	}
	return len(list) < maxEntries
}

func text[T string | []byte](s T) string { return event.Text([]byte(s)) }

// days turns shadow's day number into a time; zero where there is none.
func days(n int64) time.Time {
	if n <= 0 || n > 1<<20 {
		return time.Time{}
	}
	return time.Unix(n*86400, 0).UTC()
}

func join(dir, name string) string { return path.Join(dir, name) }
