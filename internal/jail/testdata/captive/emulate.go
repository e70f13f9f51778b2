package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/jail"
)

// Emulated is what came of a real QEMU.
type Emulated struct {
	Measures    []jail.Measure
	Observation jail.Observation
	Compared    []jail.Measure
	Greeting    string
	Answers     []string
	Exit        string
	StartMs     float64 // until QEMU was executed
	ReadyMs     float64 // until QMP greeted
}

// emulate starts a real QEMU, speaks QMP to it over an inherited socket, and looks at it: emulate BINARY UID RAMFILE.
func emulate(args []string) error {
	uid, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs, ours := os.NewFile(uintptr(pair[0]), "qmp"), os.NewFile(uintptr(pair[1]), "qmp")
	dir, disk, err := diskSocket()
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	q := jail.QEMU{
		Binary: args[0],
		Args: append([]string{"-nodefaults", "-no-user-config", "-display", "none", "-S", "-accel", "tcg", "-m", "64", "-M", "q35,memory-backend=ram",
			"-object", "memory-backend-file,id=ram,size=64M,share=on,mem-path=" + args[2],
			"-chardev", "socket,id=q,fd=3", "-mon", "chardev=q,mode=control",
			"-chardev", "socket,id=disk,path=" + dir + "/disk.sock",
			"-device", "virtio-rng-pci", "-netdev", "hubport,hubid=0,id=n", "-device", "virtio-net-pci,netdev=n", "-device", "virtio-serial-pci"}, jail.SandboxArgs...),
		Files: []*os.File{theirs},
		Binds: []jail.Bind{{Source: args[2], Write: true, Reason: "the guest's memory"},
			{Source: dir, Reason: "sockets to connect to: that needs no right to write"}},
		Stderr: os.Stderr,
	}
	if uid >= 0 {
		q.User = &jail.User{UID: uid, GID: uid}
	}
	began := time.Now()
	p, err := q.Start(context.Background())
	if err != nil {
		return err
	}
	defer p.Kill()
	e := Emulated{Measures: p.Measures, StartMs: time.Since(began).Seconds() * 1e3}
	theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return err
	}
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	lines := bufio.NewReader(conn)
	if e.Greeting, err = lines.ReadString('\n'); err != nil {
		return fmt.Errorf("greeting: %w; qemu: %s", err, p.Exit())
	}
	e.ReadyMs = time.Since(began).Seconds() * 1e3
	ask := func(commands ...string) error {
		for _, cmd := range commands {
			fmt.Fprintf(conn, "{\"execute\":%q}\n", cmd)
			answer, err := lines.ReadString('\n')
			if err != nil {
				return fmt.Errorf("%s: %w; qemu: %s", cmd, err, p.Exit())
			}
			e.Answers = append(e.Answers, answer)
		}
		return nil
	}
	// QEMU greets while it is still loading its parts; once it answers it has opened all that it will.
	if err := ask("qmp_capabilities", "query-status"); err != nil {
		return err
	}
	if e.Observation, err = jail.Observe(p.PID); err != nil {
		return err
	}
	if _, err := disk.Accept(); err != nil {
		return fmt.Errorf("it did not connect to the socket in the bind: %w", err)
	}
	e.Compared = jail.Emulator.Compare(e.Observation)
	if err := ask("quit"); err != nil {
		return err
	}
	e.Exit = p.Exit().String()
	return say(e)
}

// diskSocket listens in a directory of its own, where everyone may connect.
func diskSocket() (string, net.Listener, error) {
	dir, err := os.MkdirTemp("", "sockets")
	if err != nil {
		return "", nil, err
	}
	os.Chmod(dir, 0o755)
	l, err := net.Listen("unix", dir+"/disk.sock")
	if err != nil {
		return "", nil, err
	}
	l.(*net.UnixListener).SetDeadline(time.Now().Add(20 * time.Second))
	return dir, l, os.Chmod(dir+"/disk.sock", 0o666)
}
