package jail

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the tables into doc/confinement.md")

const (
	document   = "../../doc/confinement.md"
	tablesFrom = "<!-- tables: go test ./internal/jail -run Document -update -->\n"
	tablesTo   = "<!-- end of tables -->\n"
)

// The tables in the document are those of the code.
func TestDocument(t *testing.T) {
	raw, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(raw), tablesFrom)
	old, after, ok2 := strings.Cut(rest, tablesTo)
	if !ok1 || !ok2 {
		t.Fatalf("%s lacks the marks of its tables", document)
	}
	tables := allTables()
	if *update {
		if err := os.WriteFile(document, []byte(before+tablesFrom+tables+tablesTo+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if old != tables {
		t.Errorf("the tables of %s are not those of the code: go test ./internal/jail -run Document -update", document)
	}
}

func allTables() string {
	var b strings.Builder
	for _, name := range []string{"qemu", "guard", "gate", "gate-alone", "convert", "keeper", "planter"} {
		Profiles[name].document(&b)
	}
	return b.String()
}

func (p Profile) document(b *strings.Builder) {
	fmt.Fprintf(b, "\n### %s\n\n| namespace | why |\n|---|---|\n", p.Name)
	for _, n := range p.Namespaces {
		fmt.Fprintf(b, "| %s | %s |\n", n.Name, n.Reason)
	}
	fmt.Fprintf(b, "\n| limit | at most | why |\n|---|---|---|\n")
	for _, r := range p.Rlimits {
		fmt.Fprintf(b, "| %s | %d | %s |\n", r.Name, r.Max, r.Reason)
	}
	fmt.Fprintf(b, "\n| holds | what |\n|---|---|\n")
	for _, h := range p.Descriptors {
		fmt.Fprintf(b, "| %s | %s |\n", h.What, h.Reason)
	}
	fmt.Fprintf(b, "\n| system call | does | where | why |\n|---|---|---|---|\n")
	for _, r := range p.Syscalls {
		fmt.Fprintf(b, "| %s | %s | %s | %s |\n", r.Name, r.Do, r.conditions(), r.Reason)
	}
	fmt.Fprintf(b, "| all others | %s | | |\n", p.Otherwise)
}

func (r Rule) conditions() string {
	var all []string
	for _, a := range r.When {
		left := fmt.Sprintf("argument %d", a.Index)
		if a.Mask != 0 {
			left += fmt.Sprintf(" & %#x", a.Mask)
		}
		var values []string
		for _, v := range a.OneOf {
			if v == ownPID {
				values = append(values, "its own pid")
				continue
			}
			values = append(values, fmt.Sprintf("%#x", v))
		}
		word := " is "
		if a.Unless {
			word = " is not "
		}
		all = append(all, left+word+strings.Join(values, " or "))
	}
	return strings.Join(all, ", ")
}
