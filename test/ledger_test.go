package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLedgerByHand keeps a head and a proof elsewhere, as somebody would who does not trust this host for ever, and holds
// both against the ledger as it is later, against another's, and against copies that were changed.
func TestLedgerByHand(t *testing.T) {
	h, other := newHost(t), newHost(t)
	h.serve()
	other.serve()
	h.must("ls")
	first := h.events()[0]
	keep := t.TempDir()
	put := func(name, text string) string {
		path := filepath.Join(keep, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	head, foreign := put("head", h.must("ledger", "head", "--note")), put("foreign", other.must("ledger", "head", "--note"))
	proof := h.must("ledger", "prove", first.ID)
	key, err := os.ReadFile(h.path("ledger", "key.pub"))
	if err != nil {
		t.Fatal(err)
	}
	keyFile := put("key", string(key))
	h.refused(1, []string{"is-not-there"}, "rm", "is-not-there") // the ledger grows
	h.must("ledger", "verify", "--head", head)
	h.refused(3, []string{"head"}, "ledger", "verify", "--head", foreign)
	h.must("ledger", "verify", "--proof", put("proof", proof), "--key", keyFile)
	h.refused(3, []string{"does not verify"}, "ledger", "verify", "--proof", put("changed", strings.Replace(proof, "vigia.started", "vigia.stopped", 1)), "--key", keyFile)
	h.refused(1, []string{"--key"}, "ledger", "verify", "--proof", put("proof", proof))
	h.refused(1, []string{"no entry"}, "ledger", "prove", "100000")
	h.refused(1, []string{"no event"}, "ledger", "prove", "0000000000000000-0000000000000001")
	// Going back to what the ledger was before the head was kept is what a head is kept for.
	old := filepath.Join(keep, "copy")
	if err := os.CopyFS(old, os.DirFS(h.path("ledger"))); err != nil {
		t.Fatal(err)
	}
	h.refused(1, []string{"is-not-there"}, "rm", "is-not-there")
	was := h.must("ledger", "verify", "--dir", old)
	h.until("the ledger has grown: it is written a moment after what it tells of", time.Minute, func() bool { return h.must("ledger", "verify") != was })
	later := put("later", h.must("ledger", "head", "--note"))
	h.refused(3, []string{"verify"}, "ledger", "verify", "--dir", old, "--head", later)
}
