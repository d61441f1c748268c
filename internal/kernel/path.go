package kernel

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// OpenInRoot opens path below the directory root as a process chrooted there
// would, without following magic links: a symlink cannot lead out of root
// (invariant I1). flags are open(2) flags; O_CLOEXEC is added.
func OpenInRoot(root *os.File, path string, flags int, mode uint32) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	if flags&(unix.O_CREAT|unix.O_TMPFILE) != 0 {
		how.Mode = uint64(mode)
	}
	for {
		fd, err := unix.Openat2(int(root.Fd()), path, &how)
		switch err {
		case nil:
			return os.NewFile(uintptr(fd), path), nil
		case unix.EINTR, unix.EAGAIN: // EAGAIN: a rename raced with the resolution
			continue
		}
		return nil, fmt.Errorf("open %q below %q: %w", path, root.Name(), err)
	}
}
