// Package kernel is where Berth meets Linux: namespaces, mounts by file
// descriptor, paths below an untrusted root, and feature probes. Features are
// probed and cached, never guessed from version strings.
package kernel

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Namespace is a kind of namespace, as its file in /proc/<pid>/ns is called.
type Namespace string

// Namespaces.
const (
	NetNS    Namespace = "net"
	IPCNS    Namespace = "ipc"
	UTSNS    Namespace = "uts"
	PIDNS    Namespace = "pid"
	MountNS  Namespace = "mnt"
	UserNS   Namespace = "user"
	CgroupNS Namespace = "cgroup"
	TimeNS   Namespace = "time"
)

var cloneFlags = map[Namespace]int{
	NetNS: unix.CLONE_NEWNET, IPCNS: unix.CLONE_NEWIPC, UTSNS: unix.CLONE_NEWUTS, PIDNS: unix.CLONE_NEWPID,
	MountNS: unix.CLONE_NEWNS, UserNS: unix.CLONE_NEWUSER, CgroupNS: unix.CLONE_NEWCGROUP,
	TimeNS: unix.CLONE_NEWTIME,
}

// CloneFlag returns the CLONE_NEW* flag of n.
func (n Namespace) CloneFlag() int { return cloneFlags[n] }

// OpenCurrent opens the calling thread's namespace. The caller must have locked
// the OS thread if it changed the thread's namespaces.
func (n Namespace) OpenCurrent() (*os.File, error) {
	return os.Open("/proc/thread-self/ns/" + string(n))
}

// Dup returns a copy of the descriptor, which the caller closes.
func Dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("dup %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// NewNamespaces makes one new namespace of each kind and returns them open, in
// order. in runs inside them, on a thread of its own, before they are returned;
// it may be nil. No process is needed: the fds hold the namespaces.
func NewNamespaces(kinds []Namespace, in func() error) ([]*os.File, error) {
	var files []*os.File
	err := OnThread(func() error {
		flags := 0
		for _, k := range kinds {
			flags |= k.CloneFlag()
		}
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("unshare %v: %w", kinds, err)
		}
		for _, k := range kinds {
			f, err := k.OpenCurrent()
			if err != nil {
				return err
			}
			files = append(files, f)
		}
		if in != nil {
			return in()
		}
		return nil
	})
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	return files, nil
}

// In runs f on a thread that has joined the namespace ns of the given kind.
// Goroutines started by f do not inherit the namespace. Only per-thread
// namespaces work: net, ipc, uts.
func In(kind Namespace, ns *os.File, f func() error) error {
	return OnThread(func() error {
		if err := unix.Setns(int(ns.Fd()), kind.CloneFlag()); err != nil {
			return fmt.Errorf("join %s namespace: %w", kind, err)
		}
		return f()
	})
}

// OnThread runs f on an OS thread that is thrown away afterwards: it is never
// unlocked, so the Go runtime ends it with its goroutine and a changed
// namespace, root or umask cannot leak into other goroutines. f must not hand
// its work to other goroutines.
func OnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		// The main thread is never ended, and /proc/self of the whole process shows
		// its namespaces: keep it busy here and use another one.
		if unix.Gettid() == unix.Getpid() {
			done <- OnThread(f)
			runtime.UnlockOSThread()
			return
		}
		err := errors.New("panic on a namespace thread")
		defer func() { done <- err }()
		err = f()
	}()
	return <-done
}

// SetFSIDs makes the calling thread reach files as the given user and group,
// which new files belong to. Unlike a change by the kernel alone, it keeps the
// capabilities that override permissions. The thread must be one of OnThread.
func SetFSIDs(uid, gid uint32) error {
	// Neither call tells an error; both return the former id.
	_, _, _ = unix.RawSyscall(unix.SYS_SETFSGID, uintptr(gid), 0, 0)
	_, _, _ = unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0)
	if now, _, _ := unix.RawSyscall(unix.SYS_SETFSUID, ^uintptr(0), 0, 0); uint32(now) != uid {
		return fmt.Errorf("setfsuid %d: %w", uid, unix.EPERM)
	}
	return raisePermitted()
}

// SetEffectiveIDs makes the calling thread act as the given user and group, and
// leaves it its capabilities. The thread must be one of OnThread.
func SetEffectiveIDs(uid, gid uint32) error {
	const keep = ^uintptr(0)
	// The calls of package unix change all threads of the process.
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, keep, uintptr(gid), keep); e != 0 {
		return fmt.Errorf("setresgid %d: %w", gid, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); e != 0 {
		return fmt.Errorf("setresuid %d: %w", uid, e)
	}
	return raisePermitted()
}

// raisePermitted makes all permitted capabilities of the calling thread effective.
func raisePermitted() error {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	data[0].Effective, data[1].Effective = data[0].Permitted, data[1].Permitted
	if err := unix.Capset(&head, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}
