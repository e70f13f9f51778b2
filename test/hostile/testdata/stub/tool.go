package main

import (
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
)

// tool stands in qemu-img's place, tries what it must not be able to do, and fails with what came of it.
func tool() {
	tried, escaped := 0, []string{}
	try := func(what string, err error) {
		if tried++; err == nil {
			escaped = append(escaped, what)
		}
	}
	for _, path := range []string{"/etc/passwd", "/proc/self/status", "/proc/1/environ", "/sys/kernel", "/dev/kvm", "/dev/shm", "/home", "/root", "/disk/4"} {
		_, err := os.Stat(path)
		try("see "+path, err)
	}
	write := func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) }
	try("write the foreign file", write("/disk/3"))
	try("make a file", write("/disk/x"))
	try("make a file in the root", write("/x"))
	_, err := net.Dial("tcp", "127.0.0.1:22")
	try("reach the host", allow(err, syscall.ECONNREFUSED))
	_, err = net.Listen("tcp", "127.0.0.1:0")
	try("listen", err)
	_, err = os.StartProcess(os.Args[0], []string{"x", "-version"}, &os.ProcAttr{})
	try("start a program", err)
	try("signal its parent", syscall.Kill(os.Getppid(), 0))
	try("trace its parent", syscall.PtraceAttach(os.Getppid()))
	try("make a namespace", syscall.Unshare(syscall.CLONE_NEWUSER))
	try("mount", syscall.Mount("x", "/", "tmpfs", 0, ""))
	try("be root", syscall.Setuid(0))
	_, err = os.ReadDir("/")
	try("list the root", err)
	fmt.Fprintf(os.Stderr, "tried: %d things, as user %d\n", tried, os.Getuid())
	for _, e := range escaped {
		fmt.Fprintf(os.Stderr, "ESCAPED: it could %s\n", e)
	}
	os.Exit(1)
}

// allow takes an error that shows that the far end was reached as success.
func allow(err error, reached syscall.Errno) error {
	if err != nil && strings.Contains(err.Error(), reached.Error()) {
		return nil
	}
	return err
}
