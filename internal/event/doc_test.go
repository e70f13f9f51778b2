package event

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the tables into doc/events.md")

const (
	document   = "../../doc/events.md"
	tablesFrom = "<!-- tables: go test ./internal/event -run Doc -update -->\n"
	tablesTo   = "<!-- end of tables -->\n"
)

// The tables in the document are those of the code, and what the document says nobody tells yet is told by nobody.
func TestDoc(t *testing.T) {
	raw, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(raw), tablesFrom)
	old, after, ok2 := strings.Cut(rest, tablesTo)
	if !ok1 || !ok2 {
		t.Fatalf("%s lacks the marks of its tables", document)
	}
	tables := allTables(t)
	if *update {
		if err := os.WriteFile(document, []byte(before+tablesFrom+tables+tablesTo+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if old != tables {
		t.Errorf("the tables of %s are not those of the code: go test ./internal/event -run Doc -update", document)
	}
}

// constant is a kind as kinds.go declares it.
type constant struct {
	name string
	kind Kind
}

// TestKindsAreDescribed finds a kind without a table, a table without a kind, and a name that is no field's name.
func TestKindsAreDescribed(t *testing.T) {
	fieldName := regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
	kindName := regexp.MustCompile(`^[a-z]+\.[a-z_]+$`)
	constants := declared(t)
	for _, c := range constants {
		schema, ok := Kinds[c.kind]
		if !ok {
			t.Errorf("%s has no table", c.kind)
		}
		if schema.Doc == "" || !kindName.MatchString(string(c.kind)) {
			t.Errorf("%s: no meaning, or a name of another form", c.kind)
		}
		seen := map[string]bool{}
		for _, f := range schema.Fields {
			if !fieldName.MatchString(f.Name) || seen[f.Name] || !slices.Contains([]Type{String, Int, Float, Bool, List}, f.Type) {
				t.Errorf("%s.%s: name or type is wrong, or it is there twice", c.kind, f.Name)
			}
			seen[f.Name] = true
		}
	}
	if len(constants) != len(Kinds) {
		t.Errorf("%d kinds are declared, %d have a table", len(constants), len(Kinds))
	}
}

// declared are the kinds in the order of kinds.go.
func declared(t *testing.T) (out []constant) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "kinds.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := spec.Type.(*ast.Ident); !ok || typ.Name != "Kind" {
			return true
		}
		value, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, constant{spec.Names[0].Name, Kind(value)})
		return true
	})
	return out
}

func allTables(t *testing.T) string {
	constants := declared(t)
	told := toldBySomebody(t)
	var families []string
	for _, c := range constants {
		if f := family(c.kind); !slices.Contains(families, f) {
			families = append(families, f)
		}
	}
	var b strings.Builder
	for _, f := range families {
		fmt.Fprintf(&b, "\n### %s\n", f)
		for _, c := range constants {
			if family(c.kind) == f {
				table(&b, c, told[c.name])
			}
		}
	}
	b.WriteString("\n")
	return b.String()
}

func family(k Kind) string {
	f, _, _ := strings.Cut(string(k), ".")
	return f
}

func table(b *strings.Builder, c constant, told bool) {
	schema := Kinds[c.kind]
	fmt.Fprintf(b, "\n**`%s`**: %s.", c.kind, schema.Doc)
	if !told {
		b.WriteString(" *Nothing tells it yet.*")
	}
	if len(schema.Fields) == 0 {
		b.WriteString(" No fields.\n")
		return
	}
	b.WriteString("\n\n| field | type | is |\n|---|---|---|\n")
	for _, f := range schema.Fields {
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", f.Name, f.Type, f.Doc)
	}
}

// toldBySomebody finds the kinds that the program's code names, by their constants. Packages that only read events (they
// sort or watch them) do not count.
func toldBySomebody(t *testing.T) map[string]bool {
	t.Helper()
	named := regexp.MustCompile(`\bevent\.([A-Z][A-Za-z]+)\b`)
	out := map[string]bool{}
	err := filepath.WalkDir("..", func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") || onlyReads(file) {
			return err
		}
		src, err := os.ReadFile(file)
		for _, m := range named.FindAllSubmatch(src, -1) {
			out[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func onlyReads(file string) bool {
	file = filepath.ToSlash(file)
	return strings.HasPrefix(file, "../policy/") || file == "../link/outbox.go" || strings.HasPrefix(file, "../cli/")
}
