package hostile

import (
	"bufio"
	"context"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"vigia/internal/api/vigiav1"
	"vigia/internal/vm"
)

// bootMost is how long a guest may take to be of use; bannerMost how long another machine's ssh may take to say who it
// is while the host is flooded. Both are for software emulation on a host that has other work.
const (
	bootMost   = 90 * time.Second
	bannerMost = 20 * time.Second
	floodTime  = "5"
)

// flood is what root in a guest does, as a script that ends by itself.
type flood struct {
	name   string
	script string
	told   []string
}

// floods of channels that cost the guest nothing to flood.
var channelFloods = []flood{
	{"console", "timeout " + floodTime + " yes > /dev/ttyS0; head -c 3000000 /dev/zero | tr '\\0' x | timeout " + floodTime + " cat > /dev/ttyS0; true", []string{"console.line"}},
	{"datagrams", `end=$((SECONDS+5)); i=0
		while [ $SECONDS -lt $end ]; do i=$((i+1)); echo x > /dev/udp/198.18.$((i/250%250)).$((i%250+1))/$((1024+i%60000)); done 2>/dev/null; true`, nil},
	{"denied", `end=$((SECONDS+5)); i=0
		while [ $SECONDS -lt $end ]; do i=$((i+1)); echo x > /dev/udp/169.254.$((i/250%250)).$((i%250+1))/$((1024+i%60000)); done 2>/dev/null; true`, []string{"net.denied"}},
	{"flows", `end=$((SECONDS+5)); i=0
		while [ $SECONDS -lt $end ]; do i=$((i+1)); (exec 3<>/dev/tcp/198.18.$((i%250)).$((i%250+1))/80) & (exec 3<>/dev/tcp/10.77.0.1/$((i%60000+1))) & [ $((i%64)) = 0 ] && sleep 0.2; done 2>/dev/null
		kill $(jobs -p) 2>/dev/null; true`, []string{"net.denied"}},
	{"pings", `for i in $(seq 1 12); do busybox ping -w 4 -i 0.01 -s 1400 198.18.0.$i & busybox ping -w 4 -i 0.01 -s 1400 10.77.0.1 & done >/dev/null 2>&1; wait; true`, nil},
	{"dhcp-dns", `end=$((SECONDS+5)); i=0
		while [ $SECONDS -lt $end ]; do i=$((i+1)); timeout 3 busybox nslookup n$i.invalid 10.77.0.1 & timeout 1 busybox udhcpc -i eth0 -n -q -t 1 -T 1 -s /bin/true & [ $((i%16)) = 0 ] && wait; done >/dev/null 2>&1; wait; true`, []string{"net.dns"}},
}

// floods of the disk and of what the guard makes of it.
var diskFloods = []flood{
	{"tiny-writes", "timeout " + floodTime + " dd if=/dev/zero of=/tiny bs=512 count=1000000 oflag=direct,dsync 2>/dev/null; rm -f /tiny; true", nil},
	{"syncs", `end=$((SECONDS+5)); while [ $SECONDS -lt $end ]; do echo x >> /s; sync; done; true`, nil},
	{"watched-reads", `end=$((SECONDS+5)); while [ $SECONDS -lt $end ]; do dd if=/etc/shadow of=/dev/null iflag=direct bs=4096 2>/dev/null; done; true`, []string{"disk.read"}},
	{"watched-changes", `end=$((SECONDS+5)); while [ $SECONDS -lt $end ]; do chmod 600 /etc/shadow; sync; chmod 640 /etc/shadow; cp /etc/shadow /etc/shadow.n; mv /etc/shadow.n /etc/shadow; sync; done; true`, []string{"file.changed"}},
	{"fill", `timeout 10 dd if=/dev/zero of=/full bs=1M 2>/dev/null; sync; rm -f /full; sync; true`, nil},
	// As many as the file system has inodes for.
	{"many-files", `mkdir -p /many; cd /many; timeout 15 sh -c 'seq 1 100000 | xargs -n 5000 touch' 2>/dev/null; sync; ls -f | wc -l`, nil},
}

// TestGuestFloodsChannels and TestGuestFloodsDisk have root in one guest do its worst, while another goes on.
func TestGuestFloodsChannels(t *testing.T) { floodAll(t, channelFloods) }
func TestGuestFloodsDisk(t *testing.T)     { floodAll(t, diskFloods) }

