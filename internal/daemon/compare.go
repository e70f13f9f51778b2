package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"vigia/internal/event"
	"vigia/internal/jail"
	"vigia/internal/link"
	"vigia/internal/vm"
)

// compareConsole bounds what is compared of two consoles, in bytes: the first part of the log, which is never overwritten.
const compareConsole = 16 << 20

// notExact begins a verdict that is not the one hoped for.
const notExact = "not known to be exact: "

// judgeReplay compares what a replay that has ended did with what was recorded, and keeps the verdict with both. rec is from before the end.
func (m *machine) judgeReplay(rec record, exit jail.Exit, shown link.Shown) {
	if rec.Replays == nil || rec.Run == nil {
		return
	}
	seconds := time.Since(rec.Run.Started).Seconds()
	m.d.spawn(func() {
		verdict, err := m.compareReplay(rec, exit, shown)
		if err != nil {
			verdict = notExact + event.Text([]byte(err.Error()))
		}
		ctx := context.WithoutCancel(m.d.ctx)
		m.change(ctx, func(r *record) { r.Reason = verdict })
		if rec.Run.Asked != vm.EndedNone {
			return // somebody ended it: that says nothing of the recording
		}
		if of, ferr := m.d.machine(rec.Replays.Name); ferr == nil && of.id() == rec.Replays.Of {
			of.change(ctx, func(r *record) {
				if r.Recording != nil && r.Recording.Began.Equal(rec.Replays.Recording.Began) {
					again := *r.Recording
					again.Verdict, again.Exact = verdict, err == nil
					r.Recording = &again
				}
			})
		}
		m.d.bus.emit(m.name(), event.ReplayEnded, event.Fields{"of": rec.Replays.Name, "exact": err == nil, "reason": verdict, "seconds": seconds})
	})
}

// compareReplay says what is the same, or what differs. Neither machine runs meanwhile: who has both locks took the replaying one's first.
func (m *machine) compareReplay(rec record, exit jail.Exit, shown link.Shown) (string, error) {
	if reason := m.record().Reason; !exit.Known || exit.Signal != 0 || exit.Code != 0 {
		return "", fmt.Errorf("the replay did not come to its end: %s", reason)
	}
	of, err := m.d.machine(rec.Replays.Name)
	if err != nil || of.id() != rec.Replays.Of {
		return "", errors.New("the machine that was recorded is gone: there is nothing to compare with")
	}
	unlock, err := m.lock(m.d.ctx)
	if err != nil {
		return "", err
	}
	defer unlock()
	unlockOf, err := of.lock(m.d.ctx)
	if err != nil {
		return "", err
	}
	defer unlockOf()
	was := of.record()
	if was.Run != nil || was.Recording == nil || !was.Recording.Began.Equal(rec.Replays.Recording.Began) {
		return "", errors.New("the machine that was recorded has run again: its console and disk are not what they were")
	}
	if m.record().Run != nil {
		return "", errors.New("the machine that replayed it was started again: its console and disk are not what they were")
	}
	if err := sameConsole(m.d.files.consoleLogs(of.id())[0], m.d.files.consoleLogs(m.id())[0], *was.Recording); err != nil {
		return "", err
	}
	if !rec.showsFrames() {
		return "exact: replayed to its end with the same console and the same disk, byte by byte", m.sameDisk(of)
	}
	if err := sameFrames(was.Recording.Shown, shown); err != nil {
		return "", err
	}
	return fmt.Sprintf("exact: replayed to its end with the same console, the same disk and the same %d frames, byte by byte", shown.Frames), m.sameDisk(of)
}

func sameConsole(recorded, replayed string, r recording) error {
	a, err := readPart(recorded, r.From, r.To-r.From)
	if err != nil {
		return err
	}
	b, err := readPart(replayed, 0, compareConsole)
	if err != nil {
		return err
	}
	if n := min(len(a), len(b)); !bytes.Equal(a[:n], b[:n]) || (len(a) != len(b) && int(r.From)+len(a) < compareConsole) {
		return fmt.Errorf("the console differs: %d bytes were recorded, %d replayed", len(a), len(b))
	}
	return nil
}

func readPart(path string, from, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.NewSectionReader(f, from, min(n, compareConsole)))
}

// sameFrames compares what two guards saw of two cards.
func sameFrames(recorded, replayed link.Shown) error {
	switch {
	case !recorded.Whole:
		return errors.New("the console is the same; of the frames it is not known, since the guard of the recorded run did not see them all")
	case !replayed.Whole:
		return errors.New("the console is the same; of the frames it is not known, since the guard of the replay did not see them all")
	case recorded != replayed:
		return fmt.Errorf("the network frames differ: %d of %d bytes were recorded, %d of %d replayed", recorded.Frames, recorded.Bytes, replayed.Frames, replayed.Bytes)
	}
	return nil
}

func (m *machine) sameDisk(of *machine) error {
	ctx, cancel := context.WithTimeout(m.d.ctx, compareTime)
	defer cancel()
	a, err1 := of.openChain(of.layersOf(""))
	defer func() { closeFiles(a) }()
	b, err2 := m.openChain(m.layersOf(""))
	defer func() { closeFiles(b) }()
	overA, err3 := os.OpenFile(m.d.files.overlay(of.id()), os.O_RDWR, 0)
	overB, err4 := os.OpenFile(m.d.files.overlay(m.id()), os.O_RDWR, 0)
	defer func() { closeFiles([]*os.File{overA, overB}) }()
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	d, err := m.d.convert.Same(ctx, a, overA, b, overB)
	if err == nil && d.At >= 0 {
		err = fmt.Errorf("the disk differs from byte %d on", d.At)
	}
	return err
}

// settleReplay gives a replay that ended unseen, or whose comparison did not come to its end, its verdict.
func (d *Daemon) settleReplay(m *machine) {
	if r := m.record(); r.Replays != nil && r.Run == nil && !strings.HasPrefix(r.Reason, "exact") && !strings.HasPrefix(r.Reason, notExact) {
		m.change(d.ctx, func(r *record) { r.Reason = notExact + "the daemon ended before it was compared" })
	}
}
