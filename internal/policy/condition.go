package policy

import (
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"

	"vigia/internal/event"
)

// Limits of a condition: its length in characters, the depth of its nesting, and what evaluating it may cost, in
// CEL's units of about one operation each.
const (
	maxCondition = 4 << 10
	maxDepth     = 32
	maxCost      = 20_000
)

// condition is a CEL expression that was checked against the kinds of its step.
type condition struct {
	text    string
	program cel.Program
	ast     *ast.AST
}

// base is what all conditions share: CEL's standard functions, the macros that only look (no map, no filter), and three
// functions for addresses and names.
var base = sync.OnceValues(func() (*cel.Env, error) {
	return cel.NewCustomEnv(
		cel.StdLib(),
		cel.ClearMacros(),
		cel.Macros(cel.HasMacro, cel.ExistsMacro, cel.ExistsOneMacro, cel.AllMacro),
		cel.CrossTypeNumericComparisons(true),
		cel.ParserExpressionSizeLimit(maxCondition),
		cel.ParserRecursionLimit(maxDepth),
		cel.Function("port", cel.Overload("port_string", []*cel.Type{cel.StringType}, cel.IntType,
			cel.UnaryBinding(func(v ref.Val) ref.Val { _, p := split(v); return types.Int(p) }))),
		cel.Function("address", cel.Overload("address_string", []*cel.Type{cel.StringType}, cel.StringType,
			cel.UnaryBinding(func(v ref.Val) ref.Val { a, _ := split(v); return types.String(a) }))),
		cel.Function("domain", cel.Overload("domain_string", []*cel.Type{cel.StringType}, cel.StringType,
			cel.UnaryBinding(func(v ref.Val) ref.Val { return types.String(domain(v)) }))),
	)
})

// split takes "address:port" apart; what isn't one has port 0.
func split(v ref.Val) (string, int) {
	s, _ := v.Value().(string)
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return s, 0
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return s, 0
	}
	return host, int(n)
}

// domain is the last two labels of a DNS name.
func domain(v ref.Val) string {
	s, _ := v.Value().(string)
	s = strings.ToLower(strings.TrimSuffix(s, "."))
	if i := strings.LastIndexByte(s, '.'); i > 0 {
		return s[strings.LastIndexByte(s[:i], '.')+1:]
	}
	return s
}

// celTypes are the types of one step's variables, by name and field.
type celTypes struct {
	types.Provider
	structs map[string]map[string]*types.FieldType
}

func (t *celTypes) FindStructType(name string) (*types.Type, bool) {
	if _, ok := t.structs[name]; ok {
		return types.NewTypeTypeWithParam(types.NewObjectType(name)), true
	}
	return t.Provider.FindStructType(name)
}

func (t *celTypes) FindStructFieldNames(name string) ([]string, bool) {
	fields, ok := t.structs[name]
	if !ok {
		return t.Provider.FindStructFieldNames(name)
	}
	var names []string
	for n := range fields {
		names = append(names, n)
	}
	slices.Sort(names)
	return names, true
}

func (t *celTypes) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	fields, ok := t.structs[name]
	if !ok {
		return t.Provider.FindStructFieldType(name, field)
	}
	f, ok := fields[field]
	return f, ok
}

// object is an event, or the steps so far, as CEL sees it.
type object struct {
	kind  *types.Type
	event *event.Event
	steps map[string]*event.Event
}

func (o *object) ConvertToNative(reflect.Type) (any, error) { return nil, errors.New("no conversion") }
func (o *object) ConvertToType(t ref.Type) ref.Val {
	if t == types.TypeType {
		return o.kind
	}
	return types.NewErr("no conversion to %s", t.TypeName())
}
func (o *object) Equal(other ref.Val) ref.Val { return types.Bool(o == other) }
func (o *object) Type() ref.Type              { return o.kind }
func (o *object) Value() any                  { return o }

// common are the fields that every event has. No kind has fields of these names.
var common = map[string]struct {
	kind *types.Type
	get  func(e *event.Event) any
}{
	"id":      {types.StringType, func(e *event.Event) any { return e.ID }},
	"machine": {types.StringType, func(e *event.Event) any { return e.Machine }},
	"kind":    {types.StringType, func(e *event.Event) any { return string(e.Kind) }},
	"time":    {types.TimestampType, func(e *event.Event) any { return e.Time }},
}

// eventFields gives the fields that all of the kinds have.
func eventFields(kinds []event.Kind) map[string]*types.FieldType {
	fields := map[string]*types.FieldType{}
	for name, c := range common {
		fields[name] = &types.FieldType{
			Type:    c.kind,
			IsSet:   func(any) bool { return true },
			GetFrom: func(o any) (any, error) { return c.get(o.(*object).event), nil },
		}
	}
	for _, f := range event.Kinds[kinds[0]].Fields {
		if shared(kinds, f) {
			fields[f.Name] = kindField(f)
		}
	}
	return fields
}

