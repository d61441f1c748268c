package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Explain adds to an error of a full disk which file system is full and what is
// left there, and makes it errdefs.ErrResourceExhausted. Any other error comes
// back as it is.
func Explain(err error) error {
	if !IsFull(err) {
		return err
	}
	var path string
	var pe *fs.PathError
	var le *os.LinkError
	switch {
	case errors.As(err, &pe):
		path = pe.Path
	case errors.As(err, &le):
		path = le.New
	}
	var st unix.Statfs_t
	at := mountOf(path)
	if at == "" || unix.Statfs(at, &st) != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	kib := func(blocks uint64) uint64 { return blocks * uint64(st.Bsize) >> 10 }
	return fmt.Errorf("%w (file system at %s: %d of %d KiB and %d of %d inodes are free; free some): %w",
		err, at, kib(st.Bavail), kib(st.Blocks), st.Ffree, st.Files, errdefs.ErrResourceExhausted)
}

// IsFull says whether err comes from a file system without room for more bytes
// or files, or from a quota.
func IsFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// mountOf is where the file system of path, which need not exist, is mounted; ""
// when that cannot be told.
func mountOf(path string) string {
	if !filepath.IsAbs(path) {
		return ""
	}
	for path = filepath.Clean(path); ; path = filepath.Dir(path) {
		var st unix.Statx_t
		err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &st)
		if path == "/" || err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
			return path
		}
	}
}

// IsShort says whether err comes from a want of descriptors or memory, which says
// nothing of the file: it may be whole, and be read a moment later.
func IsShort(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM)
}
