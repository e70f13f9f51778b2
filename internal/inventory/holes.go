package inventory

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	version "github.com/knqyf263/go-deb-version"

	"vigia/internal/event"
	"vigia/internal/inventory/scan"
)

func (c *comparison) packages(now, then []scan.Package, holes *Holes) {
	id := func(p scan.Package) string { return p.Name + ":" + p.Arch }
	have := byKey(now, id)
	for _, old := range then {
		cur, there := have[id(old)]
		if there && cur.Version == old.Version {
			continue
		}
		if there && !older(old.Version, cur.Version) {
			continue // the rollback brings a newer one
		}
		reopened := holes.reopened(old, cur, there)
		for _, h := range reopened {
			c.add("vulnerability.returns", old.Name, h.severity, fmt.Sprintf("%s is open again: version %s has it, it is mended in %s", h.id, old.Version, h.fixed))
		}
		switch {
		case there:
			c.add("package.older", old.Name, Low, fmt.Sprintf("goes back from %s to %s", cur.Version, old.Version))
		default:
			c.add("package.returns", old.Name, Low, "is installed again, in version "+old.Version)
		}
	}
}

// older compares as dpkg does; versions that make no sense are told apart and not ordered, which counts as older.
func older(a, b string) bool {
	x, err1 := version.NewVersion(a)
	y, err2 := version.NewVersion(b)
	return err1 != nil || err2 != nil || x.LessThan(y)
}

// hole is one vulnerability of one source package.
type hole struct {
	id       string
	fixed    string // the first version without it; empty: none yet
	severity Severity
}

// Holes are known vulnerabilities by Debian source package.
type Holes struct {
	by map[string][]hole
	n  int
}

// Bounds of a vulnerability file: Debian's tracker of all releases has some 60 MB and 50,000 entries for one.
const maxHoles = 2_000_000

// ErrHoles says that a file is neither the Debian security tracker's JSON nor OSV's.
var ErrHoles = errors.New("not a vulnerability file: give the Debian security tracker's JSON, or an OSV record or list of records")

// Len says how many there are.
func (h *Holes) Len() int {
	if h == nil {
		return 0
	}
	return h.n
}

// ReadHoles reads the JSON of Debian's security tracker ({package: {CVE: {releases: {release: …}}}}), or an OSV record, or
// a list of them (https://ossf.github.io/osv-schema/), and keeps what is about release, a Debian codename such as bookworm with
// its number, "12". It reads as it goes: a file of any length takes the memory of what is kept.
func ReadHoles(r io.Reader, codename, number string) (*Holes, error) {
	h := &Holes{by: map[string][]hole{}}
	d := json.NewDecoder(r)
	t, err := d.Token()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrHoles, err)
	}
	switch t {
	case json.Delim('['):
		for d.More() {
			var o osv
			if err := d.Decode(&o); err != nil {
				return nil, fmt.Errorf("%w: record %d: %w", ErrHoles, h.n+1, err)
			}
			h.osv(o, number)
		}
	case json.Delim('{'):
		err = h.object(d, codename, number)
	default:
		return nil, ErrHoles
	}
	if err != nil {
		return nil, err
	}
	return h, nil
}

// object reads what stands in braces: one OSV record, whose keys are words of its schema, or the tracker's packages.
func (h *Holes) object(d *json.Decoder, codename, number string) error {
	var single osv
	isOSV := false
	for d.More() && h.n < maxHoles {
		t, err := d.Token()
		key, ok := t.(string)
		if err != nil || !ok {
			return fmt.Errorf("%w: %w", ErrHoles, err)
		}
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return fmt.Errorf("%w: %q: %w", ErrHoles, event.Text([]byte(key)), err)
		}
		if single.field(key, raw) {
			isOSV = true
			continue
		}
		var byCVE map[string]tracked
		if json.Unmarshal(raw, &byCVE) == nil && !isOSV {
			h.tracker(key, byCVE, codename)
		}
	}
	if isOSV {
		h.osv(single, number)
	}
	return nil
}

// tracked is the tracker's word on one CVE of one package.
type tracked struct {
	Releases map[string]struct {
		Status  string `json:"status"` // open, resolved, undetermined
		Fixed   string `json:"fixed_version"`
		Urgency string `json:"urgency"`
	} `json:"releases"`
}

func (h *Holes) tracker(pkg string, byCVE map[string]tracked, codename string) {
	for id, t := range byCVE {
		// A fixed version of 0 is the tracker's way to say that the release never had it.
		if rel, ok := t.Releases[codename]; ok && rel.Status == "resolved" && rel.Fixed != "" && rel.Fixed != "0" {
			h.add(pkg, hole{id, rel.Fixed, urgency(rel.Urgency)})
		}
	}
}

func urgency(s string) Severity {
	switch strings.TrimRight(s, "*") {
	case "high":
		return High
	case "low", "unimportant":
		return Low
	}
	return Medium
}

// osv is what is read of a record in OSV's schema.
type osv struct {
	ID       string   `json:"id"`
	Aliases  []string `json:"aliases"`
	Affected []struct {
		Package struct {
			Ecosystem string `json:"ecosystem"`
			Name      string `json:"name"`
		} `json:"package"`
		Ranges []struct {
			Type   string `json:"type"`
			Events []struct {
				Fixed string `json:"fixed"`
			} `json:"events"`
		} `json:"ranges"`
		Ecosystem struct {
			Urgency string `json:"urgency"`
		} `json:"ecosystem_specific"`
	} `json:"affected"`
}

// field takes a field of a record that is read one by one, and reports whether it is one of the schema's.
func (o *osv) field(key string, raw json.RawMessage) bool {
	switch key {
	case "id":
		return json.Unmarshal(raw, &o.ID) == nil
	case "aliases":
		return json.Unmarshal(raw, &o.Aliases) == nil
	case "affected":
		return json.Unmarshal(raw, &o.Affected) == nil
	case "schema_version", "modified", "published", "withdrawn", "related", "upstream", "summary", "details", "severity", "references", "credits", "database_specific":
		return true
	}
	return false
}

func (h *Holes) osv(o osv, number string) {
	id := o.ID
	for _, a := range o.Aliases {
		if strings.HasPrefix(a, "CVE-") {
			id = a
		}
	}
	for _, a := range o.Affected {
		if a.Package.Ecosystem != "Debian:"+number {
			continue
		}
		for _, r := range a.Ranges {
			for _, e := range r.Events {
				if e.Fixed != "" && e.Fixed != "0" {
					h.add(a.Package.Name, hole{id, e.Fixed, urgency(a.Ecosystem.Urgency)})
				}
			}
		}
	}
}

func (h *Holes) add(pkg string, x hole) {
	if h.n < maxHoles && len(pkg) < 256 && len(x.id) < 256 && len(x.fixed) < 256 {
		h.by[pkg] = append(h.by[pkg], x)
		h.n++
	}
}

// reopened are the holes that old has and cur has not.
func (h *Holes) reopened(old, cur scan.Package, there bool) (list []hole) {
	if h == nil {
		return nil
	}
	for _, x := range h.by[old.Source] {
		if older(old.SourceVersion, x.fixed) && !(there && older(cur.SourceVersion, x.fixed)) {
			list = append(list, x)
		}
	}
	return list
}
