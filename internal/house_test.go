// Package internal_test keeps the house in order: which package may import which (doc/architecture.md, "The house").
//
// Imports point down only, and packages of one level do not import each other. The table below is the whole truth: a
// package that is not in it fails the test, so that nobody adds one without saying where it stands.
//
// The import graph is read from the files themselves, whatever their build tags, tests included: what a package's tests
// import binds it as much as what it imports itself.
package internal_test

import (
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "vigia"

// The levels, from the ground up. Workers, api and what a person sees stand at the edge: nothing below may import them.
const (
	words    = 0 // the vocabulary: no package of this module but, for event, vm
	parts    = 1 // one concern each, knowing only the words
	joined   = 2 // made of parts
	workers  = 3 // edge: one confined process each
	contract = 3 // edge: what the daemon and a person's programs say to each other
	daemon   = 4 // edge: the process that joins everything
	faces    = 4 // edge: what a person sees
)

// house gives each package under internal/ its level. Packages in a directory below another count as part of it: they
// and their parent may import each other, and what may import the one may import the other.
var house = map[string]int{
	"vm":     words,
	"event":  words,
	"ledger": words,

	"jail":    parts,
	"memory":  parts,
	"kernel":  parts,
	"volume":  parts,
	"network": parts,
	"policy":  parts,
	"store":   parts,
	"link":    parts, // calls and outbox between daemon and workers
	"host":    parts, // what works on this host
	"inputs":  parts, // what entered a machine, kept to be given again

	"machine":    joined,
	"introspect": joined,
	"probe":      joined, // events at the instant; its eyes are lent by the guard
	"image":      joined,
	"checkpoint": joined,
	"inventory":  joined, // what a disk holds, and what a rollback reopens

	"guard":   workers,
	"gate":    workers,
	"convert": workers,
	"keeper":  workers,
	"api":     contract,

	"daemon": daemon,
	"worker": daemon, // the table of the workers, for what starts as one of them
	"cli":    faces,
	"lab":    faces, // runs the program as a person would, for demo and benches
}

// outside lists what stands in internal/ and is no part of the program.
var outside = []string{"deps"} // names modules that are yet to be used; built by nobody

// sameLevel are the only imports within one level.
var sameLevel = map[[2]string]string{
	{"event", "vm"}: "an event may speak of a machine in vm's words",
}

// onlyFrom bounds what a package of the edge may import, whatever its level would let it. The others there wire, and may
// import all that is below.
var onlyFrom = map[string]struct {
	allowed func(string) bool
	why     string
}{
	"api": {func(p string) bool { return house[p] == words }, "the contract knows the words and no implementation"},
	"cli": {func(p string) bool { return p == "api" }, "a person's program can do what the API lets it, and no more"},
	"lab": {func(p string) bool { return p == "api" }, "what is measured and shown is what a person has"},
}

// never lists imports that levels would allow and that confinement does not: who has them in its program could be made
// to read what it must not.
var never = map[string][]string{
	"daemon": {"guard", "gate", "introspect", "probe", "memory", "kernel", "network", "volume/ext4", "inventory/scan", "machine/qmp", "checkpoint/page", "checkpoint/protect"}, // parses nothing that a guest wrote
	"gate":   {"volume", "memory", "kernel", "introspect", "probe", "image", "store", "ledger", "policy"},                                                                      // knows frames and flows
	"keeper": {"volume", "network", "introspect", "kernel", "machine", "image", "store", "ledger", "policy"},                                                                   // knows pages
	"guard":  {"network", "image", "store", "ledger", "policy"},                                                                                                                // knows no network, decides nothing
}

// pure packages decide and compute: they get their events, their time and their files from others.
var pure = map[string][]string{
	"vm":     {"os", "net", "net/http", "os/exec", "syscall"},
	"event":  {"os", "net", "net/http", "os/exec", "syscall"},
	"policy": {"os", "net/http", "os/exec", "syscall"}, // of net it has SplitHostPort
}

// graph has each package's imports, by directory below the module's root; of this module as directories, others whole.
type graph map[string]map[string]bool

func TestImportsPointDown(t *testing.T) {
	g, err := readGraph("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems(g) {
		t.Error(p)
	}
	for name := range house {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(g)), func(dir string) bool { return room(dir) == name }) {
			t.Errorf("the table names %s, which does not exist", name)
		}
	}
}

