package test

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestNetwork looks at what a guest reaches, who reaches it, and what is told of it.
func TestNetwork(t *testing.T) {
	h := newHost(t)
	h.serve()
	g := h.run("one", "--publish", "0:22")
	for _, step := range []struct {
		name string
		f    func(*guest)
	}{
		{"an address, a gateway, a published port", netUp},
		{"the host's loopback, only by a rule", netLoopback},
		{"rules", netRules},
		{"flows and capture", netFlows},
		{"quarantine", netQuarantine},
	} {
		if !t.Run(step.name, func(t *testing.T) { step.f(g.on(t)) }) {
			t.FailNow()
		}
	}
}

func netUp(g *guest) {
	g.until("the guest has an address", time.Minute, func() bool { return strings.Contains(g.sh("ip -4 -o addr show dev eth0"), "10.77.") })
	if out := g.sh("ip route show default"); !strings.Contains(out, "via 10.77.0.1") {
		g.t.Errorf("default route: %s", out)
	}
	g.until("the published port answers", time.Minute, func() bool { return banner(g.port(0)) != "" })
	if !strings.HasPrefix(g.port(0), "127.0.0.1:") {
		g.t.Errorf("published at %s, not on the loopback alone", g.port(0))
	}
}

// hostService is a service of the host: it answers each line with "heard LINE".
func hostService(t *testing.T) (port string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 1<<16)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if _, err := c.Write(append([]byte("heard "), buf[:n]...)); err != nil {
						return
					}
				}
			}()
		}
	}()
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port
}

// connects tells whether the guest gets an answer from an address.
func (g *guest) connects(addr, port string) bool {
	g.t.Helper()
	out := g.sh("timeout 4 bash -c 'exec 3<>/dev/tcp/%s/%s && echo hello >&3 && head -n 1 <&3' 2>/dev/null || echo nothing", addr, port)
	return strings.Contains(out, "heard hello")
}

func netLoopback(g *guest) {
	port := hostService(g.t)
	for _, addr := range []string{"127.0.0.1", "10.77.0.1", "10.77.0.2"} {
		if g.connects(addr, port) {
			g.t.Errorf("by default the guest reaches a service on the host's loopback by %s", addr)
		}
	}
	g.must("rules", "one", "allow out tcp 127.0.0.1:"+port)
	if !g.connects("10.77.0.1", port) {
		g.t.Error("a rule allows the host's service, and the guest does not reach it")
	}
	if g.connects("10.77.0.1", hostService(g.t)) {
		g.t.Error("another service is reached too")
	}
	g.must("rules", "one", "--none")
	if g.connects("10.77.0.1", port) {
		g.t.Error("without the rule it is still reached")
	}
}

func netRules(g *guest) {
	port := hostService(g.t)
	g.must("rules", "one", "deny out tcp any:"+port, "allow out tcp 127.0.0.1")
	if g.connects("10.77.0.1", port) {
		g.t.Error("the first rule that matches does not decide")
	}
	e := g.untilEvent("one", "net.denied", 20*time.Second, func(e event) bool { return strings.HasSuffix(e.Fields.text("remote"), ":"+port) })
	if e.Fields.text("reason") == "" {
		g.t.Error(e)
	}
	r := g.vigia("rules", "one", "-o", "json")
	if r.status != 0 || !strings.Contains(r.stdout, "deny out tcp any:"+port) {
		g.t.Errorf("rules: %s", r)
	}
	g.must("rules", "one", "deny in any")
	if b := banner(g.port(0)); b != "" {
		g.t.Error("a rule denies all that comes in, and the published port answers")
	}
	g.must("rules", "one", "--none")
	if b := banner(g.port(0)); b == "" {
		g.t.Error("without rules the published port does not answer")
	}
	g.refused(2, []string{"fly"}, "rules", "one", "fly out any")
}

