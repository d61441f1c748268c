package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
)

// pins are network namespaces bound to a path, because plugins remember one.
type pins struct{ dir string }

func (p pins) path(pod id.Pod) string { return filepath.Join(p.dir, string(pod)) }

// prepare makes dir a private mount: a pin that propagated into other mount
// namespaces would keep its network namespace alive there after Detach.
func (p pins) prepare() error {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	if isMount(p.dir) {
		return nil
	}
	if err := unix.Mount(p.dir, p.dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s to itself: %w", p.dir, err)
	}
	if err := unix.Mount("", p.dir, "", unix.MS_PRIVATE, ""); err != nil {
		return errors.Join(fmt.Errorf("make %s private: %w", p.dir, err), unix.Unmount(p.dir, unix.MNT_DETACH))
	}
	return nil
}

func isMount(path string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// add binds ns to the pod's path.
func (p pins) add(pod id.Pod, ns *os.File) error {
	if err := p.prepare(); err != nil {
		return err
	}
	f, err := os.OpenFile(p.path(pod), os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o400)
	if err != nil {
		return err
	}
	f.Close()
	crashpoint.Here("cni", "pin", "file made")
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), p.path(pod), "", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("pin network namespace: %w", err), os.Remove(p.path(pod)))
	}
	return nil
}

// holds reports whether the pod's path leads to a namespace.
func (p pins) holds(pod id.Pod) bool {
	var st unix.Statfs_t
	return unix.Statfs(p.path(pod), &st) == nil && st.Type == unix.NSFS_MAGIC
}

// remove is idempotent.
func (p pins) remove(pod id.Pod) error {
	if err := unix.Unmount(p.path(pod), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unpin network namespace: %w", err)
	}
	crashpoint.Here("cni", "pin", "unmounted")
	if err := os.Remove(p.path(pod)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unpin network namespace: %w", err)
	}
	return nil
}

// close gives up the mount of dir when no pin is left.
func (p pins) close() error {
	entries, err := os.ReadDir(p.dir)
	if err != nil || len(entries) > 0 || !isMount(p.dir) {
		return nil
	}
	return unix.Unmount(p.dir, unix.MNT_DETACH)
}
