package kernel

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"os"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// packings make a payload as the kernel's build does: packed, then the size in 4 bytes (gzip has it already).
func packings(t testing.TB, image []byte) map[string][]byte {
	t.Helper()
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	sized := func(b []byte) []byte { return binary.LittleEndian.AppendUint32(b, uint32(len(image))) }
	out := map[string][]byte{"none": image}

	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := z.Write(image)
	check(err)
	check(z.Close())
	out["gzip"] = bytes.Clone(b.Bytes())

	enc, err := zstd.NewWriter(nil)
	check(err)
	out["zstd"] = sized(enc.EncodeAll(image, nil))

	block := make([]byte, lz4.CompressBlockBound(len(image)))
	n, err := lz4.CompressBlock(image, block, nil)
	check(err)
	frame := binary.LittleEndian.AppendUint32([]byte{0x02, 0x21, 0x4c, 0x18}, uint32(n))
	out["lz4"] = sized(append(frame, block[:n]...))

	b.Reset()
	x, err := xz.NewWriter(&b)
	check(err)
	_, err = x.Write(image)
	check(err)
	check(x.Close())
	out["xz"] = sized(bytes.Clone(b.Bytes()))
	return out
}

func TestEveryPackingGivesTheSameProfile(t *testing.T) {
	image := synthVmlinux(synthKallsyms(synthSymbols(700, false), offsetsFirst), synthBTF(t))
	want := build(t, image)
	for name, payload := range packings(t, image) {
		p, err := Build(bytes.NewReader(synthImage(payload)), int64(1024+len(payload)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !bytes.Equal(p.data, want.data) {
			t.Errorf("%s: another profile", name)
		}
	}
}

// TestFilterX86 unpacks what xz itself packed with its filter for x86: bytes chosen so that calls overlap.
func TestFilterX86(t *testing.T) {
	packed, err := os.ReadFile("testdata/x86.xz")
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 6000)
	x := uint64(0x2545f4914f6cdd1d)
	for i := range want {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		want[i] = []byte{0xe8, 0xe9, 0x00, 0xff, 0x90, 0x01, 0xe8, 0x00}[x>>32&7]
	}
	got, err := unpackXZ(packed, int64(len(want)))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("it does not come out as it went in: %v", err)
	}
	for n := range packed {
		if _, err := unpackXZ(packed[:n], int64(len(want))); err == nil && n < len(packed)-40 {
			t.Errorf("the first %d bytes of %d unpack", n, len(packed))
		}
	}
}

func TestBuildRefuses(t *testing.T) {
	image := synthVmlinux(synthKallsyms(synthSymbols(700, false), offsetsFirst), synthBTF(t))
	payload := packings(t, image)["lz4"]
	good := synthImage(payload)
	change := func(b []byte, at int, v ...byte) []byte {
		b = bytes.Clone(b)
		copy(b[at:], v)
		return b
	}
	for name, c := range map[string]struct {
		image []byte
		want  error
	}{
		"empty":                 {nil, ErrNotKernel},
		"text":                  {bytes.Repeat([]byte("not a kernel "), 100), ErrNotKernel},
		"an old boot protocol":  {change(good, setupVersion, 0x05, 0x02), ErrNotKernel},
		"cut short":             {good[:len(good)-100], ErrNotKernel},
		"a payload too long":    {change(good, payloadLength, 0xff, 0xff, 0xff, 0xff), ErrTooLarge},
		"no payload":            {change(good, payloadLength, 0, 0, 0, 0), ErrNotKernel},
		"an unknown packing":    {synthImage([]byte("\x89LZO, that would be\x00\x10\x00\x00")), ErrCompression},
		"a bomb":                {change(good, len(good)-4, 0xff, 0xff, 0xff, 0xff), ErrTooLarge},
		"a size that is wrong":  {change(good, len(good)-4, 0xff, 0xff, 0x00, 0x00), ErrCompression},
		"a damaged payload":     {change(good, 1024+4, 0xff, 0xff, 0xff), ErrCompression},
		"ELF for another CPU":   {change(image, 18, 183), ErrNotKernel},
		"ELF cut short":         {image[:2000], ErrNotKernel},
		"without kallsyms":      {synthVmlinux(nil, synthBTF(t)), ErrUnsupported},
		"with BTF of no sort":   {synthVmlinux(synthKallsyms(synthSymbols(700, false), offsetsFirst), []byte("rubbish, but long enough for one")), ErrUnsupported},
		"with a BTF cut short":  {synthVmlinux(synthKallsyms(synthSymbols(700, false), offsetsFirst), synthBTF(t)[:200]), ErrUnsupported},
		"a payload but not ELF": {synthImage(packings(t, []byte("this is not a kernel but is packed like one"))["gzip"]), ErrNotKernel},
	} {
		p, err := Build(bytes.NewReader(c.image), int64(len(c.image)))
		if !errors.Is(err, c.want) || p != nil {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// TestWithoutBTF: what still works, the symbols, still does; what does not says what is missing.
func TestWithoutBTF(t *testing.T) {
	p := build(t, synthVmlinux(synthKallsyms(synthSymbols(700, false), offsetsLast), nil))
	if addr, err := p.Symbol("_etext"); addr != synthText+0x900000 || err != nil {
		t.Errorf("%#x %v", addr, err)
	}
	if p.Version() != "6.1.0-synth" {
		t.Errorf("version %q", p.Version())
	}
	_, err := p.Offset("task_struct", "tasks")
	if !errors.Is(err, ErrUnsupported) || err.Error() != "kernel not supported: no type task_struct" {
		t.Errorf("%v", err)
	}
}

func FuzzBuild(f *testing.F) {
	image := synthVmlinux(synthKallsyms(synthSymbols(300, false), offsetsFirst), synthBTF(f))
	f.Add(image)
	for _, payload := range packings(f, image) {
		f.Add(synthImage(payload))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// A promise of hundreds of megabytes is allowed for, and slow to try in every execution.
		if len(b) > 4 && binary.LittleEndian.Uint32(b[len(b)-4:]) > 8<<20 {
			return
		}
		p, err := Build(bytes.NewReader(b), int64(len(b)))
		if (err == nil) != (p != nil) {
			t.Errorf("%v and %v", p, err)
		}
	})
}
