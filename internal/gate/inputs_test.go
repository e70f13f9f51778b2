package gate

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"vigia/internal/event"
	"vigia/internal/inputs"
	"vigia/internal/link"
	"vigia/internal/network"
)

func logFiles(t *testing.T, dir string, n int) (files []*os.File) {
	t.Helper()
	for i := range n {
		f, err := os.OpenFile(filepath.Join(dir, strconv.Itoa(i)), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	return files
}

// TestSet keeps what a network tells, and furnishes a stage with it.
func TestSet(t *testing.T) {
	dir := t.TempDir()
	log, err := inputs.Open(logFiles(t, dir, 2), inputs.Bounds{})
	if err != nil {
		t.Fatal(err)
	}
	from := time.Now().Add(-time.Second)
	log.Add(inputs.Record{Kind: inputs.Began, Flow: 1, Time: from.Add(-time.Second)})
	k := Kept(log)
	end := netip.MustParseAddrPort
	in := k.Flow(6, true, end("10.77.0.2:80"), end("192.0.2.9:1000"), end("192.0.2.9:1000"))
	k.Opened(in)
	k.Data(in, 0, []byte("GET / HTTP/1.0\r\n\r\n"))
	k.Closed(in, 100, true)
	k.Ended(in, "reset")
	out := k.Flow(6, false, end("10.77.0.2:40000"), end("192.0.2.10:80"), netip.AddrPort{})
	k.Opened(out)
	k.Data(out, 5, []byte("answer"))
	k.Answer("example.org", 1, 1, []byte("123456789012345"))
	k.Answer(strings.Repeat("x", 300), 1, 1, nil) // no name
	log.Close()

	s := newSet(link.Play{Gate: 2, From: from, Wait: time.Millisecond}, logFiles(t, dir, 2))
	if len(s.script.Flows) != 2 || len(s.script.Answers) != 1 || len(s.script.Gaps) != 0 {
		t.Fatalf("%+v", s.script)
	}
	n, err := network.New(network.Config{Name: "again", MAC: []byte{0x52, 0x54, 0, 1, 2, 3}, Stage: s.stage}, func(event.Kind, event.Fields) {})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	// No guest is there: what is begun has no other end. The end is told all the same.
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if r := s.play(ctx, n); r.FlowsIn != 1 || r.Unasked != 1 || r.Until.IsZero() {
		t.Errorf("%+v", r)
	}
	if r := (*set)(nil).play(ctx, n); r.FlowsIn != 0 {
		t.Errorf("a gate that is no stage has given %+v", r)
	}
}
