package inputs

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// ring makes the files of a log; openAgain opens them as another process would.
func files(t testing.TB, n int) []string {
	dir := t.TempDir()
	var names []string
	for i := range n {
		names = append(names, filepath.Join(dir, fmt.Sprint(i)))
	}
	return names
}

func open(t testing.TB, names []string, b Bounds) *Log {
	t.Helper()
	var fs []*os.File
	for _, name := range names {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		fs = append(fs, f)
	}
	l, err := Open(fs, b)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func read(t testing.TB, names []string) Kept {
	t.Helper()
	k, err := Read(segments(t, names))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func segments(t testing.TB, names []string) (s []Segment) {
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		s = append(s, bytes.NewReader(b))
	}
	return s
}

var web = Ends{Protocol: 6, In: true, Near: netip.MustParseAddrPort("10.77.0.2:80"), Far: netip.MustParseAddrPort("10.77.0.1:40000"), Client: netip.MustParseAddrPort("127.0.0.1:5555")}

// TestScript writes what two lives of a worker saw, and reads it from an instant on.
func TestScript(t *testing.T) {
	names := files(t, 2)
	l := open(t, names, Bounds{Bytes: 1 << 20})
	start := time.Now().Add(-time.Hour)
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	add := func(s int, r Record) { r.Time = at(s); l.Add(r) }
	add(0, Record{Kind: Began, Flow: 7})
	add(1, Record{Kind: Flowed, Flow: 100, Data: web.Append(nil)})
	add(11, Record{Kind: Data, Flow: 100, Data: []byte("of a flow from before")})
	add(12, Record{Kind: Flowed, Flow: 101, Data: web.Append(nil)})
	add(12, Record{Kind: Opened, Flow: 101})
	add(13, Record{Kind: Data, Flow: 101, Data: []byte("GET / HTTP/1.0\r\n\r\n")})
	add(14, Record{Kind: Closed, Flow: 101, Sent: 200})
	add(15, Record{Kind: Answered, Data: Answer{Name: "example.org", Type: 1, Class: 1, Reply: []byte("reply")}.Append(nil)})
	add(16, Record{Kind: Typed, Data: []byte("ls\n")})
	add(17, Record{Kind: Command, Flow: 102, Data: CommandData([]string{"sh", "-c", ""})})
	add(17, Record{Kind: Data, Flow: 102, Data: bytes.Repeat([]byte("x"), 3*MaxData)})
	add(17, Record{Kind: Closed, Flow: 102})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, names, Bounds{Bytes: 1 << 20})
	add(100, Record{Kind: Began, Flow: 7})
	add(101, Record{Kind: Copy, Flow: 103, Data: CopyData("/root/x", 0o644)})
	add(200, Record{Kind: Began, Flow: 8})
	add(201, Record{Kind: Typed, Data: []byte("of another run")})
	l.Close()

	s := NewScript(read(t, names), at(10))
	if len(s.Flows) != 1 || s.Flows[0].Ends != web || !s.Flows[0].Opened || len(s.Flows[0].Parts) != 2 || s.Flows[0].Parts[1].End != PartClosed || s.Flows[0].Parts[1].Sent != 200 {
		t.Errorf("flows: %+v", s.Flows)
	}
	if s.Older != 1 || s.OlderBytes != int64(len("of a flow from before")) {
		t.Errorf("from before: %d flows, %d bytes", s.Older, s.OlderBytes)
	}
	if len(s.Answers) != 1 || s.Answers[0].Name != "example.org" || string(s.Answers[0].Reply) != "reply" {
		t.Errorf("answers: %+v", s.Answers)
	}
	if len(s.Typed) != 1 || string(s.Typed[0].Data) != "ls\n" {
		t.Errorf("typed: %+v", s.Typed)
	}
	if len(s.Calls) != 2 || len(s.Calls[0].Words) != 3 || len(s.Calls[0].Input) != 3*MaxData || !s.Calls[0].Whole || s.Calls[1].Path != "/root/x" || s.Calls[1].Mode != 0o644 || s.Calls[1].Whole {
		t.Errorf("calls: %.300q", fmt.Sprintf("%+v", s.Calls))
	}
	said := strings.Join(s.Gaps, "\n")
	if len(s.Gaps) != 2 || !strings.Contains(said, "replaced") || !strings.Contains(said, "started again") {
		t.Errorf("gaps: %s", said)
	}
}

