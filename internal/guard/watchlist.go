package guard

import (
	"slices"
	"strings"
)

// watchlist is what rules want to be told of: literal paths, and patterns in which ** stands for any bytes at all. A
// tracker follows whole directories, so each pattern becomes the nearest directory, and what is not meant is dropped
// again. A pattern that begins anywhere is followed where people's own files are.
type watchlist struct {
	literal  map[string]bool
	patterns [][]string // the pieces between the **
}

var homes = []string{"/root/**", "/home/**"}

func newWatchlist(paths []string) *watchlist {
	w := &watchlist{literal: map[string]bool{}}
	for _, p := range paths {
		if strings.Contains(p, "**") {
			w.patterns = append(w.patterns, strings.Split(p, "**"))
		} else {
			w.literal[p] = true
		}
	}
	return w
}

// followed are the paths for the tracker.
func (w *watchlist) followed() []string {
	var out []string
	for p := range w.literal {
		out = append(out, p)
	}
	for _, pieces := range w.patterns {
		i := strings.LastIndexByte(pieces[0], '/')
		if i < 0 {
			out = append(out, homes...)
		} else {
			out = append(out, pieces[0][:i+1]+"**")
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// meant picks the first of a file's paths that somebody wants to hear of.
func (w *watchlist) meant(paths ...string) (string, bool) {
	for _, path := range paths {
		if w.literal[path] || slices.ContainsFunc(w.patterns, func(pieces []string) bool { return matches(pieces, path) }) {
			return path, true
		}
	}
	return "", false
}

// matches tells whether the pieces stand in the path in order, the first at its beginning and the last at its end.
func matches(pieces []string, path string) bool {
	rest, ok := strings.CutPrefix(path, pieces[0])
	if !ok {
		return false
	}
	last := len(pieces) - 1
	for _, piece := range pieces[1:last] {
		i := strings.Index(rest, piece)
		if i < 0 {
			return false
		}
		rest = rest[i+len(piece):]
	}
	return last == 0 || strings.HasSuffix(rest, pieces[last])
}
