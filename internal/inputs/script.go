package inputs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Script is what entered a machine from one instant on, ready to be given again.
type Script struct {
	Flows   []*Flow
	Answers []Answer
	Typed   []Part
	Calls   []*Call
	// Older are flows that had begun before, and OlderBytes what came in on them: a clone has no other end of them.
	Older      int
	OlderBytes int64
	Until      time.Time // where the run or the log ends
	Gaps       []string  // what is not there, in sentences
}

// Flow is one flow, with what came in on it.
type Flow struct {
	Ends
	ID     uint64
	Began  time.Time
	Opened bool
	Over   time.Time // zero: it was not over when the log ends
	Parts  []Part
}

// How a part ends.
const (
	PartData   = 0
	PartClosed = 1 // the outside has said all
	PartReset  = 2 // the outside has cut it
)

// Part is bytes that came in, or an end. Sent is what the machine had sent by then.
type Part struct {
	Time time.Time
	End  int
	Sent int64
	Data []byte
}

// Call is a command or a copy through the guest channel. Whole: all its input is there.
type Call struct {
	ID    uint64
	Time  time.Time
	Copy  bool
	Words []string // of a command
	Path  string
	Mode  uint32
	Input []byte
	Whole bool
}

// maxGaps bounds the sentences about what is missing.
const maxGaps = 16

// maxCall bounds what is put together of a call's input.
const maxCall = 256 << 20

// NewScript takes from a log what entered the machine from an instant of one of its runs on, until that run's end.
func NewScript(k Kept, from time.Time) *Script {
	s := &Script{}
	b := builder{s: s, flows: map[uint64]*Flow{}, calls: map[uint64]*Call{}, older: map[uint64]bool{}}
	switch {
	case len(k.Records) == 0:
		s.gap("nothing was kept")
	case k.Records[0].Time.After(from) && k.Dropped:
		s.gap("what entered before %s was dropped to keep within the bounds", clock(k.Records[0].Time))
	case k.Records[0].Time.After(from):
		s.gap("nothing was kept before %s", clock(k.Records[0].Time))
	}
	if k.Torn > 0 {
		s.gap("%d parts of the log end torn: what was last written there is missing", k.Torn)
	}
	for i := range k.Records {
		r := &k.Records[i]
		if r.Kind == Began && b.begin(r, from) {
			break
		}
		if r.Time.Before(from) {
			if r.Kind == Flowed {
				b.older[r.Flow] = true
			}
			continue
		}
		b.take(r)
		if r.Time.After(s.Until) {
			s.Until = r.Time
		}
	}
	return s
}

func clock(t time.Time) string { return t.UTC().Format("15:04:05.000") }

func (s *Script) gap(format string, a ...any) {
	if len(s.Gaps) < maxGaps {
		s.Gaps = append(s.Gaps, fmt.Sprintf(format, a...))
	}
}

type builder struct {
	s     *Script
	run   uint64
	seen  bool // a run's beginning
	flows map[uint64]*Flow
	calls map[uint64]*Call
	older map[uint64]bool
	told  map[uint64]bool
}

// begin takes the beginning of a worker's part of the log. It says whether the run that is asked for has ended there.
func (b *builder) begin(r *Record, from time.Time) (over bool) {
	if !b.seen || r.Time.Before(from) {
		b.seen, b.run = true, r.Flow
		return false
	}
	if r.Flow != b.run {
		b.s.gap("the machine was started again or put back at %s: what entered since is not given", clock(r.Time))
		return true
	}
	b.s.gap("the process that keeps the log was replaced at %s: what entered in that moment may be missing", clock(r.Time))
	return false
}

func (b *builder) take(r *Record) {
	switch r.Kind {
	case Flowed:
		b.flow(r)
	case Opened:
		if f := b.flows[r.Flow]; f != nil {
			f.Opened = true
		}
	case Ended:
		if f := b.flows[r.Flow]; f != nil {
			f.Over = r.Time
		}
	case Data, Closed, Reset:
		b.part(r)
	case Answered:
		if a, ok := parseAnswer(r.Data); ok {
			a.Time = r.Time
			b.s.Answers = append(b.s.Answers, a)
		}
	case Typed:
		b.s.Typed = append(b.s.Typed, Part{Time: r.Time, Data: r.Data})
	case Command, Copy:
		b.call(r)
	case Missing:
		b.s.gap("%d records of %d bytes in all are missing at %s: more came than could be written", r.Flow, r.Sent, clock(r.Time))
	}
}

