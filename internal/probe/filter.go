package probe

import "strings"

// anchor is a part of a path that every file meant by a pattern has: the plugin asks only about files which, or a directory
// above which, have such a name. It is a sieve, no judgement: who decides is the guard, by the whole path.
type anchor struct {
	text string
	how  uint8
}

// How an anchor stands in a name.
const (
	nameIs uint8 = iota
	nameBegins
	nameEnds
	nameAny
)

// anchors are those of the watched paths, in which ** stands for any bytes. A pattern without any name in it, or more
// than there is room for, lets every file through.
func anchors(paths []string) []anchor {
	seen := map[anchor]bool{}
	var out []anchor
	for _, path := range paths {
		a := anchorOf(path)
		if a.how == nameAny {
			return []anchor{a}
		}
		if !seen[a] {
			seen[a] = true
			out = append(out, a)
		}
	}
	if len(out) > maxNames {
		return []anchor{{how: nameAny}}
	}
	return out
}

// anchorOf picks the longest name of a pattern, or the last of a path without patterns.
func anchorOf(path string) (best anchor) {
	best.how = nameAny
	parts := strings.Split(path, "/")
	if !strings.Contains(path, "**") {
		parts = parts[len(parts)-1:]
	}
	for _, part := range parts {
		a := anchor{text: part, how: nameIs}
		if before, after, ok := strings.Cut(part, "**"); ok {
			a = anchor{before, nameBegins}
			if i := strings.LastIndex(after, "**"); i >= 0 {
				after = after[i+2:]
			}
			if len(after) > len(before) {
				a = anchor{after, nameEnds}
			}
		}
		if len(a.text) > maxNameLen {
			if a.how == nameEnds {
				a.text = a.text[len(a.text)-maxNameLen:]
			} else {
				a = anchor{a.text[:maxNameLen], nameBegins}
			}
		}
		if len(a.text) > len(best.text) {
			best = a
		}
	}
	return best
}

// sift writes the anchors into the page. Points that are filtered must not be enabled meanwhile.
func (p *page) sift(list []anchor) {
	p.put32(atNames, 0)
	for i, a := range list {
		at := atFilter + i*nameSize
		clear(p.b[at : at+nameSize])
		p.b[at], p.b[at+1] = uint8(len(a.text)), a.how
		copy(p.b[at+2:at+nameSize], a.text)
	}
	p.put32(atNames, uint32(len(list)))
}
