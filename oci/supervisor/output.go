package supervisor

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/supervisor/crilog"
)

const readBuffer = 64 << 10

// buffers are taken only while there is something to read: an idle container
// costs a parked goroutine, not a buffer.
var buffers = sync.Pool{New: func() any { b := make([]byte, readBuffer); return &b }}

// pollable wraps a descriptor of our own in a File that waits in epoll. The
// open file description becomes non-blocking, so it must not be one that a
// container writes to.
func pollable(fd int, name string) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// dup duplicates f without changing its mode.
func dup(f *os.File) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	var nfd int
	var derr error
	if err := raw.Control(func(fd uintptr) { nfd, derr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) }); err != nil {
		return -1, err
	}
	if derr != nil {
		return -1, fmt.Errorf("%s: dup: %w", f.Name(), derr)
	}
	return nfd, nil
}

// dupFile is dup to a File in the same mode.
func dupFile(f *os.File) (*os.File, error) {
	fd, err := dup(f)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// dupPollable is dup to a non-blocking File.
func dupPollable(f *os.File) (*os.File, error) {
	fd, err := dup(f)
	if err != nil {
		return nil, err
	}
	return pollable(fd, f.Name())
}

// control calls f with the descriptor of file.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := raw.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// waitReadable parks until poll(2) reports any event on f.
func waitReadable(f *os.File, events int16) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: events}}
		n, err := unix.Poll(p, 0)
		return n > 0 || err != nil && err != unix.EINTR
	})
}

// output reads one output stream of a container into its log and its attachers.
type output struct {
	number int // 0 stdout (or the terminal), 1 stderr
	file   *os.File
	log    *crilog.Stream // nil: not logged
	done   chan struct{}
}

// run reads until the end of the stream or the deadline set by stop.
func (o *output) run(deliver func(stream int, p []byte)) error {
	defer close(o.done)
	if o.log != nil {
		defer o.log.End()
	}
	raw, err := o.file.SyscallConn()
	if err != nil {
		return err
	}
	for {
		var buf *[]byte
		var n int
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			b := buffers.Get().(*[]byte)
			for {
				n, rerr = unix.Read(int(fd), *b)
				if rerr != unix.EINTR {
					break
				}
			}
			if rerr == unix.EAGAIN {
				buffers.Put(b)
				return false
			}
			buf = b
			return true
		})
		if buf != nil {
			if n > 0 {
				p := (*buf)[:n]
				if o.log != nil {
					o.log.Write(p)
				}
				deliver(o.number, p)
			}
			buffers.Put(buf)
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, os.ErrClosed):
			return nil
		case err != nil:
			return err
		case rerr == unix.EIO: // a terminal whose last slave was closed
			return nil
		case rerr != nil:
			return rerr
		case n == 0:
			return nil
		}
	}
}

// stop lets run read what is there, for at most d.
func (o *output) stop(d time.Duration) {
	_ = o.file.SetReadDeadline(time.Now().Add(d))
	<-o.done
	_ = o.file.Close()
}

// pipe makes a pipe whose end ours is non-blocking; the container's end is not,
// since O_NONBLOCK belongs to the open file description and programs do not expect it.
func pipe(name string, weWrite bool) (ours, theirs *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("%s pipe: %w", name, err)
	}
	own, other := p[0], p[1]
	if weWrite {
		own, other = p[1], p[0]
	}
	ours, err = pollable(own, name)
	if err != nil {
		_ = unix.Close(other)
		return nil, nil, err
	}
	return ours, os.NewFile(uintptr(other), name), nil
}

// isStream tells whether f is a pipe, fifo or socket.
func isStream(f *os.File) bool {
	is := false
	_ = control(f, func(fd int) error {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		kind := st.Mode & syscall.S_IFMT
		is = kind == syscall.S_IFIFO || kind == syscall.S_IFSOCK
		return nil
	})
	return is
}
