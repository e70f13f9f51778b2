package test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// soakOperations is how many a short soak does; $VIGIA_SOAK_OPERATIONS asks for more. $VIGIA_SOAK_SEED does one again.
const soakOperations = 8

// maxSaved is how many checkpoints a soaked machine keeps; before more are made some are removed.
const maxSaved = 14

// TestSoak saves, puts back, clones and kills at random under a guest that changes memory and disk all the time, and looks at
// all of both after each step (test/witness). At the end nothing may be left, and nothing may have grown.
func TestSoak(t *testing.T) {
	operations, seed := soakOperations, uint64(time.Now().UnixNano())
	if v := os.Getenv("VIGIA_SOAK_OPERATIONS"); v != "" {
		operations = number(v)
	}
	if v := os.Getenv("VIGIA_SOAK_SEED"); v != "" {
		seed, _ = strconv.ParseUint(v, 10, 64)
	}
	t.Logf("%d operations, VIGIA_SOAK_SEED=%d", operations, seed)
	h := newHost(t)
	h.serve()
	s := &soak{guest: h.soaked("one"), rnd: rand.New(rand.NewPCG(seed, 0)), saved: map[string]string{}, did: map[string]int{}}
	s.checkpoint()
	s.clone() // what is made once is there now
	before := s.count()
	began := time.Now()
	for s.n < operations && !t.Failed() {
		s.step()
	}
	t.Logf("%d operations in %s: %v", s.n, time.Since(began).Round(time.Second), s.did)
	if t.Failed() {
		return
	}
	s.wantNoMore(before)
	s.end()
}

// soak is a machine whose past is known.
type soak struct {
	*guest
	rnd   *rand.Rand
	word  string            // what the witness was told last
	saved map[string]string // what it had been told, by checkpoint
	n     int
	did   map[string]int
}

// soaked starts a machine and the witness in it.
func (h *host) soaked(name string, args ...string) *guest {
	h.t.Helper()
	witness := filepath.Join(h.state.path, "witness")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", witness, "./witness")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		h.t.Fatalf("%s: %v\n%s", build, err, out)
	}
	g := h.run(name, append([]string{"--additions", "exec", "--publish", "0:22"}, args...)...)
	h.must("cp", witness, name+":/usr/local/bin/witness")
	g.sh("chmod 755 /usr/local/bin/witness; (witness serve /var/tmp/witness </dev/null >/dev/null 2>/run/witness.err &)")
	g.until("the witness has filled memory and disk", 2*time.Minute, func() bool {
		_, err := g.try("witness ask", time.Minute)
		return err == nil
	})
	return g
}

// said is what the witness answers.
type said struct {
	Word         string
	Memory, Disk uint64
	Wrong        string
}

// ask has the witness look at everything; a word is for it to keep.
func (g *guest) witness(word string) (s said) {
	g.t.Helper()
	out, err := g.try("witness ask "+word, 2*time.Minute)
	if err != nil {
		g.t.Fatalf("the witness of %s: %v", g.name, err)
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		g.t.Fatalf("the witness of %s says %q", g.name, out)
	}
	if s.Wrong != "" {
		g.t.Fatalf("in %s: %s", g.name, s.Wrong)
	}
	return s
}

// tell gives the witness another word, after it has looked at everything.
func (s *soak) tell() {
	s.word = "w" + itoa(s.n) + "-" + itoa(s.rnd.IntN(1000))
	s.guest.witness(s.word)
}

// step does one operation, now and then with somebody killed meanwhile, and looks at the machine.
func (s *soak) step() {
	s.n++
	all := []struct {
		weight int
		name   string
		f      func()
	}{
		{26, "checkpoint", s.checkpoint},
		{20, "rollback", s.rollback},
		{10, "clone", s.clone},
		{4, "two clones", s.clones},
		{8, "remove", s.remove},
		{5, "pause", s.pause},
		{12, "kill", s.kill},
		{4, "restart", s.restart},
		{3, "QEMU dies", s.qemuDies},
		{12, "checkpoint, kill", func() { s.interrupt("checkpoint", s.name) }},
		{8, "rollback, kill", func() { s.interrupt("rollback", s.name, s.any(), s.atOnce()) }},
		{8, "clone, kill", s.interruptClone},
	}
	if len(s.saved) > maxSaved {
		all = all[4:5]
	}
	sum := 0
	for _, o := range all {
		sum += o.weight
	}
	at := s.rnd.IntN(sum)
	for _, o := range all {
		if at -= o.weight; at < 0 {
			began := time.Now()
			s.did[o.name]++
			o.f()
			s.t.Logf("%3d %-18s %5.1f s  %s, %d saved", s.n, o.name, time.Since(began).Seconds(), s.word, len(s.saved))
			break
		}
	}
	s.look()
}

