package kernel

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// clonesDetached reports whether a mount that is in no mount namespace can be
// cloned (Linux 6.15).
var clonesDetached = sync.OnceValue(func() bool {
	m, err := NewFS("tmpfs", []FSOption{{Key: "size", Value: "4096"}}, 0)
	if err != nil {
		return false
	}
	defer m.Close()
	c, err := CloneTree(int(m.Fd()), "", false)
	if err != nil {
		return false
	}
	c.Close()
	return true
})

// Hold turns the detached mount m into a descriptor that keeps it alive and that
// CloneHeld makes any number of clones of, in this process or another one. Where
// the kernel clones detached mounts that is m itself; before Linux 6.15 it is a
// mount namespace whose root is m, and m is closed. empty is the empty mount
// namespace (NewEmptyMountNS).
func Hold(empty, m *os.File) (*os.File, error) {
	if clonesDetached() {
		return m, nil
	}
	return holdInNS(empty, m)
}

func holdInNS(empty, m *os.File) (*os.File, error) {
	defer m.Close()
	var ns *os.File
	err := OnThread(func() (err error) {
		ns, err = enterOver(empty, m)
		return err
	})
	return ns, err
}

// CloneHeld makes a detached mount of the same filesystem as f: what Hold
// returned, or an O_PATH descriptor of something mounted.
func CloneHeld(f *os.File, recursive bool) (*os.File, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return nil, fmt.Errorf("statfs: %w", err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return CloneTree(int(f.Fd()), "", recursive)
	}
	var t *os.File
	err := OnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare CLONE_FS: %w", err)
		}
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter the mount's namespace: %w", err)
		}
		t, err = CloneTree(unix.AT_FDCWD, "/", recursive)
		return err
	})
	return t, err
}

// CloneDetached clones what lies at the open path at of the detached mount m.
// m may be used up by that.
func CloneDetached(empty, m, at *os.File) (*os.File, error) {
	t, err := CloneTree(int(at.Fd()), "", false)
	if !errors.Is(err, unix.EINVAL) || clonesDetached() {
		return t, err
	}
	// The mount is put in a namespace that ends with its thread.
	err = OnThread(func() error {
		ns, err := enterOver(empty, m)
		if err != nil {
			return err
		}
		defer ns.Close()
		t, err = CloneTree(int(at.Fd()), "", false)
		return err
	})
	return t, err
}

// enterOver moves the calling thread to a new mount namespace, a copy of the
// empty one with m over its root, and returns it open.
func enterOver(empty, m *os.File) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return nil, fmt.Errorf("unshare CLONE_FS: %w", err)
	}
	// There is no procfs inside: what leads to the namespace is opened first.
	self, err := unix.Open("/proc/thread-self/ns", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("/proc/thread-self/ns: %w", err)
	}
	defer unix.Close(self)
	if err := unix.Setns(int(empty.Fd()), unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("enter the empty mount namespace: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("unshare mount namespace: %w", err)
	}
	if err := unix.MoveMount(int(m.Fd()), "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, fmt.Errorf("move_mount: %w", err)
	}
	ns, err := unix.Openat(self, "mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount namespace: %w", err)
	}
	return os.NewFile(uintptr(ns), "mnt"), nil
}
