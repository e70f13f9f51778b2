package jail

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Bind is a file or directory of the host that shows at a path of the new root. The zero flags are the safest:
// read-only, nothing in it executable, no device, no set-user-id.
type Bind struct {
	Source string `json:"source"`
	Target string `json:"target"` // absolute; Source if empty
	Write  bool   `json:"write,omitempty"`
	Exec   bool   `json:"exec,omitempty"`   // programs and libraries
	Device bool   `json:"device,omitempty"` // a device node of /dev
	Reason string `json:"reason,omitempty"`
}

func (b Bind) target() string {
	if b.Target == "" {
		return b.Source
	}
	return b.Target
}

// attributes are the mount attributes to add. They are only ever added: a flag that the host's own mount carries stays,
// as an unprivileged user namespace requires.
func (b Bind) attributes() uint64 {
	a := uint64(unix.MOUNT_ATTR_NOSUID)
	if !b.Write {
		a |= unix.MOUNT_ATTR_RDONLY
	}
	if !b.Exec {
		a |= unix.MOUNT_ATTR_NOEXEC
	}
	if !b.Device {
		a |= unix.MOUNT_ATTR_NODEV
	}
	return a
}

func (b Bind) check() error {
	for _, p := range []string{b.Source, b.target()} {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || p == "/" {
			return fmt.Errorf("bind %q at %q: both must be clean absolute paths", b.Source, b.target())
		}
	}
	return nil
}

// rootPlaces are directories that exist everywhere and may be covered for the instant between building the new root
// and changing to it; the binds have been taken hold of before.
var rootPlaces = []string{"/tmp", "/mnt", "/run", "/var"}

// held is a bind's detached mount, taken before anything is covered.
type held struct {
	Bind
	fd  int
	dir bool
}

// newRoot leaves the process in an empty read-only root that holds the binds, with the host's root unmounted. It needs
// a mount namespace of its own and CAP_SYS_ADMIN in it, and works on the whole process.
func newRoot(binds []Bind, links map[string]string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return refused(fmt.Errorf("make mounts private: %w", err))
	}
	mounts, err := takeHold(binds)
	defer func() {
		for _, m := range mounts {
			unix.Close(m.fd)
		}
	}()
	if err != nil {
		return err
	}
	root, err := emptyTree()
	if err != nil {
		return refused(err)
	}
	defer unix.Close(root)
	for target, dest := range links {
		if err := makeLink(root, target, dest); err != nil {
			return err
		}
	}
	for _, m := range mounts {
		if err := m.place(root); err != nil {
			return fmt.Errorf("bind %s: %w", m.target(), err)
		}
	}
	return refused(changeRoot(root))
}

func takeHold(binds []Bind) ([]held, error) {
	var mounts []held
	for _, b := range binds {
		if err := b.check(); err != nil {
			return mounts, err
		}
		m, err := b.takeHold()
		if err != nil {
			return mounts, fmt.Errorf("bind %s: %w", b.Source, err)
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

func (b Bind) takeHold() (held, error) {
	var st unix.Stat_t
	if err := unix.Stat(b.Source, &st); err != nil {
		return held{}, err
	}
	m := held{Bind: b, dir: st.Mode&unix.S_IFMT == unix.S_IFDIR}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if m.dir {
		flags |= unix.AT_RECURSIVE // what is mounted below can't be left uncovered without privilege
	}
	var err error
	if m.fd, err = unix.OpenTree(unix.AT_FDCWD, b.Source, flags); err != nil {
		return held{}, refused(err)
	}
	attr := unix.MountAttr{Attr_set: b.attributes()}
	if err := unix.MountSetattr(m.fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		unix.Close(m.fd)
		return held{}, refused(fmt.Errorf("restrict the mount: %w", err))
	}
	return m, nil
}

// emptyTree mounts a small tmpfs over one of the places and returns a descriptor of it.
func emptyTree() (int, error) {
	fsfd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open a tmpfs: %w", err)
	}
	defer unix.Close(fsfd)
	for key, value := range map[string]string{"mode": "0755", "size": "1m", "nr_inodes": "4096"} {
		if err := unix.FsconfigSetString(fsfd, key, value); err != nil {
			return -1, fmt.Errorf("tmpfs %s=%s: %w", key, value, err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return -1, fmt.Errorf("make a tmpfs: %w", err)
	}
	root, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mount a tmpfs: %w", err)
	}
	for _, place := range rootPlaces {
		if err = unix.MoveMount(root, "", unix.AT_FDCWD, place, unix.MOVE_MOUNT_F_EMPTY_PATH); err == nil {
			return root, nil
		}
	}
	unix.Close(root)
	return -1, fmt.Errorf("no directory of %s to put the new root at: %w", strings.Join(rootPlaces, " "), err)
}

// place puts a held mount at its target under root.
func (m held) place(root int) error {
	rel := strings.TrimPrefix(m.target(), "/")
	if err := makeDirs(root, filepath.Dir(rel)); err != nil {
		return err
	}
	if err := makePoint(root, rel, m.dir); err != nil {
		return err
	}
	return unix.MoveMount(m.fd, "", root, rel, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

func makePoint(root int, rel string, dir bool) error {
	var err error
	if dir {
		err = unix.Mkdirat(root, rel, 0o755)
	} else {
		err = unix.Mknodat(root, rel, unix.S_IFREG|0o444, 0)
	}
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

func makeDirs(root int, rel string) error {
	if rel == "." {
		return nil
	}
	if err := makeDirs(root, filepath.Dir(rel)); err != nil {
		return err
	}
	if err := unix.Mkdirat(root, rel, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func makeLink(root int, target, dest string) error {
	rel := strings.TrimPrefix(target, "/")
	if err := makeDirs(root, filepath.Dir(rel)); err != nil {
		return err
	}
	return unix.Symlinkat(dest, root, rel)
}

// changeRoot makes the tree the root of every thread, drops the old one, and closes the new one for writing.
func changeRoot(root int) error {
	if err := unix.Fchdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("drop the host's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", 0, &attr); err != nil {
		return fmt.Errorf("make the root read-only: %w", err)
	}
	return nil
}
