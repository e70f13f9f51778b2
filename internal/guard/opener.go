package guard

import (
	"sync"
	"time"

	"vigia/internal/event"
)

// openers remember who opened a watched file last, as far as a probe saw it: a disk request itself tells of no process.
type openers struct {
	mu   sync.Mutex
	last map[string]opener
}

type opener struct {
	pid, exe any
	at       time.Time
}

const (
	maxOpeners = 1024
	openerFor  = 10 * time.Second // after an open, reads are taken for its process's
)

// note takes a file.opened event's fields.
func (o *openers) note(f event.Fields) {
	path, _ := f["path"].(string)
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.last == nil || len(o.last) >= maxOpeners {
		o.last = map[string]opener{}
	}
	o.last[path] = opener{f["pid"], f["exe"], time.Now()}
}

// name adds to a disk request's fields who it was, where that is known.
func (o *openers) name(path string, f event.Fields) {
	o.mu.Lock()
	defer o.mu.Unlock()
	who, ok := o.last[path]
	if !ok || time.Since(who.at) > openerFor {
		return
	}
	if f["pid"] = who.pid; who.exe != nil {
		f["exe"] = who.exe
	}
}
