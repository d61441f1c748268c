package kernel

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLinks is how many symlinks one path may hold, as in the kernel (ELOOP).
const maxLinks = 40

// MakeInRoot opens path below root with O_PATH, making what is missing:
// directories (mode 0755), and with dir false an empty file (mode 0644) at the
// end. Symlinks, dangling ones too, are followed inside root as a chrooted
// process would follow them; each step is taken on a pinned descriptor, so that
// a path changed meanwhile can not lead out of root (invariant I1).
func MakeInRoot(root *os.File, path string, dir bool) (*os.File, error) {
	flags := unix.O_PATH
	if dir {
		flags |= unix.O_DIRECTORY
	}
	f, err := OpenInRoot(root, path, flags, 0)
	if !errors.Is(err, unix.ENOENT) {
		return f, err
	}
	w := walker{stack: []int{int(root.Fd())}}
	defer w.close()
	fd, err := w.walk(path, dir)
	if err != nil {
		return nil, fmt.Errorf("make %q: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// walker is a path walk with its own ".." and symlinks. stack[0] is the root
// and is not the walker's to close.
type walker struct {
	stack []int
	links int
}

func (w *walker) close() {
	for _, fd := range w.stack[1:] {
		unix.Close(fd)
	}
	w.stack = w.stack[:1]
}

func (w *walker) walk(path string, dir bool) (int, error) {
	todo := elements(path)
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		if name == ".." {
			if n := len(w.stack); n > 1 {
				unix.Close(w.stack[n-1])
				w.stack = w.stack[:n-1]
			}
			continue
		}
		last := len(todo) == 0
		fd, mode, err := w.step(name, dir || !last)
		if err != nil {
			return -1, err
		}
		switch {
		case mode == unix.S_IFDIR:
			w.stack = append(w.stack, fd)
		case mode == unix.S_IFLNK:
			target, err := readlink(fd)
			unix.Close(fd)
			if w.links++; err == nil && w.links > maxLinks {
				err = unix.ELOOP
			}
			if err != nil {
				return -1, err
			}
			if strings.HasPrefix(target, "/") {
				w.close()
			}
			todo = append(elements(target), todo...)
		case last && !dir:
			return fd, nil
		default:
			unix.Close(fd)
			return -1, fmt.Errorf("%q: %w", name, unix.ENOTDIR)
		}
	}
	if !dir && len(w.stack) > 1 {
		return -1, unix.EISDIR
	}
	return unix.FcntlInt(uintptr(w.stack[len(w.stack)-1]), unix.F_DUPFD_CLOEXEC, 0)
}

// step opens one name in the current directory, making it if it is missing.
func (w *walker) step(name string, dir bool) (fd int, mode uint32, err error) {
	at := w.stack[len(w.stack)-1]
	for range 10 { // others may make and remove the name at the same time
		fd, err = unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == nil {
			var st unix.Stat_t
			if err := unix.Fstat(fd, &st); err != nil {
				unix.Close(fd)
				return -1, 0, err
			}
			return fd, st.Mode & unix.S_IFMT, nil
		}
		if err != unix.ENOENT {
			return -1, 0, fmt.Errorf("%q: %w", name, err)
		}
		if dir {
			err = unix.Mkdirat(at, name, 0o755)
		} else {
			err = unix.Mknodat(at, name, unix.S_IFREG|0o644, 0)
		}
		if err != nil && err != unix.EEXIST {
			return -1, 0, fmt.Errorf("%q: %w", name, err)
		}
	}
	return -1, 0, fmt.Errorf("%q: %w", name, unix.EAGAIN)
}

func readlink(fd int) (string, error) {
	var b [unix.PathMax]byte
	n, err := unix.Readlinkat(fd, "", b[:])
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

// elements splits a path, leaving out "" and ".".
func elements(path string) []string {
	var out []string
	for e := range strings.SplitSeq(path, "/") {
		if e != "" && e != "." {
			out = append(out, e)
		}
	}
	return out
}
