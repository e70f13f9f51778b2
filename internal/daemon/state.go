package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"vigia/internal/vm"
)

// minRoom is how much room the state directory's file system must have for a daemon to start, in bytes: enough for the
// store, the ledger and a console log.
const minRoom = 64 << 20

// layout names every file of the state directory, and the one directory of RAM files beside it.
//
//	STATE/lock              held by the daemon
//	STATE/api.sock          the API, owner only
//	STATE/store/            etcd: records of machines
//	STATE/ledger/           the ledger
//	STATE/images/           images
//	STATE/rules/            the owner's rules, *.yaml
//	STATE/machines/ID/      overlay.vol, console.log, console.tail0, console.tail1, qemu.log, guard.log, gate.log
//	STATE/layers/           frozen layers of machines' disks
//	STATE/checkpoints/ID/   checkpoints
//	STATE/run/ID/           sockets of a running machine; run/ID/qemu/ is the one directory that QEMU sees
//	/dev/shm/vigia-UID-HASH/ID.ram  RAM of a machine while it starts
type layout struct {
	root string
	ram  string
}

func newLayout(root string) layout {
	sum := sha256.Sum256([]byte(root))
	return layout{root: root, ram: filepath.Join("/dev/shm", "vigia-"+strconv.Itoa(os.Getuid())+"-"+hex.EncodeToString(sum[:4]))}
}

// tag marks all processes and control groups of this state on the host.
func (l layout) tag() string { return filepath.Base(l.ram) }

func (l layout) path(parts ...string) string {
	return filepath.Join(append([]string{l.root}, parts...)...)
}

func (l layout) machine(id vm.ID) string { return l.path("machines", string(id)) }
func (l layout) run(id vm.ID) string     { return l.path("run", string(id)) }
func (l layout) qemuDir(id vm.ID) string { return filepath.Join(l.run(id), "qemu") }
func (l layout) overlay(id vm.ID) string { return filepath.Join(l.machine(id), "overlay.vol") }
func (l layout) ramFile(id vm.ID) string { return filepath.Join(l.ram, string(id)+".ram") }
func (l layout) workerLog(id vm.ID, name string) string {
	return filepath.Join(l.machine(id), name+".log")
}
func (l layout) consoleLogs(id vm.ID) [3]string {
	dir := l.machine(id)
	return [3]string{filepath.Join(dir, "console.log"), filepath.Join(dir, "console.tail0"), filepath.Join(dir, "console.tail1")}
}

// prepare makes the directories and checks that they can be used: rights and room are found out here, not at the
// first write.
func (l layout) prepare() error {
	for _, dir := range []string{"", "ledger", "store", "images", "rules", "machines", "run", "layers"} {
		if err := os.MkdirAll(l.path(dir), 0o700); err != nil {
			return fmt.Errorf("state directory %s: %w: give another with --state DIR, or its rights to this user", l.root, bare(err))
		}
	}
	info, err := os.Stat(l.root)
	if err != nil {
		return fmt.Errorf("state directory %s: %w", l.root, bare(err))
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("state directory %s belongs to user %d: run vigia as that user, or give another with --state DIR", l.root, st.Uid)
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := os.Chmod(l.root, 0o700); err != nil {
			return fmt.Errorf("state directory %s is open to others, and its mode can't be changed: %w", l.root, bare(err))
		}
	}
	probe, err := os.CreateTemp(l.root, ".probe-")
	if err != nil {
		return fmt.Errorf("state directory %s can't be written: %w: give another with --state DIR", l.root, bare(err))
	}
	probe.Close()
	os.Remove(probe.Name())
	room, err := freeBytes(l.root)
	if err != nil {
		return fmt.Errorf("state directory %s: %w", l.root, err)
	}
	if room < minRoom {
		return fmt.Errorf("state directory %s: only %d MiB free, %d MiB are needed: free some, or give another with --state DIR", l.root, room>>20, minRoom>>20)
	}
	return l.prepareRAM()
}

// prepareRAM makes the RAM directory. /dev/shm is open to all users, so what is there already must be ours.
func (l layout) prepareRAM() error {
	if err := os.Mkdir(l.ram, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("RAM directory %s: %w", l.ram, bare(err))
	}
	info, err := os.Lstat(l.ram)
	if err != nil {
		return fmt.Errorf("RAM directory %s: %w", l.ram, bare(err))
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || !ok || int(st.Uid) != os.Geteuid() || info.Mode().Perm() != 0o700 {
		return fmt.Errorf("RAM directory %s is not this user's own: somebody else made it; remove it", l.ram)
	}
	return nil
}

// markRunning notes that a daemon runs, and reports whether the last one ended without saying so.
func (l layout) markRunning() (unclean bool) {
	_, err := os.Stat(l.path("running"))
	os.WriteFile(l.path("running"), nil, 0o600)
	return err == nil
}

func (l layout) markEnded() { os.Remove(l.path("running")) }

// freeBytes is the room that is left to this user on a path's file system.
func freeBytes(path string) (uint64, error) {
	var fsinfo syscall.Statfs_t
	if err := syscall.Statfs(path, &fsinfo); err != nil {
		return 0, err
	}
	return fsinfo.Bavail * uint64(fsinfo.Bsize), nil
}

// bare takes the path out of an error whose message names it anyway.
func bare(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// socketDir opens and dials unix sockets by way of a directory's descriptor: a path in a state directory may be longer
// than the 108 bytes of a socket's address.
type socketDir struct{ dir *os.File }

func openSocketDir(path string) (socketDir, error) {
	f, err := os.Open(path)
	return socketDir{f}, err
}

func (d socketDir) addr(name string) *net.UnixAddr {
	return &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.dir.Fd(), name)}
}

func (d socketDir) listen(name string) (*net.UnixListener, error) {
	os.Remove(filepath.Join(d.dir.Name(), name))
	l, err := net.ListenUnix("unix", d.addr(name))
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", filepath.Join(d.dir.Name(), name), err)
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}

// dial connects: a listener that nobody serves yet keeps the connection in its queue.
func (d socketDir) dial(name string) (*net.UnixConn, error) {
	c, err := net.DialUnix("unix", nil, d.addr(name))
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", filepath.Join(d.dir.Name(), name), err)
	}
	return c, nil
}

func (d socketDir) close() { d.dir.Close() }

// socketPair makes a connection of which the other end is given away.
func socketPair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	f := os.NewFile(uintptr(fds[0]), "pair")
	theirs = os.NewFile(uintptr(fds[1]), "pair")
	defer f.Close()
	if ours, err = net.FileConn(f); err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}