func (b *builder) flow(r *Record) {
	ends, ok := parseEnds(r.Data)
	if !ok || b.flows[r.Flow] != nil {
		return
	}
	f := &Flow{Ends: ends, ID: r.Flow, Began: r.Time}
	b.flows[r.Flow] = f
	b.s.Flows = append(b.s.Flows, f)
}

// part is more of a flow or of a call's input.
func (b *builder) part(r *Record) {
	if c := b.calls[r.Flow]; c != nil {
		switch {
		case r.Kind == Closed:
			c.Whole = true
		case r.Kind == Data && len(c.Input)+len(r.Data) <= maxCall:
			c.Input = append(c.Input, r.Data...)
		}
		return
	}
	f := b.flows[r.Flow]
	if f == nil {
		if r.Kind == Data {
			if !b.told[r.Flow] {
				if b.told == nil {
					b.told = map[uint64]bool{}
				}
				b.told[r.Flow] = true
				b.s.Older++
			}
			b.s.OlderBytes += int64(len(r.Data))
		}
		return
	}
	end := PartData
	switch r.Kind {
	case Closed:
		end = PartClosed
	case Reset:
		end = PartReset
	}
	f.Parts = append(f.Parts, Part{Time: r.Time, End: end, Sent: r.Sent, Data: r.Data})
}

func (b *builder) call(r *Record) {
	c := &Call{ID: r.Flow, Time: r.Time, Copy: r.Kind == Copy}
	if c.Copy {
		if len(r.Data) < 4 {
			return
		}
		c.Mode, c.Path = binary.LittleEndian.Uint32(r.Data), string(r.Data[4:])
	} else {
		for w := range bytes.SplitSeq(bytes.TrimSuffix(r.Data, []byte{0}), []byte{0}) {
			c.Words = append(c.Words, string(w))
		}
	}
	if b.calls[r.Flow] == nil {
		b.calls[r.Flow] = c
		b.s.Calls = append(b.s.Calls, c)
	}
}

// CommandData is a command as a record's payload.
func CommandData(words []string) []byte { return []byte(strings.Join(words, "\x00") + "\x00") }

// CopyData is a copy's.
func CopyData(path string, mode uint32) []byte {
	return append(binary.LittleEndian.AppendUint32(nil, mode), path...)
}

// times are when anything in the script is due.
func (s *Script) times() (all []time.Time) {
	for _, f := range s.Flows {
		all = append(all, f.Began)
		for _, p := range f.Parts {
			all = append(all, p.Time)
		}
	}
	for _, p := range s.Typed {
		all = append(all, p.Time)
	}
	for _, c := range s.Calls {
		all = append(all, c.Time)
	}
	return all
}

// Pace says when something is due, from the beginning of what is given again: as it was, or with long waits in which nothing entered cut short.
type Pace struct {
	from time.Time
	cuts []cut // by time
}

// cut is a wait that is cut short: from at on, everything is due by so much earlier.
type cut struct {
	at   time.Time
	less time.Duration
}

// NewPace makes the pace of scripts that are given together. A wait is cut to wait, or none is where that is 0.
func NewPace(from time.Time, wait time.Duration, scripts ...*Script) Pace {
	p := Pace{from: from}
	if wait <= 0 {
		return p
	}
	var all []time.Time
	for _, s := range scripts {
		all = append(all, s.times()...)
	}
	slices.SortFunc(all, time.Time.Compare)
	last, less := from, time.Duration(0)
	for _, t := range all {
		if idle := t.Sub(last); idle > wait {
			less += idle - wait
			p.cuts = append(p.cuts, cut{t, less})
		}
		last = t
	}
	return p
}

// At is when what entered at t is due.
func (p Pace) At(t time.Time) time.Duration {
	i, found := slices.BinarySearchFunc(p.cuts, t, func(c cut, t time.Time) int { return c.at.Compare(t) })
	if !found {
		i--
	}
	d := t.Sub(p.from)
	if i >= 0 {
		d -= p.cuts[i].less
	}
	return max(d, 0)
}
