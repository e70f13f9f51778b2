# What the guest does to a disk: functions for record.sh. Every `sync` makes the kernel commit.
d() { for s in /sys/block/nvme*n1; do [ "$(cat $s/device/serial | tr -d ' ')" = S$1 ] && echo /dev/${s##*/}; done; }
m() { t=$1; n=$2; shift 2; mkdir -p /run/m/$n; mount -t $t $* $(d $n) /run/m/$n || echo MOUNTFAIL $n; }
w() { # a bit of everything
cd /run/m/$1
for n in 1 2 3; do # as passwd does
 cp etc/shadow etc/shadow-; (cat etc/shadow; echo "user$n:x:$n") > etc/shadow+; sync etc/shadow+; mv etc/shadow+ etc/shadow; sync etc
done
chmod 600 etc/shadow; chown 1:42 etc/passwd; sync -f .
echo appended >> etc/passwd; sync etc/passwd
mkdir -p home/ann/docs srv; for i in 1 2 3 4 5 6 7 8; do dd if=/dev/zero of=home/ann/docs/f$i bs=4k count=$i 2>/dev/null; done; sync -f .
ln home/ann/docs/f3 home/ann/link3; ln home/ann/docs/f3 srv/link3; sync -f .
mv home/ann home/bob; sync -f .
mkdir var/old; mv home/bob/docs var/old/docs; sync -f .
rm -rf var/old; sync -f .
dd if=/dev/zero of=srv/reuse bs=4k count=40 2>/dev/null; sync -f .
rm srv/reuse; sync -f .; dd if=/dev/zero of=var/again bs=4k count=60 2>/dev/null; sync -f .
truncate -s 10000 var/again; sync -f .
fallocate -l 200k srv/falloc; sync -f .; dd if=/dev/zero of=srv/falloc bs=4k seek=10 count=4 conv=notrunc,fsync 2>/dev/null
ln -s /etc/shadow srv/lnk; rm etc/group; sync -f .; echo new > etc/group; sync -f .
mkdir -p var/d/e/f; echo x > var/d/e/f/x; sync -f .; mv var/d/e var/e; sync -f .; rmdir var/d; sync -f .
mkdir deep; mkdir deep/er; echo s > deep/er/secret; sync -f .; mv deep gone; sync -f .
mkdir deep; mkdir deep/er; echo t > deep/er/secret; sync -f .
cd /
}
many() { # a hashed directory
cd /run/m/$1; mkdir many; i=0; while [ $i -lt $2 ]; do echo $i > many/a-rather-long-file-name-to-fill-blocks-$i; i=$((i+1)); done; sync -f .
i=0; while [ $i -lt $2 ]; do rm many/a-rather-long-file-name-to-fill-blocks-$i; i=$((i+3)); done; sync -f .
mv many/a-rather-long-file-name-to-fill-blocks-1 many/renamed; sync -f .; cd /; }
frag() { # a file with a deep map
cd /run/m/$1; i=0; while [ $i -lt $2 ]; do dd if=/dev/zero of=frag bs=1k seek=$((i*2)) count=1 conv=notrunc 2>/dev/null; i=$((i+1)); [ $((i%100)) = 0 ] && sync -f .; done; sync -f .
truncate -s $(($2/2))k frag; sync -f .; fallocate -p -o 0 -l $(($2/8))k frag; sync -f .; cd /; }
storm() { cd /run/m/$1; i=0; while [ $i -lt $2 ]; do echo "line $i" >> var/log; sync var/log; i=$((i+1)); done; cd /; }
late() { # committed, but not in place
cd /run/m/$1; rm -rf var/e; mkdir home/late; echo late > home/late/file; sync home/late/file
echo z > home/fastfile; sync home/fastfile; mv etc/shadow- etc/shadow; sync etc; cd /; }
