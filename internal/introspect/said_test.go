package introspect

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// said is a saved guest with what it said of itself a moment before: NAME.guest.txt beside NAME.ram has sections that begin
// with "==ps", "==status", "==ns", "==net", "==fd", "==maps", "==modules".
type said struct {
	guest *Guest
	said  map[string][]string
}

func eachSaid(t *testing.T, test func(*testing.T, *said)) {
	saved(t, func(t *testing.T, g *Guest) {
		s := &said{g, map[string][]string{}}
		name := filepath.Base(t.Name())
		section := ""
		for _, l := range lines(t, filepath.Join(os.Getenv("VIGIA_TEST_SAVED"), name+".guest.txt")) {
			if _, name, ok := strings.Cut(l, "=="); ok && len(name) < 10 {
				section = name
				continue
			}
			s.said[section] = append(s.said[section], l)
		}
		test(t, s)
	})
}

func lines(t testing.TB, file string) (out []string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		out = append(out, s.Text())
	}
	return out
}

// brief are the guest's own shells and what they ran to say all this: they are gone by now.
func brief(comm string) bool {
	return slices.Contains([]string{"sh", "ps", "cat", "grep", "tr", "readlink", "ls", "sleep"}, comm)
}

func TestSaidProcesses(t *testing.T) {
	eachSaid(t, func(t *testing.T, s *said) {
		list, err := s.guest.Processes()
		if err != nil {
			t.Fatal(err)
		}
		by := map[string]Process{}
		for _, p := range list {
			by[fmt.Sprint(p.PID)] = p
			if len(p.Unknown) > 0 && !slices.Contains([]string{"cmdline"}, p.Unknown[0]) {
				t.Errorf("%d %s: unknown %v", p.PID, p.Comm, p.Unknown)
			}
		}
		comms := map[string]string{}
		for _, l := range s.said["ps"][1:] {
			w := strings.Fields(l)
			if len(w) < 10 {
				continue
			}
			comms[w[0]] = w[8]
			p, ok := by[w[0]]
			if !ok {
				if !brief(w[8]) && w[8] != "kworker" {
					t.Errorf("%s %s is not listed", w[0], w[8])
				}
				continue
			}
			if got := fmt.Sprintf("%d %d %d %d %d", p.PPID, p.UID, p.EUID, p.GID, p.Threads); got != strings.Join([]string{w[1], w[2], w[3], w[4], w[6]}, " ") {
				t.Errorf("%s: %s", l, got)
			}
			if args := strings.Join(w[9:], " "); !p.Kernel && strings.Join(strings.Fields(p.Cmdline), " ") != args && !strings.HasPrefix(args, "[") {
				t.Errorf("%s: %q", l, p.Cmdline)
			}
		}
		compared := 0
		for _, l := range s.said["status"] {
			w := strings.SplitN(strings.TrimPrefix(l, "/proc/"), " ", 2)
			p, ok := by[w[0]]
			if !ok || len(w) < 2 {
				continue
			}
			var groups []string
			for _, g := range p.Groups {
				groups = append(groups, fmt.Sprint(g))
			}
			nspid := fmt.Sprint(p.PID)
			if p.NamespacePID != p.PID {
				nspid += " " + fmt.Sprint(p.NamespacePID)
			}
			got := fmt.Sprintf("Uid: %d %d %d %d;Gid: %d %d %d %d;Groups: %s ;NSpid: %s;CapInh: %016x;CapPrm: %016x;CapEff: %016x;CapBnd: %016x;CapAmb: %016x;",
				p.UID, p.EUID, p.SUID, p.FSUID, p.GID, p.EGID, p.SGID, p.FSGID, strings.Join(groups, " "), nspid, p.Capabilities.Inheritable,
				p.Capabilities.Permitted, p.Capabilities.Effective, p.Capabilities.Bounding, p.Capabilities.Ambient)
			if got != w[1] {
				t.Errorf("%s %s:\n  it says %s\n  seen    %s", w[0], comms[w[0]], w[1], got)
			}
			compared++
		}
		number := regexp.MustCompile(`\[(\d+)\]`)
		for _, l := range s.said["ns"] {
			w := strings.Fields(strings.TrimPrefix(l, "/proc/"))
			p, ok := by[w[0]]
			if !ok || len(w) < 8 {
				continue
			}
			var ns []string
			for _, m := range number.FindAllStringSubmatch(l, -1) {
				ns = append(ns, m[1])
			}
			n := p.Namespaces
			if got := fmt.Sprint([]uint64{n.PID, n.Mnt, n.Net, n.UTS, n.IPC, n.User, n.Cgroup}); got != fmt.Sprint(ns) {
				t.Errorf("%s: %s", l, got)
			}
			if want := strings.TrimPrefix(w[len(w)-1], "0::"); want != p.Cgroup && p.Namespaces.Cgroup == by["1"].Namespaces.Cgroup {
				t.Errorf("%s: %s", l, p.Cgroup)
			}
			if strings.Contains(p.Cgroup, "docker") && (p.Runtime != "docker" || len(p.Container) != 64) {
				t.Errorf("%s: %s %s", l, p.Runtime, p.Container)
			}
		}
		t.Logf("%d processes, %d compared, boot %+v", len(list), compared, s.guest.Boot())
	})
}