// any is the id of a checkpoint.
func (s *soak) any() string {
	ids := make([]string, 0, len(s.saved))
	for id := range s.saved {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids[s.rnd.IntN(len(ids))]
}

func (s *soak) atOnce() string { return "--at-once=" + strconv.FormatBool(s.rnd.IntN(3) > 0) }

func (s *soak) checkpoint() {
	s.tell()
	for range 1 + s.rnd.IntN(2) {
		c := s.json("checkpoint", s.name)
		s.saved[c.text("id")] = s.word
	}
}

func (s *soak) rollback() {
	s.tell()
	to := s.any()
	s.hangUp()
	r := s.json("rollback", s.name, to, s.atOnce())
	if left := r.text("left"); left != "" {
		s.saved[left] = s.word
	}
	s.word = s.saved[to]
}

// clone has a clone show that it is what it was, and go its own way; sometimes it is saved and put back itself.
func (s *soak) clone() {
	from, name := s.any(), "clone-"+itoa(s.n)
	s.must("clone", s.name+"@"+from, name)
	c := s.host.guest(name)
	defer s.gone(c)
	s.wantWord(c, s.saved[from])
	c.witness("own")
	if s.rnd.IntN(2) == 0 {
		id := s.json("checkpoint", name).text("id")
		c.witness("lost")
		if s.rnd.IntN(2) == 0 {
			c.replaced("guard", c.kill("guard")[0])
			c.witness("")
		}
		c.hangUp()
		s.must("rollback", name, id, "--at-once")
		s.wantWord(c, "own")
		defer s.must("checkpoint", "rm", id)
	}
}

// clones has two clones on one memory.
func (s *soak) clones() {
	from := s.any()
	var both []*guest
	for i := range 2 {
		name := "clone-" + itoa(s.n) + "-" + itoa(i)
		s.must("clone", s.name+"@"+from, name)
		both = append(both, s.host.guest(name))
		defer s.gone(both[i])
	}
	for range 2 {
		for i, c := range both {
			c.witness("of-" + itoa(i))
		}
	}
	for i, c := range both {
		s.wantWord(c, "of-"+itoa(i))
	}
}

// gone removes a clone.
func (s *soak) gone(c *guest) {
	c.hangUp()
	s.must("rm", c.name, "--force")
}

func (s *soak) wantWord(g *guest, want string) {
	s.t.Helper()
	if got := g.witness("").Word; got != want {
		s.t.Fatalf("%s has the word %q and not %q", g.name, got, want)
	}
}

func (s *soak) remove() {
	for range 1 + len(s.saved)/4 {
		if len(s.saved) < 2 {
			return
		}
		id := s.any()
		s.must("checkpoint", "rm", id)
		delete(s.saved, id)
	}
}

// pause holds the machine; it may be saved as it is, or while it is held: it must stand still all the same.
func (s *soak) pause() {
	s.tell()
	switch s.rnd.IntN(3) {
	case 0:
		s.must("pause", s.name)
	case 1:
		s.must("pause", s.name)
		s.saved[s.json("checkpoint", s.name).text("id")] = s.word
	case 2:
		saving := s.command("checkpoint", s.name)
		if err := saving.Start(); err != nil {
			s.t.Fatal(err)
		}
		time.Sleep(time.Duration(s.rnd.IntN(150)) * time.Millisecond)
		s.must("pause", s.name)
		saving.Wait()
		s.learn()
	}
	if state := s.show(s.name).text("state"); state != "paused" {
		s.t.Fatalf("it was paused and is %s", state)
	}
	if s.rnd.IntN(3) == 0 {
		s.killOne([]string{"guard", "daemon"}[s.rnd.IntN(2)])
		s.until("there is a guard", time.Minute, func() bool { return alive(s.pid("guard")) })
	}
	if used := s.processorTime(500 * time.Millisecond); used > 150*time.Millisecond {
		s.t.Fatalf("it is paused, and its vCPU has worked for %s of half a second", used)
	}
	s.must("resume", s.name)
}

// processorTime is how long the machine's virtual CPUs work in a while.
func (s *soak) processorTime(while time.Duration) time.Duration {
	sum := func() (ns int64) {
		tasks, _ := filepath.Glob("/proc/" + itoa(s.pid("qemu")) + "/task/*")
		for _, task := range tasks {
			comm, _ := os.ReadFile(task + "/comm")
			stat, _ := os.ReadFile(task + "/schedstat")
			if strings.HasPrefix(string(comm), "CPU ") || strings.HasPrefix(string(comm), "ALL CPUs") {
				var one int64
				fmt.Sscan(string(stat), &one)
				ns += one
			}
		}
		return ns
	}
	before := sum()
	time.Sleep(while)
	return time.Duration(sum() - before)
}

func (s *soak) restart() {
	s.hangUp()
	s.stopDaemon()
	s.serve()
}

// victims are whom a soak kills.
var victims = []string{"guard", "gate", "keeper", "daemon"}

// kill ends one or two of the machine's processes, and waits until all is as before.
func (s *soak) kill() {
	for range 1 + s.rnd.IntN(2) {
		s.killOne(victims[s.rnd.IntN(len(victims))])
	}
	s.settle()
}

func (s *soak) killOne(who string) {
	switch who {
	case "daemon":
		s.hangUp()
		s.killDaemon()
		s.serve()
	case "keeper":
		for _, pid := range keepers(s.host) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	default:
		if pid := s.pid(who); pid > 1 {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// settle waits until the machine runs and is whole; one that a kill has stopped is started.
func (s *soak) settle() {
	s.until("the machine is whole again", 2*time.Minute, func() bool {
		m := s.show(s.name)
		switch m.text("state") {
		case "stopped", "failed":
			s.must("start", s.name)
		case "running":
			guard, gate := int(m.number("guard_pid")), int(m.number("gate_pid"))
			return guard > 1 && gate > 1 && alive(guard) && alive(gate)
		}
		return false
	})
}

// qemuDies kills QEMU; the machine goes on from a checkpoint.
func (s *soak) qemuDies() {
	s.hangUp()
	s.guest.kill("qemu")
	s.untilState(s.name, "failed", time.Minute)
	to := s.any()
	s.must("rollback", s.name, to, "--at-once")
	s.word = s.saved[to]
}

// interrupt begins something and kills somebody meanwhile. What was asked for is done or it is not: the list of checkpoints is
// learned again, and the witness has the old word or that of the checkpoint.
func (s *soak) interrupt(args ...string) {
	s.tell()
	s.hangUp()
	cmd := s.command(append(args, "-o", "json")...)
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	time.Sleep(time.Duration(s.rnd.IntN(500)) * time.Millisecond)
	who := victims[s.rnd.IntN(len(victims))]
	s.killOne(who)
	var answer struct{ Left, ID string }
	json.NewDecoder(out).Decode(&answer)
	err := cmd.Wait()
	s.settle()
	s.learn()
	now := s.guest.witness("").Word
	may := []string{s.word}
	if args[0] == "rollback" {
		to := s.saved[args[2]]
		if may = append(may, to); err == nil {
			may = []string{to}
		}
	}
	s.t.Logf("    %s, the %s killed: %v, %s of %v", args[0], who, err, now, may)
	if !slices.Contains(may, now) {
		s.t.Fatalf("the machine has the word %q: none of %q", now, may)
	}
	s.word = now
}

// interruptClone kills somebody while a clone is made: it is there whole, or it is not there.
func (s *soak) interruptClone() {
	from, name := s.any(), "clone-"+itoa(s.n)
	cmd := s.command("clone", s.name+"@"+from, name)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	time.Sleep(time.Duration(s.rnd.IntN(500)) * time.Millisecond)
	who := victims[s.rnd.IntN(len(victims))]
	s.killOne(who)
	err := cmd.Wait()
	s.settle()
	there := slices.ContainsFunc(s.list("ls"), func(m object) bool { return m.text("name") == name })
	s.t.Logf("    clone, the %s killed: %v, there is one: %v", who, err, there)
	if !there {
		if err == nil {
			s.t.Fatal("a clone was made and is not there")
		}
		return
	}
	c := s.host.guest(name)
	defer s.gone(c)
	switch state := s.show(name).text("state"); state {
	case "quarantined":
	case "stopped", "failed":
		s.must("start", name)
	default:
		s.t.Fatalf("the clone is %s", state)
	}
	s.wantWord(c, s.saved[from])
}

// learn notes checkpoints that something interrupted has made: of the state as it was then.
func (s *soak) learn() {
	for _, c := range s.list("checkpoints", s.name) {
		if id := c.text("id"); s.saved[id] == "" {
			s.saved[id] = s.word
		}
	}
}

// look compares the machine with what is known of it.
func (s *soak) look() {
	s.wantWord(s.guest, s.word)
	listed := map[string]bool{}
	for _, c := range s.list("checkpoints", s.name) {
		if listed[c.text("id")] = true; s.saved[c.text("id")] == "" {
			s.t.Errorf("a checkpoint that nobody asked for: %v", c)
		}
	}
	for id := range s.saved {
		if !listed[id] {
			s.t.Errorf("checkpoint %s is not there", id)
		}
	}
	for _, e := range dirEntries(s.path("checkpoints")) {
		if strings.HasPrefix(e, ".") {
			s.t.Errorf("left behind: %s", e)
		}
	}
	s.must("volume", "check", s.name)
	for _, e := range dirEntries(s.path("layers")) {
		r := s.vigia("volume", "check", strings.TrimSuffix(e, ".vol"))
		if _, err := os.Stat(s.path("layers", e)); r.status != 0 && err == nil { // else it was merged just now
			s.t.Error(r)
		}
	}
}

// end removes all and counts what is left of it.
func (s *soak) end() {
	for id := range s.saved {
		s.must("checkpoint", "rm", id)
	}
	s.hangUp()
	s.must("rm", s.name, "--force")
	s.only()
	for _, dir := range []string{"layers", "checkpoints", "machines", "run"} {
		if left := dirEntries(s.path(dir)); len(left) > 0 {
			s.t.Errorf("left in %s: %v", dir, left)
		}
	}
	if r := s.vigia("ledger", "verify"); r.status != 0 {
		s.t.Error(r)
	}
	s.t.Logf("at the end: %s", s.count())
}

// counted is what a daemon and its machines hold of the host.
type counted struct {
	processes, descriptors, memfds, shm, layers int
	resident                                    int64 // of the daemon, in KiB
}

func (c counted) String() string {
	return fmt.Sprintf("%d processes, the daemon: %d descriptors, %d of them memory files, %d MiB; %d RAM files, %d layers",
		c.processes, c.descriptors, c.memfds, c.resident>>10, c.shm, c.layers)
}

func (s *soak) count() (c counted) {
	c.processes = len(s.state.processes())
	pid := itoa(s.daemon.Process.Pid)
	for _, fd := range dirEntries("/proc/" + pid + "/fd") {
		to, err := os.Readlink("/proc/" + pid + "/fd/" + fd)
		if err == nil {
			c.descriptors++
		}
		if strings.HasPrefix(to, "/memfd:") {
			c.memfds++
		}
	}
	c.shm, c.layers = len(dirEntries("/dev/shm/"+s.state.tag())), len(dirEntries(s.path("layers")))
	status, _ := os.ReadFile("/proc/" + pid + "/status")
	if _, rest, ok := strings.Cut(string(status), "VmRSS:"); ok {
		fmt.Sscan(rest, &c.resident)
	}
	return c
}

// wantNoMore compares with the count before the first operation. What ends by itself gets some seconds to do so.
func (s *soak) wantNoMore(before counted) {
	s.hangUp()
	var now counted
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(500 * time.Millisecond) {
		if now = s.count(); now.processes <= before.processes && now.descriptors <= before.descriptors && now.shm <= before.shm {
			break
		}
	}
	s.t.Logf("before: %s", before)
	s.t.Logf("after:  %s", now)
	if now.processes > before.processes || now.memfds > before.memfds || now.shm > before.shm {
		s.t.Errorf("more than before:\n  %s", strings.Join(s.state.processes(), "\n  "))
	}
	if most := before.descriptors + 3; now.descriptors > most { // connections of callers come and go
		pid := s.daemon.Process.Pid
		out, _ := exec.Command("ls", "-l", fmt.Sprintf("/proc/%d/fd", pid)).Output()
		s.t.Errorf("the daemon holds %d descriptors, %d before:\n%s", now.descriptors, before.descriptors, out)
	}
}
