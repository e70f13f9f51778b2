package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"vigia/internal/checkpoint"
	"vigia/internal/jail"
	"vigia/internal/link"
)

// keeper is the process that takes a machine's memory, or puts one back, seen from the daemon. It ends with the daemon.
type keeper struct {
	proc *jail.Process
	conn *link.Conn
	// why memory is copied while the guest stands still; empty: it is protected.
	why  string
	last checkpoint.ID // the last checkpoint that it knows
}

// keeperHeap is what a keeper needs beside the memory it copies where it can't protect it.
const keeperHeap = 768 << 20

// plantTime bounds the planting of a descriptor into QEMU.
const plantTime = 5 * time.Second

// startKeeper starts a keeper that knows of no machine yet.
func (d *Daemon) startKeeper(ctx context.Context, m *machine, name string) (*keeper, error) {
	ours, theirs, err := speakingPair()
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	defer theirs.Close()
	log, err := os.OpenFile(d.files.workerLog(m.id(), name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("keeper: %w", err)
	}
	defer log.Close()
	memory := m.rec.Spec.Memory
	group, err := d.group(m, name, jail.Limits{Memory: int64(memory) + keeperHeap, PIDs: 256})
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("keeper: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, workerStart)
	defer cancel()
	proc, err := jail.Worker{Profile: jail.Keeper, Tag: d.tag(m, name), Args: []string{checkpoint.KeeperCommand}, Files: []*os.File{theirs},
		Stdout: log, Stderr: log, User: m.user("keeper"), Group: group, MaxFile: memory + memory/8 + logMost}.Start(ctx)
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("keeper: %w", err)
	}
	return &keeper{proc: proc, conn: link.New(ours, nil)}, nil
}

func (k *keeper) gone() bool { return k == nil || k.conn.Err() != nil }

func (k *keeper) end() {
	if k == nil {
		return
	}
	k.conn.Close()
	k.proc.Kill()
	<-k.proc.Done()
	k.proc.Close()
}

// speakingPair returns two connected sockets, one to speak on and one to give away.
func speakingPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs := os.NewFile(uintptr(fds[1]), "socket")
	f := os.NewFile(uintptr(fds[0]), "socket")
	c, err := net.FileConn(f)
	f.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return c.(*net.UnixConn), theirs, nil
}

// keep returns the machine's keeper, started if there is none.
func (m *machine) keep(ctx context.Context, qemu *jail.Process) (*keeper, error) {
	m.mu.Lock()
	k := m.keeper
	m.mu.Unlock()
	if !k.gone() {
		return k, nil
	}
	k.end()
	k, err := m.d.startKeeper(ctx, m, "keeper")
	if err != nil {
		return nil, err
	}
	if err := m.introduce(ctx, k, qemu); err != nil {
		k.end()
		return nil, err
	}
	m.mu.Lock()
	m.keeper = k
	m.mu.Unlock()
	return k, nil
}

// introduce gives a keeper its machine's memory, and the descriptor that protects it where that can be had.
func (m *machine) introduce(ctx context.Context, k *keeper, qemu *jail.Process) error {
	ram, base, private, err := m.memory(qemu)
	if err != nil {
		return fmt.Errorf("memory of %s: %w", m.name(), err)
	}
	defer ram.Close()
	keep := link.Keep{Memory: m.rec.Spec.Memory, Base: base, Private: private, Files: []string{link.FileRAM}}
	if base != 0 {
		protector, perr := m.plant(ctx, qemu.PID)
		if perr == nil {
			defer protector.Close()
			keep.Files = append(keep.Files, link.FileProtector)
			if _, perr = k.conn.Call(ctx, link.CallKeep, keep, nil, ram, protector); perr == nil {
				return nil
			}
			keep.Files = keep.Files[:1]
		}
		k.why = perr.Error()
	} else {
		k.why = "where QEMU has mapped its memory can't be seen"
	}
	m.d.log.Warn("memory can't be protected: the guest stands still while it is copied", "machine", m.name(), "why", k.why)
	_, err = k.conn.Call(ctx, link.CallKeep, keep, nil, ram)
	return err
}

