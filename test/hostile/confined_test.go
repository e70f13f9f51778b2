package hostile

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api/vigiav1"
	"vigia/internal/jail"
	"vigia/internal/vm"
)

// TestConfined starts two real machines and compares what /proc says of all their processes with the tables of package
// jail: as root, where each has a user of its own, and as an ordinary user.
func TestConfined(t *testing.T) {
	t.Run("caller", func(t *testing.T) { confined(t, guestHost(t)) })
	if os.Getuid() == 0 {
		t.Run("nobody", func(t *testing.T) { confined(t, guestHostAs(t, 65534)) })
	}
}

func confined(t *testing.T, h *host) {
	a := h.run(&vigiav1.RunRequest{Image: "tiny", Name: "a", MemoryBytes: 192 << 20, Publish: []string{"0:22"}, Additions: []string{vm.AdditionExec}})
	b := h.run(&vigiav1.RunRequest{Image: "tiny", Name: "b", MemoryBytes: 192 << 20, Net: vm.NetOff})
	all := map[string]int64{"daemon": int64(h.daemon.Process.Pid), "a/qemu": a.Pid, "a/guard": a.GuardPid, "a/gate": a.GatePid, "b/qemu": b.Pid, "b/guard": b.GuardPid}
	users := map[int]string{}
	for _, m := range []*vigiav1.Machine{a, b} {
		for role, pid := range map[string]int64{"qemu": m.Pid, "guard": m.GuardPid, "gate": m.GatePid} {
			if pid == 0 {
				continue
			}
			name := m.Name + "/" + role
			o, err := jail.Observe(int(pid))
			if err != nil {
				t.Fatal(err)
			}
			compareWalls(t, name, jail.Profiles[role], o, m)
			compareMounts(t, name, role, h, m, o)
			compareDescriptors(t, h, m, role, o)
			compareLimits(t, name, role, int(pid), m)
			if h.owner == 0 {
				if other := users[o.UIDs[0]]; other != "" {
					t.Errorf("%s and %s are one user: %d", name, other, o.UIDs[0])
				}
				users[o.UIDs[0]] = name
			}
		}
	}
	if os.Getuid() == 0 {
		comparePeers(t, all)
	}
	keeperConfined(t, h, a)
}

// keeperConfined saves a machine, and looks at the process that has its memory from then on, and at what QEMU has kept of it.
func keeperConfined(t *testing.T, h *host, m *vigiav1.Machine) {
	pid := h.keeper(m)
	for role, pid := range map[string]int64{"keeper": pid, "qemu": m.Pid} {
		o, err := jail.Observe(int(pid))
		if err != nil {
			t.Fatal(err)
		}
		compareWalls(t, m.Name+"/"+role, jail.Profiles[role], o, m)
		compareMounts(t, m.Name+"/"+role, role, h, m, o)
		compareDescriptors(t, h, m, role, o)
	}
}

// keeper saves a machine, and returns the process that has its memory from then on. The one that made the descriptor of it is gone.
func (h *host) keeper(m *vigiav1.Machine) (pid int64) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	saved, err := h.client.Checkpoints.Take(ctx, connect.NewRequest(&vigiav1.TakeCheckpointRequest{Name: m.Name}))
	if err != nil {
		h.t.Fatal(err)
	}
	if how := saved.Msg.How; h.owner == 0 && how != "protected" {
		h.t.Logf("memory is %s here: %s", how, saved.Msg.GetWhy())
	}
	for _, e := range entries(h.t, "/proc") {
		environ, _ := os.ReadFile("/proc/" + e + "/environ")
		tag := fmt.Sprintf("VIGIA_TAG=vigia-%d-%s/%s/", h.owner, stateHash(h.state), m.Id)
		if bytes.Contains(environ, []byte(tag+"planter")) {
			h.t.Errorf("the planter lives on as process %s", e)
		}
		if bytes.Contains(environ, []byte(tag+"keeper")) {
			n, _ := strconv.Atoi(e)
			pid = int64(n)
		}
	}
	if pid == 0 {
		h.t.Fatal("no keeper after a checkpoint")
	}
	return pid
}

