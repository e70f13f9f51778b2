package keeper

import (
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	"vigia/internal/checkpoint"
	"vigia/internal/checkpoint/protect"
	"vigia/internal/jail"
)

// PlantCommand is the sub-command that main hands to Plant.
const PlantCommand = checkpoint.PlantCommand

// Plant is `vigia plant PID FD`: it lets QEMU make a userfaultfd of the device it holds as FD, and gives it to the daemon on
// the socket that is descriptor 3. It lives for some milliseconds.
func Plant(args []string) error {
	if _, err := jail.Confine(jail.Planter); err != nil {
		return err
	}
	if len(args) != 2 {
		return fmt.Errorf("plant: %d arguments", len(args))
	}
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	device, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	f, err := protect.Plant(pid, device)
	if err != nil {
		unix.Sendmsg(3, []byte(err.Error()), nil, nil, 0)
		return err
	}
	return unix.Sendmsg(3, []byte{}, unix.UnixRights(int(f.Fd())), nil, 0)
}
