package test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// program and images are what the tests run: see doc.go.
var program, images string

func TestMain(m *testing.M) {
	program, images = os.Getenv("VIGIA_TEST_PROGRAM"), os.Getenv("VIGIA_TEST_STATE")
	if program == "" || images == "" {
		fmt.Println("no program and image are given: the tests on real guests are left out; script/test runs them")
		return
	}
	images = filepath.Join(images, "images")
	if _, err := os.Stat(filepath.Join(images, "names", "tiny")); err != nil {
		fmt.Fprintf(os.Stderr, "VIGIA_TEST_STATE holds no image tiny: %v\n", err)
		os.Exit(1)
	}
	code := m.Run()
	if left := leftovers(everyState()); len(left) > 0 {
		fmt.Fprintln(os.Stderr, "left behind on this host:")
		for _, l := range left {
			fmt.Fprintln(os.Stderr, "  "+l)
		}
		code = max(code, 1)
	}
	os.Exit(code)
}
