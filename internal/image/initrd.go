package image

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// initrdModules are the drivers loaded before the root is mounted: the disk's, the ones every machine needs soon
// (so that nothing has to wait for udev), the ones that tell the host of a panic, which should be there early, and the checksum that ext4 asks
// the kernel for by its name and no module depends on: Debian's generic kernels have it as a module.
var initrdModules = []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "pvpanic-mmio", "pvpanic-pci", "crc32c_generic", "ext4"}

// initrdApplets are what recipes/initrd/init calls.
var initrdApplets = []string{"sh", "mount", "insmod", "findfs", "sleep", "switch_root"}

// writeInitrd makes the initrd for a kernel of the root: busybox from the root itself, the drivers that are not
// built in, decompressed, and the script that mounts the root. Equal roots give equal bytes.
func writeInitrd(w io.Writer, root *rootTar, version string) error {
	busybox, err := root.read("/usr/bin/busybox")
	if err != nil {
		if busybox, err = root.read("/bin/busybox"); err != nil {
			return fmt.Errorf("initrd: %w: add the package busybox-static", err)
		}
	}
	script, err := builtin.ReadFile("recipes/initrd/init")
	if err != nil {
		return err
	}
	var a archive
	for _, d := range []string{"dev", "proc", "sys", "root"} {
		a.dir(d)
	}
	a.add("dev/console", modeChar|0o600, nil)
	a.file("init", 0o755, script)
	a.file("bin/busybox", 0o755, busybox)
	for _, name := range initrdApplets {
		a.link("bin/"+name, "busybox")
	}
	order, err := addModules(&a, root, version)
	if err != nil {
		return fmt.Errorf("initrd: %w", err)
	}
	a.file("modules/order", 0o644, []byte(strings.Join(order, "\n")+"\n"))

	// gzip: every kernel reads it, and the little there is to gain with others is lost on so small a file
	z, _ := gzip.NewWriterLevel(w, gzip.BestCompression)
	if err := a.writeTo(z); err != nil {
		return err
	}
	return z.Close()
}

// addModules adds the drivers and what they depend on, and returns their file names in loading order.
func addModules(a *archive, root *rootTar, version string) ([]string, error) {
	base := "/usr/lib/modules/" + version
	list, err := root.read(base + "/modules.dep")
	if err != nil {
		base = "/lib/modules/" + version
		if list, err = root.read(base + "/modules.dep"); err != nil {
			return nil, err
		}
	}
	var order []string
	for _, file := range loadOrder(list, initrdModules) {
		data, err := root.read(base + "/" + file)
		if err != nil {
			return nil, err
		}
		if data, err = decompressModule(file, data); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		name := moduleName(file) + ".ko"
		a.file("modules/"+name, 0o644, data)
		order = append(order, name)
	}
	return order, nil
}

// loadOrder lists the files of the wanted modules with dependencies before dependents, from the text of modules.dep:
// lines of "file: files it needs". A module that has no line is built in.
func loadOrder(dep []byte, wanted []string) []string {
	needs := map[string][]string{}
	byName := map[string]string{}
	for line := range strings.Lines(string(dep)) {
		file, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if ok {
			needs[file] = strings.Fields(rest)
			byName[moduleName(file)] = file
		}
	}
	var order []string
	visited := map[string]bool{}
	var visit func(file string)
	visit = func(file string) {
		if visited[file] {
			return
		}
		visited[file] = true
		for _, n := range needs[file] {
			visit(n)
		}
		order = append(order, file)
	}
	for _, name := range wanted {
		if file, ok := byName[strings.ReplaceAll(name, "-", "_")]; ok {
			visit(file)
		}
	}
	return order
}

// moduleName is a module's name as the kernel writes it: virtio_blk for kernel/drivers/block/virtio_blk.ko.xz.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func decompressModule(file string, data []byte) ([]byte, error) {
	var r io.Reader
	var err error
	switch path.Ext(file) {
	case ".ko":
		return data, nil
	case ".xz":
		r, err = xz.NewReader(bytes.NewReader(data))
	case ".gz":
		r, err = gzip.NewReader(bytes.NewReader(data))
	case ".zst":
		var z *zstd.Decoder
		if z, err = zstd.NewReader(bytes.NewReader(data)); err == nil {
			defer z.Close()
		}
		r = z
	default:
		err = fmt.Errorf("unknown compression")
	}
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(r, maxFromRoot))
}