func entries(t *testing.T, dir string) (names []string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// compareWalls wants every wall of the table, and that `show` says the same of it as /proc.
func compareWalls(t *testing.T, name string, p jail.Profile, o jail.Observation, m *vigiav1.Machine) {
	t.Helper()
	for _, wall := range p.Compare(o) {
		if !wall.InForce {
			t.Errorf("%s: %s", name, wall)
		}
		for _, said := range m.Isolation {
			if said.Subject == p.Name && said.Measure == wall.Name && said.InForce != wall.InForce && wall.Name != "own user" {
				t.Errorf("%s: show says of %s: %v, /proc says: %s", name, wall.Name, said.InForce, wall)
			}
		}
	}
	if most := o.Limits["Max file size"]; most > 4<<30 {
		t.Errorf("%s may write files of %d bytes", name, most)
	}
	want := []string{"ipc", "mnt", "pid", "uts", "cgroup"}
	if p.Name != "gate" {
		want = append(want, "net")
	}
	for _, ns := range want {
		if !slices.Contains(o.Own, ns) {
			t.Errorf("%s shares the namespace %s with the host", name, ns)
		}
	}
	if len(o.Groups) != 0 && !slices.Equal(o.Groups, []int{65534}) {
		t.Errorf("%s has supplementary groups %v", name, o.Groups)
	}
}

// compareMounts wants QEMU to see its program, the machine's files and nothing else, and the workers nothing at all.
func compareMounts(t *testing.T, name, role string, h *host, m *vigiav1.Machine, o jail.Observation) {
	t.Helper()
	allowed := map[string]bool{"/": true}
	ram := ""
	if role == "qemu" {
		program, err := exec.LookPath("qemu-system-x86_64")
		if err != nil {
			t.Fatal(err)
		}
		files, err := jail.Program(program)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range files.Binds {
			allowed[b.Source], allowed[b.Target] = true, true
		}
		for _, path := range []string{"/dev/null", "/dev/urandom", filepath.Join(h.state, "run", m.Id, "qemu")} {
			allowed[path] = true
		}
		for _, part := range []string{"boot/loader", "boot/joined"} {
			allowed[filepath.Join(h.state, "images", m.ImageId, part)] = true
		}
		ram = fmt.Sprintf("/dev/shm/vigia-%d-%s/%s.ram", h.owner, stateHash(h.state), m.Id)
		allowed[ram], allowed[ram+"//deleted"] = true, true
	}
	for _, mount := range o.Mounts {
		plugin, _ := filepath.Match("vigia-probe-[12].so", filepath.Base(mount.Target)) // where make build put it
		if !allowed[mount.Target] && !(plugin && strings.HasSuffix(name, "/qemu")) {
			t.Errorf("%s sees %s (%s of %s)", name, mount.Target, mount.Root, mount.Source)
		}
		if mount.Has("rw") && !strings.HasPrefix(mount.Target, ram) || mount.Has("rw") && ram == "" {
			t.Errorf("%s may write %s", name, mount.Target)
		}
		if !mount.Has("nosuid") {
			t.Errorf("%s: %s is not mounted nosuid", name, mount.Target)
		}
		if mount.Target == "/dev/kvm" {
			t.Errorf("%s sees /dev/kvm, under %s", name, m.Accelerator)
		}
	}
}

// compareLimits wants a limit of memory, CPUs and threads for each process, or a word why the host has none; and that the
// limits which `show` tells of are those of the group that the process is in.
func compareLimits(t *testing.T, name, role string, pid int, m *vigiav1.Machine) {
	t.Helper()
	for measure, files := range map[string][2]string{"memory limit": {"memory.limit_in_bytes", "memory.max"},
		"cpu limit": {"cpu.cfs_quota_us", "cpu.max"}, "thread limit": {"pids.max", "pids.max"}} {
		i := slices.IndexFunc(m.Isolation, func(x *vigiav1.Isolation) bool { return x.Subject == role && x.Measure == measure })
		if i < 0 {
			t.Errorf("%s: show says nothing of its %s", name, measure)
			continue
		}
		said := m.Isolation[i]
		if !said.InForce {
			if said.Detail == "" {
				t.Errorf("%s has no %s, and show does not say why", name, measure)
			}
			continue
		}
		controller, _, _ := strings.Cut(files[0], ".")
		found := ""
		memberships, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		for line := range strings.Lines(string(memberships)) {
			parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
			at, file := "", files[1]
			if slices.Contains(strings.Split(parts[1], ","), controller) {
				at, file = controller, files[0]
			} else if parts[1] != "" {
				continue
			}
			if text, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", at, parts[2], file)); err == nil {
				found = strings.TrimSpace(string(text))
			}
		}
		if found == "" || found == "-1" || strings.HasPrefix(found, "max") {
			t.Errorf("%s: show says %s: %s, its group says %q", name, measure, said.Detail, found)
		}
	}
}

