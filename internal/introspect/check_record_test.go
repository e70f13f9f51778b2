package introspect

import (
	"encoding/binary"
	"os"
	"slices"
	"testing"
)

// Recordings for the checks that compare views are made like those for the views, by TestRecordCheck. Of what is searched
// in bulk (struct pages, the memory for modules) they hold only the lines in which something is found.
var checkedSymbols = append([]string{"init_pid_ns", "css_set_table", "__per_cpu_offset", "nr_cpu_ids", "runqueues", "vmemmap_base",
	"page_offset_base", "task_struct_cachep", "cred_jar", "init_cred", "module_kset", "mod_tree", "module_bug_list", "tcp_hashinfo", "udp_table",
	"udplite_table", "raw_v4_hashinfo", "raw_v6_hashinfo", "net_namespace_list"}, recordedSymbols...)

var checkedTypes = append([]string{"pid_namespace", "xa_node", "upid", "css_set", "rq", "slab", "kmem_cache", "page", "user_struct", "kset",
	"kobject", "module_kobject", "mod_tree_node", "latch_tree_root", "sock_common", "inet_hashinfo", "inet_ehash_bucket",
	"inet_listen_hashbucket", "udp_table", "udp_hslot", "raw_hashinfo", "net", "packet_sock"}, recordedTypes...)

// crossChecks are the checks whose recordings there are.
func crossChecks() []check {
	return slices.DeleteFunc(slices.Clone(checks), func(k check) bool {
		return !slices.Contains([]string{"processes", "modules", "credentials", "sockets", "task memory", "module memory", "credential memory"}, k.name)
	})
}

// quick makes a checker that runs these checks and does not wait.
func quick(g *Guest) *Checker {
	c := NewChecker(g, nil)
	c.checks, c.settle = crossChecks(), c.settle[:1]
	c.settle[0] = 0
	return c
}

func TestRecordCheck(t *testing.T) {
	out := os.Getenv("VIGIA_RECORD_CHECK")
	if out == "" {
		t.Skip("VIGIA_RECORD_CHECK names no file to record to")
	}
	_, p, m := live(t)
	p, err := p.Reduce(checkedSymbols, checkedTypes)
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{RAM: m, lines: make(map[uint64][]byte), bulk: make(map[uint64]bool)}
	g := attach(t, r, p)
	banner := make([]byte, len(p.Banner()))
	_ = r.ReadPhys(g.boot.Phys+g.link.banner-g.link.text, banner)
	_ = processes(t, g)
	rep, err := quick(g).Run(true)
	if err != nil || len(rep.Findings) > 0 {
		t.Fatalf("%+v, %v", rep.Findings, err)
	}
	tasks, err := g.livingTasks()
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks { // what is read of few
		if id, err := g.identityOf(task); err == nil {
			g.plainProgram(task, &id)
		}
	}
	r.thin(t, g)
	writeRecording(t, out, p, r)
}

// thin drops the lines that were only read in bulk and hold neither a slab's first page nor a module's own struct.
func (r *recorder) thin(t *testing.T, g *Guest) {
	task, err1 := g.space.U64(g.slabs.taskCache + g.boot.Slide)
	cred, err2 := g.space.U64(g.slabs.credCache + g.boot.Slide)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	keep := map[uint64]bool{}
	for module := range g.modulesListed(g.modules).at {
		for at := module; at < module+g.moduleViews.size; at += lineSize {
			if pa, err := g.space.Translate(at); err == nil {
				keep[pa&^(lineSize-1)] = true
			}
		}
	}
	for at := range r.bulk {
		cache := binary.LittleEndian.Uint64(r.lines[at][g.slabs.cache:])
		if !keep[at] && cache != task && cache != cred {
			delete(r.lines, at)
		}
	}
}
