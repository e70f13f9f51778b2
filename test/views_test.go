package test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The rows of views as `-o json` prints them.
type (
	seenProcess struct {
		PID, PPID, UID, EUID, SUID, FSUID, GID, EGID, SGID, FSGID int64
		Comm, Cmdline, Exe, State, Cgroup, Container              string
		Threads                                                   int
		Kernel                                                    bool
		Groups                                                    []uint32
		NamespacePID                                              int64   `json:"namespace_pid"`
		StartSeconds                                              float64 `json:"start_seconds"`
		Capabilities                                              struct{ Effective, Permitted, Inheritable, Bounding, Ambient []string }
		Namespaces                                                struct{ PID, Mnt, Net, UTS, IPC, User, Cgroup uint64 }
		Unknown                                                   []string
	}
	seenSocket struct {
		Protocol, Local, Remote, State, Comm, Owner string
		PID, FD                                     int64
		Inode                                       uint64
		Unknown                                     []string
	}
	seenFile struct {
		PID, FD, Position int64
		Path, Mode, Type  string
		Deleted           bool
		Unknown           []string
	}
	seenRegion struct {
		Start, End, Offset, Inode uint64
		Permissions, File, Kind   string
		Marks, Unknown            []string
	}
	seenModule struct {
		Name          string
		Address, Size uint64
	}
	seenKernel struct {
		Version, CommandLine string
		Uptime               float64 `json:"uptime_seconds"`
		Taint                uint64
		Unknown, Missing     []string
	}
)

// view asks for a view from outside.
func view[T any](g *guest, args ...string) (out T) {
	g.t.Helper()
	if err := json.Unmarshal([]byte(g.must(append(args, "-o", "json")...)), &out); err != nil {
		g.t.Fatalf("%v: %v", args, err)
	}
	return out
}

// scene is what runs in the guest: every sort of socket, one of them of nobody, a file without a name, a user with groups, an
// ambient capability, namespaces. The rest of the guest's processes are there as well.
const scene = `#!/usr/bin/perl
use Socket; use IO::Socket::INET; use IO::Socket::UNIX;
my $l = IO::Socket::INET->new(Listen => 5, LocalAddr => '127.0.0.1', LocalPort => 7001) or die $!;
my $c = IO::Socket::INET->new('127.0.0.1:7001') or die $!; my $a = $l->accept();
my $waits = IO::Socket::INET->new('127.0.0.1:7001') or die $!;
my $t = IO::Socket::INET->new('127.0.0.1:7001') or die $!; my $ta; $ta = $l->accept() for 1..2; close $t; close $ta;
my $q = IO::Socket::INET->new('127.0.0.1:7001') or die $!;
my $u = IO::Socket::INET->new(Proto => 'udp', LocalAddr => '0.0.0.0', LocalPort => 7004) or die $!;
my $x = IO::Socket::UNIX->new(Local => '/tmp/scene.sock', Listen => 1) or die $!;
socket(my $r, AF_INET, SOCK_RAW, 1) or die $!;
socket(my $p, 17, SOCK_RAW, 0x0300) or die $!;
open(my $f, '+>', '/tmp/nameless') or die $!; syswrite $f, 'four'; unlink '/tmp/nameless';
$| = 1; print "SCENE\n"; sleep 3600;
`

// say prints what /proc says of every process, or which files they have open, without a new process for each line.
const say = `#!/usr/bin/perl
sub text { open(my $f, '<', $_[0]) or return ''; local $/; my $t = <$f>; $t }
for my $d (sort { $a <=> $b } map { m,/proc/(\d+)$, } glob '/proc/[0-9]*') {
if ($ARGV[0] eq 'files') {
for my $f (glob "/proc/$d/fd/*") { my $to = readlink $f; $f =~ s,.*/,,; print "$d $f $to\n" if defined $to }
next;
}
my @status = map { s/^\w+:\s*//; s/\s+/ /g; s/ $//; "$_;" } grep { /^(Uid|Gid|Groups|Cap|NSpid|PPid|Threads)/ } split /\n/, text("/proc/$d/status") or next;
my @ns = map { readlink("/proc/$d/ns/$_") =~ /(\d+)/ ? $1 : '' } qw(pid mnt net uts ipc user cgroup);
my ($stat) = text("/proc/$d/stat") =~ /.*\) (.*)/s;
my $line = text("/proc/$d/cmdline"); $line =~ s/\0/ /g; $line =~ s/\n/ /g;
print join(' | ', $d, join('', @status), "@ns", (split / /, $stat)[19], readlink("/proc/$d/exe") // '', $line), "\n";
}
`

