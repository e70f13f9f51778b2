package policy

import (
	"testing"
)

var responses = []string{"alert", "pause", "quarantine", "stop"}

func TestStarterReads(t *testing.T) {
	rules, err := Starter(responses)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(WatchPaths(rules))
}
