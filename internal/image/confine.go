package image

import (
	"context"
	"os"
	"os/exec"
	"sync"
)

// limits of a program on hostile input. Memory is address space: qemu-img maps little of what it converts.
var limits = []string{"--cpu=3600", "--as=4294967296", "--nofile=64", "--core=0", "--nproc=4096"}

// Limited runs a command with what util-linux has for confining one: limits, no network, no new privileges, and, for
// root, as nobody without capabilities. It is what a Store uses that is given no better Runner. Where users may not
// make namespaces, an ordinary user's command keeps the network: qemu-img is given nothing to connect to.
func Limited(ctx context.Context, c Command) error {
	c.Args = append(wall(), append([]string{c.Path}, c.Args...)...)
	var err error
	if c.Path, err = findTool("prlimit", "util-linux"); err != nil {
		return err
	}
	return Run(ctx, c)
}

// wall is the line of wrappers, each of which replaces itself by the next.
func wall() []string {
	line := append(append([]string{}, limits...), "--")
	if os.Geteuid() == 0 {
		return append(line, "unshare", "--net", "--ipc", "--uts", "--",
			"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--")
	}
	if userNamespaces() {
		line = append(line, "unshare", "--user", "--net", "--ipc", "--uts", "--")
	}
	return append(line, "setpriv", "--no-new-privs", "--")
}

var userNamespaces = sync.OnceValue(func() bool {
	return exec.Command("unshare", "--user", "--net", "--ipc", "--uts", "true").Run() == nil
})