func shared(kinds []event.Kind, f event.Field) bool {
	for _, k := range kinds {
		if g, ok := event.Kinds[k].Field(f.Name); !ok || g.Type != f.Type {
			return false
		}
	}
	return true
}

// zeros are what an absent field reads as.
var zeros = map[event.Type]any{
	event.String: "", event.Int: int64(0), event.Float: 0.0, event.Bool: false, event.List: []string{},
}

var celType = map[event.Type]*types.Type{
	event.String: types.StringType, event.Int: types.IntType, event.Float: types.DoubleType, event.Bool: types.BoolType,
	event.List: types.NewListType(types.StringType),
}

func kindField(f event.Field) *types.FieldType {
	return &types.FieldType{
		Type:  celType[f.Type],
		IsSet: func(o any) bool { _, ok := o.(*object).event.Fields[f.Name]; return ok },
		GetFrom: func(o any) (any, error) {
			if v, ok := o.(*object).event.Fields[f.Name]; ok {
				return v, nil
			}
			return zeros[f.Type], nil
		},
	}
}

const (
	eventType = "vigia.event"
	stepsType = "vigia.steps"
)

// environment is the CEL environment of a step: its event, and the named steps before it.
func environment(s step, before []step) (*cel.Env, error) {
	env, err := base()
	if err != nil {
		return nil, err
	}
	t := &celTypes{Provider: env.CELTypeProvider(), structs: map[string]map[string]*types.FieldType{
		eventType: eventFields(s.kinds),
		stepsType: {},
	}}
	for _, b := range before {
		if b.name == "" || len(b.kinds) == 0 {
			continue // without kinds it has been complained of already
		}
		kind := stepType(b.name)
		t.structs[kind] = eventFields(b.kinds)
		t.structs[stepsType][b.name] = &types.FieldType{
			Type:  types.NewObjectType(kind),
			IsSet: func(any) bool { return true },
			GetFrom: func(o any) (any, error) {
				if e := o.(*object).steps[b.name]; e != nil {
					return &object{kind: types.NewObjectType(kind), event: e}, nil
				}
				return nil, fmt.Errorf("step %s has no event", b.name)
			},
		}
	}
	return env.Extend(
		cel.CustomTypeProvider(t),
		cel.Variable("event", cel.ObjectType(eventType)),
		cel.Variable("steps", cel.ObjectType(stepsType)),
	)
}

func stepType(name string) string { return "vigia.step." + name }

// compile checks text and makes it ready to be evaluated. want are the types it may have.
func compile(env *cel.Env, text string, want ...*types.Type) (*condition, []celProblem) {
	checked, issues := env.Compile(text)
	if issues != nil && issues.Err() != nil {
		var ps []celProblem
		for _, e := range issues.Errors() {
			ps = append(ps, celProblem{e.Location.Line(), e.Location.Column(), plainly(e.Message)})
		}
		return nil, ps
	}
	if !slices.ContainsFunc(want, checked.OutputType().IsExactType) {
		var names []string
		for _, w := range want {
			names = append(names, w.String())
		}
		return nil, []celProblem{{1, 0, fmt.Sprintf("gives %s, must give %s", checked.OutputType(), strings.Join(names, " or "))}}
	}
	program, err := env.Program(checked, cel.CostLimit(maxCost), cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		return nil, []celProblem{{1, 0, err.Error()}}
	}
	return &condition{text: text, program: program, ast: checked.NativeRep()}, nil
}

// celProblem is an error at a place in a condition: lines from 1, columns from 0, as CEL counts.
type celProblem struct {
	line, column int
	reason       string
}

// plainly says in a rule's words what CEL says in its own.
func plainly(message string) string {
	message = strings.ReplaceAll(message, "undeclared reference to", "unknown name")
	message = strings.ReplaceAll(message, " (in container '')", "")
	message, _, _ = strings.Cut(message, " expecting {")
	if field, ok := strings.CutPrefix(message, "undefined field '"); ok {
		field, _, _ = strings.Cut(field, "'")
		return unknownField + field
	}
	if op, ok := strings.CutPrefix(message, "found no matching overload for '"); ok {
		op, args, _ := strings.Cut(op, "' applied to '")
		return fmt.Sprintf("%s does not go with %s", strings.Trim(op, "_"), strings.TrimSuffix(args, "'"))
	}
	return message
}

// unknownField begins the reason where a name after a dot is not known.
const unknownField = "unknown field "

var (
	eventObject = types.NewObjectType(eventType)
	stepsObject = types.NewObjectType(stepsType)
)

// eval evaluates the condition on an event, after the named events.
func (c *condition) eval(e *event.Event, steps map[string]*event.Event) (ref.Val, error) {
	v, _, err := c.program.Eval(map[string]any{
		"event": &object{kind: eventObject, event: e},
		"steps": &object{kind: stepsObject, steps: steps},
	})
	return v, err
}
