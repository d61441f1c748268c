package identity

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Bounds of what is read from an image (invariant I7).
const (
	maxFile  = 8 << 20 // bytes of /etc/passwd or /etc/group
	maxLinks = 40      // symlinks on one path, as the kernel's MAXSYMLINKS
)

// view is the merged tree of overlay layers, read without mounting it. Each
// directory of the merged tree is the list of the layers' directories that
// contribute to it, top to bottom.
type view struct {
	root []int // fds of the layer roots
}

// dir is one merged directory; it owns its fds unless it is the root.
type dir struct{ fds []int }

func (d dir) close() {
	for _, fd := range d.fds {
		unix.Close(fd)
	}
}

func openView(layers []string) (*view, error) {
	v := &view{}
	for _, l := range layers {
		fd, err := unix.Open(l, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			v.close()
			return nil, fmt.Errorf("image layer: %w", &fs.PathError{Op: "open", Path: l, Err: err})
		}
		v.root = append(v.root, fd)
	}
	return v, nil
}

func (v *view) close() { dir{v.root}.close() }

// readFile returns the content of the regular file at path in the merged tree.
// Symlinks are followed inside the tree and can never lead out of it: every
// component is opened by itself, without following links, from the fd of its
// parent (invariant I1). A missing file is fs.ErrNotExist.
func (v *view) readFile(path string) ([]byte, error) {
	stack := []dir{{v.root}}
	defer func() {
		for _, d := range stack[1:] {
			d.close()
		}
	}()
	rest := strings.Split(path, "/")
	links := 0
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(stack) > 1 { // ".." of the root is the root
				stack[len(stack)-1].close()
				stack = stack[:len(stack)-1]
			}
			continue
		}
		sub, leaf, err := stack[len(stack)-1].lookup(name)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", path, err)
		}
		if leaf == nil {
			stack = append(stack, sub)
			continue
		}
		if leaf.target == "" {
			if last(rest) {
				return readRegular(leaf.parent, name, path)
			}
			return nil, fmt.Errorf("image %s: %q is not a directory: %w", path, name, fs.ErrNotExist)
		}
		if links++; links > maxLinks {
			return nil, fmt.Errorf("image %s: more than %d symbolic links: %w", path, maxLinks, errdefs.ErrInvalidArgument)
		}
		if strings.HasPrefix(leaf.target, "/") {
			for _, d := range stack[1:] {
				d.close()
			}
			stack = stack[:1]
		}
		rest = append(strings.Split(leaf.target, "/"), rest...)
	}
	return nil, fmt.Errorf("image %s: a directory, not a regular file: %w", path, errdefs.ErrInvalidArgument)
}

func last(rest []string) bool {
	for _, r := range rest {
		if r != "" && r != "." {
			return false
		}
	}
	return true
}

// leaf is a merged entry that is no directory: the layer directory holding it,
// and where it points when it is a symlink.
type leaf struct {
	parent int
	target string
}

// lookup finds name in a merged directory as overlayfs does: the topmost entry
// decides; directories merge downwards until a whiteout, an opaque directory or
// an entry of another type hides what is below.
func (d dir) lookup(name string) (dir, *leaf, error) {
	var sub dir
	for _, parent := range d.fds {
		fd, err := openComponent(parent, name, unix.O_PATH|unix.O_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			sub.close()
			return dir{}, nil, fmt.Errorf("open %q: %w", name, err)
		}
		more, l, err := sub.add(fd, parent)
		unix.Close(fd)
		if err != nil {
			sub.close()
			return dir{}, nil, fmt.Errorf("open %q: %w", name, err)
		}
		if l != nil {
			return dir{}, l, nil
		}
		if !more {
			break
		}
	}
	if len(sub.fds) == 0 {
		return dir{}, nil, fs.ErrNotExist
	}
	return sub, nil, nil
}

// add merges the entry behind the O_PATH descriptor fd into d. more says that
// lower layers can still contribute; a leaf is returned when it is the result.
func (d *dir) add(fd, parent int) (more bool, l *leaf, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, nil, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		sub, err := openComponent(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return false, nil, err
		}
		d.fds = append(d.fds, sub)
		return !opaque(sub), nil, nil
	case unix.S_IFCHR:
		if st.Rdev == 0 { // a whiteout
			return false, nil, nil
		}
	case unix.S_IFLNK:
		if len(d.fds) > 0 {
			return false, nil, nil
		}
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(fd, "", buf)
		if err != nil {
			return false, nil, err
		}
		return false, &leaf{parent: parent, target: string(buf[:n])}, nil
	}
	if len(d.fds) > 0 { // hidden by a directory above it
		return false, nil, nil
	}
	return false, &leaf{parent: parent}, nil
}

func opaque(fd int) bool {
	var v [8]byte
	n, err := unix.Fgetxattr(fd, "trusted.overlay.opaque", v[:])
	return err == nil && string(v[:n]) == "y"
}

// openComponent opens one path element below parent.
func openComponent(parent int, name string, flags uint64) (int, error) {
	how := unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	for {
		fd, err := unix.Openat2(parent, name, &how)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		return fd, err
	}
}

// readRegular reads a regular file. O_NONBLOCK keeps a FIFO planted under the
// name from blocking the open (CVE-2024-9676).
func readRegular(parent int, name, path string) ([]byte, error) {
	fd, err := openComponent(parent, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		// ENXIO: a socket or a device without driver.
		return nil, fmt.Errorf("image %s: not a readable regular file: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", path, err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("image %s: not a regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	if st.Size() > maxFile {
		return nil, fmt.Errorf("image %s: larger than %d bytes: %w", path, maxFile, errdefs.ErrInvalidArgument)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", path, err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("image %s: larger than %d bytes: %w", path, maxFile, errdefs.ErrInvalidArgument)
	}
	return b, nil
}
