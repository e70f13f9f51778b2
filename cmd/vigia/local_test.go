package main

import (
	"bufio"
	"io"
	"strings"
	"testing"
)

const recordedEvent = `{"id":"a-0000000000000001","machine":"web","time":"2026-01-02T03:04:05Z","kind":"machine.paused"}`

// TestRecordedEventsInThreeForms: what `events -o json` prints and what `ledger export` writes can be given to `policy
// test` as they are.
func TestRecordedEventsInThreeForms(t *testing.T) {
	for name, text := range map[string]string{
		"lines":  recordedEvent + "\n" + recordedEvent + "\n",
		"array":  "[" + recordedEvent + ",\n " + recordedEvent + "]\n",
		"export": `{"format":"vigia-ledger-1","key":"k","from":0,"to":2,"head":"h"}` + "\n" + `{"index":0,"leaf_hash":"x","entry":` + recordedEvent + "}\n" + `{"index":1,"leaf_hash":"y","entry":` + recordedEvent + "}\n",
	} {
		got, err := io.ReadAll(recorded(bufio.NewReader(strings.NewReader(text))))
		if err != nil || string(got) != recordedEvent+"\n"+recordedEvent+"\n" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, text := range []string{"[", "[{]", `{"format":"vigia-ledger-1"`, "[7"} {
		if _, err := io.ReadAll(recorded(bufio.NewReader(strings.NewReader(text)))); err == nil {
			t.Errorf("%q is taken for events", text)
		}
	}
}
