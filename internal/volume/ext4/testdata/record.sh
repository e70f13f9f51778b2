#!/bin/bash
# Makes the traces anew: record.sh WORKDIR, then `go test -run TestConvert -convert WORKDIR` and `go test -run TestTraces -update`.
# $GUEST is a command that boots a Linux guest on QEMU (ext4 built in, e2fsprogs, NVMe disks) with a root shell on standard
# input and output, prints GUEST-READY, and takes more QEMU arguments.
set -e
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"; cd "$1"
sh "$here/tree.sh"
rm -f d-* b-* in; mkfifo -m 600 in

mk() { # NAME SIZE MKE2FS-ARGUMENTS
	n=$1; size=$2; shift 2
	truncate -s "$size" "d-$n.img"
	mke2fs -q -F "$@" -d tree "d-$n.img"
	cp --sparse=always "d-$n.img" "b-$n.img"
}

boot() { # SCRIPT NAME...: runs SCRIPT in the guest, the disks recorded, then kills QEMU
	script=$1; shift; args=
	for n in "$@"; do
		truncate -s 0 "d-$n.log"
		args="$args -blockdev driver=blklogwrites,node-name=w-$n,log-sector-size=512,file.driver=file,file.filename=d-$n.img,log.driver=file,log.filename=d-$n.log -device nvme,drive=w-$n,serial=S$n"
	done
	timeout 400 $GUEST $args <in >out.txt 2>&1 &
	pid=$!
	exec 3>in
	until grep -q GUEST-READY out.txt; do sleep 0.5; kill -0 $pid; done
	{
		echo 'stty -echo; cat > /run/work.sh <<"END"'; cat "$here/work.sh"; echo END
		echo '. /run/work.sh'; echo "$script"; echo 'echo ALL-"DONE"'
	} >&3
	until grep -q ALL-DONE out.txt; do sleep 0.5; kill -0 $pid; done
	for p in $(pgrep -P $pid); do kill -9 "$p"; done
	exec 3>&-
	wait $pid || true
}

mk plain 16M -t ext4 -b 4096 -N 256 -E lazy_itable_init=0
mk wrap 8M -t ext4 -b 1024 -J size=1 -N 256
mk fast 16M -t ext4 -b 4096 -N 256 -O fast_commit -J fast_commit_size=256
mk journal 16M -t ext4 -b 4096 -N 256
mk inline 12M -t ext4 -b 1024 -N 256 -O inline_data -I 256
mk ext3 12M -t ext3 -b 1024 -N 256
mk nojournal 8M -t ext4 -b 1024 -N 256 -O ^has_journal
mk bigalloc 32M -t ext4 -b 1024 -N 512 -O bigalloc -C 16384
mk resize 12M -t ext4 -b 1024 -N 256 -J size=1
truncate -s 20M d-resize.img b-resize.img
mk htree 12M -t ext4 -b 1024 -N 2048 -J size=1
mk async 8M -t ext4 -b 1024 -N 256 -J size=1
mk reboot 12M -t ext4 -b 1024 -J size=1 -N 256
mk fastreboot 16M -t ext4 -b 4096 -N 256 -O fast_commit -J fast_commit_size=256

boot '
m ext4 plain; w plain; umount /run/m/plain
m ext4 wrap; w wrap; storm wrap 150
m ext4 fast; w fast; storm fast 10
m ext4 journal -o data=journal; w journal
m ext4 inline; w inline
m ext3 ext3; w ext3; frag ext3 600; umount /run/m/ext3
m ext4 nojournal; w nojournal; umount /run/m/nojournal
m ext4 bigalloc; w bigalloc
m ext4 resize; w resize; resize2fs $(d resize) 18M; storm resize 3
m ext4 htree; many htree 700; frag htree 900
m ext4 async -o data=writeback,journal_async_commit; w async; storm async 20
sync' plain wrap fast journal inline ext3 nojournal bigalloc resize htree async

boot '
m ext4 reboot; w reboot; storm reboot 20; late reboot
m ext4 fastreboot; w fastreboot; late fastreboot; storm fastreboot 3' reboot fastreboot
for n in reboot fastreboot; do cp --sparse=always "d-$n.img" "b-$n.img"; done # the journal is dirty
boot '
m ext4 reboot; storm reboot 5; echo again > /run/m/reboot/etc/group; rm -rf /run/m/reboot/home/late; sync -f /run/m/reboot; storm reboot 60
m ext4 fastreboot; echo again > /run/m/fastreboot/home/fastfile2; sync /run/m/fastreboot/home/fastfile2; storm fastreboot 4; umount /run/m/fastreboot' reboot fastreboot
