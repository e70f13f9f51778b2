package introspect

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"

	"vigia/internal/kernel"
	"vigia/internal/kernel/patch"
)

// Recordings for the comparison of code are a stretch of a real guest's running kernel, text and read-only data, with what
// explains it and what of the kernel file is compared with it: reference length u64, reference, then a recording as others are
// (record_test.go). TestRecordText makes them of saved guests (saved_test.go).
var textRecordings = []string{"text-6.1.xz", "text-6.12.xz"}

const (
	recordedText   = 40 << 10
	recordedRodata = 4 << 10
)

var textSymbols = []string{"_text", "_etext", "_sinittext", "_einittext", "linux_banner", "init_task", "init_top_pgt", "__pgtable_l5_enabled",
	"modules", "bpf_kallsyms", "ftrace_ops_trampoline_list", "kprobe_insn_slots", "kprobe_optinsn_slots", "boot_cpu_data",
	"__x86_return_thunk", "its_return_thunk", "__static_call_return0", "__static_call_return", "nop_func", "_paravirt_nop", "BUG_func",
	"paravirt_BUG", "ftrace_caller", "ftrace_regs_caller", "ftrace_trace_function", "ftrace_call", "ftrace_regs_call", "MOD_TEXT", "MOD_INIT_TEXT"}

var textTypes = []string{"task_struct", "mm_struct", "module", "module_memory", "bpf_ksym", "ftrace_ops", "kprobe_insn_cache", "kprobe_insn_page",
	"cpuinfo_x86", "module_sect_attrs", "module_sect_attr"}

// diverse returns the stretch of a kernel's text that has the most sorts of places that the kernel writes over.
func diverse(ref *kernel.Reference) kernel.Segment {
	text := ref.Text()
	var best kernel.Segment
	most := 0
	for at := text.Addr; at+recordedText <= text.End(); at += 4096 {
		var count [256]int
		score := 0
		for i := patch.FirstSite(patch.Kernel{Ref: ref}, at); i < ref.NumSites() && ref.Site(i).Addr < at+recordedText; i++ {
			if s := ref.Site(i); count[s.Kind] < 6 {
				count[s.Kind]++
				score++
			}
		}
		if score > most {
			most, best = score, kernel.Segment{Addr: at, Data: text.Data[at-text.Addr:][:recordedText]}
		}
	}
	return best
}

// TestRecordText makes the recordings in VIGIA_RECORD_TEXT, of guests in VIGIA_TEST_SAVED.
func TestRecordText(t *testing.T) {
	out := os.Getenv("VIGIA_RECORD_TEXT")
	if out == "" {
		t.Skip("VIGIA_RECORD_TEXT names no directory to record to")
	}
	for name, from := range map[string]string{textRecordings[0]: "cloud-4cpu", textRecordings[1]: "612-2cpu"} {
		full, mem := openSavedWith(t, filepath.Join(os.Getenv("VIGIA_TEST_SAVED"), from+".ram"))
		ref, _ := savedCode(t, attach(t, mem, full), from)
		ro := ref.Rodata()
		banner, err := full.Symbol("linux_banner")
		if err != nil {
			t.Fatal(err)
		}
		at := max(banner&^4095, ro.Addr)
		cut, err := ref.Cut(diverse(ref), kernel.Segment{Addr: at, Data: ro.Data[at-ro.Addr:][:recordedRodata]})
		if err != nil {
			t.Fatal(err)
		}
		p, err := full.Reduce(textSymbols, textTypes)
		if err != nil {
			t.Fatal(err)
		}
		r := &recorder{RAM: mem, lines: make(map[uint64][]byte)}
		g := attach(t, r, p)
		read := make([]byte, len(p.Banner()))
		_ = r.ReadPhys(g.boot.Phys+g.link.banner-g.link.text, read)
		found, stats, err := g.CheckText(cut, nil)
		if err != nil || len(found) > 0 {
			t.Fatal(found, err)
		}
		t.Logf("%s: %+v", name, stats)
		file := filepath.Join(out, strings.TrimSuffix(name, ".xz"))
		writeRecording(t, file+".gz", p, r)
		var b bytes.Buffer
		_ = cut.Encode(&b)
		if err := os.WriteFile(file+".ref", append(binary.LittleEndian.AppendUint64(nil, uint64(b.Len())), b.Bytes()...), 0o644); err != nil {
			t.Fatal(err)
		}
		// then (cat FILE.ref; gunzip -c FILE.gz) | xz -9e >FILE.xz
	}
}

// textRecording is a recording of code.
type textRecording struct {
	*recorded
	profile *kernel.Profile
	ref     *kernel.Reference
}

func loadText(t testing.TB, name string) textRecording {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := xz.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	n := binary.LittleEndian.Uint64(b)
	ref, err := kernel.LoadReference(slices.Clone(b[8 : 8+n]))
	if err != nil {
		t.Fatal(err)
	}
	var r textRecording
	r.ref = ref
	r.recorded, r.profile = parseRecording(t, b[8+n:])
	return r
}