// memory opens the guest's memory for reading, and says where QEMU has mapped it; base is 0 where that can't be seen.
func (m *machine) memory(qemu *jail.Process) (ram *os.File, base uint64, private bool, err error) {
	private, pid := m.private(), qemu.PID
	if !private {
		again, err := m.d.openRAM(m, qemu) // also where an earlier daemon's descriptor is gone
		if err != nil {
			return nil, 0, false, err
		}
		again.Close()
	}
	m.mu.Lock()
	kept := m.ram
	m.mu.Unlock()
	if kept == nil {
		return nil, 0, false, errors.New("it is not at hand")
	}
	base, berr := mappedAt(pid, kept)
	if private {
		if berr != nil {
			return nil, 0, false, berr
		}
		ram, err = os.Open(fmt.Sprintf("/proc/%d/mem", pid))
		return ram, base, true, err
	}
	fd, err := unix.FcntlInt(kept.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, 0, false, err
	}
	return os.NewFile(uintptr(fd), "ram"), base, false, nil
}

// mappedAt finds where a process has mapped a file.
func mappedAt(pid int, f *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, err
	}
	want := fmt.Sprintf("%02x:%02x %d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, err
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		words := strings.Fields(lines.Text()) // address, rights, offset, device, inode, path
		if len(words) < 5 || words[2] != "00000000" || words[3]+" "+words[4] != want {
			continue
		}
		from, _, _ := strings.Cut(words[0], "-")
		return strconv.ParseUint(from, 16, 64)
	}
	return 0, errors.New("QEMU has not mapped its memory")
}

// plant gets a userfaultfd of QEMU: the device is handed to it for a moment, and a process that may do nothing else lets
// it make the descriptor.
func (m *machine) plant(ctx context.Context, pid int) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, plantTime)
	defer cancel()
	device, err := os.OpenFile(checkpoint.Device, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer device.Close()
	var handed link.Handed
	if _, err := m.callGuard(ctx, link.CallHand, nil, &handed, device); err != nil {
		return nil, err
	}
	defer m.callGuard(context.WithoutCancel(ctx), link.CallTakeBack, handed, nil)
	ours, theirs, err := speakingPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	proc, err := jail.Worker{Profile: jail.Planter, Tag: m.d.tag(m, "planter"),
		Args: []string{checkpoint.PlantCommand, strconv.Itoa(pid), strconv.Itoa(handed.FD)}, Files: []*os.File{theirs}, User: m.user("qemu")}.Start(ctx)
	theirs.Close()
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	f, err := receiveOne(ctx, ours)
	proc.Kill()
	<-proc.Done()
	return f, err
}

// receiveOne reads one descriptor, or the words that say why there is none.
func receiveOne(ctx context.Context, c *net.UnixConn) (*os.File, error) {
	if deadline, ok := ctx.Deadline(); ok {
		c.SetReadDeadline(deadline)
	}
	text, rights := make([]byte, 1024), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.ReadMsgUnix(text, rights)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:oobn])
	if err == nil && len(messages) == 1 {
		var fds []int
		if fds, err = unix.ParseUnixRights(&messages[0]); err == nil && len(fds) == 1 {
			unix.CloseOnExec(fds[0])
			return os.NewFile(uintptr(fds[0]), "protector"), nil
		}
	}
	if n == 0 {
		return nil, errors.New("the planter ended without a word")
	}
	return nil, errors.New(string(text[:n]))
}

// chainBatch is how many files go to a keeper in one call.
const chainBatch = 32

// giveChain gives a keeper the memory of a checkpoint and of all it lies on.
func (d *Daemon) giveChain(ctx context.Context, k *keeper, id checkpoint.ID, adopt bool) error {
	chain, err := d.checkpoints.Chain(id)
	if err != nil {
		return err
	}
	for at := 0; at < len(chain); at += chainBatch {
		batch := chain[at:min(at+chainBatch, len(chain))]
		c := link.Chain{First: at == 0, Last: at+len(batch) == len(chain), Adopt: adopt}
		var files []*os.File
		for _, r := range batch {
			f, err := d.checkpoints.Open(r.ID, checkpoint.FileMemory)
			if err != nil {
				closeFiles(files)
				return fmt.Errorf("%w: memory of checkpoint %s, on which it lies: %w", checkpoint.ErrDamaged, r.ID, err)
			}
			files, c.Sums = append(files, f), append(c.Sums, r.MemorySum)
		}
		_, err := k.conn.Call(ctx, link.CallChain, c, nil, files...)
		closeFiles(files)
		if err != nil && !k.gone() {
			err = fmt.Errorf("%w: %w", checkpoint.ErrDamaged, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
