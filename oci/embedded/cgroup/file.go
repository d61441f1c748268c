package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// readFile reads a small cgroup file without its final newline. Without package
// os, which would make the poller watch each of these files for a moment.
func readFile(path string) (string, error) {
	fail := func(err error) (string, error) {
		return "", fmt.Errorf("cgroup: %w", &fs.PathError{Op: "read", Path: path, Err: err})
	}
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(fd)
	var all []byte
	var b [4096]byte
	for {
		n, err := unix.Read(fd, b[:])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fail(err)
		case n == 0:
			return strings.TrimSpace(string(all)), nil
		}
		all = append(all, b[:n]...)
	}
}

func open(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// control is a cgroup file open for writing.
type control struct {
	fd   int
	path string
}

func openControl(path string) (control, error) {
	fd, err := open(path, unix.O_WRONLY)
	if err != nil {
		return control{}, explain(fmt.Errorf("cgroup: open %s: %w", path, err))
	}
	return control{fd, path}, nil
}

func (c control) close() { unix.Close(c.fd) }

// write writes one value. The memory controller answers EINTR when the Go
// runtime's preemption signal meets a reclaim; the write is repeated.
// An empty value, which empties a cpuset, is an empty line: no byte is no write.
func (c control) write(value string) error {
	if value == "" {
		value = "\n"
	}
	for {
		_, err := unix.Write(c.fd, []byte(value))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return explain(fmt.Errorf("cgroup: write %q to %s: %w", value, c.path, err))
		}
		return nil
	}
}

func writeFile(path, value string) error {
	c, err := openControl(path)
	if err != nil {
		return err
	}
	defer c.close()
	return c.write(value)
}

// explain gives an error of the kernel its kind and, where there is one, the
// remedy. The error of the system call stays in the chain.
func explain(err error) error {
	var e unix.Errno
	if !errors.As(err, &e) {
		return err
	}
	switch e {
	case unix.EPERM, unix.EACCES, unix.EROFS:
		return fmt.Errorf("%w: the cgroup is not ours to change: run as root, have it delegated to this user (systemd: Delegate=yes), or leave out linux.cgroupsPath and its limits: %w", err, errdefs.ErrPermissionDenied)
	case unix.EINVAL, unix.ERANGE:
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	case unix.EBUSY:
		return fmt.Errorf("%w: in use: %w", err, errdefs.ErrFailedPrecondition)
	case unix.EOPNOTSUPP:
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}
