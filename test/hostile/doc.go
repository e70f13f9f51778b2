// Package hostile is the proof that nothing escapes: it plays the attacker against vigia's real processes and measures,
// from the host, what the attack could reach.
//
//	confined_test.go   what /proc says of QEMU, guard and gate is what the tables of package jail say
//	stub_test.go       a program in QEMU's place that sends hostile NBD, frames, QMP, console and agent bytes
//	guest_test.go      floods out of a real guest
//	api_test.go        clients of the API that mean harm
//	import_test.go     a foreign qcow2 is converted in a jail
//
// The attacker never gets an answer that he should not, and that is tested elsewhere; here it is the rest of the host
// that matters: memory of guard, gate and daemon, the state directory, the ledger's rate, and that another machine and
// the API go on. Bounds are generous: they tell a bounded thing from an unbounded one, not a quick one from a slow one.
//
// The daemon is the real binary, and no hook of the product is used: the stub (testdata/stub) is an executable named
// qemu-system-x86_64 in a directory that comes first in the daemon's PATH. What it does is chosen by the machine's name.
//
// Tests with a real guest need the tiny image, which script/test builds; $VIGIA_TEST_STATE names another state that has it.
package hostile
