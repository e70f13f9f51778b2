package daemon

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"vigia/internal/link"
	"vigia/internal/vm"
)

// A recording's log knows instructions and no time of day. So while a machine is recorded it is noted now and then how far it is: rows
// of sixteen bytes, little-endian, the host's time in nanoseconds since 1970 and the count of instructions. Between two rows the guest is taken to
// have executed evenly: a time is right to about the distance of two rows.
const (
	timesRow   = 16
	timesEvery = 2 * time.Second
	timesMost  = 1 << 20 // rows: three weeks and a half
)

func (l layout) recordingTimes(id vm.ID) string {
	return filepath.Join(l.machine(id), "recording.times")
}

// mark is a row.
type mark struct {
	at           time.Time
	instructions int64
}

type marks []mark

// watchRecording notes how far a machine is that is recorded.
func (d *Daemon) watchRecording(m *machine, r *run) {
	if m.rec.replayMode() != "record" {
		return
	}
	d.spawn(func() {
		f, err := os.OpenFile(d.files.recordingTimes(m.id()), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			d.log.Warn("it will not be known what the recording executed when", "machine", m.name(), "error", err)
			return
		}
		defer f.Close()
		for {
			var s link.GuardStatus
			before := time.Now()
			if _, err := m.callGuard(d.ctx, link.CallGuardStatus, nil, &s); err == nil {
				f.Write(mark{before, s.Instructions}.row())
			}
			if info, err := f.Stat(); err != nil || info.Size() >= timesMost*timesRow {
				return
			}
			if waitFor(d.ctx, r.ended, timesEvery) || d.ctx.Err() != nil {
				return
			}
		}
	})
}

func (m mark) row() []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(m.at.UnixNano()))
	return binary.LittleEndian.AppendUint64(b, uint64(m.instructions))
}

// readTimes reads what was noted; there are two rows at least. What does not go forward is left out: the host's clock may have been set.
func readTimes(path string) (marks, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, bare(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, timesMost*timesRow))
	if err != nil {
		return nil, err
	}
	var all marks
	for ; len(b) >= timesRow; b = b[timesRow:] {
		m := mark{time.Unix(0, int64(binary.LittleEndian.Uint64(b))), int64(binary.LittleEndian.Uint64(b[8:]))}
		if n := len(all); n == 0 || m.at.After(all[n-1].at) && m.instructions >= all[n-1].instructions {
			all = append(all, m)
		}
	}
	if len(all) < 2 {
		return nil, fmt.Errorf("%d rows were noted: %w", len(all), errShort)
	}
	return all, nil
}

var errShort = errors.New("it ended too soon")

// instruction says how far the machine was at a time.
func (all marks) instruction(at time.Time) (int64, bool) {
	for i := 1; i < len(all); i++ {
		a, b := all[i-1], all[i]
		if !at.Before(a.at) && !at.After(b.at) {
			part := float64(at.Sub(a.at)) / float64(b.at.Sub(a.at))
			return a.instructions + int64(part*float64(b.instructions-a.instructions)), true
		}
	}
	return 0, false
}

// when says at what time the machine had executed so many instructions; zero where that is not known.
func (all marks) when(instructions int64) time.Time {
	for i := 1; i < len(all); i++ {
		a, b := all[i-1], all[i]
		if a.instructions <= instructions && instructions <= b.instructions && a.instructions < b.instructions {
			part := float64(instructions-a.instructions) / float64(b.instructions-a.instructions)
			return a.at.Add(time.Duration(part * float64(b.at.Sub(a.at))))
		}
	}
	return time.Time{}
}
