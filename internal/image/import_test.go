package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vigia/internal/vm"
)

// foreign is the tree of a disk somebody else made.
func foreign() map[string]string {
	return map[string]string{"etc/os-release": "ID=other\n", "usr/bin/": "", "boot/vmlinuz-6.1.0-9": "old", "boot/vmlinuz-6.1.0-10": "newest kernel",
		"boot/vmlinuz-0-rescue-abc": "rescue", "boot/vmlinuz-9$(evil)": "evil", "boot/initrd.img-6.1.0-10": "its initrd"}
}

func checkImported(t *testing.T, s *Store, img Image, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if img.Kernel != "6.1.0-10" || img.Disk != 16<<20 {
		t.Errorf("%+v", img.Info)
	}
	if want := "root=UUID=" + testUUID + " rootfstype=ext4 ro console=ttyS0"; !strings.HasPrefix(img.Cmdline, want) {
		t.Errorf("command line %q", img.Cmdline)
	}
	kernel, _ := os.ReadFile(img.Path(PartKernel))
	initrd, _ := os.ReadFile(img.Path(PartInitrd))
	if string(kernel) != "newest kernel" || string(initrd) != "its initrd" {
		t.Errorf("kernel %q, initrd %q", kernel, initrd)
	}
	if got := readFromImage(t, &img, "/etc/os-release"); got != "ID=other\n" {
		t.Errorf("the disk holds %q", got)
	}
	if _, err := s.Verify(t.Context(), img.Name); err != nil {
		t.Error(err)
	}
	leftovers(t, s)
}

func TestImportRaw(t *testing.T) {
	s := openStore(t)
	disk := makeDisk(t, foreign())
	before, _ := os.ReadFile(disk)
	img, err := s.Import(t.Context(), disk, "foreign", ImportOptions{}, nil)
	checkImported(t, s, img, err)
	if after, _ := os.ReadFile(disk); !bytes.Equal(before, after) {
		t.Error("the imported file was changed")
	}
}

func TestImportOtherFormats(t *testing.T) {
	disk := makeDisk(t, foreign())
	for _, format := range []string{"qcow2", "vmdk", "vdi"} {
		t.Run(format, func(t *testing.T) {
			s := openStore(t)
			file := filepath.Join(t.TempDir(), "disk."+format)
			qemuImg(t, "convert", "-O", format, disk, file)
			img, err := s.Import(t.Context(), file, "foreign", ImportOptions{}, nil)
			checkImported(t, s, img, err)
		})
	}
}

