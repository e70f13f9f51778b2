package guard

import (
	"context"
	"math"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"vigia/internal/event"
)

// How often the load is read, and how often it becomes an event: at once where it jumps, else every busyPeriod while
// the machine works and every idlePeriod while it does not.
const (
	samplePeriod = time.Second
	busyPeriod   = 5 * time.Second
	idlePeriod   = time.Minute
	busyPercent  = 25.0
	jumpPercent  = 30.0
)

// vcpuClock reads how long the virtual CPUs' threads ran, or were ready and waited for the host, from descriptors of
// /proc/PID/task/TID/schedstat (Documentation/scheduler/sched-stats.rst: run and wait time in nanoseconds). Waiting
// counts: a guest that computes is busy, however loaded the host is.
type vcpuClock struct {
	mu    sync.Mutex
	files []*os.File
}

func (c *vcpuClock) set(files []*os.File) {
	c.mu.Lock()
	old := c.files
	c.files = files
	c.mu.Unlock()
	for _, f := range old {
		f.Close()
	}
}

// read returns the sums over all threads; ok is false while there is nothing to read. The runtime is not told of the calls: they
// take a microsecond, and it would wake a thread each time to see whether they take longer.
func (c *vcpuClock) read() (ran, waited time.Duration, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var buf [128]byte
	for _, f := range c.files {
		n, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, f.Fd(), uintptr(unsafe.Pointer(&buf)), uintptr(len(buf)), 0, 0, 0)
		if errno != 0 {
			return 0, 0, false
		}
		r, w, ok := parseSchedstat(string(buf[:n]))
		if !ok {
			return 0, 0, false
		}
		ran, waited = ran+r, waited+w
	}
	return ran, waited, len(c.files) > 0
}

// used says, each time it is asked, how long the virtual CPUs have run since, where that can be told. A thread that runs at this
// moment may be found out the next time only, when the host has counted it.
func (c *vcpuClock) used() func() (time.Duration, bool) {
	var last time.Duration
	return func() (time.Duration, bool) {
		now, _, ok := c.read()
		used := now - last
		last = now
		return used, ok && used >= 0
	}
}

func parseSchedstat(s string) (ran, waited time.Duration, ok bool) {
	words := strings.Fields(s)
	if len(words) < 2 {
		return 0, 0, false
	}
	run, err1 := strconv.ParseUint(words[0], 10, 62)
	wait, err2 := strconv.ParseUint(words[1], 10, 62)
	return time.Duration(run), time.Duration(wait), err1 == nil && err2 == nil
}

// busiest names the guest's process that took the most CPU since the last call.
type busiest struct {
	pid     int64
	comm    string
	exe     string
	cmdline string
	percent float64
}

// sampler turns the clock into cpu.usage events.
type sampler struct {
	clock   vcpuClock
	cpus    int
	emit    func(event.Kind, event.Fields)
	process func(period time.Duration) (busiest, bool) // the introspector's answer
	// panicked looks for a kernel panic in guest memory: a guest without the panic device's driver only stops.
	panicked func() bool

	lastClock   time.Duration
	lastTime    time.Time
	lastEvent   time.Time
	lastPercent float64
}

func (s *sampler) run(ctx context.Context) {
	tick := time.NewTicker(samplePeriod)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			s.sample(now)
			if s.panicked() {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

func (s *sampler) sample(now time.Time) {
	ran, waited, ok := s.clock.read()
	if !ok {
		return
	}
	clock := ran + waited
	period := now.Sub(s.lastTime)
	used := clock - s.lastClock
	first := s.lastTime.IsZero() || used < 0
	s.lastTime, s.lastClock = now, clock
	if first || period <= 0 {
		return
	}
	percent := math.Round(1000*float64(used)/float64(period)) / 10
	// Run and wait overlap nowhere, but the two clocks are not read at one instant.
	percent = min(percent, 100*float64(s.cpus))
	who, known := s.process(period)
	if !s.due(now, percent) {
		return
	}
	s.lastEvent, s.lastPercent = now, percent
	fields := event.Fields{"percent": percent, "cpus": int64(s.cpus)}
	if known && percent >= busyPercent/5 {
		fields["pid"], fields["process"] = who.pid, who.comm
		fields["process_percent"] = who.percent
		fields["exe"], fields["cmdline"] = who.exe, who.cmdline
	}
	s.emit(event.CPUUsage, fields)
}

func (s *sampler) due(now time.Time, percent float64) bool {
	since := now.Sub(s.lastEvent)
	return since >= idlePeriod || math.Abs(percent-s.lastPercent) >= jumpPercent ||
		(percent >= busyPercent && since >= busyPeriod)
}