// says runs say, on a host that may have much else to do.
func (g *guest) says(what string) string {
	g.t.Helper()
	out, err := g.try("/root/say "+what, bootTime)
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}

// TestViews compares what is seen from outside with what the guest says of itself in /proc: nobody has tampered with it.
func TestViews(t *testing.T) {
	h := newHost(t)
	h.serve()
	g := h.run("seen", "--cpus", "2", "--additions", "exec")
	g.sh("cat > /root/scene <<'END'\n%s\nEND\nchmod +x /root/scene; ip link set lo up; (setsid /root/scene >/root/scene.log 2>&1 </dev/null &); for i in 1 2 3 4 5 6 7 8 9; do grep -q SCENE /root/scene.log && break; sleep 1; done; grep SCENE /root/scene.log", scene)
	g.sh("cat > /root/say <<'END'\n%s\nEND\nchmod +x /root/say", say)
	g.sh("modprobe dummy; (setsid setpriv --reuid 1234 --regid 2345 --groups 7,42,100 sleep 3601 </dev/null >/dev/null 2>&1 &); " +
		"(setsid setpriv --reuid 33 --clear-groups --inh-caps=+net_raw --ambient-caps=+net_raw sleep 3602 </dev/null >/dev/null 2>&1 &); " +
		"(setsid unshare -pfnmui sleep 3603 </dev/null >/dev/null 2>&1 &); sleep 2")
	t.Run("processes", func(t *testing.T) { g.on(t).compareProcesses() })
	t.Run("sockets", func(t *testing.T) { g.on(t).compareSockets() })
	t.Run("files", func(t *testing.T) { g.on(t).compareFiles() })
	t.Run("maps", func(t *testing.T) { g.on(t).compareMaps() })
	t.Run("kernel", func(t *testing.T) { g.on(t).compareKernel() })
}

// capabilityMask turns names back into the form that /proc has; the table is that of the library of capabilities in Debian's
// manual, in order.
func capabilityMask(names []string) string {
	order := strings.Fields(`chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service
		net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin sys_boot
		sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap mac_override mac_admin syslog
		wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore`)
	mask := uint64(0)
	for _, name := range names {
		if name == "all" {
			mask = 1<<len(order) - 1
		} else if i := slices.Index(order, strings.TrimPrefix(name, "cap_")); i >= 0 {
			mask |= 1 << i
		}
	}
	return fmt.Sprintf("%016x", mask)
}