// TestImportIsConfined has a Runner look at how qemu-img would be run.
func TestImportIsConfined(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", file, "16M")
	var ran []string
	s, err := Open(filepath.Join(t.TempDir(), "images"), Options{Worker: fakeKernels{}, Confine: func(ctx context.Context, c Command) error {
		line := strings.Join(c.Args, " ")
		ran = append(ran, c.Args[0])
		if strings.Contains(line, file) || strings.Contains(line, filepath.Dir(c.Files[0].Name())) || !strings.Contains(line, `"driver":"qcow2"`) || !strings.Contains(line, `"backing":null`) {
			t.Errorf("%s names a path or leaves the format open", line)
		}
		for _, f := range c.Files {
			if info, err := f.Stat(); err != nil || info.Mode().Perm()&0o004 == 0 {
				t.Errorf("another user could not reopen descriptor %s: %v", f.Name(), info.Mode())
			}
		}
		return Run(ctx, c)
	}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Import(t.Context(), file, "x", ImportOptions{}, nil)
	if !errors.Is(err, ErrNoRoot) {
		t.Errorf("an empty disk: %v", err)
	}
	if fmt.Sprint(ran) != "[check convert]" {
		t.Errorf("ran %v", ran)
	}
	leftovers(t, s)
}

// partitioned puts ext4 disks into the partitions of an MBR disk, one MiB apart.
func partitioned(t *testing.T, disks ...string) string {
	t.Helper()
	head := make([]byte, 1<<20)
	head[510], head[511] = 0x55, 0xaa
	all := head
	for i, d := range disks {
		data, err := os.ReadFile(d)
		if err != nil {
			t.Fatal(err)
		}
		entry := head[446+16*i:]
		entry[4] = 0x83
		binary.LittleEndian.PutUint32(entry[8:], uint32(len(all)/512))
		binary.LittleEndian.PutUint32(entry[12:], uint32(len(data)/512))
		all = append(all, data...)
		copy(all, head)
	}
	name := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(name, all, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestImportWithBootPartition(t *testing.T) {
	boot := makeDisk(t, map[string]string{"vmlinuz-6.5": "boot kernel", "initramfs-6.5.img": "boot initrd"})
	root := makeDisk(t, map[string]string{"etc/fstab": "", "usr/bin/": "", "boot/": ""})
	s := openStore(t)
	img, err := s.Import(t.Context(), partitioned(t, boot, root), "parts", ImportOptions{Cmdline: "quiet loglevel=1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	kernel, _ := os.ReadFile(img.Path(PartKernel))
	initrd, _ := os.ReadFile(img.Path(PartInitrd))
	if string(kernel) != "boot kernel" || string(initrd) != "boot initrd" || img.Kernel != "6.5" || !strings.HasSuffix(img.Cmdline, "quiet loglevel=1") {
		t.Errorf("%q %q %q", kernel, initrd, img.Cmdline)
	}
}

func TestImportGivenKernel(t *testing.T) {
	disk := makeDisk(t, map[string]string{"etc/fstab": "", "usr/bin/": ""})
	s := openStore(t)
	_, err := s.Import(t.Context(), disk, "x", ImportOptions{}, nil)
	if !errors.Is(err, ErrNoKernel) || !strings.Contains(err.Error(), "give --kernel") || !strings.Contains(err.Error(), disk) {
		t.Errorf("without a kernel: %v", err)
	}
	leftovers(t, s)
	kernel := filepath.Join(t.TempDir(), "vmlinuz-7.0")
	initrd := kernel + ".initrd"
	if err := errors.Join(os.WriteFile(kernel, []byte("given kernel"), 0o600), os.WriteFile(initrd, []byte("given initrd"), 0o600)); err != nil {
		t.Fatal(err)
	}
	img, err := s.Import(t.Context(), disk, "x", ImportOptions{Kernel: kernel, Initrd: initrd}, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, _ := os.ReadFile(img.Path(PartKernel))
	if string(got) != "given kernel" || img.Kernel != "7.0" || img.Path(PartInitrd) == "" {
		t.Errorf("%q %+v", got, img.Info)
	}
	blank := filepath.Join(t.TempDir(), "blank.raw")
	if err := os.WriteFile(blank, bytes.Repeat([]byte{7}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	img, err = s.Import(t.Context(), blank, "y", ImportOptions{Kernel: kernel, Cmdline: "root=/dev/vda rootfstype=xfs"}, nil)
	if err != nil || img.Root != "/dev/vda" || strings.Count(img.Cmdline, "root=") != 1 {
		t.Errorf("%v %q", err, img.Cmdline)
	}
	for name, o := range map[string]ImportOptions{"initrd alone": {Initrd: initrd}, "line break": {Cmdline: "a\nb"}} {
		if _, err := s.Import(t.Context(), disk, "z", o, nil); !errors.Is(err, vm.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Import(t.Context(), disk, "z", ImportOptions{Kernel: "/nonexistent"}, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent kernel: %v", err)
	}
}

// TestImportRefuses has files that must not be imported, most of them because they would read others.
func TestImportRefuses(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	disk := makeDisk(t, foreign())
	file := func(name string, data []byte) string {
		at := filepath.Join(dir, name)
		if err := os.WriteFile(at, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return at
	}
	file("secret", bytes.Repeat([]byte("secret"), 1<<18))
	made := func(name string, args ...string) string {
		at := filepath.Join(dir, name)
		qemuImg(t, append(args, at)...)
		return at
	}
	backed := filepath.Join(dir, "backed.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", backed)
	external := filepath.Join(dir, "external.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "data"), external, "1M")
	child := filepath.Join(dir, "child.vmdk")
	parent := made("parent.vmdk", "convert", "-O", "vmdk", disk)
	qemuImg(t, "create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", child)
	whole := made("whole.qcow2", "convert", "-O", "qcow2", disk)
	qcow2, _ := os.ReadFile(whole)
	patched := func(at int, b ...byte) []byte {
		p := bytes.Clone(qcow2)
		copy(p[at:], b)
		return p
	}
	raw, _ := os.ReadFile(disk)
	noise := bytes.Repeat([]byte("noise "), 1<<18)
	for _, c := range []struct {
		name, file string
		is         error
		says       string
	}{
		{"absent", filepath.Join(dir, "absent"), fs.ErrNotExist, "absent"},
		{"empty", file("empty", nil), nil, "the file is empty"},
		{"directory", dir, nil, "not a regular file"},
		{"device", "/dev/zero", nil, "not a regular file"},
		{"noise", file("noise", noise), ErrNoRoot, "nothing that is known"},
		{"raw cut off", file("cut.raw", raw[:len(raw)/2]), ErrNoRoot, ""},
		{"swap", file("swap", append(append(make([]byte, 4086), "SWAPSPACE2"...), make([]byte, 1<<20)...)), ErrNoRoot, "swap"},
		{"backing file", backed, ErrFormat, "needs a backing file"},
		{"data file", external, ErrFormat, "keeps its data in another file"},
		{"vmdk parent", child, ErrFormat, "needs a parent file"},
		{"vmdk descriptor", file("d.vmdk", []byte("# Disk DescriptorFile\nRW 2 FLAT \""+secret+"\" 0\n")), ErrFormat, "vmdk descriptor is not imported"},
		{"vmdk of extents", file("e.vmdk", append([]byte("KDMV\x01\x00\x00\x00"), make([]byte, 504)...)), ErrFormat, "names its data in other files"},
		{"qcow2 header alone", file("h.qcow2", qcow2[:80]), ErrFormat, "cut off"},
		{"qcow2 cut off", file("c.qcow2", qcow2[:len(qcow2)*2/3]), ErrFormat, "cut off"},
		{"qcow2 version", file("v.qcow2", patched(4, 0, 0, 0, 9)), ErrFormat, "version 9"},
		{"qcow2 encrypted", file("x.qcow2", patched(32, 0, 0, 0, 1)), ErrFormat, "encrypted"},
		{"qcow2 size", file("s.qcow2", patched(24, 0x7f, 0xff)), ErrFormat, "bytes: use"},
		{"qcow2 clusters", file("b.qcow2", patched(20, 0, 0, 0, 60)), ErrFormat, "2^60"},
		{"qcow2 corrupt", file("m.qcow2", patched(79, 2)), ErrFormat, "marked as corrupt"},
		{"qcow2 features", file("f.qcow2", patched(72, 0x80)), ErrFormat, "unknown features"},
		{"qcow2 damaged", file("t.qcow2", patched(0x30000, bytes.Repeat([]byte{0x7f}, 4096)...)), ErrFormat, "damaged"},
		{"vhdx", file("v.vhdx", append([]byte("vhdxfile"), make([]byte, 1024)...)), ErrFormat, "convert it to qcow2 or raw first"},
		{"luks", file("l.raw", append([]byte("LUKS\xba\xbe"), make([]byte, 1024)...)), ErrFormat, "luks"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := openStore(t)
			_, err := s.Import(t.Context(), c.file, "x", ImportOptions{}, nil)
			if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), c.file) {
				t.Errorf("%v", err)
			}
			if list, _ := s.List(); len(list) != 0 {
				t.Errorf("an image came of it: %v", list)
			}
			leftovers(t, s)
		})
	}
}

// TestBackingFileIsNotReadAnyway runs the conversion without the check before it: the arguments alone must keep
// qemu-img from the backing file.
func TestBackingFileIsNotReadAnyway(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("secret"), 1<<18), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "backed.qcow2")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", file)
	s := openStore(t)
	tmp, err := s.temporary()
	if err != nil {
		t.Fatal(err)
	}
	defer tmp.remove()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = s.convert(t.Context(), tmp, f, Format{"qcow2", 3 << 19}, tmp.path("disk.raw"), nil)
	text, _ := os.ReadFile(tmp.path("disk.raw"))
	if bytes.Contains(text, []byte("secret")) {
		t.Errorf("the backing file was read (%v)", err)
	}
}

func FuzzSniff(f *testing.F) {
	header := make([]byte, 512)
	copy(header, "QFI\xfb\x00\x00\x00\x03")
	header[23], header[27], header[47] = 16, 1, 100
	f.Add(header)
	vmdk := make([]byte, 1024)
	copy(vmdk, "KDMV")
	vmdk[12], vmdk[28], vmdk[36] = 1, 1, 1
	f.Add(vmdk)
	vdi := make([]byte, 512)
	binary.LittleEndian.PutUint32(vdi[0x40:], 0xbeda107f)
	f.Add(vdi)
	f.Add([]byte("raw"))
	f.Fuzz(func(t *testing.T, b []byte) {
		format, err := sniff(b[:min(len(b), 512)], bytes.NewReader(b), int64(len(b)))
		if err == nil && format.Name == "" {
			t.Error("neither a format nor an error")
		}
		if err != nil && format != (Format{}) {
			t.Error("both a format and an error")
		}
	})
}

// TestLimited starts a shell in place of qemu-img and has it try what it should not be able to.
func TestLimited(t *testing.T) {
	f, err := openShared(filepath.Join(t.TempDir(), "in"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.WriteString("handed over")
	var out bytes.Buffer
	err = Limited(t.Context(), Command{Path: "/bin/sh", Files: []*os.File{f}, Stdout: &out, Stderr: &out, Args: []string{"-c", `
		cat /proc/self/fd/3; echo
		head -c 1 /etc/shadow >/dev/null 2>&1 && echo reads shadow
		grep -c . /proc/net/dev
		grep -E '^(NoNewPrivs|CapEff|CapBnd)' /proc/self/status`}})
	text := out.String()
	if err != nil || !strings.HasPrefix(text, "handed over\n") || strings.Contains(text, "shadow") || !strings.Contains(text, "NoNewPrivs:\t1") {
		t.Errorf("%v\n%s", err, text)
	}
	if os.Geteuid() == 0 && (!strings.Contains(text, "\n3\n") || !strings.Contains(text, "CapEff:\t0000000000000000") || !strings.Contains(text, "CapBnd:\t0000000000000000")) {
		t.Errorf("more than loopback, or capabilities:\n%s", text)
	}
}
