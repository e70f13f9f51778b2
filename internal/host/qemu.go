package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// QEMU is an emulator that was found and is new enough.
type QEMU struct {
	Path    string
	Version Version
	Package string // how its maker calls it: Debian 1:7.2+dfsg-7+deb12u18
}

// Version is a release number.
type Version struct{ Major, Minor, Micro int }

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

func (v Version) before(w Version) bool {
	return slices.Compare([]int{v.Major, v.Minor, v.Micro}, []int{w.Major, w.Minor, w.Micro}) < 0
}

// Oldest is the oldest QEMU that vigia runs: Debian 12's.
var Oldest = Version{7, 2, 0}

// Errors of QEMU, wrapped with what was found and what to do.
var (
	ErrQEMUMissing = errors.New("QEMU is not installed")
	ErrQEMUTooOld  = errors.New("QEMU is too old")
	ErrQEMUBroken  = errors.New("QEMU does not say its version")
)

const qemuName = "qemu-system-x86_64"

// qemuTimeout bounds a run of QEMU that only prints something.
const qemuTimeout = 10 * time.Second

// neededDevices are those of every machine's command line.
var neededDevices = []string{"virtio-blk-pci", "virtio-net-pci", "virtio-serial-pci", "virtio-rng-pci", "virtserialport"}

type knownQEMU struct {
	changed time.Time
	size    int64
	qemu    QEMU
}

// QEMU finds the emulator and its version. It is executed only when the file has changed since the last time.
func (h *Host) QEMU(ctx context.Context) (QEMU, error) {
	path, err := h.qemuPath()
	if err != nil {
		return QEMU{}, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return QEMU{}, fmt.Errorf("%w: %w", ErrQEMUMissing, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if k, ok := h.qemus[path]; ok && k.changed.Equal(st.ModTime()) && k.size == st.Size() {
		return k.qemu, nil
	}
	q, err := askVersion(ctx, path)
	if err != nil {
		return QEMU{}, err
	}
	if q.Version.before(Oldest) {
		return QEMU{}, fmt.Errorf("%w: %s is %s, vigia needs %s or newer: %s", ErrQEMUTooOld, path, q.Version, Oldest, h.newerQEMU())
	}
	if h.qemus == nil {
		h.qemus = map[string]knownQEMU{}
	}
	h.qemus[path] = knownQEMU{st.ModTime(), st.Size(), q}
	return q, nil
}

func (h *Host) newerQEMU() string {
	if id, _ := h.distribution(); id == "debian" || id == "ubuntu" {
		return "Debian 12 and Ubuntu 24.04 carry new enough ones; upgrade, or name another by --qemu"
	}
	return "install a newer one, or name another by --qemu"
}

func (h *Host) qemuPath() (string, error) {
	if h.Binary != "" {
		p, err := exec.LookPath(h.Binary)
		if err != nil {
			return "", fmt.Errorf("%w: %s: %w", ErrQEMUMissing, h.Binary, err)
		}
		return filepath.Abs(p)
	}
	p, ok := h.lookup(qemuName)
	if !ok {
		return "", fmt.Errorf("%w: no %s in the path: %s", ErrQEMUMissing, qemuName, h.packages("qemu-system-x86", "qemu-utils"))
	}
	return p, nil
}

// lookup searches the path, and the places of administrators' tools that a person's path may lack.
func (h *Host) lookup(name string) (string, bool) {
	path := os.Getenv("PATH")
	if h.path != nil {
		path = h.path()
	}
	dirs := append(filepath.SplitList(path), "/usr/sbin", "/sbin")
	for _, d := range dirs {
		if !filepath.IsAbs(d) {
			continue
		}
		p := filepath.Join(h.at(d), name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p, true
		}
	}
	return "", false
}

func run(ctx context.Context, path string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, qemuTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", path, strings.Join(args, " "), err, firstLine(errs.String()))
	}
	return out.Bytes(), nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line[:min(len(line), 200)]
}

func askVersion(ctx context.Context, path string) (QEMU, error) {
	out, err := run(ctx, path, "-version")
	if err != nil {
		return QEMU{}, fmt.Errorf("%w: %w", ErrQEMUBroken, err)
	}
	v, pkg, err := parseVersion(string(out))
	if err != nil {
		return QEMU{}, fmt.Errorf("%w: %s: %w", ErrQEMUBroken, path, err)
	}
	return QEMU{Path: path, Version: v, Package: pkg}, nil
}

// parseVersion reads "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)".
func parseVersion(text string) (Version, string, error) {
	line := firstLine(text)
	rest, ok := strings.CutPrefix(line, "QEMU emulator version ")
	if !ok {
		return Version{}, "", fmt.Errorf("%q is no version", line)
	}
	number, pkg, _ := strings.Cut(rest, " ")
	var parts [3]int
	fields := strings.SplitN(number, ".", 4)
	if len(fields) < 2 {
		return Version{}, "", fmt.Errorf("%q is no version", line)
	}
	for i, f := range fields[:min(3, len(fields))] {
		f, _, _ = strings.Cut(f, "-") // 9.0.0-rc1
		n, err := strconv.Atoi(f)
		if err != nil || n < 0 || n > 9999 {
			return Version{}, "", fmt.Errorf("%q is no version", line)
		}
		parts[i] = n
	}
	return Version{parts[0], parts[1], parts[2]}, strings.Trim(pkg, "()"), nil
}

func (h *Host) findQEMU(ctx context.Context) Finding {
	q, err := h.QEMU(ctx)
	switch {
	case errors.Is(err, ErrQEMUMissing):
		return Finding{Status: Missing, Seen: "no " + qemuName, Consequence: "no machine can run", Remedy: h.packages("qemu-system-x86", "qemu-utils")}
	case errors.Is(err, ErrQEMUTooOld):
		return Finding{Status: Missing, Seen: err.Error(), Consequence: "no machine can run", Remedy: h.newerQEMU()}
	case err != nil:
		return Finding{Status: Missing, Seen: err.Error(), Consequence: "no machine can run", Remedy: "reinstall it: " + h.packages("--reinstall", "qemu-system-x86")}
	}
	return Finding{Status: OK, Seen: fmt.Sprintf("%s %s (%s)", q.Path, q.Version, q.Package)}
}

func (h *Host) findDevices(ctx context.Context) Finding {
	q, err := h.QEMU(ctx)
	if err != nil {
		return Finding{Status: Missing, Seen: "not asked: no usable QEMU", Consequence: "no machine can run"}
	}
	out, err := run(ctx, q.Path, "-nodefaults", "-device", "help")
	if err != nil {
		return Finding{Status: Missing, Seen: err.Error(), Consequence: "no machine can run", Remedy: h.packages("--reinstall", "qemu-system-x86")}
	}
	var lacking []string
	for _, d := range neededDevices {
		if !bytes.Contains(out, []byte(`name "`+d+`"`)) {
			lacking = append(lacking, d)
		}
	}
	if len(lacking) > 0 {
		return Finding{Status: Missing, Seen: "without " + strings.Join(lacking, " "), Consequence: "no machine can run",
			Remedy: "use a QEMU built with them: " + h.packages("qemu-system-x86")}
	}
	return Finding{Status: OK, Seen: strings.Join(neededDevices, " ")}
}
