package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"vigia/internal/volume"
)

const (
	chainSize   = 128 << 20
	chainLayers = 20
)

// one and deep are the targets of a chain's rows.
const one, deep = 0, 1

// chain reads twenty layers of scattered writes, and one layer with the content of all, as a guest does.
func (t *targets) chain(ctx context.Context, rounds, scale int) ([]row, error) {
	layers, over, err := t.stack()
	if err != nil {
		return nil, err
	}
	flat, flatOver, err := t.flatten(append(layers, over))
	if err != nil {
		return nil, err
	}
	if err := settle(true, append(layers, flat)...); err != nil {
		return nil, err
	}
	var list []target
	for _, s := range []struct {
		name, socket string
		files        []string
	}{{"1 layer", "one.sock", []string{flat, flatOver}}, {"20 layers", "deep.sock", append(layers, over)}} {
		socket := t.path(s.socket)
		v, err := serverOf(ctx, s.name, socket, t.self, append([]string{"serve", socket}, s.files...)...)
		if err != nil {
			return nil, err
		}
		defer v.stop()
		list = append(list, v)
	}
	var rows []row
	for _, c := range []benchCase{
		{name: "4k scattered read, depth 32", count: 80000 / scale, args: []string{"-d", "32", "-s", "4k", "-S", scatter}},
		{name: "64 KiB sequential read, depth 8", count: 20000 / scale, args: []string{"-d", "8", "-s", "64k"}},
	} {
		r, err := inTurn(ctx, list, c, rounds)
		if err != nil {
			return nil, err
		}
		rows = append(rows, r)
	}
	return rows, nil
}

// stack freezes one overlay after another, each with sixteen runs of 256 KiB somewhere.
func (t *targets) stack() (layers []string, over string, err error) {
	f, err := overlay(t.dir, chainSize, volume.ID{})
	if err != nil {
		return nil, "", err
	}
	v, err := volume.Open(nil, f, volume.Options{})
	if err != nil {
		return nil, "", err
	}
	defer v.Close()
	r := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, 256<<10)
	for i := range chainLayers {
		for j := range buf {
			buf[j] = byte(r.Uint32())
		}
		n := 16
		if i == 0 {
			n = chainSize / len(buf)
		}
		for j := range n {
			at := int64(j) * int64(len(buf))
			if i > 0 {
				at = r.Int64N(chainSize/4096-64) * 4096
			}
			if _, err := v.WriteAt(buf, at); err != nil {
				return nil, "", err
			}
		}
		layers = append(layers, f.Name())
		id, err := v.Freeze()
		if err != nil {
			return nil, "", err
		}
		if f, err = overlay(t.dir, chainSize, id); err != nil {
			return nil, "", err
		}
		if err := v.Push(f); err != nil {
			return nil, "", err
		}
	}
	return layers, f.Name(), nil
}

func overlay(dir string, size int64, parent volume.ID) (*os.File, error) {
	f, err := os.CreateTemp(dir, "layer")
	if err != nil {
		return nil, err
	}
	return f, volume.Create(f, volume.CreateOptions{Size: size, Parent: parent})
}

// flatten makes one layer of a chain, and an overlay over it.
func (t *targets) flatten(chain []string) (flat, over string, err error) {
	var files []*os.File
	for _, name := range chain {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return "", "", err
		}
		files = append(files, f)
	}
	k := len(files) - 1
	v, err := volume.Open(files[:k], files[k], volume.Options{})
	if err != nil {
		return "", "", err
	}
	defer v.Close()
	raw, err := os.Create(t.path("flat.raw"))
	if err != nil {
		return "", "", err
	}
	defer raw.Close()
	if err := v.Export(raw, nil); err != nil {
		return "", "", err
	}
	flat, over = t.path("flat"), t.path("flat.overlay")
	if err := importRaw(raw.Name(), flat, chainSize); err != nil {
		return "", "", err
	}
	return flat, over, makeOverlay(flat, over, chainSize)
}

// clones times what a clone of a 2 GiB disk needs: a new overlay, and opening it over the frozen layer.
func clones(dir string) ([]time.Duration, error) {
	const size = 2 << 30
	name, id, err := scatteredLayer(dir, size)
	if err != nil {
		return nil, err
	}
	var took []time.Duration
	for i := range 40 {
		over, err := os.Create(filepath.Join(dir, fmt.Sprint("clone", i)))
		if err != nil {
			return nil, err
		}
		lower, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		start := time.Now()
		if err := volume.Create(over, volume.CreateOptions{Size: size, Parent: id}); err != nil {
			return nil, err
		}
		v, err := volume.Open([]*os.File{lower}, over, volume.Options{})
		if err != nil {
			return nil, err
		}
		took = append(took, time.Since(start))
		v.Close()
	}
	slices.Sort(took)
	return took, nil
}

// scatteredLayer is a frozen layer as an installed system leaves it: a third full, in runs of all sizes.
func scatteredLayer(dir string, size int64) (string, volume.ID, error) {
	f, err := overlay(dir, size, volume.ID{})
	if err != nil {
		return "", volume.ID{}, err
	}
	v, err := volume.Open(nil, f, volume.Options{})
	if err != nil {
		return "", volume.ID{}, err
	}
	defer v.Close()
	r := rand.New(rand.NewPCG(3, 3))
	buf := make([]byte, 1<<20)
	for range 1200 {
		n := int64(1) << (12 + r.IntN(9))
		off := r.Int64N((size-n)/4096) * 4096
		if _, err := v.WriteAt(buf[:n], off); err != nil {
			return "", volume.ID{}, err
		}
	}
	id, err := v.Freeze()
	return f.Name(), id, err
}
