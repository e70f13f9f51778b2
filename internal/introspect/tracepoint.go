package introspect

import "slices"

// CheckTracepoints lists the functions that are called at the kernel's tracepoints.
func (g *Guest) CheckTracepoints() ([]Finding, error) { return g.look((*control).tracepoints) }

const maxTracepointProbes = 64

func (c *control) tracepoints() error {
	r := c.resolver()
	funcs, fn := r.field("tracepoint", "funcs"), r.field("tracepoint_func", "func")
	size, err := c.profile.Size("tracepoint_func")
	if r.err != nil || err != nil {
		return errNotBuilt
	}
	if c.points == nil {
		for s := range c.profile.SymbolsFrom("__tracepoint_") {
			c.points = append(c.points, s.Addr)
		}
		slices.Sort(c.points)
	}
	for _, link := range c.points {
		list, err := c.space.U64(link + c.boot.Slide + funcs)
		if err != nil || list == 0 {
			continue
		}
		name := c.symbol(link + c.boot.Slide)[len("__tracepoint_"):]
		for i := range uint64(maxTracepointProbes) {
			at := list + i*size + fn
			target, err := c.space.U64(at)
			if err != nil || target == 0 {
				break
			}
			c.hook("tracepoint.hook", name, "the tracepoint "+name, at, target)
		}
	}
	return nil
}