// TestBrokenHouse shows that the test sees what it is for.
func TestBrokenHouse(t *testing.T) {
	for _, bad := range [][2]string{
		{"internal/vm", "internal/event"},               // up within a level
		{"internal/event", "internal/jail"},             // up
		{"internal/volume", "internal/memory"},          // sideways
		{"internal/volume/ext4", "internal/kernel"},     // sideways, from below another
		{"internal/machine/qmp", "internal/introspect"}, // sideways
		{"internal/image", "internal/convert"},          // up
		{"internal/api", "internal/jail"},               // an edge that knows too much
		{"internal/cli", "internal/event"},              // past the API
		{"internal/cli", "internal/daemon"},             // the same
		{"internal/daemon", "internal/introspect"},      // parses what a guest wrote
		{"internal/daemon", "internal/volume/ext4"},     // the same
		{"internal/gate", "internal/volume"},            // two of a guest's secrets in one process
		{"internal/guard", "internal/gate"},             // one worker in the other
		{"internal/policy", "os"},                       // an effect in what only decides
		{"internal/network", "demo"},                    // from outside
		{"internal/util", "internal/vm"},                // stands nowhere
		{"demo", "internal/daemon"},                     // plays with marked cards
	} {
		g := graph{bad[0]: {bad[1]: true}}
		if len(problems(g)) == 0 {
			t.Errorf("%s imports %s, and nothing is said", bad[0], bad[1])
		}
	}
	for _, good := range [][2]string{
		{"internal/event", "internal/vm"}, {"internal/volume", "internal/volume/ext4"}, {"internal/volume/ext4", "internal/volume"},
		{"internal/image", "internal/volume/ext4"}, {"internal/daemon", "internal/convert"}, {"internal/daemon", "internal/api/vigiav1"},
		{"internal/gate", "internal/network"}, {"cmd/vigia", "internal/guard"}, {"bench/net", "internal/network"}, {"internal/jail", "os"},
	} {
		if p := problems(graph{good[0]: {good[1]: true}}); len(p) > 0 {
			t.Errorf("%v is refused: %v", good, p)
		}
	}
}

// room is the package of the table that a directory belongs to; empty for what is not under internal/.
func room(dir string) string {
	rest, ok := strings.CutPrefix(dir, "internal/")
	if !ok {
		return ""
	}
	name, _, _ := strings.Cut(rest, "/")
	return name
}

// problems names every import that should not be.
func problems(g graph) (out []string) {
	for _, dir := range slices.Sorted(maps.Keys(g)) {
		for _, imported := range slices.Sorted(maps.Keys(g[dir])) {
			if why := refused(dir, imported); why != "" {
				out = append(out, fmt.Sprintf("%s imports %s: %s", dir, imported, why))
			}
		}
		if name := room(dir); name != "" && !slices.Contains(outside, name) {
			if _, ok := house[name]; !ok {
				out = append(out, fmt.Sprintf("%s stands at no level: give it one in the table", dir))
			}
		}
	}
	return out
}

// refused says why dir may not import it; empty where it may.
func refused(dir, imported string) string {
	from, to := room(dir), room(imported)
	switch {
	case from == "" && dir == "demo" && to != "" && to != "api" && to != "lab":
		return "the demonstration uses what a person has, the API and the program"
	case from == "":
		return "" // commands, benchmarks and tests of the whole may use everything
	case to == "" && isOurs(imported):
		return "what is under internal/ knows nothing of what uses it"
	case to == "" && slices.Contains(pure[from], imported):
		return "this package has no effects of its own"
	case to == "" || from == to:
		return ""
	}
	for _, n := range never[from] {
		if imported == "internal/"+n || strings.HasPrefix(imported, "internal/"+n+"/") {
			return "the process that it is may not hold that code"
		}
	}
	if bound, ok := onlyFrom[from]; ok && !bound.allowed(to) {
		return bound.why
	}
	switch a, b := house[from], house[to]; {
	case a < b:
		return fmt.Sprintf("level %d may not import level %d", a, b)
	case a == b && sameLevel[[2]string{from, to}] == "":
		return fmt.Sprintf("both are of level %d", a)
	}
	return ""
}

func isOurs(dir string) bool {
	top, _, _ := strings.Cut(dir, "/")
	return slices.Contains([]string{"cmd", "demo", "bench", "test", "internal"}, top)
}

// readGraph parses the imports of all Go files below root.
func readGraph(root string) (graph, error) {
	g := graph{}
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if file != root && (name == "testdata" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "bin") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		dir, err := filepath.Rel(root, filepath.Dir(file))
		if err != nil {
			return err
		}
		imports, err := importsOf(file)
		if err != nil {
			return err
		}
		dir = filepath.ToSlash(dir)
		if g[dir] == nil {
			g[dir] = map[string]bool{}
		}
		for _, i := range imports {
			if !testsOwn(dir, name, i) {
				g[dir][i] = true
			}
		}
		return nil
	})
	if err == nil && len(g) < len(house) {
		err = errors.New("hardly a package was found: is this the module's root?")
	}
	return g, err
}

func importsOf(file string) (out []string, err error) {
	src, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	parsed, err := parser.ParseFile(token.NewFileSet(), file, src, parser.ImportsOnly)
	if err != nil {
		return nil, err
	}
	for _, spec := range parsed.Imports {
		name, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if rest, ok := strings.CutPrefix(name, module+"/"); ok {
			name = path.Clean(rest)
		}
		out = append(out, name)
	}
	return out, nil
}

// testsOwn tells a test's own effects (it reads its testdata, opens a socket) from the package's.
func testsOwn(dir, file, imported string) bool {
	return strings.HasSuffix(file, "_test.go") && slices.Contains(pure[room(dir)], imported)
}
