package kernel

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"github.com/containerd/errdefs"
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

// pidfdInfoSize is the size of the oldest struct pidfd_info, which every kernel
// with PIDFD_GET_INFO takes.
const pidfdInfoSize = unix.PIDFD_INFO_SIZE_VER0

// pidfdGetInfo is _IOWR(0xFF, 11, struct pidfd_info).
const pidfdGetInfo = 3<<30 | uint(pidfdInfoSize)<<16 | 0xFF<<8 | 11

// ExitStatus reads the wait status of a process from its pidfd, whoever's child
// it was (PIDFD_GET_INFO with PIDFD_INFO_EXIT, Linux 6.15). The kernel knows it
// only for pidfds that were open when the process was reaped: ok is false while
// it runs or waits to be reaped. The error of a kernel that cannot tell is
// errdefs.ErrNotImplemented.
func ExitStatus(pidfd int) (ws unix.WaitStatus, ok bool, err error) {
	// The status is there before the process is gone. So one that was gone before the
	// second question has it, and not on kernels that cannot tell: those before 6.13
	// do not know the request, the next ones not this part of it.
	for range 2 {
		info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(pidfd), uintptr(pidfdGetInfo), uintptr(unsafe.Pointer(&info)))
		switch {
		case errno != 0 && errno != unix.ESRCH:
			return 0, false, fmt.Errorf("PIDFD_GET_INFO: %w: %w", errno, errdefs.ErrNotImplemented)
		case errno == 0 && info.Mask&unix.PIDFD_INFO_EXIT != 0:
			return unix.WaitStatus(info.Exit_code), true, nil
		case unix.PidfdSendSignal(pidfd, 0, nil, 0) != unix.ESRCH:
			return 0, false, nil
		}
	}
	return 0, false, fmt.Errorf("PIDFD_INFO_EXIT: %w", errdefs.ErrNotImplemented)
}

// readStat reads the file stat of a process's or a thread's folder in /proc: its
// name, which is its own choice and may hold anything, a ")" too, and the fields
// behind that, from the third on (proc_pid_stat(5)).
func readStat(dir string) (name string, fields []string, err error) {
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return "", nil, err
	}
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open || len(b) < end+3 {
		return "", nil, fmt.Errorf("%s/stat: %q is not of the kernel's form", dir, b)
	}
	return string(b[open+1 : end]), strings.Fields(string(b[end+1:])), nil
}

// ZombieStatus reads the wait status of a process that has ended and waits to be
// reaped by somebody else from /proc/PID/stat; ok is false for any other process.
// The caller needs CAP_SYS_PTRACE, or the kernel shows 0, and must hold a pidfd of
// the process and find afterwards that it was not reaped meanwhile.
func ZombieStatus(pid int) (ws unix.WaitStatus, ok bool) {
	_, f, err := readStat("/proc/" + strconv.Itoa(pid))
	const state, exitCode = 0, 49 // fields 3 and 52
	if err != nil || len(f) <= exitCode || f[state] != "Z" {
		return 0, false
	}
	n, err := strconv.Atoi(f[exitCode])
	return unix.WaitStatus(n), err == nil
}
