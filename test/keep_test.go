package test

import (
	"strings"
	"testing"
	"time"
)

// TestKeptByRule: a machine is saved every second and the last three of that are kept, with what was marked and what a clone comes from;
// its disk's chain stays short for ever, while it writes, and through its daemon's and its guard's death.
func TestKeptByRule(t *testing.T) {
	h := newHost(t)
	h.serve()
	h.refused(2, []string{"--checkpoint-every"}, "run", "tiny", "one", "--keep", "3")
	g := h.run("one", "--net", "off", "--checkpoint-every", "1s", "--keep", "3")
	g.sh("(i=0; while :; do i=$((i+1)); dd if=/dev/urandom of=/root/f$((i%%7)) bs=64k count=$((i%%9+1)) 2>/dev/null; sha256sum /root/f* >/root/.sums; mv /root/.sums /root/sums; sync; busybox usleep 100000; done) & echo $! >/run/writer; disown")
	made := func() int {
		n := 0
		for _, e := range h.events("one", "--kind", "checkpoint.created") {
			if b, _ := e.Fields["scheduled"].(bool); b {
				n++
			}
		}
		return n
	}
	h.until("four checkpoints are made", time.Minute, func() bool { return made() >= 4 })
	first := h.list("checkpoints", "one")[0].text("id")
	h.must("checkpoint", "mark", first, "--stable")
	h.must("clone", "one", "two")
	h.must("checkpoint", "keep", "two", "--every", "1s", "--keep", "2")
	h.until("twelve are made", 2*time.Minute, func() bool { return made() >= 12 })
	h.killDaemon()
	h.serve()
	was := made()
	h.until("ten more are made by the next daemon", 2*time.Minute, func() bool { return made() >= was+10 })
	old := g.kill("guard")[0]
	g.replaced("guard", old)
	was = made()
	h.until("fourteen more are made", 3*time.Minute, func() bool { return made() >= was+14 })
	h.must("checkpoint", "keep", "one", "--off")
	h.must("checkpoint", "keep", "two", "--off")
	h.until("layers are merged", time.Minute, func() bool { return h.show("one").object("disk").number("layers") <= 24 })

	list := h.list("checkpoints", "one")
	scheduled := 0
	for _, c := range list {
		if b, _ := c["scheduled"].(bool); b && c.text("id") != first {
			scheduled++
		}
	}
	if scheduled < 3 || scheduled > 5 || list[0].text("id") != first { // one that was being made when the rule ended may be there too
		t.Errorf("%d are kept, the first is %s: %v", scheduled, list[0].text("id"), list)
	}
	if n := len(dirEntries(h.path("layers"))); n > 60 {
		t.Errorf("%d layers lie there", n)
	}
	g.sh("kill $(cat /run/writer); sleep 0.5; sync; sha256sum -c --quiet /root/sums; sync; echo right >/root/says; sync")
	h.must("stop", "one", "--force")
	h.must("start", "one")
	g.hangUp()
	g.ready()
	if got := g.sh("cat /root/says; dmesg | grep -i 'ext4.*error'; true"); got != "right" {
		t.Errorf("after a start from the merged disk: %q", got)
	}
	last := list[len(list)-2].text("id")
	h.must("rollback", "one", last, "--at-once")
	g.hangUp()
	g.ready()
	if got := g.sh("echo 3 >/proc/sys/vm/drop_caches; cat /root/f* | wc -c; dmesg | grep -i 'ext4.*error'; true"); !strings.HasSuffix(got, "0") && got == "" {
		t.Errorf("rolled back: %q", got)
	}
	h.must("stop", "two", "--force")
	h.must("stop", "one", "--force")
	if out := h.must("rm", "one", "two"); !strings.Contains(out, "one removed") || !strings.Contains(out, "two removed") {
		t.Errorf("rm of two: %s", out)
	}
	h.refused(1, []string{"one", "two"}, "rm", "one", "two")
}
