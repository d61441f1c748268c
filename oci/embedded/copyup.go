package embedded

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// Bounds of a copy: what it costs is decided by the image (invariant I7). Bytes
// are bounded by the tmpfs.
const (
	maxCopyDepth   = 128
	maxCopyEntries = 1 << 20
	maxXattr       = 64 << 10 // the kernel's limit of a value and of the list of names
)

// copier copies one tree. No name is used twice for one object: each is opened
// once as O_PATH, without following links or crossing mounts, and everything is
// then read through that descriptor. So a tree that changes meanwhile yields a
// mixture of its states, but nothing that is not in it.
type copier struct {
	proc    *os.File // a procfs of our own, to open an O_PATH descriptor for reading
	to      int      // root of the copy
	links   map[inode]string
	entries int
	buf     []byte
}

type inode struct{ dev, ino uint64 }

// copyUp copies the content of the directory from into the empty directory to,
// and from's own mode, owner, times and extended attributes, for the mount option
// "tmpcopyup". from may be below an image's root and to a new tmpfs that nobody
// else sees; both may be O_PATH. Sockets are left out, and device nodes where we
// may not make any. A mount point below from is an error.
func copyUp(from, to *os.File) error {
	proc, err := kernel.NewFS("proc", nil, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return fmt.Errorf("tmpcopyup: %w", err)
	}
	defer proc.Close()
	dst, err := openBeneath(int(to.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("tmpcopyup: open the tmpfs: %w", err)
	}
	defer dst.Close()
	src, err := openBeneath(int(from.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("tmpcopyup: open the directory: %w", err)
	}
	defer src.Close()
	c := copier{proc: proc, to: int(dst.Fd()), links: map[inode]string{}, buf: make([]byte, 128<<10)}
	err = c.dir(src, dst, "", 0)
	if err == nil {
		err = c.finishDir(src, dst, int(dst.Fd()), ".")
	}
	if errors.Is(err, unix.ENOSPC) {
		err = fmt.Errorf("%w; the tmpfs is full, raise its mount options size or nr_inodes: %w", err, errdefs.ErrResourceExhausted)
	}
	if err != nil {
		return fmt.Errorf("tmpcopyup: %w", err)
	}
	return nil
}

// openBeneath opens one name of a directory. The last component may be a symlink
// only for O_PATH.
func openBeneath(dir int, name string, flags int) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_NOFOLLOW | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	for {
		fd, err := unix.Openat2(dir, name, &how)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}

var errMountPoint = errors.New("is a mount point")

// openEntry opens a name as O_PATH, whatever it is. EXDEV says that it is a mount
// point, or that it was moved out of the directory just when it had been found.
func openEntry(dir int, name string) (*os.File, error) {
	for try := 0; ; try++ {
		f, err := openBeneath(dir, name, unix.O_PATH)
		if err != unix.EXDEV || try == 1000 {
			return f, err
		}
		var st unix.Statx_t
		err = unix.Statx(dir, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE, &st)
		if err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
			return nil, errMountPoint
		}
	}
}

// reopen opens the object of an O_PATH descriptor: that object, whatever its name
// leads to by now.
func (c *copier) reopen(f *os.File, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(c.proc.Fd()), "self/fd/"+strconv.Itoa(int(f.Fd())), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// dir copies the entries of src, whose path below the root is rel.
func (c *copier) dir(src, dst *os.File, rel string, depth int) error {
	if depth > maxCopyDepth {
		return invalid("%q: more than %d directories deep", rel, maxCopyDepth)
	}
	for {
		names, err := src.Readdirnames(256)
		for _, name := range names {
			if c.entries++; c.entries > maxCopyEntries {
				return invalid("more than %d files", maxCopyEntries)
			}
			path := name
			if rel != "" {
				path = rel + "/" + name
			}
			if err := c.entry(src, dst, name, path, depth); err != nil {
				return err
			}
		}
		if err == io.EOF || errors.Is(err, unix.ENOENT) { // ENOENT: removed meanwhile
			return nil
		}
		if err != nil {
			return fmt.Errorf("%q: read directory: %w", rel, err)
		}
	}
}

// entry copies one name of src. A name that is gone meanwhile, or that the
// directory lists twice because it changes, is no error.
func (c *copier) entry(src, dst *os.File, name, path string, depth int) error {
	f, err := openEntry(int(src.Fd()), name)
	switch {
	case err == unix.ENOENT:
		return nil
	case err == errMountPoint:
		return invalid("%q: %w; mount the tmpfs before it", path, err)
	case err != nil:
		return fmt.Errorf("%q: %w", path, err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFSOCK {
		return nil
	}
	key := inode{uint64(st.Dev), st.Ino}
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		if first, ok := c.links[key]; ok {
			if err := unix.Linkat(c.to, first, int(dst.Fd()), name, 0); err != nil && err != unix.EEXIST {
				return fmt.Errorf("%q: hard link to %q: %w", path, first, err)
			}
			return nil
		}
	}
	switch kind {
	case unix.S_IFDIR:
		err = c.subdir(f, dst, name, path, depth)
	case unix.S_IFREG:
		err = c.regular(f, dst, name, &st)
	case unix.S_IFLNK:
		err = symlink(f, dst, name, &st)
	default:
		err = node(dst, name, &st)
	}
	switch {
	case err == unix.EEXIST, err == errNotPermitted:
		return nil
	case err != nil && kind == unix.S_IFDIR:
		return err // names its path
	case err != nil:
		return fmt.Errorf("%q: %w", path, err)
	}
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		c.links[key] = path
	}
	return nil
}

func (c *copier) subdir(f, dst *os.File, name, path string, depth int) error {
	if err := unix.Mkdirat(int(dst.Fd()), name, 0o700); err != nil {
		if err == unix.EEXIST {
			return err
		}
		return fmt.Errorf("%q: mkdir: %w", path, err)
	}
	from, err := c.reopen(f, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	defer from.Close()
	to, err := openBeneath(int(dst.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	defer to.Close()
	if err := c.dir(from, to, path, depth+1); err != nil {
		return err
	}
	if err := c.finishDir(from, to, int(dst.Fd()), name); err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	return nil
}

// finishDir sets what filling a directory changes or could be stopped by.
func (c *copier) finishDir(from, to *os.File, parent int, name string) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(from.Fd()), &st); err != nil {
		return err
	}
	return c.finish(from, to, parent, name, &st)
}

// finish gives to, the entry name of parent, the attributes of from. Each step
// undoes part of the ones after it: a new owner clears set-id bits and
// capabilities, and all of them touch the time.
func (c *copier) finish(from, to *os.File, parent int, name string, st *unix.Stat_t) error {
	if err := unix.Fchown(int(to.Fd()), int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("owner: %w", err)
	}
	if err := unix.Fchmod(int(to.Fd()), st.Mode&0o7777); err != nil {
		return fmt.Errorf("mode: %w", err)
	}
	if err := c.xattrs(from, to); err != nil {
		return err
	}
	return setTimes(parent, name, st)
}

func setTimes(parent int, name string, st *unix.Stat_t) error {
	if err := unix.UtimesNanoAt(parent, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("times: %w", err)
	}
	return nil
}

func (c *copier) regular(f, dst *os.File, name string, st *unix.Stat_t) error {
	// O_NONBLOCK: a lease that somebody holds would make the open wait.
	from, err := c.reopen(f, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return err
	}
	defer from.Close()
	fd, err := unix.Openat(int(dst.Fd()), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	to := os.NewFile(uintptr(fd), name)
	defer to.Close()
	if err := c.content(from, to, st.Size); err != nil {
		return err
	}
	return c.finish(from, to, int(dst.Fd()), name, st)
}

// content copies the first size bytes, leaving holes as they are. A file that
// grows or shrinks meanwhile comes out with that size.
func (c *copier) content(from, to *os.File, size int64) error {
	if err := unix.Ftruncate(int(to.Fd()), size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(from.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO { // a hole to the end
			return nil
		}
		if err != nil {
			data = at // no filesystem to ask
		}
		end, err := unix.Seek(int(from.Fd()), data, unix.SEEK_HOLE)
		if err != nil || end <= data {
			end = size
		}
		for at = data; at < min(end, size); {
			n, err := from.ReadAt(c.buf[:min(int64(len(c.buf)), min(end, size)-at)], at)
			if n > 0 {
				if _, err := to.WriteAt(c.buf[:n], at); err != nil {
					return err
				}
				at += int64(n)
			}
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func symlink(f, dst *os.File, name string, st *unix.Stat_t) error {
	target := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(f.Fd()), "", target)
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(string(target[:n]), int(dst.Fd()), name); err != nil {
		return err
	}
	return ownNode(dst, name, st)
}

var errNotPermitted = errors.New("device nodes may not be made here")

// node makes a device node or a FIFO; neither is ever opened.
func node(dst *os.File, name string, st *unix.Stat_t) error {
	err := unix.Mknodat(int(dst.Fd()), name, st.Mode, int(st.Rdev))
	if err == unix.EPERM {
		return errNotPermitted
	}
	if err != nil {
		return err
	}
	if err := ownNode(dst, name, st); err != nil {
		return err
	}
	// After the owner, and despite our umask. What we have just made is no link.
	if err := unix.Fchmodat(int(dst.Fd()), name, st.Mode&0o7777, 0); err != nil {
		return fmt.Errorf("mode: %w", err)
	}
	return nil
}

func ownNode(dst *os.File, name string, st *unix.Stat_t) error {
	if err := unix.Fchownat(int(dst.Fd()), name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("owner: %w", err)
	}
	return setTimes(int(dst.Fd()), name, st)
}

// xattrs copies the attributes that belong to the content. Labels of security
// modules come from the mount; trusted.* is the host's business.
func (c *copier) xattrs(from, to *os.File) error {
	n, err := unix.Flistxattr(int(from.Fd()), c.buf[:maxXattr])
	if err == unix.EOPNOTSUPP {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list extended attributes: %w", err)
	}
	kept := []string{"security.capability", "system.posix_acl_access", "system.posix_acl_default"}
	for name := range strings.SplitSeq(string(c.buf[:n]), "\x00") {
		if !strings.HasPrefix(name, "user.") && !slices.Contains(kept, name) {
			continue
		}
		n, err := unix.Fgetxattr(int(from.Fd()), name, c.buf[:maxXattr])
		if err == unix.ENODATA || err == unix.EOPNOTSUPP {
			continue
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		// A tmpfs takes user.* since Linux 6.6, and ACLs if it was built for them.
		if err := unix.Fsetxattr(int(to.Fd()), name, c.buf[:n], 0); err != nil && err != unix.EOPNOTSUPP {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}
