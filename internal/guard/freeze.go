package guard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"vigia/internal/link"
	"vigia/internal/machine/additions"
	"vigia/internal/volume/ext4"
)

// freezer is who can hold the guest's file systems still.
type freezer interface {
	Freeze(ctx context.Context) (count int, asked bool, err error)
	Thaw(ctx context.Context) error
}

// freezeTime bounds what a guest may add to a checkpoint: freezing, and the answer to thawing. thawTimes and thawWait say for how
// long a guest that does not answer is asked again to thaw: one that writes a lot out first may hear it only after that.
const (
	freezeTime = time.Second
	thawTimes  = 30
	thawTime   = 10 * time.Second // for one answer
	thawWait   = 2 * time.Second
)

// medium is the guest's disk, to be looked at.
type medium interface {
	io.ReaderAt
	Size() int64
}

// frozen is how the guest's file systems stood at a checkpoint. The zero value: nobody was asked.
type frozen struct {
	by    freezer
	disk  medium
	began time.Time
	asked bool   // the guest may have heard it
	why   string // it is not frozen
	found []ext4.Filesystem
	held  bool // the disk says so too

	thawed   bool         // it has been asked to
	unthawed *atomic.Bool // it may not have heard that yet

	took time.Duration // from asking until it was thawed, or until it was not waited for any more
}

// freeze asks the guest to hold its file systems still. It takes no longer than freezeTime, and fails by saying why.
func freeze(ctx context.Context, by freezer, disk medium, unthawed *atomic.Bool) *frozen {
	f := &frozen{by: by, disk: disk, began: time.Now(), unthawed: unthawed}
	found, err := ext4.Find(disk, disk.Size())
	if f.found = found; err != nil {
		f.why = "the disk can't be read: " + err.Error()
		return f
	}
	ctx, cancel := context.WithDeadline(ctx, f.began.Add(freezeTime))
	defer cancel()
	_, f.asked, err = by.Freeze(ctx)
	if f.asked {
		unthawed.Store(true)
	}
	if err != nil {
		f.why = err.Error()
		if ctx.Err() != nil || time.Since(f.began) >= freezeTime { // the channel has the same deadline, and may be the first to tell
			f.why = fmt.Sprintf("the guest did not freeze its file systems in %s", freezeTime)
		}
	}
	return f
}

// look reads from the disk whether what the guest says is so: a file system that is frozen has its journal closed. It is done while
// the guest stands still. Of file systems that are not ext3 or ext4 its word is taken.
func (f *frozen) look() {
	if f == nil || f.why != "" {
		return
	}
	for _, fs := range f.found {
		open, err := fs.JournalOpen(f.disk)
		if err != nil {
			f.why = "the disk can't be read: " + err.Error()
			return
		}
		if open {
			f.why = "the guest says that its file systems are frozen, and the journal of one on the disk is open"
			return
		}
	}
	f.held = true
}

// thaw lets the guest write again. It waits for the answer only as long as the guest has left of its time; who does not answer is
// asked again beside everything else.
func (f *frozen) thaw(ctx context.Context) {
	if f == nil || !f.asked || f.thawed {
		return
	}
	f.thawed = true
	done := make(chan struct{})
	go func() {
		if thaw(ctx, f.by, thawTimes, thawWait) == nil {
			f.unthawed.Store(false)
		}
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(time.Until(f.began.Add(freezeTime))):
	}
	f.took = time.Since(f.began)
}

// thaw asks until it is answered. An answer that is an error is one too: there is nothing to thaw, or nothing that can be.
func thaw(ctx context.Context, by freezer, times int, wait time.Duration) error {
	var err error
	for range times {
		one, cancel := context.WithTimeout(ctx, thawTime)
		err = by.Thaw(one)
		cancel()
		var refused *additions.Error
		if err == nil || errors.As(err, &refused) || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
	return err
}

// tell puts into the answer to a checkpoint how the guest's file systems stood.
func (f *frozen) tell(c *link.Checkpointed) {
	if f != nil {
		c.Frozen, c.NotFrozen, c.FrozenSeconds = f.held, f.why, f.took.Seconds()
	}
}