var tcpNumbers = map[string]string{"01": "established", "06": "time-wait", "0A": "listen", "07": "unconnected", "08": "close-wait"}

func TestSaidSockets(t *testing.T) {
	eachSaid(t, func(t *testing.T, s *said) {
		list, err := s.guest.Sockets()
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		owners := map[string]int{}
		for _, k := range list {
			owners[k.Owner]++
			seen[fmt.Sprintf("%s %s %s %s", strings.TrimSuffix(k.Protocol, "6"), k.Local, k.Remote, k.State)]++
			if len(k.Unknown) > 0 && k.State != "time-wait" {
				t.Errorf("%+v", k)
			}
		}
		compared := 0
		for _, l := range s.said["net"] {
			w := strings.Fields(l)
			var key string
			switch {
			case len(w) > 9 && strings.HasSuffix(w[0], ":") && strings.Contains(w[1], ":") && len(w[3]) == 2:
				local, remote := procAddress(w[1]), procAddress(w[2])
				for _, proto := range []string{"tcp", "udp", "raw"} {
					k := fmt.Sprintf("%s %s %s %s", proto, local, remote, tcpNumbers[w[3]])
					if seen[k] > 0 {
						key = k
					}
				}
				if key == "" && w[3] != "06" { // which may have ended since
					t.Errorf("not seen: %s: %s %s %s", l, local, remote, tcpNumbers[w[3]])
				}
			case len(w) == 8 && strings.HasSuffix(w[0], ":"):
				if !slices.ContainsFunc(list, func(k Socket) bool {
					return k.Protocol == "unix" && k.Local == w[7] && (w[6] == "0" || fmt.Sprint(k.Inode) == w[6])
				}) {
					t.Errorf("not seen: %s", l)
				}
				key = l
			}
			if key != "" {
				compared++
			}
		}
		byTable, err := s.guest.SocketsByTables()
		if err != nil {
			t.Fatal(err)
		}
		byFile, err := s.guest.SocketsByFiles()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%d sockets %v, %d compared; by table %d, by file %d; missing %v", len(list), owners, compared, len(byTable), len(byFile), s.guest.tableLayout().missing())
		for _, k := range list {
			if k.Owner != heldByProcess {
				t.Logf("%+v", k)
			}
		}
	})
}

// procAddress turns /proc/net's form of an address into the usual one; empty for none.
func procAddress(text string) string {
	addr, port, _ := strings.Cut(text, ":")
	n, _ := strconv.ParseUint(port, 16, 16)
	raw, _ := hex.DecodeString(addr)
	for i := 0; i+4 <= len(raw); i += 4 {
		slices.Reverse(raw[i : i+4])
	}
	ip, _ := netip.AddrFromSlice(raw)
	if n == 0 && ip.IsUnspecified() {
		return ""
	}
	return netip.AddrPortFrom(ip, uint16(n)).String()
}

