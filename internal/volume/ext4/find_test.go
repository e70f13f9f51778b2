package ext4

import (
	"errors"
	"fmt"
	"hash/crc32"
	"testing"
	"unicode/utf16"
)

const testDisk = 64 << 20

type part struct {
	first, n uint32 // sectors
	kind     byte
}

func mbrEntry(b []byte, n int, p part) {
	e := b[446+16*n:]
	e[4] = p.kind
	le.PutUint32(e[8:], p.first)
	le.PutUint32(e[12:], p.n)
	b[510], b[511] = 0x55, 0xAA
}

func makeMBR() *disk {
	d := &disk{b: make([]byte, testDisk)}
	mbrEntry(d.b, 0, part{2048, 32768, 0x83})
	mbrEntry(d.b, 1, part{40960, 81920, 0x05})
	mbrEntry(d.b[40960*512:], 0, part{2048, 8192, 0x83}) // at 43008
	mbrEntry(d.b[40960*512:], 1, part{20480, 20480, 0x05})
	mbrEntry(d.b[61440*512:], 0, part{2048, 8192, 0x82}) // at 63488
	copy(d.b[43008*512:], "XFSB")
	copy(d.b[43008*512+108:], "data")
	copy(d.b[63488*512+4086:], "SWAPSPACE2")
	putExt4(d, 2048*512)
	return d
}

func putExt4(d *disk, at int64) {
	b := d.b[at+1024:]
	le.PutUint16(b[0x38:], superMagic)
	copy(b[0x78:], "root")
	copy(b[0x68:], "0123456789abcdef")
}

func makeGPT(lba int, damaged bool) *disk {
	d := &disk{b: make([]byte, testDisk)}
	mbrEntry(d.b, 0, part{1, testDisk/512 - 1, 0xEE})
	entries := make([]byte, 128*128)
	add := func(n int, first, last uint64, name string) {
		e := entries[128*n:]
		copy(e, fmt.Sprintf("type%012d", n))
		le.PutUint64(e[32:], first)
		le.PutUint64(e[40:], last)
		for i, u := range utf16.Encode([]rune(name)) {
			le.PutUint16(e[56+2*i:], u)
		}
	}
	add(0, 2048*512/uint64(lba), 4095*512/uint64(lba), "EFI")
	add(14, 8192*512/uint64(lba), 32767*512/uint64(lba), "root-ä")
	put := func(at, table int) {
		h := d.b[at*lba:]
		copy(h, "EFI PART")
		le.PutUint64(h[72:], uint64(table))
		le.PutUint32(h[80:], 128)
		le.PutUint32(h[84:], 128)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
		copy(d.b[table*lba:], entries)
	}
	put(1, 2)
	last := testDisk/lba - 1
	put(last, last-len(entries)/lba)
	if damaged {
		clear(d.b[lba : 40*lba])
	}
	copy(d.b[2048*512+82:], "FAT32   ")
	copy(d.b[2048*512+71:], "ESP        ")
	putExt4(d, 8192*512)
	return d
}

var tables = map[string]struct {
	make func() *disk
	want []string
}{
	"mbr": {makeMBR, []string{
		"1 ext4 1048576+16777216 root 30313233-3435-3637-3839-616263646566", "5 xfs 22020096+4194304 data 00000000-0000-0000-0000-000000000000",
		"6 swap 32505856+4194304  00000000-0000-0000-0000-000000000000"}},
	"gpt": {func() *disk { return makeGPT(512, false) }, []string{
		"1 vfat 1048576+1048576 ESP EFI", "15 ext4 4194304+12582912 root 30313233-3435-3637-3839-616263646566root-ä"}},
	"gpt of 4k sectors": {func() *disk { return makeGPT(4096, false) }, []string{
		"1 vfat 1048576+1048576 ESP EFI", "15 ext4 4194304+12582912 root 30313233-3435-3637-3839-616263646566root-ä"}},
	"gpt with its first copy gone": {func() *disk { return makeGPT(512, true) }, []string{
		"1 vfat 1048576+1048576 ESP EFI", "15 ext4 4194304+12582912 root 30313233-3435-3637-3839-616263646566root-ä"}},
	"empty": {func() *disk { return &disk{b: make([]byte, testDisk)} }, nil},
}

func TestFind(t *testing.T) {
	for name, c := range tables {
		t.Run(name, func(t *testing.T) {
			found, err := Find(c.make(), testDisk)
			if err != nil {
				t.Fatal(err)
			}
			for i, f := range found {
				got := fmt.Sprintf("%d %s %d+%d %s %s%s", f.Partition, f.Kind, f.Offset, f.Size, f.Label, f.UUID, f.Name)
				if i >= len(c.want) || got != c.want[i] {
					t.Errorf("got %q", got)
				}
			}
			if len(found) != len(c.want) {
				t.Errorf("%d partitions, not %d", len(found), len(c.want))
			}
		})
	}
}

func TestFindBroken(t *testing.T) {
	loop := makeMBR()
	mbrEntry(loop.b[61440*512:], 1, part{20480, 20480, 0x05}) // points to itself
	if _, err := Find(loop, testDisk); !errors.Is(err, ErrPartitions) {
		t.Error(err)
	}
	out := makeGPT(512, true)
	clear(out.b[testDisk-512:])
	if _, err := Find(out, testDisk); !errors.Is(err, ErrPartitions) {
		t.Error(err)
	}
}

func TestFindWholeDisk(t *testing.T) {
	for _, name := range traces {
		tr := loadTrace(t, name)
		found, err := Find(tr.disk(), tr.size)
		want := "ext4"
		if name == "ext3" {
			want = "ext3"
		}
		if err != nil || len(found) != 1 || found[0].Kind != want || !found[0].Named() || len(found[0].UUID) != 36 {
			t.Errorf("%s: %+v %v", name, found, err)
		}
	}
	for kind, at := range map[string]int{"luks": 0, "btrfs": 65600, "lvm": 512} {
		magic := map[string]string{"luks": "LUKS\xba\xbe", "btrfs": "_BHRfS_M", "lvm": "LABELONE"}[kind]
		d := &disk{b: make([]byte, 1<<20)}
		copy(d.b[at:], magic)
		found, err := Find(d, 1<<20)
		if err != nil || len(found) != 1 || found[0].Kind != kind || found[0].Named() {
			t.Errorf("%s: %+v %v", kind, found, err)
		}
	}
}
