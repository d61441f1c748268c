// Package dirlock makes sure that one program at a time works on a directory of
// Berth's: the daemon, or `berth fsck` while none runs. The lock goes with the
// process, however it ends.
package dirlock

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/durable"
)

// Name is the lock file's name in the directory.
const Name = "berthd.lock"

// HeldError says that another process has the lock.
type HeldError struct {
	// Dir is the directory and Holder the process id that the file names.
	Dir, Holder string
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("directory %s is in use by another berthd (pid %s)", e.Dir, e.Holder)
}

// Take locks dir for a program that changes it, and names the process in the file.
// It fails with a *HeldError when another has the lock.
func Take(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, Name), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lock(f, dir); err != nil {
		return nil, err
	}
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	// On a full disk there is nobody's pid in it: who holds the lock is what counts.
	if err != nil && !durable.IsFull(err) {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
	}
	return f, nil
}

// Hold keeps others from taking the lock and changes nothing on disk. In a directory
// where no lock was ever taken there is nothing to hold, and the file is nil.
func Hold(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, Name), os.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := lock(f, dir); err != nil {
		return nil, err
	}
	return f, nil
}

// lock locks f, or closes it.
func lock(f *os.File, dir string) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return nil
	}
	holder := make([]byte, 16)
	n, _ := f.ReadAt(holder, 0)
	_ = f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return &HeldError{Dir: dir, Holder: strings.TrimSpace(string(holder[:n]))}
	}
	return fmt.Errorf("lock %s: %w", filepath.Join(dir, Name), err)
}