// TestBounds floods a log: it keeps the newest within its bounds, and says that older ones are gone.
func TestBounds(t *testing.T) {
	names := files(t, 4)
	l := open(t, names, Bounds{Bytes: 1 << 20})
	start := time.Now()
	for i := range 300 {
		l.Add(Record{Kind: Typed, Data: []byte(strings.Repeat(fmt.Sprintf("%04d", i), 4000))})
		l.Flush()
	}
	l.Close()
	var size int64
	for _, name := range names {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if size > 1<<20 || size < 512<<10 {
		t.Errorf("%d bytes are kept, 1 MiB was asked for", size)
	}
	k := read(t, names)
	if !k.Dropped || k.Torn != 0 {
		t.Errorf("dropped %t, torn %d", k.Dropped, k.Torn)
	}
	if last := k.Records[len(k.Records)-1]; string(last.Data[:4]) != "0299" {
		t.Errorf("the last one is %.4s", last.Data)
	}
	for i := 1; i < len(k.Records); i++ {
		if k.Records[i].Time.Before(k.Records[i-1].Time) {
			t.Fatal("not in order")
		}
	}
	if s := NewScript(k, start); len(s.Gaps) != 1 || !strings.Contains(s.Gaps[0], "dropped") {
		t.Errorf("gaps: %v", s.Gaps)
	}
}

func TestAge(t *testing.T) {
	names := files(t, 4)
	l := open(t, names, Bounds{Bytes: 4 << 20, Age: 4 * time.Hour})
	start := time.Now().Add(-24 * time.Hour)
	for i := range 24 {
		l.Add(Record{Kind: Typed, Time: start.Add(time.Duration(i) * time.Hour), Data: []byte{byte(i)}})
	}
	l.Close()
	k := read(t, names)
	if first, last := k.Records[0].Data[0], k.Records[len(k.Records)-1].Data[0]; first < 23-5 || last != 23 || !k.Dropped {
		t.Errorf("hours %d to %d are kept, dropped %t", first, last, k.Dropped)
	}
}

// TestNoRoom has more come than the disk takes: it is counted where it is missing.
func TestNoRoom(t *testing.T) {
	names := files(t, 2)
	l := open(t, names, Bounds{Bytes: 32 << 20})
	const held = 400
	for range held {
		l.Add(Record{Kind: Typed, Data: make([]byte, MaxData)})
	}
	l.Close()
	k := read(t, names)
	var got, missing int
	for _, r := range k.Records {
		if r.Kind == Missing {
			missing += int(r.Flow)
		} else {
			got++
		}
	}
	if got+missing != held {
		t.Errorf("%d kept and %d missing of %d", got, missing, held)
	}
}

// TestTorn cuts a log at every byte: what is before the cut is read, and nothing else.
func TestTorn(t *testing.T) {
	names := files(t, 2)
	l := open(t, names, Bounds{})
	for i := range 5 {
		l.Add(Record{Kind: Typed, Data: []byte{byte(i)}})
	}
	l.Close()
	b, err := os.ReadFile(names[1])
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(b) {
		k, err := Read([]Segment{bytes.NewReader(b[:n])})
		if want := max(n-headerSize, 0) / (recordHead + 1 + recordTail); err != nil || len(k.Records) != want {
			t.Fatalf("cut at %d: %d records, want %d: %v", n, len(k.Records), want, err)
		}
	}
	for i := range b {
		flipped := bytes.Clone(b)
		flipped[i] ^= 0x10
		k, err := Read([]Segment{bytes.NewReader(flipped)})
		if err == nil && len(k.Records) == 5 {
			t.Fatalf("byte %d is another, and nothing is said", i)
		}
	}
}

func TestPace(t *testing.T) {
	from := time.Unix(1000, 0)
	at := func(s float64) time.Time { return from.Add(time.Duration(s * float64(time.Second))) }
	s := &Script{Typed: []Part{{Time: at(1)}, {Time: at(100)}, {Time: at(101)}, {Time: at(5000)}}}
	p := NewPace(from, 2*time.Second, s)
	for _, c := range []struct{ at, want float64 }{{0, 0}, {1, 1}, {100, 3}, {101, 4}, {5000, 6}, {5001, 7}} {
		if got := p.At(at(c.at)); got != time.Duration(c.want*float64(time.Second)) {
			t.Errorf("what entered after %gs is due after %s, want %gs", c.at, got, c.want)
		}
	}
	if got := NewPace(from, 0, s).At(at(5000)); got != 5000*time.Second {
		t.Errorf("at its pace: %s", got)
	}
}

type bad struct{ *bytes.Reader }

func (b bad) Size() int64 { return 1 << 40 }

func FuzzRead(f *testing.F) {
	seed := func(records ...Record) {
		b := appendHeader(nil, 3, time.Unix(5, 0))
		for _, r := range records {
			r.Time = time.Unix(6, 0)
			b = appendRecord(b, 3, &r)
		}
		f.Add(b, uint8(1))
		f.Add(b[:len(b)-3], uint8(2))
	}
	seed()
	seed(Record{Kind: Began, Flow: 1}, Record{Kind: Flowed, Flow: 9, Data: web.Append(nil)}, Record{Kind: Data, Flow: 9, Data: []byte("x")}, Record{Kind: Reset, Flow: 9})
	seed(Record{Kind: Answered, Data: Answer{Name: "a.b", Reply: []byte{1}}.Append(nil)}, Record{Kind: Command, Flow: 4, Data: CommandData([]string{"true"})}, Record{Kind: Copy, Flow: 5, Data: CopyData("/x", 1)}, Record{Kind: Missing, Flow: 3, Sent: 4})
	f.Fuzz(func(t *testing.T, b []byte, twice uint8) {
		list := []Segment{bytes.NewReader(b), bytes.NewReader(nil)}
		if twice > 1 {
			list = append(list, bytes.NewReader(b[:len(b)/2]))
		}
		k, err := Read(list)
		if err != nil {
			if len(k.Records) > 0 {
				t.Error("an error came with records")
			}
			return
		}
		// What is behind the sums is anything, too: its writer may be the attacker.
		rest := b
		for len(rest) > recordHead {
			n := min(int(rest[0]), len(rest)-recordHead)
			k.Records = append(k.Records, Record{Kind: Kind(rest[4] % 14), Time: time.Unix(int64(rest[8]), 0), Flow: uint64(rest[16] % 4), Data: rest[recordHead : recordHead+n]})
			rest = rest[recordHead+n:]
		}
		s := NewScript(k, time.Unix(3, 0))
		p := NewPace(time.Unix(3, 0), time.Second, s)
		for _, at := range s.times() {
			if p.At(at) < 0 {
				t.Error("due before the beginning")
			}
		}
		if len(s.Gaps) > maxGaps {
			t.Error("too many gaps")
		}
	})
}

func TestTooLarge(t *testing.T) {
	if _, err := Read([]Segment{bad{bytes.NewReader(nil)}}); err == nil {
		t.Error("a segment of a terabyte was read")
	}
	var _ io.ReaderAt = bad{}
}
