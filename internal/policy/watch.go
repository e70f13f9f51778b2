package policy

import (
	"path"
	"slices"
	"strings"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"

	"vigia/internal/event"
)

// fileKinds are the kinds whose events name a file only if its path is watched.
var fileKinds = []event.Kind{event.DiskRead, event.DiskWrite, event.FileChanged, event.FileOpened}

// WatchPaths lists the paths that the rules need to be watched, sorted: literal ones, and patterns where ** stands for
// any bytes at all: /etc/ssh/** is all below a directory, **/authorized_keys the files of one name.
func WatchPaths(rules []Rule) []string {
	var all []string
	for i := range rules {
		all = append(all, rules[i].watch...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Watched is WatchPaths of the engine's rules.
func (e *Engine) Watched() []string { return WatchPaths(e.rules) }

// watched finds the rule's paths: those its conditions compare event.path with, and those it lists itself.
func (r *reader) watched(m *mapping, rule *Rule) {
	listed := m.vals["watch"]
	if listed != nil {
		paths, nodes := r.list(listed, "watch")
		for i, p := range paths {
			if !validWatch(p) {
				r.fail(nodes[i], "watch: %q must be an absolute path, clean, or begin or end with **", p)
			}
		}
		rule.watch = append(rule.watch, paths...)
	}
	for _, s := range rule.steps {
		if s.when == nil || !slices.ContainsFunc(s.kinds, func(k event.Kind) bool { return slices.Contains(fileKinds, k) }) {
			continue
		}
		paths, mentioned := comparedPaths(s.when.ast)
		rule.watch = append(rule.watch, paths...)
		if mentioned && len(paths) == 0 && listed == nil {
			r.fail(m.node, "which files must be watched can't be told from %q: compare event.path by ==, in, startsWith, endsWith or contains, or list them under watch", s.when.text)
		}
	}
	slices.Sort(rule.watch)
	rule.watch = slices.Compact(rule.watch)
}

func validWatch(p string) bool {
	p = strings.TrimSuffix(strings.TrimPrefix(p, "**"), "**")
	return strings.HasPrefix(p, "/") && path.Clean(p) == strings.TrimSuffix(p, "/") && !strings.Contains(p, "**")
}

// comparedPaths walks a condition for comparisons of event.path with text; mentioned tells that event.path occurs.
func comparedPaths(a *ast.AST) (paths []string, mentioned bool) {
	return pathsIn(a.Expr())
}

// pathsIn walks e. What stands under a negation names files that are not meant.
func pathsIn(e ast.Expr) (paths []string, mentioned bool) {
	if isPath(e) {
		return nil, true
	}
	var below []ast.Expr
	switch e.Kind() {
	case ast.CallKind:
		c := e.AsCall()
		below = c.Args()
		if c.IsMemberFunction() {
			below = append([]ast.Expr{c.Target()}, below...)
		}
		paths = callPaths(c)
	case ast.ListKind:
		below = e.AsList().Elements()
	case ast.SelectKind:
		below = []ast.Expr{e.AsSelect().Operand()}
	case ast.ComprehensionKind:
		c := e.AsComprehension()
		below = []ast.Expr{c.IterRange(), c.AccuInit(), c.LoopCondition(), c.LoopStep(), c.Result()}
	}
	for _, b := range below {
		p, m := pathsIn(b)
		mentioned = mentioned || m
		if e.Kind() != ast.CallKind || e.AsCall().FunctionName() != operators.LogicalNot {
			paths = append(paths, p...)
		}
	}
	return paths, mentioned
}

func callPaths(c ast.CallExpr) []string {
	switch c.FunctionName() {
	case operators.Equals:
		for i, side := range c.Args() {
			if other := c.Args()[1-i]; isPath(side) {
				return text(other)
			}
		}
	case operators.In:
		if list := c.Args()[1]; isPath(c.Args()[0]) && list.Kind() == ast.ListKind {
			var paths []string
			for _, item := range list.AsList().Elements() {
				paths = append(paths, text(item)...)
			}
			return paths
		}
	case "startsWith":
		if isPath(c.Target()) {
			return affix(text(c.Args()[0]), "", "**")
		}
	case "endsWith":
		if isPath(c.Target()) {
			return affix(text(c.Args()[0]), "**", "")
		}
	case "contains":
		if isPath(c.Target()) {
			return affix(text(c.Args()[0]), "**", "**")
		}
	}
	return nil
}

func affix(texts []string, before, after string) []string {
	for i, t := range texts {
		texts[i] = before + t + after
	}
	return texts
}

// isPath recognizes event.path.
func isPath(e ast.Expr) bool {
	if e == nil || e.Kind() != ast.SelectKind || e.AsSelect().FieldName() != "path" {
		return false
	}
	of := e.AsSelect().Operand()
	return of.Kind() == ast.IdentKind && of.AsIdent() == "event"
}

// text is a literal text, as a list of one, or nothing.
func text(e ast.Expr) []string {
	if e.Kind() == ast.LiteralKind {
		if s, ok := e.AsLiteral().Value().(string); ok && s != "" {
			return []string{s}
		}
	}
	return nil
}
