// Package machine is QEMU from spec to exit: the command line that it is started with (args.go), and what its monitor
// says of the run (monitor.go).
//
// A machine is a q35 with nothing that was not asked for: one virtio disk behind NBD, one network card behind a unix
// socket, one serial line, a panic device, a source of randomness. Every channel is a descriptor that QEMU inherits or
// a socket in its own small root: it can open nothing else. QEMU listens on QMP, console, network and agent sockets
// and is stopped (-S) until guard and gate are connected, so that nothing the guest does is missed, and a guard or
// gate that died can be replaced while the guest goes on.
package machine

import (
	"crypto/sha256"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"vigia/internal/jail"
	"vigia/internal/vm"
)

// Names of the disk's socket in its directory, and of the disk on it.
const (
	NBDSocket = "nbd.sock"
	NBDExport = "disk"
)

// Paths as QEMU sees them in its root. They are the host's own where that is possible, so that a host on which no
// root of its own can be made still runs the machine.
type Paths struct {
	RAM    string
	Kernel string
	Initrd string // empty: none
	NBD    string // the disk's socket
	Log    string // of what is recorded or replayed
	Plugin string // loaded where Descriptors has a Probe
}

// Descriptors that QEMU inherits, listening sockets all. Agent is 0 where the machine has no guest channel.
type Descriptors struct {
	QMP, Console, Net, Agent int
	Probe                    int // the page that a plugin shares with the guard; 0: no plugin
	Frames                   int // where the card's frames are shown, of a machine that is recorded or replayed; 0: nowhere
	NetIn                    int // what comes to the card of a machine that is recorded: Net has only what goes
	GDB                      int // where a debugger may come; 0: nowhere
}

// Config is all that the command line depends on.
type Config struct {
	Spec        *vm.Spec
	Accelerator string // kvm or tcg
	Paths       Paths
	Cmdline     string // the kernel's
	FDs         Descriptors
	// Reconnect is how long a disk request waits for a new guard, in seconds, before the guest sees an error.
	Reconnect int
	// Incoming: the machine is not to boot, its devices' state will be loaded into it (Monitor.LoadDevices).
	Incoming bool
	// Record is how the machine's non-determinism is treated, in QEMU's words: record or replay. Empty: it goes its way.
	Record string
	// Began is what the guest's clock says at the start of a machine that is recorded or replayed.
	Began time.Time
	// PrivateRAM maps the RAM file copy-on-write: many machines may share it.
	PrivateRAM bool
	// Origin is the machine whose hardware this one has: a clone keeps the address of its card and the number of its disk,
	// which its guest knows. Empty: it is its own.
	Origin vm.ID
}

// origin is whose hardware it is.
func (c Config) origin() vm.ID {
	if c.Origin != "" {
		return c.Origin
	}
	return c.Spec.ID
}

// tcgBuffer bounds the translation cache of TCG, in MiB: QEMU's default of 1 GiB is more than most guests' RAM.
const tcgBuffer = 256

// Args returns QEMU's arguments, without its own name.
func Args(c Config) []string {
	mem := strconv.FormatUint(c.Spec.Memory, 10)
	args := []string{
		"-name", "guest=" + c.Spec.Name + ",debug-threads=on",
		"-nodefaults", "-no-user-config", "-display", "none", "-S",
		"-machine", "q35,memory-backend=ram,vmport=off,usb=off,graphics=off,dump-guest-core=off",
		"-smp", strconv.Itoa(c.Spec.CPUs), "-m", "size=" + mem + "b",
		"-object", "memory-backend-file,id=ram,size=" + mem + ",mem-path=" + comma(c.Paths.RAM) + ",share=" + onOff(!c.PrivateRAM),
		"-rtc", rtc(c),
		"-action", "panic=pause,reboot=reset,shutdown=poweroff",
		"-kernel", c.Paths.Kernel, "-append", c.Cmdline,
	}
	args = append(args, jail.SandboxArgs...)
	if c.Incoming {
		args = append(args, "-incoming", "defer", "-global", "migration.send-configuration=off")
	}
	if c.Paths.Initrd != "" {
		args = append(args, "-initrd", c.Paths.Initrd)
	}
	if c.Accelerator == "kvm" {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		threads := "multi"
		if c.Record != "" {
			threads = "single" // one order of things
			args = append(args, "-icount", fmt.Sprintf("shift=auto,rr=%s,rrfile=%s", c.Record, comma(c.Paths.Log)))
		}
		args = append(args, "-accel", fmt.Sprintf("tcg,thread=%s,tb-size=%d", threads, tcgBuffer), "-cpu", "max")
	}
	if c.FDs.Probe != 0 && c.Accelerator == "tcg" {
		args = append(args, "-plugin", fmt.Sprintf("%s,fd=%d", comma(c.Paths.Plugin), c.FDs.Probe))
	}
	args = append(args, listener("qmp", c.FDs.QMP, false)...)
	args = append(args, "-mon", "chardev=qmp,mode=control")
	args = append(args, listener("console", c.FDs.Console, true)...)
	if c.Record != "" {
		args = append(args, "-serial", "chardev:console") // this way only is what is typed recorded (QEMU's chardev/char.c)
	} else {
		args = append(args, "-device", "isa-serial,chardev=console")
	}
	args = append(args, disk(c)...)
	args = append(args, network(c)...)
	args = append(args, "-device", "pvpanic-pci",
		"-object", "rng-builtin,id=rng0", "-device", "virtio-rng-pci,rng=rng0"+atOnce(c, ""))
	if c.FDs.GDB != 0 {
		args = append(append(args, listener("gdb", c.FDs.GDB, false)...), "-gdb", "chardev:gdb")
	}
	if c.Record == "" { // a number that is another in each QEMU, by which a kernel knows that it goes on from a checkpoint: it reseeds
		args = append(args, "-device", "vmgenid,guid=auto")
	}
	if c.FDs.Agent != 0 {
		args = append(args, listener("agent", c.FDs.Agent, false)...)
		args = append(args,
			"-device", "virtio-serial-pci,max_ports=2", "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0")
	}
	return args
}

