package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// mkfs puts a root's tar on an ext4 file system in a raw disk, without mounting anything.
type mkfs struct {
	tools     builders
	temporary *temporary
	recipe    Recipe
	epoch     int64
}

// run chooses the way: a mke2fs that reads tar files (1.47.1 and newer, with libarchive) needs no rights at all; else
// the tar is unpacked, as root, or under fakeroot, which lets mke2fs see the owners that could not be set.
func (m mkfs) run(ctx context.Context, tarball, disk string) error {
	tree := m.temporary.path("tree")
	defer os.RemoveAll(tree)
	switch {
	case makesFromTar(m.tools):
		return m.make(ctx, m.tools.mke2fs, m.args(tarball, disk))
	case os.Geteuid() == 0:
		if err := os.Mkdir(tree, 0o755); err != nil {
			return err
		}
		if err := m.make(ctx, m.tools.tar, m.unpack(tarball, tree)); err != nil {
			return err
		}
		return m.make(ctx, m.tools.mke2fs, m.args(tree, disk))
	}
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	script := quoteAll(append([]string{m.tools.tar}, m.unpack(tarball, tree)...)) + " && " +
		quoteAll(append([]string{m.tools.mke2fs}, m.args(tree, disk)...)) + " && chmod -R u+rwX " + quote(tree)
	return m.make(ctx, m.tools.fakeroot, []string{"--", "sh", "-c", script})
}

func (m mkfs) unpack(tarball, tree string) []string {
	return []string{"-C", tree, "--numeric-owner", "--same-permissions", "--same-owner", "--xattrs", "--xattrs-include=*", "-xf", tarball}
}

// args are mke2fs's. Features that older tools and kernels lack are off, whatever the host's mke2fs.conf says; the
// tables are written now, as zeros that cost nothing in a sparse file, so that no guest does it later.
func (m mkfs) args(from, disk string) []string {
	uuid := m.uuid()
	return []string{"-q", "-F", "-t", "ext4", "-L", rootLabel, "-U", uuid, "-m", "1", "-b", "4096",
		"-O", "^orphan_file,^metadata_csum_seed", "-E", "hash_seed=" + uuid + ",lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0",
		"-d", from, disk, fmt.Sprintf("%dk", m.recipe.diskSize()>>10)}
}

// uuid is that of the file system: fixed by the recipe, so that equal builds give equal disks.
func (m mkfs) uuid() string {
	sum := sha256.Sum256([]byte("vigia root\n" + m.recipe.Digest()))
	sum[6], sum[8] = sum[6]&0x0f|0x80, sum[8]&0x3f|0x80 // version 8, RFC 9562
	return fmt.Sprintf("%x-%x-%x-%x-%x", sum[0:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
}

func (m mkfs) make(ctx context.Context, program string, args []string) error {
	said := &tail{}
	epoch := fmt.Sprint(m.epoch)
	err := Run(ctx, Command{Path: program, Args: args, Dir: m.temporary.dir, Stdout: said, Stderr: said,
		Env: []string{"SOURCE_DATE_EPOCH=" + epoch, "E2FSPROGS_FAKE_TIME=" + epoch}})
	return said.explain(filepath.Base(program), err)
}

// tarProbe remembers what makesFromTar found out.
var tarProbe struct {
	sync.Mutex
	known map[string]bool
}

// makesFromTar tries whether mke2fs reads tar files: its version alone does not tell, the library may be missing.
func makesFromTar(tools builders) bool {
	tarProbe.Lock()
	defer tarProbe.Unlock()
	ok, known := tarProbe.known[tools.mke2fs]
	if !known {
		ok = tryTar(tools.mke2fs) == nil
		tarProbe.known = map[string]bool{tools.mke2fs: ok}
	}
	return ok
}

func tryTar(mke2fs string) error {
	dir, err := os.MkdirTemp("", "vigia-mke2fs-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tarball := filepath.Join(dir, "t.tar")
	err = create(tarball, func(f *os.File) error {
		w := tar.NewWriter(f)
		if err := w.WriteHeader(&tar.Header{Name: "./d/", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 7, ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		return w.Close()
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return Run(ctx, Command{Path: mke2fs, Args: []string{"-q", "-F", "-t", "ext4", "-d", tarball, filepath.Join(dir, "disk"), "4M"}, Dir: dir})
}
