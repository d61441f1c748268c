package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/dirlock"
)

// lockDir makes sure that one daemon works on a directory, which is the value of
// flag. The lock goes with the process, however it ends.
func lockDir(flag, dir string) (*os.File, error) {
	f, err := dirlock.Take(dir)
	var held *dirlock.HeldError
	switch {
	case errors.As(err, &held):
		return nil, fmt.Errorf("%s %w; stop it or choose another --%s: %w", flag, err, flag, errdefs.ErrFailedPrecondition)
	case err != nil:
		return nil, fmt.Errorf("%s directory: %w", flag, err)
	}
	return f, nil
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
