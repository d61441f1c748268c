package kernel

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// FSOption is one option of a new filesystem. Flag options have no value.
type FSOption struct {
	Key, Value string
	Flag       bool
}

// NewFS makes a detached mount of a new filesystem with the given MOUNT_ATTR_*
// attributes. It belongs to the namespaces of the calling thread (proc: pid,
// sysfs: net, mqueue: ipc) and appears in no mount namespace until it is attached.
func NewFS(fstype string, opts []FSOption, attrs int) (*os.File, error) {
	fd, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen %s: %w", fstype, err)
	}
	defer unix.Close(fd)
	if err := setOptions(fd, opts); err != nil {
		return nil, fmt.Errorf("%s %w", fstype, err)
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fmt.Errorf("new %s: %w%s", fstype, err, fsLog(fd))
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return nil, fmt.Errorf("fsmount %s: %w", fstype, err)
	}
	return os.NewFile(uintptr(m), fstype), nil
}

// fsLog returns what the kernel wrote about the last failure on a filesystem context.
func fsLog(fd int) string {
	var b [256]byte
	n, err := unix.Read(fd, b[:])
	if err != nil || n <= 0 {
		return ""
	}
	return " (" + strings.TrimSpace(strings.TrimPrefix(string(b[:n]), "e ")) + ")"
}

// CloneTree makes a detached bind mount of path (with everything mounted below
// it, if recursive). An empty path means dir itself. It keeps the peer group of
// a shared mount, so a later MS_SLAVE or MS_SHARED connects to the host's mount.
func CloneTree(dir int, path string, recursive bool) (*os.File, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(dir, path, flags)
	if err != nil {
		return nil, fmt.Errorf("open_tree: %w", err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// SetMountAttr changes attributes of the mount m, and of all mounts below it if recursive.
func SetMountAttr(m *os.File, recursive bool, attr *unix.MountAttr) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	if err := unix.MountSetattr(int(m.Fd()), "", flags, attr); err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	return nil
}

// Attach moves the detached mount m onto the object at points to. It is made in
// the mount namespace of the calling thread, which must hold at.
func Attach(m, at *os.File) error {
	err := unix.MoveMount(int(m.Fd()), "", int(at.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// Names in the filesystem of an empty mount namespace: the sources of masks.
const (
	EmptyDir  = "d"
	EmptyNull = "null"
	EmptyProc = "p" // a mount point
	EmptyRoot = "r" // another
)

// NewEmptyMountNS makes a mount namespace whose only mount is a read-only tmpfs
// holding an empty directory (EmptyDir) and a null device (EmptyNull): what
// masks are made of, so that nothing from an image can take their place. A
// process that joins it and unshares copies one mount however many the host has.
func NewEmptyMountNS() (*os.File, error) {
	var ns *os.File
	err := OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare mount namespace: %w", err)
		}
		unix.Umask(0)
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		var err error
		if ns, err = MountNS.OpenCurrent(); err != nil {
			return err
		}
		return enterEmptyRoot()
	})
	if err != nil {
		if ns != nil {
			ns.Close()
		}
		return nil, fmt.Errorf("empty mount namespace: %w", err)
	}
	return ns, nil
}

// enterEmptyRoot replaces the whole mount tree of the calling thread's own
// mount namespace by a small tmpfs. /proc serves as the place to put it first,
// since it exists wherever Berth can run.
func enterEmptyRoot() error {
	t, err := NewEmptyFS()
	if err != nil {
		return err
	}
	defer t.Close()
	fd := int(t.Fd())
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, "/proc", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	if err := unix.Fchdir(fd); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount host tree: %w", err)
	}
	return nil
}

// NewEmptyFS makes the detached read-only tmpfs of an empty mount namespace.
func NewEmptyFS() (_ *os.File, err error) {
	t, err := NewFS("tmpfs", []FSOption{{Key: "mode", Value: "555"}, {Key: "size", Value: "16384"}}, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	fd := int(t.Fd())
	for _, d := range []string{EmptyDir, EmptyProc, EmptyRoot} {
		if err := unix.Mkdirat(fd, d, 0o555); err != nil {
			return nil, fmt.Errorf("mkdir: %w", err)
		}
	}
	err = unix.Mknodat(fd, EmptyNull, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))
	if err == unix.EPERM { // in a user namespace: an empty file that cannot be written hides as much
		err = unix.Mknodat(fd, EmptyNull, unix.S_IFREG|0o444, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("mknod null: %w", err)
	}
	// The superblock too is made read-only: containers share it.
	if err := Reconfigure(t, []FSOption{{Key: "ro", Flag: true}}); err != nil {
		return nil, fmt.Errorf("make the empty tmpfs read-only: %w", err)
	}
	return t, SetMountAttr(t, false, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}

// Reconfigure changes options of the filesystem whose mount m is.
func Reconfigure(m *os.File, opts []FSOption) error {
	fd, err := unix.Fspick(int(m.Fd()), "", unix.FSPICK_EMPTY_PATH|unix.FSPICK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fspick: %w", err)
	}
	defer unix.Close(fd)
	if err := setOptions(fd, opts); err != nil {
		return err
	}
	if err := unix.FsconfigReconfigure(fd); err != nil {
		return fmt.Errorf("reconfigure: %w%s", err, fsLog(fd))
	}
	return nil
}

// setOptions sets options of a filesystem context.
func setOptions(fd int, opts []FSOption) (err error) {
	for _, o := range opts {
		if o.Flag {
			err = unix.FsconfigSetFlag(fd, o.Key)
		} else {
			err = unix.FsconfigSetString(fd, o.Key, o.Value)
		}
		if err != nil {
			return fmt.Errorf("option %s=%q: %w%s", o.Key, o.Value, err, fsLog(fd))
		}
	}
	return nil
}
