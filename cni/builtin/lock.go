package builtin

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// lockDir holds one lock file per network namespace. It is the machine's and not
// the daemon's: two daemons with state folders of their own still share the
// kernel's tables.
const lockDir = "/run"

// lockNode makes this network the only one of its kind in the network namespace
// ns (nil: the process's): a second one would replace the first one's table and
// give out its addresses. The lock goes with the process.
func lockNode(ns *os.File) (*os.File, error) {
	path := "/proc/self/ns/net"
	if ns != nil {
		path = fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	name := filepath.Join(lockDir, fmt.Sprintf("berth-network-%d.lock", st.Ino))
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("network lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("another daemon with the built-in network runs in this network namespace; stop it, or run one of them in a network namespace of its own: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("network lock %s: %w", name, err)
	}
	// The holder before us removed the file between our open and our lock.
	if err := unix.Fstat(int(f.Fd()), &st); err == nil && st.Nlink == 0 {
		f.Close()
		return lockNode(ns)
	}
	return f, nil
}

// unlockNode gives the namespace free and removes the file: namespaces come and
// go in tests, and their numbers are used again.
func unlockNode(f *os.File) error {
	return errors.Join(os.Remove(f.Name()), f.Close())
}