// hold is one thing that a process may hold: its name in the table, how /proc shows it, and whether it is for writing.
type hold struct {
	what  string
	path  string // a glob
	write bool
	most  int
}

// holds says the tables' "holds" in the words of /proc.
func (h *host) holds(m *vigiav1.Machine, role string) []hold {
	dir, img := filepath.Join(h.state, "machines", m.Id), filepath.Join(h.state, "images", m.ImageId)
	ram := fmt.Sprintf("/dev/shm/vigia-%d-%s/%s.ram (deleted)", h.owner, stateHash(h.state), m.Id)
	const std, events = "standard input, output, error", "event descriptors"
	all := []hold{{std, "/dev/null", true, 1}, {std, filepath.Join(dir, role+".log"), true, 2},
		{events, "anon_inode:*eventpoll*", true, 4}, {events, "anon_inode:*eventfd*", true, 1024}}
	if role == "keeper" { // between two checkpoints; QEMU has kept neither the device nor what it made of it
		return append(all, hold{"guest memory", ram, false, 1}, hold{"protection", "anon_inode:[userfaultfd]", true, 1})
	}
	if role != "qemu" {
		all = append(all, hold{"tally", "/memfd:tally (deleted)", true, 1})
	}
	switch role {
	case "qemu":
		all = append(all, hold{"guest memory", ram, true, 1}, hold{events, "anon_inode:*signalfd*", true, 1},
			hold{"probe page", "/memfd:vigia-probe (deleted)", true, 1})
	case "guard":
		all = append(all, hold{"volume files", filepath.Join(dir, "overlay.vol"), true, 1}, hold{"volume files", filepath.Join(img, "disk.layer"), false, 1},
			hold{"kernel profile", filepath.Join(img, "profile"), false, 1},
			hold{"kernel reference", filepath.Join(img, "reference"), false, 1}, hold{"kernel modules", filepath.Join(img, "modules"), false, 1},
			hold{"console log", filepath.Join(dir, "console.*"), true, 3},
			hold{"guest memory", ram, false, 1}, hold{"clocks", fmt.Sprintf("/proc/%d/task/*/schedstat", m.Pid), false, int(m.Cpus)})
	}
	return all
}

// sockets are the unix sockets that a process may hold, by their bound name; "" are ends that were connected.
func sockets(m *vigiav1.Machine, role string) map[string]int {
	agent, card := len(m.Additions), 1
	if m.Net == vm.NetOff {
		card = 0
	}
	switch role {
	case "qemu": // each once listening and once accepted; and its end of the disk
		return map[string]int{"qmp.sock": 2, "console.sock": 2, "net.sock": 2 * card, "agent.sock": 2 * agent, "": 1}
	case "keeper":
		return map[string]int{"": 1}
	case "guard":
		return map[string]int{"guard.sock": 2, "nbd.sock": 2, "": 2 + agent}
	}
	return map[string]int{"gate.sock": 2, "": card}
}

