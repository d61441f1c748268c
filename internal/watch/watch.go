// Package watch tells of changes in a directory.
package watch

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long Dir waits for more after a change: changes come in
// crowds, and what is being deleted should not be looked at in the middle.
const settle = 50 * time.Millisecond

// Dir calls changed once, and then after changes of the entries of dir,
// until ctx ends or dir is gone or another one.
func Dir(ctx context.Context, dir string, changed func()) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify") // non-blocking: Close ends a Read
	defer f.Close()
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	const mask = unix.IN_CREATE | unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	watched, err := d.Stat()
	if err == nil {
		_, err = unix.InotifyAddWatch(fd, fmt.Sprintf("/proc/self/fd/%d", d.Fd()), mask)
	}
	d.Close() // who holds a directory open does not hear of its end
	if err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	var buf [4096]byte
	for {
		changed() // the first time for what changed before the watch was set
		now, err := os.Stat(dir)
		if err == nil && !os.SameFile(now, watched) {
			err = unix.ESTALE
		}
		if err != nil {
			return fmt.Errorf("watch %s: %w", dir, err)
		}
		n, err := f.Read(buf[:])
		if err != nil {
			return err
		}
		if ended(buf[:n]) { // a new one may have got its inode number
			return fmt.Errorf("watch %s: %w", dir, unix.ENOENT)
		}
		select {
		case <-time.After(settle):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ended says whether inotify events tell that the directory itself is gone.
func ended(events []byte) bool {
	for len(events) >= unix.SizeofInotifyEvent {
		mask := binary.NativeEndian.Uint32(events[4:])
		if mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_IGNORED|unix.IN_UNMOUNT) != 0 {
			return true
		}
		n := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		events = events[min(n, len(events)):]
	}
	return false
}
