package policy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

// reader takes a YAML tree apart and gathers what is wrong with it.
type reader struct {
	file     string
	lines    []string
	problems Problems
}

func (r *reader) fail(at ast.Node, format string, args ...any) {
	r.failAt(position(at), format, args...)
}

func (r *reader) failAt(p token.Position, format string, args ...any) {
	r.problems = append(r.problems, Problem{r.file, max(p.Line, 1), max(p.Column, 1), fmt.Sprintf(format, args...)})
}

func position(n ast.Node) token.Position {
	if n == nil || n.GetToken() == nil || n.GetToken().Position == nil {
		return token.Position{Line: 1, Column: 1}
	}
	return *n.GetToken().Position
}

// mapping is a YAML mapping whose keys are taken out one by one.
type mapping struct {
	node ast.Node
	keys []string
	vals map[string]ast.Node
	at   map[string]ast.Node
}

// mapping reads a mapping that may have the known keys only.
func (r *reader) mapping(n ast.Node, what string, known ...string) (*mapping, bool) {
	var pairs []*ast.MappingValueNode
	switch x := n.(type) {
	case *ast.MappingNode:
		pairs = x.Values
	case *ast.MappingValueNode:
		pairs = []*ast.MappingValueNode{x}
	default:
		r.fail(n, "%s must be a mapping of keys to values", what)
		return nil, false
	}
	m := &mapping{node: n, vals: map[string]ast.Node{}, at: map[string]ast.Node{}}
	if len(pairs) > 0 {
		m.node = pairs[0].Key
	}
	for _, p := range pairs {
		key, ok := p.Key.(*ast.StringNode)
		if !ok {
			r.fail(p.Key, "%s: this key can't be used: anchors, aliases, merges and keys that are no plain text are not allowed", what)
			continue
		}
		switch {
		case !slices.Contains(known, key.Value):
			r.fail(p.Key, "unknown key %q in %s: it may have %s", key.Value, what, strings.Join(known, ", "))
		case m.vals[key.Value] != nil:
			r.fail(p.Key, "key %q is there twice", key.Value)
		default:
			m.keys = append(m.keys, key.Value)
			m.vals[key.Value], m.at[key.Value] = p.Value, p.Key
		}
	}
	return m, true
}

// text reads a scalar as it was written.
func (r *reader) text(n ast.Node, what string) (string, bool) {
	switch x := n.(type) {
	case *ast.StringNode:
		return x.Value, true
	case *ast.LiteralNode:
		if x.Value != nil {
			return x.Value.Value, true
		}
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return n.GetToken().Value, true
	}
	r.fail(n, "%s must be text", what)
	return "", false
}

// list reads a sequence of scalars, or one scalar alone.
func (r *reader) list(n ast.Node, what string) (texts []string, nodes []ast.Node) {
	items := []ast.Node{n}
	if seq, ok := n.(*ast.SequenceNode); ok {
		items = seq.Values
	}
	for _, item := range items {
		if s, ok := r.text(item, what); ok {
			texts, nodes = append(texts, s), append(nodes, item)
		}
	}
	return texts, nodes
}

// maxDuration bounds windows, and with them how long state is kept.
const maxDuration = 7 * 24 * time.Hour

func (r *reader) duration(n ast.Node, what string) time.Duration {
	s, ok := r.text(n, what)
	if !ok {
		return 0
	}
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		r.fail(n, "%s: %q is no duration: write it like 30s, 10m or 1h30m", what, s)
	case d <= 0 || d > maxDuration:
		r.fail(n, "%s: %s is out of range: more than 0, at most 168h", what, s)
	default:
		return d
	}
	return 0
}

func (r *reader) number(n ast.Node, what string, least, most int) int {
	s, ok := r.text(n, what)
	if !ok {
		return 0
	}
	v, err := strconv.Atoi(s)
	if err != nil || v < least || v > most {
		r.fail(n, "%s: %q must be a whole number from %d to %d", what, s, least, most)
		return 0
	}
	return v
}

// failIn reports a problem inside a condition at its place in the file.
func (r *reader) failIn(n ast.Node, p celProblem, what string) {
	at := position(n)
	tok := n.GetToken()
	switch x := n.(type) {
	case *ast.LiteralNode:
		at.Line += p.line
		at.Column = 1 + p.column
		if i := at.Line - 1; i >= 0 && i < len(r.lines) {
			at.Column += len(r.lines[i]) - len(strings.TrimLeft(r.lines[i], " "))
		}
	case *ast.StringNode:
		if p.line == 1 {
			at.Column += p.column
			if tok.Type == token.SingleQuoteType || tok.Type == token.DoubleQuoteType {
				at.Column++
			}
		}
		_ = x
	}
	r.failAt(at, "%s: %s", what, p.reason)
}
