// Package crilog writes container logs in the CRI log format, one record a line:
//
//	2006-01-02T15:04:05.000000000Z stdout F content
//
// A record tagged P is a part of a line that goes on in the stream's next
// record; the last part is tagged F. Content is kept byte for byte.
//
// Bytes on their way to a log are in a lane (package lane), and each write says
// beforehand what it is about to do: a process that is killed at any moment leaves
// what the next one needs to go on with the very next byte (Adopt).
//
// Locks: a Log has one mutex around its file, held over one write(2). It
// belongs to one container, so a slow disk holds up that container alone.
package crilog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/supervisor/lane"
)

const (
	// MaxContent is the most bytes of content in one record, what the kubelet's reader expects.
	MaxContent = 16384

	batchSize = 256 << 10
	headerLen = len("2006-01-02T15:04:05.000000000Z stdout F ")
	maxRecord = headerLen + MaxContent + 1
)

// batches are output buffers: taken while bytes are formatted, never kept by an idle stream.
var batches = sync.Pool{New: func() any { b := make([]byte, 0, batchSize); return &b }}

// Log is one log file that the streams of a container share.
type Log struct {
	dropped atomic.Uint64

	mu     sync.Mutex
	file   *os.File // nil after Close, and while an adopted log cannot be opened
	closed bool
	torn   bool // the file ends inside a record
	end    ending
	left   *adopted // what is still to be done for Adopt
	last   [len(streamNames)]time.Time
}

// ending is where the file ends and what file it is.
type ending struct {
	lane.Write
	seen time.Time // when the kernel said so; zero: it has to be asked
}

// endKnown is how long we trust our own count of the file's size. Nobody else
// writes to it, but an administrator may truncate it.
const endKnown = 100 * time.Millisecond

// Open opens or makes the file (mode 0640, its directories 0755). A symlink or
// anything but a regular file at path is refused.
func Open(path string) (*Log, error) {
	f, err := open(path, unix.O_WRONLY)
	if err != nil {
		return nil, err
	}
	return &Log{file: f}, nil
}

func open(path string, mode int) (*os.File, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("log path %q: want an absolute path: %w", path, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("log directory: %w", err)
	}
	f, err := openRegular(unix.AT_FDCWD, path, mode|unix.O_CREAT)
	if err != nil {
		return nil, fmt.Errorf("log file: %w", err)
	}
	return f, nil
}

// openRegular opens a file to append to.
func openRegular(dir int, path string, mode int) (*os.File, error) {
	// O_NONBLOCK: opening a fifo that has no reader must not hang. It means
	// nothing for a regular file.
	fd, err := unix.Openat(dir, path, mode|unix.O_APPEND|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errdefs.ErrInvalidArgument
	}
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("%s: want a regular file: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Reopen lets later records go to path and closes the former file. It happens
// between two records, so the old and the new file together have every line
// once. When path cannot be opened the former file stays in use.
func (l *Log) Reopen(path string) error {
	f, err := open(path, unix.O_WRONLY)
	if err != nil {
		return err
	}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return errors.Join(fmt.Errorf("log is closed: %w", errdefs.ErrFailedPrecondition), f.Close())
	}
	l.finishLocked()
	old := l.file
	l.file, l.torn, l.end = f, false, ending{}
	l.mu.Unlock()
	if old == nil {
		return nil
	}
	return old.Close()
}

// Dropped returns how many bytes of records were given up because the file
// could not take them (disk full, quota, I/O error).
func (l *Log) Dropped() uint64 { return l.dropped.Load() }

// Close closes the file; what streams write later is dropped and counted.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.finishLocked()
	f := l.file
	l.file, l.closed = nil, true
	if f == nil {
		return nil
	}
	return f.Close()
}

// write appends out, the whole records of the first n bytes of the lane, and
// ends with these bytes done with, whether the file could take them or not.
func (l *Log) write(b *lane.Lane, n int, out []byte, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.wholeLocked() || !l.endLocked(at) {
		l.dropped.Add(uint64(len(out)))
		b.Skip(n)
		return
	}
	l.end.Time = at
	b.Arm(n, l.end.Write)
	written, err := writeFile(l.file, out)
	l.end.Size += int64(written)
	if err != nil {
		l.dropped.Add(uint64(len(out) - written))
		l.torn = written > 0 && out[written-1] != '\n'
		l.end.seen = time.Time{}
	}
	b.Commit()
}

// endLocked finds out where the file ends.
func (l *Log) endLocked(now time.Time) bool {
	if d := now.Sub(l.end.seen); d >= 0 && d < endKnown {
		return true
	}
	var st unix.Stat_t
	if unix.Fstat(int(l.file.Fd()), &st) != nil {
		return false
	}
	l.end = ending{Write: lane.Write{Dev: st.Dev, Ino: st.Ino, Size: st.Size}, seen: now}
	return true
}

// wholeLocked tells whether there is a file to write to, and ends a broken record
// in it, or it would swallow the next one.
func (l *Log) wholeLocked() bool {
	if l.file == nil {
		return false
	}
	if l.torn {
		if _, err := l.file.Write([]byte{'\n'}); err != nil {
			return false
		}
		l.torn, l.end.seen = false, time.Time{}
	}
	return true
}

// writeFile writes all of p; a test puts one in its place that is killed half-way.
// os.File.Write goes on after a short write and after EINTR.
var writeFile = (*os.File).Write
