package kernel

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Reap waits until a child of ours ends and returns its wait status. ECHILD means
// that it is not our child, or that another reaper was faster.
func Reap(pid int) (ws unix.WaitStatus, err error) {
	for {
		if _, err = unix.Wait4(pid, &ws, 0, nil); err != unix.EINTR {
			return ws, err
		}
	}
}

// InUserNamespace reports whether we run in a user namespace other than the first.
func InUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && !IsInitialIDMap(string(b))
}

// IsInitialIDMap reports whether a text of /proc/<pid>/uid_map is that of the first
// user namespace, which alone maps every id to itself.
func IsInitialIDMap(text string) bool {
	return strings.Join(strings.Fields(text), " ") == "0 0 4294967295"
}

// Exited reports whether the process of a pidfd has ended. It does not wait. A
// signal to the calling thread, as the Go scheduler sends them, interrupts poll(2)
// even with a timeout of 0; that says nothing of the process.
func Exited(pidfd int) (bool, error) {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		if n, err := unix.Poll(p, 0); err != unix.EINTR {
			return n > 0, err
		}
	}
}