// listener is a character device on a listening socket that QEMU inherits. With wait QEMU does not go on before the
// connection, which already waits in the socket's queue, is accepted: the console is kept from its first byte.
func listener(id string, fd int, wait bool) []string {
	return []string{"-chardev", fmt.Sprintf("socket,id=%s,fd=%d,server=on,wait=%s", id, fd, onOff(wait))}
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// rtc says what the guest's clock begins with. In a recording it must be the same again, and go by what the guest executes.
func rtc(c Config) string {
	if c.Record == "" {
		return "base=utc"
	}
	return "base=" + c.Began.UTC().Format("2006-01-02T15:04:05") + ",clock=vm"
}

// network is the machine's card, if it has one. One that is recorded or replayed has another wire.
func network(c Config) (args []string) {
	switch {
	case c.Spec.Net.Mode != vm.NetNAT && c.Spec.Net.Mode != vm.NetReplay:
		return nil
	case c.Record != "":
		args = recordedWire(c)
	default:
		args = []string{"-netdev", fmt.Sprintf("stream,id=net0,server=on,addr.type=fd,addr.str=%d", c.FDs.Net)}
	}
	return append(args, "-device", fmt.Sprintf("virtio-net-pci,netdev=net0,romfile=,host_mtu=%d,mac=%s%s", MTU, CardMAC(c.Spec, c.origin()), atOnce(c, ",tx=timer")))
}

// atOnce are a virtio device's options where it is recorded or replayed. What the guest asks of it is to be done as it asks, by its own thread, and what
// is put off is to be put off by the guest's clock: what QEMU's main loop does when it comes to it (ioeventfd, the card's bottom half) is in no log.
func atOnce(c Config, more string) string {
	if c.Record == "" {
		return ""
	}
	return ",ioeventfd=off" + more
}

// recordedWire is a wire that always takes a frame: one that is full for a while holds the card's queue up, and no log knows of that. It ends in a hub
// with a port to nowhere; before that a filter writes each frame to the gate, waiting if need be while nothing else of QEMU's happens. What
// comes back has a socket of its own (a character device has one user). In a replay neither is there: those frames are in the log.
//
// What comes goes through the filters in their order, what goes in the other. What is shown to the guard is so what the card is given and what it gives, each
// at its instruction, in the recording and in the replay.
func recordedWire(c Config) []string {
	args := []string{"-netdev", "hubport,id=net0,hubid=0", "-netdev", "hubport,id=nowhere0,hubid=0"}
	if c.Record == "record" {
		args = append(args, listener("netin", c.FDs.NetIn, false)...)
		args = append(args, "-object", "filter-redirector,id=in0,netdev=net0,queue=tx,indev=netin")
	}
	args = append(args, "-object", "filter-replay,id=replay0,netdev=net0")
	args = append(args, listener("frames", c.FDs.Frames, true)...)
	args = append(args, "-object", "filter-mirror,id=frames0,netdev=net0,queue=all,outdev=frames")
	if c.Record == "record" {
		args = append(args, listener("net", c.FDs.Net, false)...)
		args = append(args, "-object", "filter-mirror,id=out0,netdev=net0,queue=rx,outdev=net")
	}
	return args
}

func disk(c Config) []string {
	node := "disk0"
	var order []string
	if c.Record != "" { // requests end in the order that is recorded
		node = "ordered0"
		order = []string{"-blockdev", "driver=blkreplay,node-name=ordered0,image=disk0"}
	}
	args := []string{
		"-blockdev", fmt.Sprintf("driver=nbd,node-name=disk0,server.type=unix,server.path=%s,export=%s,reconnect-delay=%d,discard=unmap",
			comma(c.Paths.NBD), NBDExport, c.Reconnect),
	}
	return append(append(args, order...), "-device", "virtio-blk-pci,drive="+node+",id=disk,serial="+string(c.origin())+atOnce(c, ""))
}

// comma writes a value so that QEMU's option parser does not end it at a comma.
func comma(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// ProbePage is the size of what plugin and guard share, in bytes.
const ProbePage = 64<<10 + 1<<20

// MTU of the machine's network card. There is no wire: large frames cost the guest and the gate less for each byte.
const MTU = 65520

// CardMAC is the hardware address of a machine's card: its own where it was given one, or that of the hardware it has.
func CardMAC(s *vm.Spec, origin vm.ID) string {
	if s.Identity.MAC != "" {
		return s.Identity.MAC
	}
	return MAC(origin).String()
}

// MAC returns the machine's hardware address: QEMU's prefix 52:54:00 and three bytes of the id's hash.
func MAC(id vm.ID) net.HardwareAddr {
	h := sha256.Sum256([]byte(id))
	return net.HardwareAddr{0x52, 0x54, 0x00, h[0], h[1], h[2]}
}
