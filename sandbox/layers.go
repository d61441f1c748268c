package sandbox

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
)

// shards are the folders that the containers' writable layers are spread over,
// by the first digit of the id.
//
// ext4 makes a folder near its parent, and for minutes after an inode was
// deleted it looks at that inode again, and does not take it, each time it makes
// another one in the same block group. With all layers in one group a node that
// starts and removes a container a second pays 4 ms for each create. Folders of a
// "top" folder (chattr +T) are put into different groups; a fixed number of them
// keeps the cost of touching a new group out of the creates.
const shards = "0123456789abcdef"

func containersDir(root string) string  { return filepath.Join(root, "containers") }
func (e *Engine) containersDir() string { return containersDir(e.cfg.Root) }

// containerDir is where a container's writable layer is.
func (e *Engine) containerDir(c id.Container) string {
	return filepath.Join(e.containersDir(), string(c[:1]), string(c))
}

// makeShards makes the folders for writable layers.
func (e *Engine) makeShards() error {
	dir := e.containersDir()
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	if err := spreadFolders(dir); err != nil {
		return err
	}
	for _, s := range shards {
		if err := os.Mkdir(filepath.Join(dir, string(s)), 0o711); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// spreadFolders asks the file system to put the folders of dir far from each
// other. Only ext4 and its ancestors know how; others need not.
func spreadFolders(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil || flags&topDirFlag != 0 {
		return nil // a file system without flags
	}
	_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags|topDirFlag))
	return nil
}

const topDirFlag = 0x00020000 // FS_TOPDIR_FL
