package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"vigia/internal/volume"
)

// pair is what the same reads took over one layer and over twenty of the same content, by round.
type pair struct {
	name      string
	one, deep []time.Duration
}

const chainSize = 128 << 20

// chain builds twenty layers of scattered writes, and one with the content of all.
func chain(dir string, rounds, scale int) ([]pair, error) {
	deep, err := stack(dir, 20)
	if err != nil {
		return nil, err
	}
	defer deep.Close()
	flat, err := flatten(dir, deep)
	if err != nil {
		return nil, err
	}
	defer flat.Close()
	files, err := filepath.Glob(filepath.Join(dir, "layer*"))
	if err != nil {
		return nil, err
	}
	if err := settle(append(files, filepath.Join(dir, "flat"))...); err != nil {
		return nil, err
	}
	small, large := pair{name: "4k scattered read"}, pair{name: "64 KiB sequential read"}
	for range rounds + 1 {
		small.one = append(small.one, scattered(flat, 200000/scale))
		small.deep = append(small.deep, scattered(deep, 200000/scale))
		large.one = append(large.one, sequential(flat))
		large.deep = append(large.deep, sequential(deep))
	}
	return []pair{small, large}, nil
}

// stack freezes one overlay after another, each with sixteen runs of 256 KiB somewhere.
func stack(dir string, layers int) (*volume.Volume, error) {
	f, err := overlay(dir, chainSize, volume.ID{})
	if err != nil {
		return nil, err
	}
	v, err := volume.Open(nil, f, volume.Options{})
	if err != nil {
		return nil, err
	}
	r := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, 256<<10)
	for i := range layers {
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
				return nil, err
			}
		}
		id, err := v.Freeze()
		if err != nil {
			return nil, err
		}
		if f, err = overlay(dir, chainSize, id); err != nil {
			return nil, err
		}
		if err := v.Push(f); err != nil {
			return nil, err
		}
	}
	return v, nil
}

func overlay(dir string, size int64, parent volume.ID) (*os.File, error) {
	f, err := os.CreateTemp(dir, "layer")
	if err != nil {
		return nil, err
	}
	return f, volume.Create(f, volume.CreateOptions{Size: size, Parent: parent})
}

func flatten(dir string, v *volume.Volume) (*volume.Volume, error) {
	raw, err := os.Create(filepath.Join(dir, "flat.raw"))
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	if err := v.Export(raw, nil); err != nil {
		return nil, err
	}
	lay, err := os.Create(filepath.Join(dir, "flat"))
	if err != nil {
		return nil, err
	}
	if _, err := volume.ImportRaw(lay, raw, v.Size(), nil); err != nil {
		return nil, err
	}
	return volume.Open([]*os.File{lay}, nil, volume.Options{})
}

func scattered(v *volume.Volume, n int) time.Duration {
	r := rand.New(rand.NewPCG(2, 2))
	buf := make([]byte, 4096)
	start := time.Now()
	for range n {
		v.ReadAt(buf, r.Int64N(chainSize/4096)*4096)
	}
	return time.Since(start)
}

func sequential(v *volume.Volume) time.Duration {
	buf := make([]byte, 64<<10)
	start := time.Now()
	for range 4 {
		for off := int64(0); off < chainSize; off += int64(len(buf)) {
			v.ReadAt(buf, off)
		}
	}
	return time.Since(start)
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
