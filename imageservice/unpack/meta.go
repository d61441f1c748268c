package unpack

import (
	"archive/tar"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const xattrPrefix = "SCHILY.xattr."

// procPath names an object by its directory's descriptor, for the xattr calls,
// which have no *at form before Linux 6.13. The last component is not followed.
func procPath(fd int, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(fd) + "/" + name
}

// wanted reports whether an image may set the attribute. overlayfs's own would
// let a layer redirect into others; labels are the node's policy, not the image's.
func wanted(name string) bool {
	switch {
	case strings.HasPrefix(name, "trusted.overlay."), strings.HasPrefix(name, "user.overlay."):
		return false
	case name == "security.capability":
		return true
	case strings.HasPrefix(name, "security."):
		return false
	}
	return true
}

// setXattrs sets the entry's attributes through set.
func setXattrs(h *tar.Header, set func(name string, value []byte) error) error {
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, xattrPrefix)
		if !ok || !wanted(name) {
			continue
		}
		err := set(name, []byte(v))
		if err == unix.EOPNOTSUPP || err == unix.EPERM && strings.HasPrefix(name, "user.") {
			// The file system, or this type of file (user.* on a link), has none of
			// the kind. Losing a file capability would change behaviour: that is told.
			if name != "security.capability" {
				continue
			}
		}
		if err != nil {
			return fmt.Errorf("xattr %.100q: %w", name, err)
		}
	}
	return nil
}

// setFileMeta gives an open regular file its metadata. The order matters: chown
// clears set-id bits and file capabilities.
func setFileMeta(fd, pfd int, name string, h *tar.Header) error {
	if h.Uid != 0 || h.Gid != 0 {
		if err := unix.Fchown(fd, h.Uid, h.Gid); err != nil {
			return fmt.Errorf("owner %d:%d: %w", h.Uid, h.Gid, err)
		}
	}
	if err := unix.Fchmod(fd, uint32(h.Mode&0o7777)); err != nil {
		return err
	}
	if len(h.PAXRecords) > 0 {
		if err := setXattrs(h, func(n string, v []byte) error { return unix.Fsetxattr(fd, n, v, 0) }); err != nil {
			return err
		}
	}
	return utimes(pfd, name, h)
}

func utimes(pfd int, name string, h *tar.Header) error {
	return unix.UtimesNanoAt(pfd, name, times(h), unix.AT_SYMLINK_NOFOLLOW)
}

// setMeta gives a link, device or pipe its metadata, never following it.
func setMeta(pfd int, name string, h *tar.Header) error {
	if err := owner(pfd, name, h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeSymlink {
		// We made the node, nobody else can reach it: it is no link.
		if err := unix.Fchmodat(pfd, name, uint32(h.Mode&0o7777), 0); err != nil {
			return err
		}
	}
	if err := setXattrs(h, func(n string, v []byte) error { return unix.Lsetxattr(procPath(pfd, name), n, v, 0) }); err != nil {
		return err
	}
	return utimes(pfd, name, h)
}

func owner(pfd int, name string, h *tar.Header) error {
	if h.Uid == 0 && h.Gid == 0 {
		return nil
	}
	if err := unix.Fchownat(pfd, name, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("owner %d:%d: %w", h.Uid, h.Gid, err)
	}
	return nil
}

// setDir gives a directory its metadata; its time is set when all is unpacked.
func (u *unpacker) setDir(d *dir, h *tar.Header) error {
	fd, err := u.fdOf(d)
	if err != nil {
		return err
	}
	if err := unix.Fchownat(fd, "", h.Uid, h.Gid, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("owner %d:%d: %w", h.Uid, h.Gid, err)
	}
	if err := unix.Fchmodat(fd, ".", uint32(h.Mode&0o7777), 0); err != nil {
		return err
	}
	if err := setXattrs(h, func(n string, v []byte) error { return unix.Lsetxattr(procPath(fd, "."), n, v, 0) }); err != nil {
		return err
	}
	d.times = times(h)
	if d.alias {
		return unix.UtimesNanoAt(fd, ".", d.times, 0)
	}
	return nil
}

// setTimes sets the times of d and all below it.
func (u *unpacker) setTimes(d *dir) error {
	for _, c := range d.children {
		if err := u.setTimes(c); err != nil {
			return err
		}
	}
	if d.times == nil {
		return nil
	}
	fd, err := u.fdOf(d)
	if err == nil {
		err = unix.UtimesNanoAt(fd, ".", d.times, 0)
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil // removed by another name
	}
	if err != nil {
		return fmt.Errorf("times of directory %.300q: %w: %w", d.name, err, errdefs.ErrInternal)
	}
	return nil
}
