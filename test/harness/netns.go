package harness

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"

	"github.com/vishvananda/netlink"
)

const netnsMark = "BERTH_TEST_NETNS"

// OwnNetwork runs the calling program again in a network namespace of its own
// and exits with its status; in the second run it brings lo up and returns.
// Tests so see and leave only their own links, addresses and nftables tables,
// and "the host" of host networking and host ports is that namespace.
func OwnNetwork() error {
	if os.Getenv(netnsMark) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), netnsMark+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		if cmd.ProcessState == nil {
			return fmt.Errorf("network namespace of the test: %w", err)
		}
		os.Exit(cmd.ProcessState.ExitCode())
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	// An address that is neither 127.0.0.0/8 nor a pod's: the "node address".
	return netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(NodeIP), Mask: net.CIDRMask(32, 32)}})
}

// NodeIP is the address of the test's node inside its network namespace
// (TEST-NET-2, RFC 5737).
const NodeIP = "198.51.100.7"
