package hostile

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The main thread, which /proc/self shows, is kept for the main goroutine: unixPeers moves threads elsewhere.
func init() { runtime.LockOSThread() }

// unixPeers asks the kernel, in the network namespace of a process, which unix socket is connected to which, by inode
// (sock_diag(7)). It takes root to enter another's namespace.
func unixPeers(pid int64) (map[uint32]uint32, error) {
	peers, errs := map[uint32]uint32{}, make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err == nil {
			defer ns.Close()
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = dumpPeers(peers)
		}
		errs <- err
	}()
	return peers, <-errs
}

const (
	sockDiagByFamily = 20
	showPeer         = 4 // UDIAG_SHOW_PEER
	attrPeer         = 2 // UNIX_DIAG_PEER
)

func dumpPeers(peers map[uint32]uint32) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	le := binary.LittleEndian
	req := make([]byte, 16+24)
	le.PutUint32(req, uint32(len(req)))
	le.PutUint16(req[4:], sockDiagByFamily)
	le.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req[16] = unix.AF_UNIX
	le.PutUint32(req[20:], ^uint32(0)) // all states
	le.PutUint32(req[28:], showPeer)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 1<<17)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return err
		}
		for b := buf[:n]; len(b) >= 16; {
			size := int(le.Uint32(b))
			switch le.Uint16(b[4:]) {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				return fmt.Errorf("sock_diag: error %d", int32(le.Uint32(b[16:])))
			}
			onePeer(b[16:size], peers)
			b = b[min((size+3)&^3, len(b)):]
		}
	}
}

// onePeer reads struct unix_diag_msg and its attributes.
func onePeer(b []byte, peers map[uint32]uint32) {
	le := binary.LittleEndian
	inode := le.Uint32(b[4:])
	for b = b[16:]; len(b) >= 4; {
		size := int(le.Uint16(b))
		if size < 4 || size > len(b) {
			return
		}
		if le.Uint16(b[2:]) == attrPeer && size >= 8 {
			peers[inode] = le.Uint32(b[4:])
		}
		b = b[min((size+3)&^3, len(b)):]
	}
}

// unixPaths are the bound names of unix sockets that a process's namespace shows, by inode.
func unixPaths(pid int64) map[uint32]string {
	paths := map[uint32]string{}
	f, err := os.Open(fmt.Sprintf("/proc/%d/net/unix", pid))
	if err != nil {
		return paths
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		words := strings.Fields(lines.Text())
		if len(words) < 7 {
			continue
		}
		inode, err := strconv.ParseUint(words[6], 10, 32)
		if err != nil {
			continue
		}
		name := ""
		if len(words) > 7 {
			name = filepath.Base(words[7])
		}
		paths[uint32(inode)] = name
	}
	return paths
}

// inetListening are the TCP and UDP sockets, by inode, that the host's namespace shows.
func inetListening() map[uint32]string {
	found := map[uint32]string{}
	for _, kind := range []string{"tcp", "tcp6", "udp", "udp6"} {
		text, _ := os.ReadFile("/proc/self/net/" + kind)
		for line := range strings.Lines(string(text)) {
			words := strings.Fields(line)
			if len(words) < 10 {
				continue
			}
			if inode, err := strconv.ParseUint(words[9], 10, 32); err == nil {
				found[uint32(inode)] = kind + " " + words[1]
			}
		}
	}
	return found
}

// socketInode reads "socket:[123]".
func socketInode(link string) (uint32, bool) {
	rest, ok := strings.CutPrefix(link, "socket:[")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(rest, "]"), 10, 32)
	return uint32(n), err == nil
}

// holders are the processes that hold each socket, by inode; a process is named by what it is.
func holders(processes map[string]int64) map[uint32][]string {
	held := map[uint32][]string{}
	for name, pid := range processes {
		entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		for _, e := range entries {
			link, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name()))
			if inode, ok := socketInode(link); ok {
				held[inode] = append(held[inode], name)
			}
		}
	}
	return held
}
