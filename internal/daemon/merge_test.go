package daemon

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestRunsBetweenWhatIsNeeded(t *testing.T) {
	for chains, want := range map[string]string{
		"abcd":                      "abcd",
		"abcd ab":                   "ab cd",      // a checkpoint at b
		"abcd abxy":                 "ab cd xy",   // another machine from b on
		"abcd abxy abc":             "ab xy",      // and a checkpoint at c
		"abcd abcd abcd":            "abcd",       // a machine, its clone and its checkpoint
		"a ab abc":                  "",           // every layer is a checkpoint's
		"":                          "",           // an image's machine
		"abcdef abc xyz xyzw abcde": "abc de xyz", // two machines
		"abcdP abcd":                "abcd",       // an overlay that is on its way is not merged with what is frozen
	} {
		var list [][]string
		for _, c := range strings.Fields(chains) {
			list = append(list, strings.Split(c, ""))
		}
		var got []string
		for _, r := range runsOf(list) {
			got = append(got, strings.Join(r, ""))
		}
		slices.Sort(got)
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %s", chains, got, want)
		}
	}
}

// TestMergingIsCheapAndChainsStayShort lets a machine be checkpointed a hundred thousand times, with the last twelve kept, and counts
// what is written.
func TestMergingIsCheapAndChainsStayShort(t *testing.T) {
	const keep, rounds = 12, 100_000
	var run []int64 // sizes of the layers under the oldest that is kept
	written, longest := int64(0), 0
	for range rounds {
		if run = append(run, 1); len(run) > longest {
			longest = len(run)
		}
		low := worthMerging(run)
		if low < 0 {
			continue
		}
		if low >= len(run)-1 {
			t.Fatalf("merging one layer of %v", run)
		}
		sum := int64(0)
		for _, s := range run[low:] {
			sum += s
		}
		written += sum
		run = append(run[:low], sum)
	}
	if longest+keep > maxLayers/2 {
		t.Errorf("a chain of %d layers", longest+keep)
	}
	if written > 20*rounds {
		t.Errorf("%d blocks were written for %d", written, rounds)
	}
	t.Logf("the longest chain has %d layers, a block is written %.1f times", longest+keep, float64(written)/rounds)
	for n := range 3 * mergeFrom { // a large layer below, and sizes of zero
		sizes := make([]int64, n)
		if n > 0 {
			sizes[0] = 1 << 40
		}
		if low := worthMerging(sizes); (low < 0) != (n < mergeFrom) || low >= n-1 && n >= mergeFrom {
			t.Errorf("%d layers: from %d on", n, low)
		}
	}
}

func TestAChainWithoutARun(t *testing.T) {
	chain := strings.Split("abcdef", "")
	for run, want := range map[string]string{"cd": "abNef", "ab": "Ncdef", "ef": "abcdN", "abcdef": "N", "ce": "abcdef", "fg": "abcdef", "x": "abcdef"} {
		got := withoutRun(chain, strings.Split(run, ""), "N")
		if strings.Join(got, "") != want || fmt.Sprint(chain) != "[a b c d e f]" {
			t.Errorf("%s: %v, want %s", run, got, want)
		}
	}
}