func (g *guest) compareProcesses() {
	t := g.t
	said := g.says("processes")
	seen := map[string]seenProcess{}
	for _, p := range view[[]seenProcess](g, "ps", g.name) {
		seen[fmt.Sprint(p.PID)] = p
		if len(p.Unknown) > 0 {
			t.Errorf("%d %s: unknown %v", p.PID, p.Comm, p.Unknown)
		}
	}
	compared := 0
	for line := range strings.Lines(said) {
		part := strings.Split(strings.TrimRight(line, "\n"), " | ")
		if len(part) < 5 {
			continue
		}
		p, ok := seen[part[0]]
		if !ok {
			continue // the shells that say all this
		}
		nspid := fmt.Sprint(p.PID)
		if p.NamespacePID != p.PID {
			nspid += " " + fmt.Sprint(p.NamespacePID)
		}
		var groups []string
		for _, n := range p.Groups {
			groups = append(groups, fmt.Sprint(n))
		}
		c, n := p.Capabilities, p.Namespaces
		status := fmt.Sprintf("%d;%d %d %d %d;%d %d %d %d;%s;%s;%d;%s;%s;%s;%s;%s;", p.PPID, p.UID, p.EUID, p.SUID, p.FSUID, p.GID, p.EGID, p.SGID, p.FSGID,
			strings.Join(groups, " "), nspid, p.Threads, capabilityMask(c.Inheritable), capabilityMask(c.Permitted), capabilityMask(c.Effective), capabilityMask(c.Bounding), capabilityMask(c.Ambient))
		if part[1] != status {
			t.Errorf("%s %s:\n says %s\n seen %s", part[0], p.Comm, part[1], status)
		}
		if want := fmt.Sprintf("%d %d %d %d %d %d %d", n.PID, n.Mnt, n.Net, n.UTS, n.IPC, n.User, n.Cgroup); strings.TrimSpace(part[2]) != want {
			t.Errorf("%s %s: namespaces %s, seen %s", part[0], p.Comm, part[2], want)
		}
		if exe := strings.TrimSpace(part[4]); exe != p.Exe && !p.Kernel {
			t.Errorf("%s: executable %q, seen %q", part[0], exe, p.Exe)
		}
		if len(part) > 5 && strings.Join(strings.Fields(part[5]), " ") != strings.Join(strings.Fields(p.Cmdline), " ") {
			t.Errorf("%s: command line %q, seen %q", part[0], part[5], p.Cmdline)
		}
		if ticks, err := strconv.ParseFloat(strings.TrimSpace(part[3]), 64); err == nil && math.Abs(ticks/100-p.StartSeconds) > 0.02 {
			t.Errorf("%s: started at %v, seen %v", part[0], ticks/100, p.StartSeconds)
		}
		compared++
	}
	if compared < 30 || compared < len(seen)-8 {
		t.Errorf("%d processes compared of %d", compared, len(seen))
	}
	one := g.must("ps", g.name, "1")
	if !strings.Contains(one, "capabilities effective:  all") {
		t.Errorf("ps of init: %s", one)
	}
	if tree := g.must("ps", g.name, "--tree"); !strings.Contains(tree, "   [kworker") {
		t.Errorf("no kernel worker below kthreadd: %s", tree)
	}
}

var procStates = map[string]string{"01": "established", "05": "fin-wait-2", "06": "time-wait", "0A": "listen", "07": "unconnected", "08": "close-wait"}

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

func (g *guest) compareSockets() {
	said := g.sh("for f in tcp tcp6 udp udp6 raw raw6; do sed \"s/^/$f /\" /proc/net/$f; done; sed 's/^/unix /' /proc/net/unix; sed 's/^/packet /' /proc/net/packet")
	list := view[[]seenSocket](g, "sockets", g.name)
	compared, waiting, nobodys := 0, 0, 0
	for line := range strings.Lines(said) {
		w := strings.Fields(line)
		fits := func(s seenSocket) bool { return false }
		switch {
		case len(w) > 10 && strings.Contains(w[2], ":") && strings.Contains(w[3], ":") && len(w[4]) == 2:
			local, remote, inode := procAddress(w[2]), procAddress(w[3]), w[10]
			fits = func(s seenSocket) bool {
				return s.Protocol == w[0] && s.Local == local && s.Remote == remote && s.State == procStates[w[4]] && (fmt.Sprint(s.Inode) == inode || s.Owner == "none" && inode == "0")
			}
			if slices.ContainsFunc(list, fits) && (w[4] == "05" || w[4] == "06") {
				waiting++
			}
		case w[0] == "unix" && len(w) == 9 && w[1] != "Num":
			fits = func(s seenSocket) bool {
				return s.Protocol == "unix" && s.Local == w[8] && (fmt.Sprint(s.Inode) == w[7] || w[7] == "0")
			}
		case w[0] == "packet" && len(w) > 8 && w[1] != "sk":
			fits = func(s seenSocket) bool { return s.Protocol == "packet" && fmt.Sprint(s.Inode) == w[9] }
		default:
			continue
		}
		if !slices.ContainsFunc(list, fits) && w[4] != "05" && w[4] != "06" { // which end by themselves
			g.t.Errorf("not seen: %s", line)
		}
		compared++
	}
	for _, s := range list {
		if s.Owner == "none" {
			nobodys++
		}
	}
	if compared < 9 || nobodys < 2 || waiting == 0 {
		g.t.Errorf("%d sockets compared, %d of them waiting; %d seen that are nobody's", compared, waiting, nobodys)
	}
}

