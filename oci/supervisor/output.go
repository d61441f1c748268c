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

const (
	readBuffer    = 64 << 10
	terminalHolds = 128 << 10             // no less than the kernel buffers of a terminal
	memoryRetry   = 20 * time.Millisecond // when there is no memory for what is to be read
)

// buffers are for output that is not logged. They are taken only while there is
// something to read: an idle container costs a parked goroutine, not a buffer.
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

// run reads until the end of the stream or the deadline set by stopOutputs.
func (o *output) run(deliver func(stream int, p []byte)) error {
	defer close(o.done)
	if o.log != nil {
		o.log.Write() // what a former supervisor has left
		defer o.log.End()
	}
	raw, err := o.file.SyscallConn()
	if err != nil {
		return err
	}
	for {
		n, err := o.next(raw.Read, deliver)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return o.drain(raw, deliver)
		case errors.Is(err, os.ErrClosed):
			return nil
		case err == unix.ENOMEM || err == unix.ENOSPC: // all of it is still in the pipe
			time.Sleep(memoryRetry)
		case err != nil || n == 0:
			return err
		}
	}
}

// next reads once and passes on what came: 0 is the end of the stream. access is
// raw.Read, or raw.Control in order not to wait: then nothing to read is EAGAIN.
func (o *output) next(access func(func(fd uintptr) bool) error, deliver func(stream int, p []byte)) (n int, err error) {
	var p []byte
	var buf *[]byte
	var rerr error
	err = access(func(fd uintptr) bool {
		if o.log != nil {
			p, rerr = o.log.Receive(int(fd))
		} else {
			p, buf, rerr = read(int(fd))
		}
		return rerr != unix.EAGAIN
	})
	if len(p) > 0 {
		if o.log != nil {
			o.log.Write()
		}
		deliver(o.number, p)
	}
	if buf != nil {
		buffers.Put(buf)
	}
	if err == nil && rerr != unix.EIO { // EIO: a terminal whose last slave was closed
		err = rerr
	}
	return len(p), err
}

// read reads what is not logged, into a buffer of the pool.
func read(fd int) ([]byte, *[]byte, error) {
	b := buffers.Get().(*[]byte)
	for {
		n, err := unix.Read(fd, *b)
		switch {
		case err == unix.EINTR:
			continue
		case n <= 0:
			buffers.Put(b)
			return nil, nil, err
		}
		return (*b)[:n], b, nil
	}
}

// drain reads what is in the pipe after the deadline: a log disk that stalled
// until then must not cost the container's last lines. It never waits, and it
// takes no more than a pipe holds, or a process that goes on writing would keep
// it for ever.
func (o *output) drain(raw syscall.RawConn, deliver func(stream int, p []byte)) error {
	left := terminalHolds
	_ = control(o.file, func(fd int) error {
		size, err := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0)
		if err == nil {
			left = size
		}
		return err
	})
	for left > 0 {
		n, err := o.next(func(f func(uintptr) bool) error { return raw.Control(func(fd uintptr) { f(fd) }) }, deliver)
		switch {
		case err == unix.EAGAIN, errors.Is(err, os.ErrClosed):
			return nil
		case err != nil || n == 0:
			return err
		}
		left -= n
	}
	return nil
}

// stopOutputs lets the outputs read on for at most d together, then what is in
// their pipes. It reports whether they have ended within stuck after that: one
// whose log disk does not answer has not.
func stopOutputs(outputs []*output, d, stuck time.Duration) bool {
	deadline := time.Now().Add(d)
	for _, o := range outputs {
		_ = o.file.SetReadDeadline(deadline)
	}
	limit := time.NewTimer(d + stuck)
	defer limit.Stop()
	for _, o := range outputs {
		select {
		case <-o.done:
		case <-limit.C:
			return false
		}
	}
	return true
}

// closeOutputs waits for the end of the outputs, as long as it takes, and closes them.
func closeOutputs(outputs []*output) {
	for _, o := range outputs {
		<-o.done
		_ = o.file.Close()
	}
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