func netFlows(g *guest) {
	port := hostService(g.t)
	g.must("rules", "one", "allow out tcp 127.0.0.1:"+port)
	file := filepath.Join(g.t.TempDir(), "one.pcapng")
	capture := g.command("capture", "one", "-w", file)
	if err := capture.Start(); err != nil {
		g.t.Fatal(err)
	}
	g.until("the capture has begun", 20*time.Second, func() bool {
		g.connects("10.77.0.1", port)
		info, err := os.Stat(file)
		return err == nil && info.Size() > 400
	})
	capture.Process.Signal(syscall.SIGINT)
	capture.Wait()
	if code := capture.ProcessState.ExitCode(); code != 0 {
		g.t.Errorf("capture ended with %d", code)
	}
	if packets := pcapng(g.t, file); packets < 3 {
		g.t.Errorf("the capture has %d packets", packets)
	}
	g.sh("timeout 20 bash -c 'exec 3<>/dev/tcp/10.77.0.1/%s; head -c 50000 /dev/zero >&3; head -c 50006 <&3 >/dev/null' || true", port)
	e := g.untilEvent("one", "net.flow", time.Minute, func(e event) bool { return e.Fields.number("bytes_out") == 50_000 })
	if in := e.Fields.number("bytes_in"); in < 50_006 || in > 51_000 || e.Fields.text("direction") != "out" || e.Fields.number("packets_out") < 1 {
		g.t.Error(e)
	}
	g.must("rules", "one", "--none")
}

// pcapng reads a capture by its format (draft-ietf-opsawg-pcapng) and counts its packets.
func pcapng(t *testing.T, file string) (packets int) {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for first := true; ; first = false {
		var head struct{ Type, Length uint32 }
		if err := binary.Read(f, binary.LittleEndian, &head); err == io.EOF {
			return packets
		} else if err != nil || head.Length < 12 || head.Length%4 != 0 || first && head.Type != 0x0a0d0d0a {
			t.Fatalf("no pcapng: block %#x of %d bytes, %v", head.Type, head.Length, err)
		}
		body := make([]byte, head.Length-8)
		if _, err := io.ReadFull(f, body); err != nil {
			t.Fatalf("a block is cut off: %v", err)
		}
		if binary.LittleEndian.Uint32(body[len(body)-4:]) != head.Length {
			t.Fatal("a block's two lengths differ")
		}
		if head.Type == 6 {
			packets++
		}
	}
}

func netQuarantine(g *guest) {
	c, err := net.Dial("tcp", g.port(0))
	if err != nil {
		g.t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 256)
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(buf); err != nil {
		g.t.Fatalf("no banner: %v", err)
	}
	before := time.Now()
	g.must("quarantine", "one")
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if n, err := c.Read(buf); err == nil {
		g.t.Errorf("an open flow goes on: %q", buf[:n])
	}
	if took := time.Since(before); took > 3*time.Second {
		g.t.Errorf("an open flow was cut after %s", took)
	}
	e := g.untilEvent("one", "response.quarantined", 10*time.Second, nil)
	if e.Fields.number("flows") < 1 {
		g.t.Error(e)
	}
	shut := func(when string) {
		g.t.Helper()
		if s := g.show("one"); s.text("state") != "quarantined" || s["quarantined"] != true {
			g.t.Errorf("%s: %s, quarantined %v", when, s.text("state"), s["quarantined"])
		}
		if banner(g.port(0)) != "" {
			g.t.Errorf("%s: the port answers", when)
		}
		if out := g.sh("timeout 3 bash -c 'exec 3<>/dev/tcp/10.77.0.1/53' 2>/dev/null && echo open || echo shut"); out != "shut" {
			g.t.Errorf("%s: the guest reaches its gateway", when)
		}
	}
	shut("in quarantine")
	g.stopDaemon()
	g.serve()
	g.hangUp()
	shut("after the daemon's restart")
	g.must("stop", "one")
	g.must("start", "one")
	g.ready()
	shut("after stop and start")
	g.must("release", "one")
	g.until("the port answers again", time.Minute, func() bool { return banner(g.port(0)) != "" })
	g.refused(1, []string{"not in quarantine"}, "release", "one")
}

// TestApart runs two machines at once: neither reaches the other.
func TestApart(t *testing.T) {
	h := newHost(t)
	h.serve()
	a := h.run("a", "--publish", "0:22")
	b := h.run("b")
	a.until("a's address", time.Minute, func() bool { return banner(a.port(0)) != "" })
	own := strings.Fields(a.sh("hostname -I"))
	if len(own) == 0 {
		t.Fatal("machine a has no address")
	}
	_, port, _ := net.SplitHostPort(a.port(0))
	for _, to := range [][2]string{{own[0], "22"}, {"10.77.0.1", port}, {"127.0.0.1", port}} {
		out := b.sh("ip -4 addr show dev eth0 | grep -q 'inet %[1]s/' && echo own || timeout 4 bash -c 'exec 3<>/dev/tcp/%[1]s/%[2]s && head -n 1 <&3' 2>/dev/null || echo nothing", to[0], to[1])
		if strings.Contains(out, "SSH-") {
			t.Errorf("machine b reaches machine a at %s port %s", to[0], to[1])
		}
	}
}
