rm -rf tree; mkdir -p tree/etc tree/home tree/var tree/srv
printf 'root:x:0:0::/root:/bin/sh\nann:x:1:1::/home/ann:/bin/sh\n' > tree/etc/passwd
printf 'root:$6$abc:1:0:9:7:::\nann:$6$def:1:0:9:7:::\n' > tree/etc/shadow
echo 'root:x:0:' > tree/etc/group; ln -s etc tree/conf
