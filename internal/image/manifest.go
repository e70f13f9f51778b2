package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// formatVersion is the version of image.json that is written here; others are refused.
const formatVersion = 1

// maxManifest bounds image.json, which is read whole.
const maxManifest = 64 << 10

// manifest is the content of image.json.
type manifest struct {
	Version int             `json:"version"`
	ID      string          `json:"id"`
	Created time.Time       `json:"created"`
	Origin  string          `json:"origin"` // build or import
	Recipe  string          `json:"recipe"` // name of the recipe or of the imported file
	Digest  string          `json:"recipe_digest,omitempty"`
	Kernel  string          `json:"kernel_version"`
	Cmdline string          `json:"cmdline"`
	Root    string          `json:"root"` // LABEL=… or UUID=…, as in the command line
	Disk    uint64          `json:"disk_bytes"`
	Parts   map[string]part `json:"parts"`
}

type part struct {
	Bytes int64  `json:"bytes"`
	Hash  string `json:"hash"` // of pieces: see hash.go
}

var idPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

// id is the image's content address: the SHA-256 of
//
//	vigia image 1
//	cmdline root=LABEL=root …
//	disk 2147483648
//	disk.layer 268435456 9f86d0…
//	vmlinuz 14186432 60303a…
//	profile 6094584 1b4f0e…
//
// with the parts in this order. When and by what the image was made is not part of it.
func (m *manifest) id() string {
	var text strings.Builder
	fmt.Fprintf(&text, "vigia image %d\ncmdline %s\ndisk %d\n", m.Version, m.Cmdline, m.Disk)
	for _, name := range parts {
		if p, ok := m.Parts[name]; ok {
			fmt.Fprintf(&text, "%s %d %s\n", name, p.Bytes, p.Hash)
		}
	}
	sum := sha256.Sum256([]byte(text.String()))
	return hex.EncodeToString(sum[:])
}

// check reports the first thing wrong with a manifest that was read from the directory of the image id.
func (m *manifest) check(id string) error {
	switch {
	case m.Version != formatVersion:
		return fmt.Errorf("image.json has version %d, this vigia reads version %d", m.Version, formatVersion)
	case strings.ContainsAny(m.Cmdline, "\n\x00"):
		return fmt.Errorf("image.json: the command line has a line break")
	case m.ID != id || m.id() != id:
		return fmt.Errorf("image.json does not belong to this id: it was changed")
	}
	for name, p := range m.Parts {
		if !idPattern.MatchString(p.Hash) || p.Bytes < 0 || !isPart(name) {
			return fmt.Errorf("image.json: part %q is not valid", name)
		}
	}
	for _, need := range []string{PartDisk, PartKernel, PartProfile} {
		if _, ok := m.Parts[need]; !ok {
			return fmt.Errorf("image.json names no %s", need)
		}
	}
	return nil
}

func isPart(name string) bool {
	for _, p := range parts {
		if p == name {
			return true
		}
	}
	return false
}

func readManifest(dir string) (manifest, error) {
	var m manifest
	f, err := os.Open(filepath.Join(dir, "image.json"))
	if err != nil {
		return m, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err != nil {
		return m, err
	}
	if len(text) > maxManifest {
		return m, fmt.Errorf("image.json is longer than %d bytes", maxManifest)
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("image.json: %w", err)
	}
	return m, m.check(filepath.Base(dir))
}

func (m *manifest) write(dir string) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return writeSynced(filepath.Join(dir, "image.json"), append(text, '\n'), 0o444)
}

func writeSynced(name string, data []byte, perm os.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
