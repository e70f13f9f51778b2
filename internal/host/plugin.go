package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Why there is no plugin.
var (
	errNoPlugin      = errors.New("the plugin is not installed beside the program: make build makes it where there is a C compiler")
	errPluginRefused = errors.New("QEMU does not take the plugin")
)

// pluginDirs are where the plugin is looked for beside the program's own directory.
var pluginDirs = []string{"/usr/local/lib/vigia", "/usr/lib/vigia"}

// plugins remembers which files QEMU took, and which not.
var plugins struct {
	sync.Mutex
	tried map[pluginTry]error
}

type pluginTry struct {
	qemu, file               string
	qemuChanged, fileChanged time.Time
}

// Plugin finds the plugin for this QEMU. It has been tried: QEMU has loaded it once.
func (h *Host) Plugin(ctx context.Context) (string, error) {
	q, err := h.QEMU(ctx)
	if err != nil {
		return "", err
	}
	// QEMU 9.0 takes plugins of API 2 and newer, those before take 1 and older.
	name := "vigia-probe-1.so"
	if q.Version.Major >= 9 {
		name = "vigia-probe-2.so"
	}
	file, err := findPlugin(name)
	if err != nil {
		return "", err
	}
	return file, tryPlugin(ctx, q.Path, file)
}

func findPlugin(name string) (string, error) {
	dirs := pluginDirs
	if exe, err := os.Executable(); err == nil {
		dirs = append([]string{filepath.Dir(exe)}, dirs...)
	}
	for _, dir := range dirs {
		file, err := filepath.EvalSymlinks(filepath.Join(dir, name))
		if err == nil {
			return file, nil
		}
	}
	return "", errNoPlugin
}

func tryPlugin(ctx context.Context, qemu, file string) error {
	key := pluginTry{qemu: qemu, file: file}
	for path, at := range map[string]*time.Time{qemu: &key.qemuChanged, file: &key.fileChanged} {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		*at = st.ModTime()
	}
	plugins.Lock()
	defer plugins.Unlock()
	if err, ok := plugins.tried[key]; ok {
		return err
	}
	err := loadPlugin(ctx, qemu, file)
	if ctx.Err() != nil {
		return err // says nothing of the plugin
	}
	if plugins.tried == nil {
		plugins.tried = map[pluginTry]error{}
	}
	plugins.tried[key] = err
	return err
}

// loadPlugin runs QEMU without a machine. Without a page the plugin does nothing; that it was loaded is all that is asked.
func loadPlugin(ctx context.Context, qemu, file string) error {
	ctx, cancel := context.WithTimeout(ctx, qemuTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, "-machine", "none", "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-S",
		"-qmp", "stdio", "-plugin", strings.ReplaceAll(file, ",", ",,"))
	// It ends with who tries it. The signal comes when the thread that began it ends, so that must stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stdin = strings.NewReader("{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("%w: %s", errPluginRefused, lines[len(lines)-1])
	}
	return nil
}

func (h *Host) findPluginHere(ctx context.Context) Finding {
	if h.tryKVM() == nil {
		return Finding{Status: OK, Seen: "not needed: it is for software emulation, and machines run under kvm, where processes are sampled"}
	}
	file, err := h.Plugin(ctx)
	if err == nil {
		return Finding{Status: OK, Seen: "QEMU loads " + file}
	}
	f := Finding{Status: Degraded, Seen: err.Error(), Consequence: "under tcg, processes are sampled fifty times a second: what lives shorter is counted, not seen, and opened files are not seen"}
	if errors.Is(err, errNoPlugin) {
		f.Remedy = h.packages("gcc", "libc6-dev") + "; then: make build"
	}
	return f
}
