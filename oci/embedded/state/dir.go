// Package state keeps what the commands of berth-oci must know of each other's
// containers: one directory per container below a root, with the record of the
// container, the spec it was made from and the gate its first process waits at.
//
// The rules that make kill -9 of a command harmless: the record says what is
// going to be made before it is made; the directory goes last; and whether a
// container lives is read from the kernel, never from the record.
package state

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// fault is an error with the words that scripts written for runc look for.
type fault struct {
	text string
	kind error
}

func (f *fault) Error() string { return f.text }
func (f *fault) Unwrap() error { return f.kind }

// The faults of looking for a container.
var (
	ErrNotExist   error = &fault{"container does not exist", errdefs.ErrNotFound}
	ErrExist      error = &fault{"container with given ID already exists", errdefs.ErrAlreadyExists}
	ErrNotRunning error = &fault{"container not running", errdefs.ErrFailedPrecondition}
	ErrBusy       error = &fault{"another command is working on the container", errdefs.ErrUnavailable}
)

// maxID is what a container id may have in bytes.
const maxID = 1024

// ValidID checks that s is usable as one path element and as the name of a cgroup.
func ValidID(s string) error {
	bad := func(why string) error {
		return fmt.Errorf("invalid container ID format: %q: %s: %w", s, why, errdefs.ErrInvalidArgument)
	}
	switch {
	case s == "":
		return fmt.Errorf("container id cannot be empty: %w", errdefs.ErrInvalidArgument)
	case len(s) > maxID:
		return fmt.Errorf("invalid container ID format: %d characters, want at most %d: %w", len(s), maxID, errdefs.ErrInvalidArgument)
	case s == "." || s == "..":
		return bad("names a directory")
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == '_', c == '+', c == '-', c == '.':
		default:
			return bad("want letters, digits and _+-.")
		}
	}
	return nil
}

// Root is the directory that holds the containers' directories.
type Root string

// Dir is the directory of one container.
type Dir struct {
	ID   string
	Path string
	lock *os.File // the directory, with an exclusive flock; nil: not locked
}

// Create makes the directory of a new container and locks it. A directory
// without a record is what a killed Create left: it is taken over.
func (r Root) Create(id string) (*Dir, error) {
	if err := ValidID(id); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(string(r), 0o700); err != nil {
		return nil, fmt.Errorf("state root: %w", err)
	}
	d := &Dir{ID: id, Path: filepath.Join(string(r), id)}
	for {
		err := os.Mkdir(d.Path, 0o700)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			if errors.Is(err, unix.ENAMETOOLONG) {
				return nil, fmt.Errorf("invalid container ID format: too long for a file name: %w", errdefs.ErrInvalidArgument)
			}
			return nil, fmt.Errorf("state directory: %w", err)
		}
		if err != nil {
			if _, serr := os.Stat(filepath.Join(d.Path, recordFile)); serr == nil {
				return nil, fmt.Errorf("%s: %w", id, ErrExist)
			}
		}
		switch err := d.lockWithin(shortWait); {
		case errors.Is(err, ErrNotExist): // a delete came in between
			continue
		case errors.Is(err, ErrBusy):
			return nil, fmt.Errorf("%s: %w", id, ErrExist)
		case err != nil:
			return nil, err
		}
		if _, err := os.Stat(filepath.Join(d.Path, recordFile)); err == nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", id, ErrExist), d.Close())
		}
		if err := emptyDir(d.Path); err != nil {
			return nil, errors.Join(err, d.Close())
		}
		return d, nil
	}
}

// Open finds the directory of a container, without a lock.
func (r Root) Open(id string) (*Dir, error) {
	if err := ValidID(id); err != nil {
		return nil, err
	}
	d := &Dir{ID: id, Path: filepath.Join(string(r), id)}
	_, err := os.Lstat(d.Path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENAMETOOLONG) {
		return nil, fmt.Errorf("%s: %w", id, ErrNotExist)
	}
	return d, err
}

// List returns the containers' directories, without locks.
func (r Root) List() ([]*Dir, error) {
	entries, err := os.ReadDir(string(r))
	if err != nil {
		return nil, err
	}
	var out []*Dir
	for _, e := range entries {
		if e.IsDir() && ValidID(e.Name()) == nil {
			out = append(out, &Dir{ID: e.Name(), Path: filepath.Join(string(r), e.Name())})
		}
	}
	return out, nil
}

const (
	shortWait = 200 * time.Millisecond // longer than a reader holds the lock
	longWait  = 60 * time.Second
)

// Lock keeps other commands from making, starting or deleting the container
// until Close. The kernel lets go of it when the process dies. Commands that
// only look, signal, run a further process or change limits do not take it: a
// hook may call them while Create or Start holds it.
func (d *Dir) Lock() error { return d.lockWithin(longWait) }

func (d *Dir) lockWithin(wait time.Duration) error {
	deadline := time.Now().Add(wait)
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 20*time.Millisecond) {
		f, err := d.tryLock(unix.LOCK_EX)
		if err != unix.EWOULDBLOCK {
			d.lock = f
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %w; it holds %s", d.ID, ErrBusy, d.Path)
		}
		time.Sleep(pause)
	}
}

// tryLock opens the directory and locks what the name still means afterwards: a
// delete may have removed it, and a create made another, since it was opened.
func (d *Dir) tryLock(how int) (*os.File, error) {
	for {
		fd, err := unix.Open(d.Path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		switch err {
		case nil:
		case unix.EINTR:
			continue
		case unix.ENOENT:
			return nil, fmt.Errorf("%s: %w", d.ID, ErrNotExist)
		default:
			return nil, fmt.Errorf("state directory %s: %w", d.Path, err)
		}
		f := os.NewFile(uintptr(fd), d.Path)
		if err := unix.Flock(fd, how|unix.LOCK_NB); err != nil {
			f.Close()
			return nil, err
		}
		var held, named unix.Stat_t
		if err := unix.Fstat(fd, &held); err != nil {
			f.Close()
			return nil, err
		}
		if unix.Lstat(d.Path, &named) == nil && named.Ino == held.Ino && named.Dev == held.Dev {
			return f, nil
		}
		f.Close()
	}
}

// Busy reports whether a command holds the lock.
func (d *Dir) Busy() bool {
	f, err := d.tryLock(unix.LOCK_SH)
	if err == nil {
		f.Close()
	}
	return err == unix.EWOULDBLOCK
}

// LockLimits keeps other changes of limits away until the returned function is called.
func (d *Dir) LockLimits() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(d.Path, limitsFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: lock: %w", d.ID, err)
	}
	return func() { f.Close() }, nil
}

// Close lets go of the lock.
func (d *Dir) Close() error {
	if d.lock == nil {
		return nil
	}
	f := d.lock
	d.lock = nil
	return f.Close()
}

// Remove removes the directory, the record first: without it nothing of the
// container is left to find. The lock must be held.
func (d *Dir) Remove() error {
	err := os.Remove(filepath.Join(d.Path, recordFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := os.RemoveAll(d.Path); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

func emptyDir(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(path, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
