package jail

import (
	"os/exec"
	"testing"
)

// What confinement adds to the start of QEMU, from the call to the first instruction of the program.
func BenchmarkStartQEMU(b *testing.B) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		b.Skip("no QEMU")
	}
	for b.Loop() {
		p, err := QEMU{Binary: qemu, Args: []string{"-version"}}.Start(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		<-p.Done()
		p.Close()
	}
}

// The same program without.
func BenchmarkBareQEMU(b *testing.B) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		b.Skip("no QEMU")
	}
	for b.Loop() {
		if err := exec.Command(qemu, "-version").Run(); err != nil {
			b.Fatal(err)
		}
	}
}

// An almost empty root: the share of the re-executed binary, namespaces and filters.
func BenchmarkProbe(b *testing.B) {
	for b.Loop() {
		if _, err := Probe(b.Context(), nil, nil); err != nil {
			b.Fatal(err)
		}
	}
}
