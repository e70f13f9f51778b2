package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"vigia/internal/event"
)

// Limits of a rule file and of a rule.
const (
	MaxFile    = 256 << 10
	maxRules   = 256
	maxSteps   = 8
	maxAtLeast = 1000
)

// Defaults: how long the same rule is quiet on a machine after an alert where it does not say (a sequence: its
// window), and how long a sampled condition may go unseen.
const (
	defaultEvery = 10 * time.Minute
	defaultGap   = 10 * time.Second
)

// sampled are the kinds that come again and again, so that a condition on them can hold for a while.
var sampled = map[event.Kind]bool{event.CPUUsage: true}

var (
	idForm   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	nameForm = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,31}$`)
)

// Parse reads the rules of a file: YAML documents, each a rule. responses are those that exist; a rule that asks for
// another is refused. The error, a Problems, lists all that is wrong, not the first thing only; with it there are no
// rules.
func Parse(name string, data []byte, responses []string) ([]Rule, error) {
	r := &reader{file: name}
	if len(data) > MaxFile {
		return nil, Problems{{name, 1, 1, fmt.Sprintf("file of %d bytes is too large: at most %d", len(data), MaxFile)}}
	}
	if p := tooDeep(name, data); p != nil {
		return nil, Problems{*p}
	}
	r.lines = strings.Split(string(data), "\n")
	file, err := parseYAML(data)
	if err != nil {
		return nil, Problems{syntax(name, err)}
	}
	var rules []Rule
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if _, ok := doc.Body.(*ast.CommentGroupNode); ok {
			continue
		}
		if len(rules) == maxRules {
			r.fail(doc.Body, "too many rules in one file: at most %d", maxRules)
			break
		}
		rule := r.rule(doc.Body, responses)
		if i := slices.IndexFunc(rules, func(o Rule) bool { return o.ID == rule.ID && o.ID != "" }); i >= 0 {
			r.failAt(token.Position{Line: rule.Line, Column: 1}, "rule %q is there twice: first in line %d", rule.ID, rules[i].Line)
		}
		rules = append(rules, rule)
	}
	if len(rules) == 0 && len(r.problems) == 0 {
		r.problems = Problems{{name, 1, 1, "no rule in this file"}}
	}
	if len(r.problems) > 0 {
		slices.SortStableFunc(r.problems, func(a, b Problem) int {
			return (a.Line-b.Line)*100_000 + min(a.Column, 99_999) - min(b.Column, 99_999)
		})
		return nil, slices.Compact(r.problems)
	}
	return rules, nil
}

// parseYAML makes an error of a panic: the parser is not ours, and rules are written by people.
func parseYAML(data []byte) (file *ast.File, err error) {
	defer func() {
		if r := recover(); r != nil {
			file, err = nil, fmt.Errorf("can't be made sense of")
		}
	}()
	return parser.ParseBytes(data, 0)
}

// syntax turns the YAML parser's error into a problem.
func syntax(name string, err error) Problem {
	p := Problem{name, 1, 1, ""}
	var se *yaml.SyntaxError
	if errors.As(err, &se) {
		p.Reason = se.Message
		if se.Token != nil && se.Token.Position != nil {
			p.Line, p.Column = max(se.Token.Position.Line, 1), max(se.Token.Position.Column, 1)
		}
	} else {
		p.Reason, _, _ = strings.Cut(err.Error(), "\n")
	}
	p.Reason = "not YAML: " + p.Reason
	return p
}

// maxNesting bounds brackets and indentation: a rule needs little of either, and the YAML parser calls itself for each.
const maxNesting = 64

func tooDeep(name string, data []byte) *Problem {
	depth := 0
	for i, line := range strings.Split(string(data), "\n") {
		column := 0
		for _, c := range line {
			column++
			switch c {
			case '[', '{':
				depth++
			case ']', '}':
				depth = max(depth-1, 0)
			}
			if depth > maxNesting {
				return &Problem{name, i + 1, column, "nested too deep"}
			}
		}
		trimmed := strings.TrimLeft(line, " -?:\t")
		if strings.Count(line[:len(line)-len(trimmed)], "-")+strings.Count(line[:len(line)-len(trimmed)], "?") > maxNesting {
			return &Problem{name, i + 1, 1, "nested too deep"}
		}
		if len(line)-len(trimmed) > 8*maxNesting {
			return &Problem{name, i + 1, 1, "nested too deep"}
		}
	}
	return nil
}

var ruleKeys = []string{"id", "title", "about", "severity", "machines", "sequence", "on", "when", "for", "gap", "count", "watch", "respond", "every"}

var stepKeys = []string{"name", "on", "when", "for", "gap", "count"}

// rule reads one rule.
func (r *reader) rule(n ast.Node, responses []string) Rule {
	rule := Rule{File: r.file, Line: position(n).Line, Text: n.String()}
	m, ok := r.mapping(n, "a rule", ruleKeys...)
	if !ok {
		return rule
	}
	rule.Line = position(m.node).Line
	sum := sha256.Sum256([]byte(rule.Text))
	rule.print = hex.EncodeToString(sum[:8])
	r.heading(m, &rule)
	r.steps(m, &rule)
	rule.Every = rule.Within
	if rule.Every == 0 {
		rule.Every = defaultEvery
	}
	if v := m.vals["every"]; v != nil {
		rule.Every = r.duration(v, "every")
	}
	r.responses(m, &rule, responses)
	if slices.Contains(rule.Respond, Refuse) || slices.Contains(rule.Kinds(), event.CheckpointReopens) {
		rule.Every = 0 // what is told before it is done is asked each time
	}
	r.watched(m, &rule)
	return rule
}

func (r *reader) heading(m *mapping, rule *Rule) {
	if v := m.vals["id"]; v == nil {
		r.fail(m.node, "the rule has no id")
	} else if rule.ID, _ = r.text(v, "id"); !idForm.MatchString(rule.ID) {
		r.fail(v, "id %q: use lower-case letters, digits and hyphens, at most 63", rule.ID)
	}
	if v := m.vals["title"]; v == nil {
		r.fail(m.node, "the rule has no title")
	} else if rule.Title, _ = r.text(v, "title"); rule.Title == "" || len(rule.Title) > 200 {
		r.fail(v, "title: 1 to 200 bytes")
	}
	if v := m.vals["about"]; v != nil {
		rule.About, _ = r.text(v, "about")
	}
	if v := m.vals["severity"]; v == nil {
		r.fail(m.node, "the rule has no severity: low, medium, high or critical")
	} else {
		s, _ := r.text(v, "severity")
		if rule.Severity = Severity(s); !slices.Contains(severities, rule.Severity) {
			r.fail(v, "severity %q: must be low, medium, high or critical", s)
		}
	}
	if v := m.vals["machines"]; v != nil {
		names, nodes := r.list(v, "machines")
		for i, pattern := range names {
			if _, err := path.Match(pattern, ""); err != nil {
				r.fail(nodes[i], "machines: %q is no pattern", pattern)
			}
		}
		rule.Machines = names
	}
}

func (r *reader) responses(m *mapping, rule *Rule, known []string) {
	v := m.vals["respond"]
	if v == nil {
		rule.Respond = []string{"alert"}
		return
	}
	names, nodes := r.list(v, "respond")
	for i, name := range names {
		if !slices.Contains(known, name) {
			r.fail(nodes[i], "unknown response %q: there are %s", name, strings.Join(known, ", "))
		}
		if slices.Contains(names[:i], name) {
			r.fail(nodes[i], "response %q is there twice", name)
		}
	}
	rule.Respond = names
}

// steps reads the sequence, or the one step that stands in the rule itself.
func (r *reader) steps(m *mapping, rule *Rule) {
	seq := m.vals["sequence"]
	if seq == nil {
		if m.vals["on"] == nil {
			r.fail(m.node, "the rule has neither a sequence nor an on")
			return
		}
		rule.steps = []step{r.step(m, nil)}
		return
	}
	for _, key := range []string{"on", "when", "for", "gap", "count"} {
		if m.vals[key] != nil {
			r.fail(m.at[key], "%s stands beside a sequence: put it into a step", key)
		}
	}
	sm, ok := r.mapping(seq, "sequence", "within", "steps")
	if !ok {
		return
	}
	if v := sm.vals["within"]; v != nil {
		rule.Within = r.duration(v, "within")
	} else {
		r.fail(m.at["sequence"], "the sequence has no within: how long it may take from first to last")
	}
	list, ok := sm.vals["steps"].(*ast.SequenceNode)
	if !ok || len(list.Values) == 0 || len(list.Values) > maxSteps {
		r.fail(m.at["sequence"], "the sequence needs a list of 1 to %d steps", maxSteps)
		return
	}
	for _, item := range list.Values {
		if im, ok := r.mapping(item, "a step", stepKeys...); ok {
			s := r.step(im, rule.steps)
			if s.hold > rule.Within && rule.Within > 0 {
				r.fail(im.at["for"], "for is longer than the sequence's within")
			}
			rule.steps = append(rule.steps, s)
		}
	}
}

func (r *reader) step(m *mapping, before []step) step {
	s := step{}
	if v := m.vals["name"]; v != nil {
		s.name, _ = r.text(v, "name")
		if !nameForm.MatchString(s.name) {
			r.fail(v, "name %q: use lower-case letters, digits and underscores, at most 32", s.name)
		}
		if slices.ContainsFunc(before, func(b step) bool { return b.name == s.name }) {
			r.fail(v, "name %q is there twice", s.name)
		}
	}
	s.kinds = r.kinds(m)
	if len(s.kinds) == 0 {
		return s
	}
	env, err := environment(s, before)
	if err != nil {
		r.fail(m.node, "conditions: %v", err)
		return s
	}
	if v := m.vals["when"]; v != nil {
		s.when = r.condition(env, v, "when", &s, before, types.BoolType)
	}
	r.hold(m, &s)
	if v := m.vals["count"]; v != nil {
		if s.hold > 0 {
			r.fail(m.at["count"], "a step has either for or count")
		}
		s.count = r.count(env, v, &s, before)
	}
	return s
}

func (r *reader) kinds(m *mapping) []event.Kind {
	v := m.vals["on"]
	if v == nil {
		r.fail(m.node, "the step has no on: the kind of event it looks at")
		return nil
	}
	var kinds []event.Kind
	names, nodes := r.list(v, "on")
	for i, name := range names {
		kind := event.Kind(name)
		switch _, ok := event.Kinds[kind]; {
		case !ok:
			r.fail(nodes[i], "unknown kind of event %q%s", name, similar(name))
		case slices.Contains(kinds, kind):
			r.fail(nodes[i], "kind %q is there twice", name)
		default:
			kinds = append(kinds, kind)
		}
	}
	return kinds
}

// similar lists the kinds of the same family.
func similar(name string) string {
	family, _, _ := strings.Cut(name, ".")
	var same []string
	for k := range event.Kinds {
		if strings.HasPrefix(string(k), family+".") {
			same = append(same, string(k))
		}
	}
	if len(same) == 0 {
		return ""
	}
	slices.Sort(same)
	return ": there are " + strings.Join(same, ", ")
}

func (r *reader) hold(m *mapping, s *step) {
	v := m.vals["for"]
	if v == nil {
		if g := m.vals["gap"]; g != nil {
			r.fail(m.at["gap"], "gap goes with for")
		}
		return
	}
	s.hold = r.duration(v, "for")
	s.gap = min(defaultGap, max(s.hold, time.Second))
	if g := m.vals["gap"]; g != nil {
		s.gap = r.duration(g, "gap")
	}
	for _, k := range s.kinds {
		if !sampled[k] {
			r.fail(m.at["for"], "for needs a kind that is sampled again and again, as cpu.usage; %s isn't", k)
		}
	}
	if s.when == nil && m.vals["when"] == nil {
		r.fail(m.at["for"], "for needs a when: the condition that must hold")
	}
}

func (r *reader) count(env *cel.Env, n ast.Node, s *step, before []step) *count {
	m, ok := r.mapping(n, "count", "at_least", "within", "by", "distinct", "weight")
	if !ok {
		return nil
	}
	c := &count{}
	if v := m.vals["at_least"]; v != nil {
		c.atLeast = r.number(v, "at_least", 1, maxAtLeast)
	} else {
		r.fail(n, "count has no at_least")
	}
	if v := m.vals["within"]; v != nil {
		c.within = r.duration(v, "within")
	} else {
		r.fail(n, "count has no within")
	}
	scalar := []*types.Type{types.StringType, types.IntType}
	if v := m.vals["by"]; v != nil {
		c.by = r.condition(env, v, "by", s, before, scalar...)
	}
	if v := m.vals["distinct"]; v != nil {
		c.distinct = r.condition(env, v, "distinct", s, before, scalar...)
	}
	if v := m.vals["weight"]; v != nil {
		c.weight = r.condition(env, v, "weight", s, before, types.IntType)
		if c.distinct != nil {
			r.fail(m.at["weight"], "count has either distinct or weight")
		}
	}
	return c
}

func (r *reader) condition(env *cel.Env, n ast.Node, what string, s *step, before []step, want ...*types.Type) *condition {
	text, ok := r.text(n, what)
	if !ok {
		return nil
	}
	c, problems := compile(env, text, want...)
	for _, p := range problems {
		if field, ok := strings.CutPrefix(p.reason, unknownField); ok {
			p.reason = explainField(field, operand(text, p), s, before)
		}
		r.failIn(n, p, what)
	}
	return c
}

// operand is what stands before the dot that a problem is at.
func operand(text string, p celProblem) string {
	lines := strings.Split(text, "\n")
	if p.line < 1 || p.line > len(lines) || p.column > len(lines[p.line-1]) {
		return ""
	}
	line := lines[p.line-1][:p.column]
	return line[strings.LastIndexFunc(line, func(c rune) bool {
		return c != '.' && c != '_' && (c < '0' || c > '9') && (c < 'a' || c > 'z')
	})+1:]
}

// explainField says what there is in place of an unknown field of an event or an unknown step.
func explainField(field, of string, s *step, before []step) string {
	kinds := s.kinds
	if of == "steps" {
		var names []string
		for _, b := range before {
			if b.name != "" {
				names = append(names, b.name)
			}
		}
		if len(names) == 0 {
			return fmt.Sprintf("unknown step %q: no step before this one has a name", field)
		}
		return fmt.Sprintf("unknown step %q: named before are %s", field, strings.Join(names, ", "))
	}
	for _, b := range before {
		if of == "steps."+b.name {
			kinds = b.kinds
		}
	}
	var has, names []string
	for name := range eventFields(kinds) {
		if _, ok := common[name]; !ok {
			has = append(has, name)
		}
	}
	slices.Sort(has)
	for _, k := range kinds {
		names = append(names, string(k))
	}
	if len(kinds) > 1 {
		return fmt.Sprintf("unknown field %q: %s have in common %s", field, strings.Join(names, " and "), strings.Join(has, ", "))
	}
	return fmt.Sprintf("unknown field %q: %s has %s", field, names[0], strings.Join(has, ", "))
}
