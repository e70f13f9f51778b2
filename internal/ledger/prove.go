package ledger

import (
	"context"
	"fmt"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
)

// Proof shows that one entry is in the ledger, to anyone who has the key and nothing else of it.
type Proof struct {
	Index uint64 `json:"index"`
	Entry []byte `json:"entry"`
	Path  []Hash `json:"path"` // the siblings from the leaf up
	Head  string `json:"head"` // signed
}

// Prove makes the proof of one entry under the newest head.
func (l *Log) Prove(ctx context.Context, index uint64) (Proof, error) {
	for {
		head := l.Head()
		if index >= head.Size {
			return Proof{}, fmt.Errorf("%w: entry %d: the ledger has %d", ErrMissing, index, head.Size)
		}
		p, err := l.prove(ctx, index, head)
		if err == nil || l.Head().Size == head.Size {
			return p, err
		}
	}
}

func (l *Log) prove(ctx context.Context, index uint64, head Head) (Proof, error) {
	p := Proof{Index: index, Head: head.Note}
	for e, err := range l.Read(ctx, index, index+1) {
		if err != nil {
			return p, err
		}
		p.Entry = e.Data
	}
	var err error
	p.Path, err = inclusion(ctx, l.dir, index, head.Size)
	return p, err
}

func inclusion(ctx context.Context, dir string, index, size uint64) ([]Hash, error) {
	fetch := client.FileFetcher{Root: dir}
	builder, err := client.NewProofBuilder(ctx, size, fetch.ReadTile)
	if err != nil {
		return nil, fmt.Errorf("prove entry %d: %w", index, err)
	}
	nodes, err := builder.InclusionProof(ctx, index)
	if err != nil {
		return nil, fmt.Errorf("prove entry %d: %w", index, err)
	}
	path := make([]Hash, len(nodes))
	for i, n := range nodes {
		if len(n) != len(path[i]) {
			return nil, fmt.Errorf("%w: a hash of %d bytes in %s", ErrCorrupt, len(n), layout.TilePath(0, index/layout.TileWidth, 0))
		}
		path[i] = Hash(n)
	}
	return path, nil
}

// Check checks the proof against a key and returns the head that it leads to.
func (p Proof) Check(vkey string) (Head, error) {
	verifier, err := checkKey(vkey)
	if err != nil {
		return Head{}, err
	}
	head, err := parseHead([]byte(p.Head), verifier)
	if err != nil {
		return Head{}, err
	}
	return head, checkInclusion(p.Index, rfc6962.DefaultHasher.HashLeaf(p.Entry), p.Path, head)
}

func checkInclusion(index uint64, leaf []byte, path []Hash, head Head) error {
	nodes := make([][]byte, len(path))
	for i := range path {
		nodes[i] = path[i][:]
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, index, head.Size, leaf, nodes, head.Root[:]); err != nil {
		return fmt.Errorf("%w: entry %d: %v", ErrCorrupt, index, err)
	}
	return nil
}
