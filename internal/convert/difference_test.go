package convert

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"vigia/internal/introspect"
	"vigia/internal/inventory/scan"
)

func TestProcessesBetweenTwoStates(t *testing.T) {
	p := func(pid int64, start uint64, comm, exe string, uid uint32) introspect.Process {
		return introspect.Process{PID: pid, StartTime: start, Comm: comm, Exe: exe, UID: uid, PPID: 1}
	}
	then := []introspect.Process{p(1, 1, "init", "/sbin/init", 0), p(7, 5, "sh", "/bin/sh", 1000), p(8, 6, "gone", "/bin/gone", 0), p(9, 7, "x", "/bin/x", 0)}
	now := []introspect.Process{p(1, 1, "init", "/sbin/init", 0), p(7, 5, "sh", "/bin/su", 0), p(9, 70, "again", "/bin/again", 0)}
	now[0].Unknown, now[0].Exe = []string{"exe"}, ""
	got := ""
	for _, r := range changedProcesses(then, now) {
		got += r.Change + " " + r.Comm + " " + strings.Join(r.What, ",") + "\n"
	}
	if want := "changed sh user,program\nended gone \nended x \nstarted again \n"; got != want {
		t.Errorf("%s", got)
	}
}

// TestAnAnswerHasRoom: what a guest made so much of that an answer can't hold it is cut, and not the answer.
func TestAnAnswerHasRoom(t *testing.T) {
	var list []scan.Change
	for range scan.MaxChanges {
		list = append(list, scan.Change{Path: strings.Repeat("\u202e", 1000), Change: "added"})
	}
	n := fits(list)
	text, err := json.Marshal(list[:n])
	if err != nil || n == 0 || n == len(list) || len(text) > answerRoom {
		t.Errorf("%d of them in %d bytes: %v", n, len(text), err)
	}
	if fits(list[:3]) != 3 || fits([]scan.Change(nil)) != 0 {
		t.Error("what has room is cut")
	}
}

// TestTwoDisksDiffer: a file that differs is named; a question that makes no sense, and memory that is none, are errors.
func TestTwoDisksDiffer(t *testing.T) {
	dir := t.TempDir()
	files := []string{layer(t, dir, "then", "root:x:0:0::/root:/bin/bash\n", "root:*:1:0:9:7:::\n"), layer(t, dir, "now", "root:x:0:0::/root:/bin/bash\neve:x:0:0::/:/bin/sh\n", "root:*:1:0:9:7:::\n")}
	open := func(n int) *os.File {
		f, err := os.Open(files[min(n, 1)])
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	d, err := diffDisks(`{"then":1,"now":1}`, open)
	if err != nil || len(d.Files) == 0 {
		t.Fatalf("%+v %v", d, err)
	}
	found := false
	for _, c := range d.Files {
		found = found || c.Path == "/etc/passwd" && c.Change == "changed"
	}
	if !found {
		t.Errorf("/etc/passwd is not in %+v", d.Files)
	}
	for _, bad := range []string{"", "{}", `{"then":1,"now":999999}`, `{"then":-1,"now":1}`} {
		if _, err := diffDisks(bad, open); err == nil {
			t.Errorf("%q is answered", bad)
		}
	}
	for _, bad := range []string{"", "0", "-1", "1e30", "268435456"} {
		if _, err := diffProcesses(bad, open); err == nil {
			t.Errorf("memory of %q bytes is read", bad)
		}
	}
}
