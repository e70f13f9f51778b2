package introspect

import (
	"encoding/binary"
	"fmt"

	"vigia/internal/event"
)

// CheckDeferred follows what the kernel will call later: timers, delayed work, hardware breakpoints, the functions of kernel
// threads, and the return addresses on the stacks of tasks that wait. Code that hides from every list still has to run.
func (g *Guest) CheckDeferred() ([]Finding, error) {
	return g.look(all((*control).timers, (*control).clocks, (*control).breakpoints, (*control).tasks))
}

const (
	maxTimers  = 1 << 16
	maxWheel   = 1024 // lists of one wheel
	maxStack   = 64 << 10
	stackSize  = 16 << 10 // THREAD_SIZE on x86-64
	maxThreads = 1 << 16
)

func (c *control) timers() error {
	bases, err := c.profile.Symbol("timer_bases")
	r := c.resolver()
	vectors, size := r.field("timer_base", "vectors"), r.size("timer_base")
	link, function := r.field("timer_list", "entry"), r.field("timer_list", "function")
	timer, work, job := r.field("delayed_work", "timer"), r.field("delayed_work", "work"), r.field("work_struct", "func")
	wheel, err2 := c.profile.Field("timer_base", "vectors")
	count, err3 := c.profile.Enum("NR_BASES")
	if err != nil || err2 != nil || r.err != nil {
		return errNotBuilt
	}
	if err3 != nil {
		count = 2 // NR_BASES is a macro: BASE_STD and BASE_DEF
	}
	delayed := c.known("delayed_work_timer_fn")
	return c.eachCPU(func(cpu int, offset uint64) error {
		subject := fmt.Sprintf("timers of CPU %d", cpu)
		for i := range uint64(min(max(count, 1), 8)) {
			base := bases + offset + i*size + vectors
			b, err := c.table(base, int(min(wheel.Count, maxWheel))*8)
			if err != nil {
				return nil
			}
			for _, node := range pointersIn(b) {
				for n := 0; node != 0 && n < maxTimers; n++ {
					read := reader{s: c.space}
					target, next := read.u64(node-link+function), read.u64(node)
					if read.err != nil {
						break
					}
					c.hooked("timer.hook", subject, "a timer", node-link+function, target)
					if target != 0 && target == delayed {
						at := node - link - timer + work + job
						if target, err := c.space.U64(at); err == nil {
							c.hooked("timer.hook", subject, "delayed work", at, target)
						}
					}
					node = next
				}
			}
		}
		return nil
	})
}

// clocks looks at the high-resolution timers: red-black trees, which change all the time.
func (c *control) clocks() error {
	bases, err := c.profile.Symbol("hrtimer_bases")
	r := c.resolver()
	first, active, size := r.field("hrtimer_cpu_base", "clock_base"), r.field("hrtimer_clock_base", "active"), r.size("hrtimer_clock_base")
	node, function := r.field("hrtimer", "node"), r.field("hrtimer", "function")
	all, err2 := c.profile.Field("hrtimer_cpu_base", "clock_base")
	if err != nil || err2 != nil || r.err != nil {
		return errNotBuilt
	}
	return c.eachCPU(func(cpu int, offset uint64) error {
		for i := range min(all.Count, 16) {
			_ = steady(func() error {
				return c.tree(bases+offset+first+i*size+active, func(n uint64) error {
					if target, err := c.space.U64(n - node + function); err == nil {
						c.hooked("timer.hook", fmt.Sprintf("timers of CPU %d", cpu), "a high-resolution timer", n-node+function, target)
					}
					return nil
				})
			})
		}
		return nil
	})
}

// breakpoints looks at the hardware breakpoints that the kernel knows to be in the CPUs' debug registers.
func (c *control) breakpoints() error {
	slots, err := c.profile.Symbol("bp_per_reg")
	r := c.resolver()
	handler, addr := r.field("perf_event", "overflow_handler"), r.field("perf_event", "hw.info.address")
	if err != nil || r.err != nil {
		return errNotBuilt
	}
	return c.eachCPU(func(cpu int, offset uint64) error {
		for i := range uint64(4) {
			event, err := c.space.U64(slots + offset + i*8)
			if err != nil || event == 0 {
				continue
			}
			read := reader{s: c.space}
			target, at := read.u64(event+handler), read.u64(event+addr)
			if read.err != nil {
				continue
			}
			subject := fmt.Sprintf("debug register %d of CPU %d", i, cpu)
			what := fmt.Sprintf("a hardware breakpoint at %#x", at)
			if at >= kernelHalf {
				what = "a hardware breakpoint in the kernel, at " + c.where(at)
			}
			c.hook("breakpoint.hook", subject, what, event+handler, target)
		}
		return nil
	})
}

// tasks looks at what kernel threads were started with, and at whom waiting tasks will return to.
func (c *control) tasks() error {
	r := c.resolver()
	private, function := r.field("task_struct", "worker_private"), r.field("kthread", "threadfn")
	stack, sp := r.field("task_struct", "stack"), r.field("task_struct", "thread.sp")
	if r.err != nil {
		return errNotBuilt
	}
	l := c.layout
	n := 0
	return c.leaders(func(task uint64) error {
		read := reader{s: c.space}
		comm := make([]byte, 16)
		read.bytes(task+l.task.comm, comm)
		pid, flags := int64(int32(read.u32(task+l.task.pid))), read.u32(task+l.task.flags)
		signal := read.u64(task + l.task.signal)
		if read.err != nil {
			return ErrTorn
		}
		name := nameTask(event.Text(untilNUL(comm)), pid)
		if flags&flagKernelThread != 0 {
			if thread, err := c.space.U64(task + private); err == nil && thread != 0 {
				if target, err := c.space.U64(thread + function); err == nil {
					c.hooked("thread.hook", name, "the kernel thread "+name, thread+function, target)
				}
			}
		}
		return c.loose(signal+l.signal.threads, maxThreads-n, func(node uint64) {
			n++
			thread := node - l.task.threadNode
			r := reader{s: c.space}
			base, top := r.u64(thread+stack), r.u64(thread+sp)
			if r.err == nil && top >= base && top < base+stackSize {
				c.stack(name, top, base+stackSize)
			}
		})
	})
}

// stack looks for return addresses into code that is nobody's. What lies on a stack may be old, so a word counts where
// the instruction before it is a call.
func (c *control) stack(name string, from, to uint64) {
	b, err := c.table(from&^7, int(min(to-from&^7, maxStack)))
	if err != nil {
		return
	}
	for i := 0; i+8 <= len(b); i += 8 {
		v := binary.LittleEndian.Uint64(b[i:])
		if v < modulesFrom || v >= modulesTo || c.code.at(v).owner != ownerNone || !c.isCode(v) || !c.afterCall(v) {
			continue
		}
		c.found(Finding{Kind: "thread.hook", Subject: name, Severity: Critical,
			Detail:   fmt.Sprintf("a thread of %s waits within code at %#x that no known module owns", name, v),
			Evidence: []Evidence{pointerAt(from&^7+uint64(i), v, "return address")}})
		return
	}
}

// afterCall says that the instruction before an address is a call: e8 and 4 bytes, or ff with /2 and up to 5 more.
func (c *control) afterCall(va uint64) bool {
	var b [7]byte
	if c.space.Read(va-7, b[:]) != nil {
		return false
	}
	if b[2] == 0xe8 {
		return true
	}
	for i := range 6 {
		if b[i] == 0xff && b[i+1]>>3&7 == 2 {
			return true
		}
	}
	return false
}