func TestSaidMaps(t *testing.T) {
	eachSaid(t, func(t *testing.T, s *said) {
		var pid int64
		var got []Region
		next, compared := 0, 0
		finish := func() {
			if pid != 0 && next != len(got) {
				t.Errorf("%d: %d regions seen, %d said", pid, len(got), next)
			}
		}
		for _, l := range s.said["maps"] {
			if n, ok := strings.CutPrefix(l, "pid "); ok {
				finish()
				pid, _ = strconv.ParseInt(n, 10, 64)
				var err error
				if got, err = s.guest.Maps(pid); err != nil {
					t.Fatal(err)
				}
				next = 0
				continue
			}
			if strings.Contains(l, "[vsyscall]") {
				continue
			}
			w := strings.Fields(l)
			if next >= len(got) {
				t.Errorf("%d: missing %s", pid, l)
				continue
			}
			r := got[next]
			next++
			inode := r.Inode
			text := fmt.Sprintf("%08x-%08x %s %08x %d", r.Start, r.End, r.Permissions, r.Offset, inode)
			want := fmt.Sprintf("%s %s %s %s", w[0], w[1], w[2], w[4])
			if text != want {
				t.Errorf("%d: said %s, seen %s", pid, want, text)
			}
			name := strings.Join(w[5:], " ")
			if r.File != name && !(strings.HasPrefix(name, "[") && "["+r.Kind+"]" == name) && !(name == "[vvar]" && r.Kind == "special") && !(name == "" && r.Kind == "anonymous") {
				t.Errorf("%d: said %s, seen %+v", pid, l, r)
			}
			compared++
		}
		finish()
		marked := 0
		list, _ := s.guest.Processes()
		for _, p := range list {
			regions, err := s.guest.Maps(p.PID)
			if err != nil {
				t.Errorf("%d: %v", p.PID, err)
			}
			for _, r := range regions {
				if len(r.Marks) > 0 {
					marked++
					t.Logf("%s %+v", p.Comm, r)
				}
			}
		}
		t.Logf("%d regions compared, %d marked", compared, marked)
	})
}

func TestSaidFiles(t *testing.T) {
	eachSaid(t, func(t *testing.T, s *said) {
		list, err := s.guest.Files(0)
		if err != nil {
			t.Fatal(err)
		}
		pids := map[int64]string{}
		seen := map[string]bool{}
		for _, f := range list {
			pids[f.PID] = f.Comm
			seen[fmt.Sprintf("%d %d %s", f.PID, f.FD, f.Path)] = true
			if len(f.Unknown) > 0 {
				t.Errorf("%+v", f)
			}
		}
		var pid int64
		compared := 0
		for _, l := range s.said["fd"] {
			if strings.HasPrefix(l, "/proc/") {
				fmt.Sscanf(l, "/proc/%d/fd", &pid)
				continue
			}
			w := strings.Fields(l)
			arrow := slices.Index(w, "->")
			if arrow < 1 || pids[pid] == "" || brief(pids[pid]) {
				continue
			}
			name := strings.Join(w[arrow+1:], " ")
			if !seen[fmt.Sprintf("%d %s %s", pid, w[arrow-1], name)] {
				t.Errorf("%d %s: %s", pid, pids[pid], l)
			}
			compared++
		}
		t.Logf("%d files, %d compared", len(list), compared)
	})
}

func TestSaidSystem(t *testing.T) {
	eachSaid(t, func(t *testing.T, s *said) {
		sys, err := s.guest.System()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%+v", sys)
		modules, err := s.guest.Modules()
		if err != nil {
			t.Fatal(err)
		}
		for i, l := range s.said["modules"] {
			w := strings.Fields(l)
			if m := modules[i]; fmt.Sprintf("%s %d 0x%016x", m.Name, m.Size, m.Address) != w[0]+" "+w[1]+" "+w[len(w)-1] {
				t.Errorf("%s: %+v", l, m)
			}
		}
	})
}
