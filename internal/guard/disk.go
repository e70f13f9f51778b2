package guard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"vigia/internal/event"
	"vigia/internal/link"
	"vigia/internal/machine"
	"vigia/internal/volume"
	"vigia/internal/volume/ext4"
)

// countPeriod is how often accesses to unwatched files become events, and countTop how many of them.
const (
	countPeriod = 10 * time.Second
	countTop    = 16
)

// disk is the guest's disk: the volume, served to QEMU, and the trackers that name the files.
type disk struct {
	vol   *volume.Volume
	emit  func(event.Kind, event.Fields)
	flood *event.Flood // for what a guest can repeat as it likes
	who   openers
	// overlay is for asking how large it has grown; the volume owns it.
	overlay atomic.Pointer[os.File]

	trackers atomic.Pointer[[]*tracker]
	place    sync.Mutex // one change of the set of trackers at a time
	named    atomic.Pointer[string]
	stalled  atomic.Pointer[string]
}

// tracker is one file system on the disk.
type tracker struct {
	*ext4.Tracker
	kind string
}

// openDisk opens the volume and begins to serve it. Files are named from a guest's first request on. A QEMU that comes up opens its disk, and reads
// nothing of it before its guest runs: it need not wait until the index is built. Under a guest that runs already nothing is served before.
func openDisk(files map[string]*os.File, watch []string, running bool, emit func(event.Kind, event.Fields), flood *event.Flood) (*disk, error) {
	d := &disk{emit: emit, flood: flood}
	d.overlay.Store(files[link.FileOverlay])
	var layers []*os.File
	for i := 0; files[link.FileLayer+strconv.Itoa(i)] != nil; i++ {
		layers = append(layers, files[link.FileLayer+strconv.Itoa(i)])
	}
	if files[link.FileNBD] == nil || files[link.FileOverlay] == nil {
		return nil, errors.New("no overlay or no socket was given")
	}
	l, err := net.FileListener(files[link.FileNBD])
	if err != nil {
		return nil, err
	}
	files[link.FileNBD].Close()
	d.vol, err = volume.Open(layers, files[link.FileOverlay], volume.Options{Observer: d, OnStall: d.stall, OnResume: d.unstall})
	if err != nil {
		l.Close()
		return nil, err
	}
	serve := func() {
		go volume.Serve(context.Background(), l, d.vol, volume.ServeOptions{Name: machine.NBDExport, Simple: true})
	}
	if !running {
		serve()
	}
	if err := d.watch(watch); err != nil {
		d.say("files are not named: " + err.Error())
	}
	if running {
		serve()
	}
	go d.count()
	return d, nil
}

// watch finds the file systems on the disk and follows those whose files can be named. With other paths to watch the
// index is built anew, which takes tens of milliseconds.
func (d *disk) watch(paths []string) error {
	d.place.Lock()
	defer d.place.Unlock()
	found, err := ext4.Find(d.vol, d.vol.Size())
	if err != nil && len(found) == 0 {
		return err
	}
	list := newWatchlist(paths)
	var set []*tracker
	names := ""
	for _, fs := range found {
		if !fs.Named() {
			names += ", files on " + fs.Kind + " are not named"
			continue
		}
		t := &tracker{kind: fs.Kind}
		t.Tracker, err = ext4.NewTracker(d.vol, fs, ext4.Options{Watch: list.followed(), TopN: countTop, Access: t.access(list, d), Changed: changed(list, d.flood)})
		if err != nil {
			names += fmt.Sprintf(", files on a %s are not named: %v", fs.Kind, err)
			continue
		}
		set = append(set, t)
		names += ", named (" + fs.Kind + ")"
	}
	if names == "" {
		names = ", files are not named: no file system was found on the disk"
	}
	d.say(names[2:])
	if old := d.trackers.Swap(&set); old != nil {
		for _, t := range *old {
			t.Close()
		}
	}
	return nil
}

func (d *disk) say(s string) { d.named.Store(&s) }

// access makes an event of each touch of a watched file, or of a second's touches where they go on.
func (t *tracker) access(list *watchlist, d *disk) func(ext4.Access) {
	return func(a ext4.Access) {
		path, ok := list.meant(append([]string{a.Path}, a.Paths...)...)
		if !ok {
			return
		}
		kind := event.DiskRead
		fields := event.Fields{"path": event.Text([]byte(path)), "inode": int64(a.Inode), "fstype": t.kind, "bytes": a.Bytes,
			"requests": int64(1), "watched": true}
		if a.Op == ext4.OpWrite {
			kind = event.DiskWrite
			fields["pending"] = a.Pending
		} else {
			d.who.name(path, fields)
		}
		d.flood.Emit(event.Alike{Sort: string(kind) + path, Sum: []string{"bytes", "requests"}, Always: list.literal[path]}, event.Event{Kind: kind, Fields: fields})
	}
}