func (g *guest) compareFiles() {
	said := g.says("files")
	list := view[[]seenFile](g, "files", g.name)
	pids := map[int64]bool{}
	seen := map[string]seenFile{}
	for _, f := range list {
		pids[f.PID] = true
		seen[fmt.Sprintf("%d %d %s", f.PID, f.FD, f.Path)] = f
		if len(f.Unknown) > 0 {
			g.t.Errorf("%+v", f)
		}
	}
	compared := 0
	for line := range strings.Lines(said) {
		line = strings.TrimSpace(line)
		pid, _, _ := strings.Cut(line, " ")
		if n, err := strconv.ParseInt(pid, 10, 64); err != nil || !pids[n] {
			continue
		}
		if _, ok := seen[line]; !ok && !strings.Contains(line, "/proc/") { // what the shell that says it looks at
			g.t.Errorf("not seen: %s", line)
		}
		compared++
	}
	if compared < 20 || !slices.ContainsFunc(list, func(f seenFile) bool {
		return f.Path == "/tmp/nameless (deleted)" && f.Deleted && f.Mode == "rw" && f.Position == 4 && f.Type == "file"
	}) {
		g.t.Errorf("%d files compared; is one without a name there?", compared)
	}
}

func (g *guest) compareMaps() {
	pid := g.sh("pgrep -xf '/usr/bin/perl /root/scene'")
	list := view[[]seenRegion](g, "maps", g.name, pid)
	next := 0
	for line := range strings.Lines(g.sh("cat /proc/%s/maps", pid)) {
		w := strings.Fields(line)
		if len(w) < 5 || strings.Contains(line, "[vsyscall]") {
			continue
		}
		if next == len(list) {
			g.t.Fatalf("not seen: %s", line)
		}
		r := list[next]
		next++
		if got := fmt.Sprintf("%08x-%08x %s %08x %d", r.Start, r.End, r.Permissions, r.Offset, r.Inode); got != strings.Join([]string{w[0], w[1], w[2], w[4]}, " ") {
			g.t.Errorf("%s\n seen %s", line, got)
		}
		if name := strings.Join(w[5:], " "); name != r.File && !strings.HasPrefix(name, "[") || len(r.Unknown) > 0 {
			g.t.Errorf("%s\n seen %+v", line, r)
		}
	}
	if next != len(list) || next < 15 {
		g.t.Errorf("%d regions seen, %d said", len(list), next)
	}
	g.refused(1, []string{"no such process"}, "maps", g.name, "99999")
}

func (g *guest) compareKernel() {
	k := view[seenKernel](g, "kernel", g.name)
	uptime, _ := strconv.ParseFloat(strings.Fields(g.sh("cat /proc/uptime"))[0], 64)
	if k.Version != g.sh("uname -r") || len(k.Unknown) > 0 || len(k.Missing) > 0 || k.Uptime > uptime || uptime-k.Uptime > 60 || fmt.Sprint(k.Taint) != g.sh("cat /proc/sys/kernel/tainted") {
		g.t.Errorf("%+v, up for %v s", k, uptime)
	}
	modules := view[[]seenModule](g, "modules", g.name)
	said := strings.Split(g.sh("cat /proc/modules"), "\n")
	if len(said) != len(modules) || len(said) == 0 {
		g.t.Fatalf("%d modules said, %d seen", len(said), len(modules))
	}
	for i, line := range said {
		w := strings.Fields(line)
		if got := fmt.Sprintf("%s %d 0x%016x", modules[i].Name, modules[i].Size, modules[i].Address); got != w[0]+" "+w[1]+" "+w[5] {
			g.t.Errorf("%s, seen %s", line, got)
		}
	}
}
