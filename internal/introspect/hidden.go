package introspect

import (
	"fmt"
	"slices"
	"strings"
)

// Kinds of findings about what is hidden.
const (
	KindProcessHidden = "process.hidden"
	KindThreadHidden  = "thread.hidden"
	KindDisguised     = "process.disguised" // says it is a kernel thread, and is none
	KindModuleHidden  = "module.hidden"
	KindSocketHidden  = "socket.hidden"
	KindListBroken    = "list.broken"
)

// A listing is what one view lists: addresses of tasks, or of modules.
type listing struct {
	name  string
	at    map[uint64]bool
	known bool   // it could be read
	why   string // it could not
	// broken are nodes whose next node does not point back at them, however often they are read.
	broken []uint64
}

func newListing(name string) *listing {
	return &listing{name: name, at: map[uint64]bool{}, known: true}
}

// unknown gives a listing up.
func (l *listing) unknown(err error) *listing {
	l.known, l.why = false, err.Error()
	return l
}

func (l *listing) view() View { return View{Name: l.name, Count: len(l.at), Unknown: l.why} }

// brokenList is a finding for each node of a list where forward and backward differ.
func (l *listing) brokenLists() (found []Finding) {
	for _, node := range l.broken {
		found = append(found, Finding{
			Kind: KindListBroken, Subject: l.name, Severity: High,
			Detail:   fmt.Sprintf("the kernel's list of %s is broken: the element after the one at %#x does not point back at it", l.name, node),
			Evidence: []Evidence{{Address: node, Note: "element of the list"}},
		})
	}
	return found
}

// compare tells which of the listings have a thing and which of those that should have it do not.
func compare(at uint64, all []*listing, expected func(name string) bool) (listed, missing []string) {
	for _, l := range all {
		switch {
		case !l.known:
		case l.at[at]:
			listed = append(listed, l.name)
		case expected(l.name):
			missing = append(missing, l.name)
		}
	}
	return listed, missing
}

// union is all that any listing has, in the order of addresses.
func union(all []*listing) []uint64 {
	seen := map[uint64]bool{}
	var out []uint64
	for _, l := range all {
		for at := range l.at {
			if !seen[at] {
				seen[at] = true
				out = append(out, at)
			}
		}
	}
	slices.Sort(out)
	return out
}

// words joins names for a sentence.
func words(names []string) string {
	if len(names) < 2 {
		return strings.Join(names, "")
	}
	return strings.Join(names[:len(names)-1], ", ") + " and " + names[len(names)-1]
}

// follow visits the nodes of the circular list at head, which is a list_head. A list that changes is read again; one that
// stays torn is followed as a reader in the guest would, by its next pointers, and where a node is not pointed back at is
// kept in l.broken. No node is visited twice.
func (g *Guest) follow(l *listing, head uint64, visit func(node uint64)) {
	var nodes []uint64
	err := steady(func() error {
		nodes = nodes[:0]
		return g.walk(head, func(node uint64) error { nodes = append(nodes, node); return nil })
	})
	if err != nil {
		nodes = g.forward(l, head, nodes[:0])
	}
	for _, n := range nodes {
		visit(n)
	}
}

func (g *Guest) forward(l *listing, head uint64, nodes []uint64) []uint64 {
	seen := map[uint64]bool{head: true}
	for node := head; len(nodes) < maxNodes; {
		next, err := g.space.U64(node)
		back, err2 := g.space.U64(next + 8)
		if (err != nil || err2 != nil || back != node) && len(l.broken) < 8 {
			l.broken = append(l.broken, node)
		}
		if err != nil || err2 != nil || seen[next] {
			break
		}
		seen[next] = true
		nodes = append(nodes, next)
		node = next
	}
	return nodes
}
