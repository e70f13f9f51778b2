package ledger

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// The ledger is checked by programs that know nothing of vigia: Tessera's fsck, and the Go checksum database's reader of
// trees.
func TestPublicToolsAgree(t *testing.T) {
	ctx := context.Background()
	dir, vkey := made(t, 300, 1, 700)
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	checker := fsck.New(verifier.Name(), verifier, client.FileFetcher{Root: dir}, leafHashes, fsck.Opts{N: 1})
	if err := checker.Check(ctx); err != nil {
		t.Errorf("fsck: %v", err)
	}
	cp, err := os.ReadFile(filepath.Join(dir, checkpointFile))
	if err != nil {
		t.Fatal(err)
	}
	tree, err := tlog.ParseTree(append([]byte("go.sum database tree\n"), cp[len("vigia/test\n"):]...))
	if err != nil || tree.N != 1001 {
		t.Errorf("tlog: %v, %v", tree, err)
	}
}

func leafHashes(bundle []byte) (hashes [][]byte, err error) {
	var b api.EntryBundle
	if err := b.UnmarshalText(bundle); err != nil {
		return nil, err
	}
	for _, e := range b.Entries {
		hashes = append(hashes, rfc6962.DefaultHasher.HashLeaf(e))
	}
	return hashes, nil
}
