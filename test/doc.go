// Package test runs bin/vigia on real guests and looks at what a person would see: what commands print, how they end, what
// `show` and `events` tell, and what is left on the host.
//
// Package tests look at parts; these look at the whole. They need a built program and an image, which script/test makes:
//
//	VIGIA_TEST_PROGRAM  the program, built as `make build` does: confined workers refuse any other
//	VIGIA_TEST_STATE    a state directory whose images hold the image "tiny", and "tamper" of test/tamper
//
//	VIGIA_SOAK_OPERATIONS, VIGIA_SOAK_SEED  how long TestSoak goes on, and with which choices (soak_test.go)
//
// Without the first two every test is left out. A guest takes seconds to boot, so tests share one where they can: a test of this
// package boots a machine and goes through a list of subtests on it, in order. Each daemon has a state directory of its own
// with the images linked into it. At the end nothing of any of them may be left on the host (leftovers_test.go).
package test
