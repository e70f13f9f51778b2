package image

import "path/filepath"

// Path returns where a part is on the host, for QEMU to be shown it; empty where the image has no such part.
func (i *Image) Path(name string) string {
	if _, ok := i.m.Parts[name]; !ok {
		return ""
	}
	return filepath.Join(i.dir, name)
}
