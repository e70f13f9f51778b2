package host

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
)

// tool is a program that only image building and importing uses.
type tool struct {
	program, pack, use string
	rootless           bool // needed without root only
}

var tools = []tool{
	{"mmdebstrap", "mmdebstrap", "image build", false},
	{"mke2fs", "e2fsprogs", "image build", false},
	{"qemu-img", "qemu-utils", "image import", false},
	{"newuidmap", "uidmap", "image build without root", true},
}

func (h *Host) findTools(context.Context) Finding {
	var have, lack, packs []string
	for _, t := range tools {
		if t.rootless && os.Geteuid() == 0 && h.root == "" {
			continue
		}
		if _, ok := h.lookup(t.program); ok {
			have = append(have, t.program)
			continue
		}
		lack = append(lack, fmt.Sprintf("%s without %s", t.use, t.program))
		packs = append(packs, t.pack)
	}
	if len(lack) == 0 {
		return Finding{Status: OK, Seen: strings.Join(have, " ")}
	}
	return Finding{Status: Degraded, Seen: "found: " + strings.Join(have, " "),
		Consequence: "does not work: " + strings.Join(lack, ", "), Remedy: h.packages(slices.Compact(packs)...)}
}

// findSubIDs asks for the ranges that a user without root maps when he unpacks a distribution.
func (h *Host) findSubIDs(context.Context) Finding {
	if os.Geteuid() == 0 && h.root == "" {
		return Finding{Status: OK, Seen: "not needed as root"}
	}
	uid := strconv.Itoa(os.Geteuid())
	names := []string{uid}
	if u, err := user.LookupId(uid); err == nil {
		names = append(names, u.Username)
	}
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		text, _ := h.read(file)
		if subordinate(text, names) < 65536 {
			name := names[len(names)-1]
			return Finding{Status: Degraded, Seen: "no range of 65536 for " + name + " in " + file,
				Consequence: "images can't be built without root",
				Remedy:      "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 " + name}
		}
	}
	return Finding{Status: OK, Seen: "a range of 65536 or more"}
}

// subordinate is the largest range that /etc/subuid or subgid gives one of the names.
func subordinate(text string, names []string) int64 {
	var largest int64
	for line := range strings.Lines(text) {
		parts := strings.Split(strings.TrimSpace(line), ":")
		if len(parts) != 3 || !slices.Contains(names, parts[0]) {
			continue
		}
		if n, err := strconv.ParseInt(parts[2], 10, 64); err == nil {
			largest = max(largest, n)
		}
	}
	return largest
}
