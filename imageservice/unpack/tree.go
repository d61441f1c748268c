package unpack

import (
	"container/list"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxOpenDirs bounds the directory descriptors that one unpacking keeps.
const maxOpenDirs = 256

// dir is a directory of the layer. Its descriptor, when open, was reached from
// the root one component at a time without following links, so a name used
// relative to it cannot leave the layer (invariant I1).
type dir struct {
	parent   *dir
	name     string
	children map[string]*dir
	fd       int // -1 while closed
	elem     *list.Element
	refs     int             // files being written into it
	times    []unix.Timespec // to set at the end: filling a directory changes them
	alias    bool            // reached through a link of the layer; not part of the tree
}

// openRoot opens the directory that the layer is built in.
func (u *unpacker) openRoot(path string) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("layer directory: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	u.root = &dir{fd: fd}
	return nil
}

// closeDirs closes every descriptor.
func (u *unpacker) closeDirs() {
	u.dropAliases()
	for e := u.open.Front(); e != nil; e = u.open.Front() {
		u.shut(e.Value.(*dir))
	}
	if u.root != nil {
		_ = unix.Close(u.root.fd)
		u.root.fd = -1
	}
}

func (u *unpacker) shut(d *dir) {
	_ = unix.Close(d.fd)
	d.fd = -1
	u.open.Remove(d.elem)
	d.elem = nil
}

// fdOf returns d's descriptor, opening it again when it was closed to save room.
func (u *unpacker) fdOf(d *dir) (int, error) {
	if d.fd >= 0 {
		if d.elem != nil {
			u.open.MoveToFront(d.elem)
		}
		return d.fd, nil
	}
	pfd, err := u.fdOf(d.parent)
	if err != nil {
		return -1, err
	}
	fd, err := openDirAt(pfd, d.name)
	if err != nil {
		return -1, fmt.Errorf("directory %q: %w", d.name, err)
	}
	u.keep(d, fd)
	return fd, nil
}

func openDirAt(pfd int, name string) (int, error) {
	return retry(func() (int, error) {
		return unix.Openat(pfd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	})
}

func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// keep remembers an open descriptor and closes the ones unused for longest.
func (u *unpacker) keep(d *dir, fd int) {
	d.fd = fd
	d.elem = u.open.PushFront(d)
	u.mu.Lock()
	defer u.mu.Unlock()
	for e := u.open.Back(); u.open.Len() > maxOpenDirs && e != nil && e != d.elem; {
		old := e.Value.(*dir)
		e = e.Prev()
		if old.refs == 0 {
			u.shut(old)
		}
	}
}

// child returns the directory name in d, which may be new to the cache; nil
// when there is none.
func (u *unpacker) child(d *dir, name string) (*dir, error) {
	if c := d.children[name]; c != nil {
		return c, nil
	}
	pfd, err := u.fdOf(d)
	if err != nil {
		return nil, err
	}
	fd, err := openDirAt(pfd, name)
	switch {
	case err == unix.ENOENT:
		return nil, nil
	case err != nil:
		return nil, err // ENOTDIR also for a link
	}
	return u.adopt(d, name, fd), nil
}

func (u *unpacker) adopt(d *dir, name string, fd int) *dir {
	if d.alias {
		return u.newAlias(fd)
	}
	c := &dir{parent: d, name: name}
	if d.children == nil {
		d.children = map[string]*dir{}
	}
	d.children[name] = c
	u.keep(c, fd)
	return c
}

// lookup finds the directory at a cleaned relative path. With create, missing
// ones are made: a tar need not list the parents of its entries.
func (u *unpacker) lookup(path string, create bool) (*dir, error) {
	d := u.root
	if path == "." || path == "" {
		return d, nil
	}
	for rest := path; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		c := d.children[name]
		if c == nil {
			if err := u.settle(d, name); err != nil {
				return nil, err
			}
			var err error
			c, err = u.child(d, name)
			if err == unix.ENOTDIR || err == unix.ELOOP {
				return u.throughLink(path, create)
			}
			if err != nil {
				return nil, err
			}
		}
		if c == nil {
			if !create {
				return nil, unix.ENOENT
			}
			var err error
			if c, err = u.makeDir(d, name); err != nil {
				return nil, err
			}
		}
		d = c
	}
	return d, nil
}

// newAlias holds a directory that was reached through a link, for one entry.
func (u *unpacker) newAlias(fd int) *dir {
	d := &dir{fd: fd, alias: true}
	u.aliases = append(u.aliases, d)
	return d
}

// dropAliases ends what the last entry needed.
func (u *unpacker) dropAliases() {
	for _, d := range u.aliases {
		_ = unix.Close(d.fd)
	}
	u.aliases = u.aliases[:0]
}

// throughLink resolves a path with a symbolic link among its directories, the
// link taken as inside a root of its own. The result is not cached by name.
func (u *unpacker) throughLink(path string, create bool) (*dir, error) {
	if err := u.drain(); err != nil {
		return nil, err
	}
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	var missing []string
	for {
		fd, err := retry(func() (int, error) { return unix.Openat2(u.root.fd, path, &how) })
		if err == unix.EAGAIN {
			continue
		}
		if err == unix.ENOENT && create {
			i := strings.LastIndexByte(path, '/')
			if i < 0 {
				return nil, fmt.Errorf("parent %q is a link to nothing: %w", path, errdefs.ErrInvalidArgument)
			}
			missing = append(missing, path[i+1:])
			path = path[:i]
			continue
		}
		if err == unix.ENOTDIR || err == unix.ELOOP {
			return nil, fmt.Errorf("parent %q is not a directory: %w", path, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return nil, err
		}
		d := u.newAlias(fd)
		for i := len(missing) - 1; i >= 0; i-- {
			// The missing name may itself be a dangling link: mkdir then says EEXIST.
			if d, err = u.makeDir(d, missing[i]); err != nil {
				return nil, fmt.Errorf("parent %q: %w", missing[i], err)
			}
		}
		return d, nil
	}
}

// makeDir makes a directory that has no entry of its own (yet).
func (u *unpacker) makeDir(d *dir, name string) (*dir, error) {
	pfd, err := u.fdOf(d)
	if err != nil {
		return nil, err
	}
	if err := unix.Mkdirat(pfd, name, 0o755); err != nil {
		return nil, err
	}
	// The process' umask took part in the mode.
	if err := unix.Fchmodat(pfd, name, 0o755, 0); err != nil {
		return nil, err
	}
	u.count(4096)
	fd, err := openDirAt(pfd, name)
	if err != nil {
		return nil, err
	}
	return u.adopt(d, name, fd), nil
}

// forget drops a directory and everything below it from the cache.
func (u *unpacker) forget(c *dir) {
	for _, g := range c.children {
		u.forget(g)
	}
	if c.fd >= 0 && c.elem != nil {
		u.shut(c)
	}
	if c.parent != nil {
		delete(c.parent.children, c.name)
	}
}

// remove deletes what is at name in d, of whatever kind, and what is below it.
func (u *unpacker) remove(d *dir, name string) error {
	if err := u.drain(); err != nil {
		return err
	}
	if c := d.children[name]; c != nil {
		u.forget(c)
	}
	pfd, err := u.fdOf(d)
	if err != nil {
		return err
	}
	if d.alias {
		// It may be cached by its other name, and finding that out would cost a walk
		// of the cache for each such entry.
		var st unix.Stat_t
		if err := unix.Fstatat(pfd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return fmt.Errorf("directory replaced through a link: %w", errdefs.ErrInvalidArgument)
		}
	}
	return u.removeAt(pfd, name)
}

// removeAt deletes depth first. The depth is bounded by the path length that an
// entry may have; each level holds one descriptor.
func (u *unpacker) removeAt(pfd int, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(pfd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	u.uncount(&st)
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return unix.Unlinkat(pfd, name, 0)
	}
	fd, err := unix.Openat(pfd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	names, err := f.Readdirnames(-1)
	for _, n := range names {
		if err == nil {
			err = u.removeAt(fd, n)
		}
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return unix.Unlinkat(pfd, name, unix.AT_REMOVEDIR)
}
