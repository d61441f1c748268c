// Package crilog writes container logs in the CRI log format, one record a line:
//
//	2006-01-02T15:04:05.000000000Z stdout F content
//
// A record tagged P is a part of a line that goes on in the stream's next
// record; the last part is tagged F. Content is kept byte for byte.
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

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
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

	mu   sync.Mutex
	file *os.File // nil after Close
	torn bool     // the file ends inside a record
}

// Open opens or makes the file (mode 0640, its directories 0755). A symlink or
// anything but a regular file at path is refused.
func Open(path string) (*Log, error) {
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	return &Log{file: f}, nil
}

func open(path string) (*os.File, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("log path %q: want an absolute path: %w", path, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("log directory: %w", err)
	}
	// O_NONBLOCK: opening a fifo that has no reader must not hang. It means
	// nothing for a regular file.
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, fmt.Errorf("log file: %w", &os.PathError{Op: "open", Path: path, Err: err})
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
		return nil, fmt.Errorf("log file %s: want a regular file: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Reopen lets later records go to path and closes the former file. It happens
// between two records, so the old and the new file together have every line
// once. When path cannot be opened the former file stays in use.
func (l *Log) Reopen(path string) error {
	f, err := open(path)
	if err != nil {
		return err
	}
	l.mu.Lock()
	if l.file == nil {
		l.mu.Unlock()
		return errors.Join(fmt.Errorf("log is closed: %w", errdefs.ErrFailedPrecondition), f.Close())
	}
	old := l.file
	l.file, l.torn = f, false
	l.mu.Unlock()
	return old.Close()
}

// Dropped returns how many bytes of records were given up because the file
// could not take them (disk full, quota, I/O error).
func (l *Log) Dropped() uint64 { return l.dropped.Load() }

// Close closes the file; what streams write later is dropped and counted.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	f := l.file
	l.file = nil
	return f.Close()
}

// write appends whole records.
func (l *Log) write(b []byte) {
	if len(b) == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		l.dropped.Add(uint64(len(b)))
		return
	}
	if l.torn { // end the broken record, or it would swallow the next one
		if _, err := l.file.Write([]byte{'\n'}); err != nil {
			l.dropped.Add(uint64(len(b)))
			return
		}
		l.torn = false
	}
	// os.File.Write goes on after a short write and after EINTR.
	n, err := l.file.Write(b)
	if err != nil {
		l.dropped.Add(uint64(len(b) - n))
		l.torn = n > 0 && b[n-1] != '\n'
	}
}
