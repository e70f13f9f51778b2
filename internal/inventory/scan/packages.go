package scan

import (
	"bytes"
	"strings"
)

// Package is an installed package.
type Package struct {
	Name          string `json:"name"`
	Arch          string `json:"arch"`
	Version       string `json:"version"`
	Source        string `json:"source"` // the source package: what vulnerabilities are listed by
	SourceVersion string `json:"source_version"`
}

// Service is a unit that starts by itself.
type Service struct {
	Unit   string `json:"unit"`
	Target string `json:"target"` // what wants it
}

func (r *reader) packages() {
	r.Packages = parseStatus(r.file("/var/lib/dpkg/status", maxStatus))
	if len(r.Packages) == maxEntries {
		r.note("more than %d packages: the others are left out", maxEntries)
	}
	if len(r.Packages) == 0 {
		r.note("no packages were found: /var/lib/dpkg/status is empty or absent")
	}
}

// parseStatus reads dpkg's status file: paragraphs of "Field: value", parted by empty lines.
func parseStatus(b []byte) (list []Package) {
	var p Package
	installed := false
	end := func() {
		if installed && p.Name != "" && len(list) < maxEntries {
			if p.Source == "" {
				p.Source = p.Name
			}
			if p.SourceVersion == "" {
				p.SourceVersion = p.Version
			}
			list = append(list, p)
		}
		p, installed = Package{}, false
	}
	for line := range bytes.Lines(b) {
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			end()
			continue
		}
		field, value, ok := strings.Cut(string(line[:min(len(line), 1024)]), ":")
		if !ok || field == "" || field[0] == ' ' || field[0] == '\t' {
			continue
		}
		value = strings.TrimSpace(value)
		switch field {
		case "Package":
			p.Name = text(value)
		case "Status":
			installed = strings.HasSuffix(value, " installed")
		case "Version":
			p.Version = text(value)
		case "Architecture":
			p.Arch = text(value)
		case "Source":
			name, version, _ := strings.Cut(value, " ")
			p.Source, p.SourceVersion = text(name), text(strings.Trim(version, "()"))
		}
	}
	end()
	return list
}

// services are the links in the .wants and .requires directories of /etc/systemd/system, and what rc2.d starts where there is no
// unit: what systemctl enable makes. Units that a package's own /lib/systemd has wanted are the package's.
func (r *reader) services() {
	for _, root := range []string{"/etc/systemd/system", "/etc/systemd/user"} {
		for _, dir := range r.dir(root) {
			target, ok := strings.CutSuffix(dir.Name(), ".wants")
			if !ok {
				target, ok = strings.CutSuffix(dir.Name(), ".requires")
			}
			if !ok || !dir.IsDir() {
				continue
			}
			for _, e := range r.dir(join(root, dir.Name())) {
				if e.Name() == "." || e.Name() == ".." || !room(r, r.Services, "services") {
					continue
				}
				r.Services = append(r.Services, Service{Unit: text(e.Name()), Target: text(target)})
			}
		}
	}
	for _, e := range r.dir("/etc/rc2.d") {
		if name := e.Name(); len(name) > 3 && name[0] == 'S' && room(r, r.Services, "services") {
			r.Services = append(r.Services, Service{Unit: text(name[3:]), Target: "rc2.d"})
		}
	}
}
