package daemon

import (
	"fmt"
	"strings"
	"sync"
	"time"
)

// pace is where the time of something goes: what was reached, and when. It may be marked from many goroutines.
type pace struct {
	mu    sync.Mutex
	began time.Time
	marks []string
}

func newPace() pace { return pace{began: time.Now()} }

// mark notes that something was reached now.
func (p *pace) mark(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.marks = append(p.marks, fmt.Sprintf("%s %.1f", what, time.Since(p.began).Seconds()*1000))
}

// String tells the marks in their order, in milliseconds since the beginning.
func (p *pace) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.marks, ", ")
}