func changed(list *watchlist, flood *event.Flood) func(ext4.Change) {
	return func(c ext4.Change) {
		if _, ok := list.meant(c.Path); !ok {
			return
		}
		flood.Emit(event.Alike{Sort: c.What + c.Path, Sum: []string{"count"}, Always: list.literal[c.Path]}, event.Event{Kind: event.FileChanged,
			Fields: event.Fields{"path": event.Text([]byte(c.Path)), "inode": int64(c.Inode), "change": c.What, "detail": event.Text([]byte(c.Detail))}})
	}
}

// Read, Written, Trimmed and Zeroed are the volume's Observer: each request goes to the tracker of every file system,
// which knows its own part of the disk.
func (d *disk) Read(off, n int64) {
	if set := d.trackers.Load(); set != nil {
		for _, t := range *set {
			t.Tracker.Read(off, n)
		}
	}
}

// Written is told of a write and its data.
func (d *disk) Written(off int64, data []byte) {
	if set := d.trackers.Load(); set != nil {
		for _, t := range *set {
			t.Tracker.Written(off, data)
		}
	}
}

// Trimmed is told of a discard.
func (d *disk) Trimmed(off, n int64) {
	if set := d.trackers.Load(); set != nil {
		for _, t := range *set {
			t.Tracker.Trimmed(off, n)
		}
	}
}

// Zeroed is told of zeros written.
func (d *disk) Zeroed(off, n int64) {
	if set := d.trackers.Load(); set != nil {
		for _, t := range *set {
			t.Tracker.Zeroed(off, n)
		}
	}
}

// count reports what the rest of the files saw, for as long as the guard lives.
func (d *disk) count() {
	for range time.Tick(countPeriod) {
		d.report()
	}
}

// report makes events of the counts since the last report.
func (d *disk) report() {
	set := d.trackers.Load()
	if set == nil {
		return
	}
	for _, t := range *set {
		for _, c := range t.Counts() {
			if c.Kind == ext4.KindData || c.Kind == ext4.KindUnowned {
				d.counted(t.kind, c)
			}
		}
	}
}

func (d *disk) counted(fstype string, c ext4.Count) {
	give := func(kind event.Kind, requests, bytes uint64) {
		if requests > 0 {
			d.emit(kind, event.Fields{"path": event.Text([]byte(c.Path)), "inode": int64(c.Inode), "fstype": fstype,
				"bytes": int64(bytes), "requests": int64(requests), "watched": false})
		}
	}
	give(event.DiskRead, c.Reads, c.ReadBytes)
	give(event.DiskWrite, c.Writes, c.WriteBytes)
}

// stall is called when the host can't carry a request out: it is held, and tried again until it can.
func (d *disk) stall(err error) {
	text := err.Error()
	d.stalled.Store(&text)
	d.emit(event.DiskStalled, event.Fields{"reason": event.Text([]byte(text + ": make room on the host's disk; the machine waits and goes on by itself"))})
}

func (d *disk) unstall() {
	d.stalled.Store(nil)
	d.emit(event.DiskResumed, nil)
}

func (d *disk) status(s *link.GuardStatus) {
	st := d.vol.Stats()
	if info, err := d.overlay.Load().Stat(); err == nil {
		if sys, ok := info.Sys().(*syscall.Stat_t); ok {
			s.DiskUsed = uint64(sys.Blocks) * 512
		}
	}
	s.DiskSize, s.Layers, s.Top = uint64(d.vol.Size()), st.Layers, d.vol.ID().String()
	s.Reads, s.Writes, s.Flushes = uint64(st.Reads), uint64(st.Writes), uint64(st.Flushes)
	if p := d.named.Load(); p != nil {
		s.Files = *p
	}
	if set := d.trackers.Load(); set != nil {
		for _, t := range *set {
			ts := t.Stats()
			if ts.State != "current" {
				s.Files += fmt.Sprintf("; index %s: %s", ts.State, ts.Reason)
			}
			if ts.Degraded != "" {
				s.Files += "; " + ts.Degraded
			}
		}
	}
	if p := d.stalled.Load(); p != nil {
		s.Stalled = *p
	}
}