func floodAll(t *testing.T, floods []flood) {
	h := guestHost(t)
	calm := h.run(&vigiav1.RunRequest{Image: "tiny", Name: "calm", MemoryBytes: 192 << 20, Publish: []string{"0:22"}})
	noisy := h.run(&vigiav1.RunRequest{Image: "tiny", Name: "noisy", MemoryBytes: 192 << 20, Publish: []string{"0:22"}, Additions: []string{vm.AdditionExec}})
	ssh := strings.TrimSuffix(calm.Publish[0], ":22/tcp")
	eventually(t, bootMost, "the calm machine's ssh", func() bool { return banner(ssh) == nil })
	eventually(t, bootMost, "the noisy machine's agent", func() bool { _, err := h.sh(t.Context(), "noisy", "true"); return err == nil })
	for _, f := range floods {
		t.Run(f.name, func(t *testing.T) { h.flooded(t, f, noisy, ssh) })
	}
}

// flooded runs one flood and measures the host and the other machine.
func (h *host) flooded(t *testing.T, f flood, noisy *vigiav1.Machine, ssh string) {
	entries, ledger, disk := h.entries(), h.used("ledger"), h.used("machines", noisy.Id)
	began := time.Now()
	seen := h.watch("noisy", "calm")
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	done := make(chan error, 1)
	var said string
	go func() {
		var err error
		said, err = h.sh(ctx, "noisy", f.script)
		done <- err
	}()
	var times []time.Duration
	for over := false; !over; {
		at := time.Now()
		if err := banner(ssh); err != nil {
			t.Errorf("the other machine, %s into the flood: %v", at.Sub(began).Round(time.Second), err)
		}
		times = append(times, time.Since(at))
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("the flood: %v", err)
			}
			over = true
		case <-time.After(200 * time.Millisecond):
		}
	}
	h.answers(t, "noisy")
	seen.check(t)
	seconds := time.Since(began).Seconds()
	grown, room := h.entries()-entries, h.used("ledger")-ledger
	slices.Sort(times)
	t.Logf("%.0f s, said %q; the other machine's ssh: median %s, most %s of %d; ledger: %.0f entries/s, %.0f KiB/s; disk: %d MiB more", seconds, strings.TrimSpace(said),
		times[len(times)/2].Round(time.Millisecond), times[len(times)-1].Round(time.Millisecond), len(times),
		float64(grown)/seconds, float64(room>>10)/seconds, (h.used("machines", noisy.Id)-disk)>>20)
	if grown > burstEntries+int64(entriesMost*seconds) || room > burstBytes+int64(ledgerMost*seconds) {
		t.Errorf("the ledger grew by %d entries and %d KiB in %.0f seconds", grown, room>>10, seconds)
	}
	if used := h.used("machines", noisy.Id, "console.log") + h.used("machines", noisy.Id, "console.tail0") + h.used("machines", noisy.Id, "console.tail1"); used > consoleMost {
		t.Errorf("the console's log takes %d MiB", used>>20)
	}
	show, err := h.show("noisy")
	if err != nil {
		t.Fatal(err)
	}
	if used := h.used("machines", noisy.Id); used > int64(show.Disk.SizeBytes)*9/8+consoleMost {
		t.Errorf("the machine takes %d MiB of the host's disk, its own has %d", used>>20, show.Disk.SizeBytes>>20)
	}
	counts := h.events("noisy", nil)
	for _, kind := range f.told {
		if counts[kind] == 0 {
			t.Errorf("nothing was told of: no %s event in %v", kind, counts)
		}
	}
}

// sh runs a script in a guest, as its root.
func (h *host) sh(ctx context.Context, name, script string) (string, error) {
	s, err := h.client.Machines.Exec(ctx, connect.NewRequest(&vigiav1.ExecRequest{Name: name, Command: []string{"/bin/bash", "-c", script}, TimeoutSeconds: 55}))
	if err != nil {
		return "", err
	}
	defer s.Close()
	var said []byte
	for s.Receive() {
		said = append(said, s.Msg().Stdout...)
	}
	return string(said), s.Err()
}

// banner asks a published ssh who it is.
func banner(at string) error {
	c, err := net.DialTimeout("tcp", at, bannerMost)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(bannerMost))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && !strings.HasPrefix(line, "SSH-2.0-") {
		err = errNoField
	}
	return err
}

// eventually waits for what must come.
func eventually(t *testing.T, most time.Duration, what string, f func() bool, why ...func() string) {
	t.Helper()
	for end := time.Now().Add(most); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if f() {
			return
		}
	}
	for _, f := range why {
		t.Log(f())
	}
	t.Fatalf("%s does not come in %s", what, most)
}
