package cli

import (
	"strings"
	"testing"
	"time"
)

// play makes happenings, a second each: kind, then pairs of names and values.
func play(from int, list ...[]any) (all []happening) {
	for i, words := range list {
		h := happening{at: time.Unix(int64(from+i), 0), kind: words[0].(string), fields: map[string]any{}}
		for j := 1; j+1 < len(words); j += 2 {
			v := words[j+1]
			if n, ok := v.(int); ok {
				v = float64(n)
			}
			h.fields[words[j].(string)] = v
		}
		all = append(all, h)
	}
	return all
}

func in(remote, text string) []any {
	return []any{"input.given", "source", "network", "direction", "in", "protocol", "tcp", "local", "10.77.0.2:80", "remote", remote, "text", text, "bytes", len(text)}
}
func forked(pid, ppid int) []any { return []any{"process.forked", "pid", pid, "ppid", ppid} }
func started(pid, ppid int, cmdline string) []any {
	return []any{"process.started", "pid", pid, "ppid", ppid, "exe", strings.Fields(cmdline)[0], "cmdline", cmdline}
}
func flowEnds(remote string) []any {
	return []any{"net.flow", "local", "10.77.0.2:80", "remote", remote}
}

var webScene = scene{parents: map[int64]int64{1: 0, 50: 1, 51: 50, 60: 1, 70: 1}, listens: map[int64][]string{50: {"443", "80"}}, channel: map[int64]bool{70: true}}

// TestTimeline blames each process on the input before it, on its own service.
func TestTimeline(t *testing.T) {
	now := play(100,
		in("1.1.1.1:1", "harmless"), forked(101, 51), started(101, 51, "/bin/cgi one"), []any{"process.exited", "pid", 101}, flowEnds("1.1.1.1:1"),
		in("1.1.1.1:2", "evil"), forked(102, 50), started(102, 50, "/bin/sh -c evil"), forked(103, 102), forked(104, 103), started(104, 103, "/tmp/implant"),
		[]any{"process.exited", "pid", 103}, []any{"process.exited", "pid", 102}, flowEnds("1.1.1.1:2"),
		in("1.1.1.1:3", "harmless"), forked(105, 104), started(105, 104, "/tmp/child of the implant"), []any{"socket.connecting", "pid", 105, "remote", "9.9.9.9:9"},
		forked(101, 50), started(101, 50, "/bin/cgi three"),
		started(200, 60, "/usr/sbin/cron"), started(300, 999, "/bin/unknown"),
		[]any{"input.given", "source", "command", "text", "id"}, started(301, 70, "/usr/bin/id"), []any{"socket.listening", "pid", 4242, "local", "0.0.0.0:1"})
	tl := makeTimeline(webScene, now, play(0, started(1, 1, "/bin/cgi one"), started(1, 1, "/bin/never again")))
	text := strings.Join(tl.lines(), "\n")
	want := `#1  ?  tcp 1.1.1.1:1 → 10.77.0.2:80, 8 bytes: harmless
    +1.00s  101  /bin/cgi one
#2  ?  tcp 1.1.1.1:2 → 10.77.0.2:80, 4 bytes: evil
    +1.00s  102  /bin/sh -c evil
        +3.00s  103  ()
            +4.00s  104  /tmp/implant
                +10.00s  105  /tmp/child of the implant
                        connects to 9.9.9.9:9
#3  ?  tcp 1.1.1.1:3 → 10.77.0.2:80, 8 bytes: harmless
    +4.00s  101  /bin/cgi three
#4  ?  command, 0 bytes: id
    +1.00s  301  /usr/bin/id
of no input that is known:
    +0.00s  200  /usr/sbin/cron
    +0.00s  300  /bin/unknown
and:
    00:02:04.000 process 4242 () listens on 0.0.0.0:1`
	if text != strings.ReplaceAll(want, "?", "") {
		t.Errorf("got\n%s", text)
	}
	if p := tl.Programs; p.Then != 2 || p.Again != 1 || len(p.Missing) != 1 || p.Missing[0] != "/bin/never again" || len(p.New) != 7 {
		t.Errorf("programs: %+v", p)
	}
}

// TestTimelineOrphan has a parent that ended before its child first ran.
func TestTimelineOrphan(t *testing.T) {
	now := play(100, in("1.1.1.1:1", "evil"), started(101, 50, "/bin/sh x"), []any{"process.exited", "pid", 101}, []any{"process.forked", "pid", 102, "ppid", 1, "comm", ""}, started(102, 1, "/tmp/implant"),
		[]any{"process.forked", "pid", 103, "ppid", 1, "comm", "other"}, started(103, 1, "/bin/other"))
	tl := makeTimeline(webScene, now, nil)
	if len(tl.Inputs[0].Processes) != 1 || len(tl.Others) != 1 {
		t.Errorf("got\n%s", strings.Join(tl.lines(), "\n"))
	}
	if text := strings.Join(tl.lines(), "\n"); !strings.Contains(text, "/tmp/implant\n                its parent was gone") {
		t.Errorf("got\n%s", text)
	}
}

// TestTimelineUnsure names all flows that were open when a process began.
func TestTimelineUnsure(t *testing.T) {
	now := play(100, in("1.1.1.1:1", "closed before"), flowEnds("1.1.1.1:1"), in("1.1.1.1:2", "slow"), in("1.1.1.1:3", "quick"), started(101, 50, "/bin/cgi"), flowEnds("1.1.1.1:3"), flowEnds("1.1.1.1:2"))
	tl := makeTimeline(webScene, now, nil)
	if text := strings.Join(tl.lines(), "\n"); !strings.Contains(text, "/bin/cgi  (of one of #2, #3)") {
		t.Errorf("got\n%s", text)
	}
}

// TestTimelineHostile has a guest and a caller that send the terminal orders.
func TestTimelineHostile(t *testing.T) {
	now := play(100, in("1.1.1.1:1", "\x1b]0;mine\a"), started(101, 50, "/bin/\x1b[2J"), started(101, 101, "/a "+strings.Repeat("x", 10000)), forked(7, 7), forked(50, 101), started(102, 50, "/y"))
	for _, l := range makeTimeline(webScene, now, now).lines() {
		if strings.ContainsAny(l, "\x1b\a") || len(l) > 1000 {
			t.Errorf("%q", l)
		}
	}
}
