package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/durable"
)

// lockDir makes sure that one daemon works on a directory, which is the value of
// flag. The lock goes with the process, however it ends.
func lockDir(flag, dir string) (*os.File, error) {
	path := filepath.Join(dir, "berthd.lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s directory: %w", flag, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 16)
		n, _ := f.ReadAt(holder, 0)
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s directory %s is in use by another berthd (pid %s); stop it or choose another --%s: %w",
				flag, dir, strings.TrimSpace(string(holder[:n])), flag, errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	// On a full disk there is nobody's pid in it: who holds the lock is what counts.
	if err := errors.Join(f.Truncate(0), writeAt(f, fmt.Sprintf("%d\n", os.Getpid()))); err != nil && !durable.IsFull(err) {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}

func writeAt(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// listen opens the CRI socket. One that nobody answers on is left from a daemon
// that was killed, and is replaced; one that answers belongs to another daemon.
func listen(path string) (*socket, error) {
	l, id, err := bind(path)
	if err != nil {
		return nil, err
	}
	return &socket{path: path, l: l, id: id}, nil
}

// bind makes the file of the socket, with whose identity it returns.
func bind(path string) (*net.UnixListener, os.FileInfo, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, nil, fmt.Errorf("socket directory: %w", err)
	}
	stale, err := staleSocket(path)
	if err != nil {
		return nil, nil, err
	}
	if stale {
		if err := os.Remove(path); err != nil {
			return nil, nil, fmt.Errorf("stale socket: %w", err)
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, nil, fmt.Errorf("socket %s: %w", path, err)
	}
	// Whoever can connect is root on this node.
	err = os.Chmod(path, 0o660)
	id, serr := os.Lstat(path)
	if err = errors.Join(err, serr); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("socket: %w", err), l.Close())
	}
	return l, id, nil
}

// staleSocket says whether a socket is at path that nobody answers on. One that
// answers, and a file that is no socket, are errors.
func staleSocket(path string) (bool, error) {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("socket: %w", err)
	case st.Mode().Type() != fs.ModeSocket:
		return false, fmt.Errorf("socket %s exists and is not a socket; remove it or choose another --socket: %w", path, errdefs.ErrFailedPrecondition)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return false, fmt.Errorf("socket %s: another daemon answers on it; stop it or choose another --socket: %w", path, errdefs.ErrFailedPrecondition)
	}
	return true, nil
}