// compareDescriptors accounts for every descriptor.
func compareDescriptors(t *testing.T, h *host, m *vigiav1.Machine, role string, o jail.Observation) {
	t.Helper()
	name := m.Name + "/" + role
	holds, left := h.holds(m, role), sockets(m, role)
	for _, x := range holds {
		if !slices.ContainsFunc(jail.Profiles[role].Descriptors, func(row jail.Hold) bool { return row.What == x.what }) {
			t.Errorf("the table of %s does not name: %s", role, x.what)
		}
	}
	paths := unixPaths(int64(os.Getpid()))
	maps.Copy(paths, unixPaths(m.Pid)) // the disk's connection was made in QEMU's namespace
	inet, published := inetListening(), len(m.Publish)
	for fd, link := range o.Descriptors {
		if inode, ok := socketInode(link); ok {
			if bound, ok := paths[inode]; ok && left[bound] > 0 {
				left[bound]--
			} else if _, ok := inet[inode]; ok && role == "gate" && published > 0 {
				published--
			} else {
				t.Errorf("%s holds the socket %d: %q %s", name, inode, paths[inode], inet[inode])
			}
			continue
		}
		i := slices.IndexFunc(holds, func(x hold) bool { ok, _ := filepath.Match(escaped(x.path), link); return ok })
		if i < 0 || holds[i].most == 0 {
			t.Errorf("%s holds descriptor %d: %s", name, fd, link)
			continue
		}
		holds[i].most--
		if writable(t, o.PID, fd) && !holds[i].write {
			t.Errorf("%s holds %s for writing", name, link)
		}
		if info, err := os.Stat(link); err == nil && info.IsDir() {
			t.Errorf("%s holds a directory: %s", name, link)
		}
	}
}

// escaped keeps what /proc puts around words from being a pattern.
func escaped(glob string) string { return strings.NewReplacer("[", `\[`, "]", `\]`).Replace(glob) }

// writable reads how a descriptor was opened.
func writable(t *testing.T, pid, fd int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd))
	if err != nil {
		return false // closed meanwhile
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseUint(strings.TrimSpace(rest), 8, 64)
			if err != nil {
				t.Fatal(err)
			}
			return flags&3 != 0 // O_RDONLY
		}
	}
	return false
}

// comparePeers wants connections between a machine's own processes, and theirs to the daemon, and no others.
func comparePeers(t *testing.T, processes map[string]int64) {
	t.Helper()
	allowed := map[string]bool{"qemu guard": true, "guard qemu": true, "qemu gate": true, "gate qemu": true,
		"guard daemon": true, "gate daemon": true, "keeper daemon": true}
	held := holders(processes)
	seen, peers := map[string]int{}, map[uint32]uint32{}
	for _, pid := range processes {
		more, err := unixPeers(pid)
		if err != nil {
			t.Fatal(err)
		}
		for one, other := range more { // a listing of what changes meanwhile may miss an end
			peers[one], peers[other] = other, one
		}
	}
	for name := range processes {
		if name == "daemon" {
			continue
		}
		for inode, holding := range held {
			if !slices.Contains(holding, name) {
				continue
			}
			if len(holding) > 1 {
				t.Errorf("the socket %d is held by %v", inode, holding)
			}
			peer, ok := peers[inode]
			if !ok || peer == 0 {
				continue // it listens
			}
			if len(held[peer]) != 1 {
				t.Errorf("%s is connected to the socket %d, held by %q", name, peer, held[peer])
				continue
			}
			other := held[peer][0]
			pair := name[2:] + " " + strings.TrimPrefix(other, name[:2])
			if !allowed[pair] {
				t.Errorf("%s is connected to %s", name, other)
			}
			seen[name+" "+other]++
		}
	}
	t.Logf("connections: %v", seen)
	if seen["a/qemu a/guard"] != 4 || seen["a/qemu a/gate"] != 1 || seen["b/qemu b/guard"] != 3 {
		t.Errorf("not all connections were seen: %v", seen)
	}
}
