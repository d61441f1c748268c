package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watchDir sends on changed after entries of dir changed. It ends when ctx
// does. A dir that does not exist (yet, or any more) is looked for every retry.
func watchDir(ctx context.Context, dir string, retry time.Duration, changed chan<- struct{}) {
	for ctx.Err() == nil {
		_ = watchOnce(ctx, dir, changed)
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
}

// watchOnce watches dir until it vanishes or ctx ends.
func watchOnce(ctx context.Context, dir string, changed chan<- struct{}) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify") // non-blocking: Close ends a Read
	defer f.Close()
	const mask = unix.IN_CREATE | unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	if _, err := unix.InotifyAddWatch(fd, dir, mask|unix.IN_ONLYDIR); err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	notify := func() {
		select {
		case changed <- struct{}{}:
		default: // one is pending
		}
	}
	notify() // what changed before the watch was set
	var buf [4096]byte
	for {
		if _, err := f.Read(buf[:]); err != nil {
			return err
		}
		notify()
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
}
