package supervisor

import (
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// process is a child of ours: the first one of a container, or an exec.
type process struct {
	pid   int
	pidfd *os.File // non-blocking; open until the exit is published
	// console is our duplicate of the pty master, for resizing; nil without a terminal.
	console *os.File
	done    chan struct{} // closed after the exit was published
}

// newProcess takes over what the runtime made. Until watch runs, the caller
// must see to it that p.Pid is among the known children.
func newProcess(p oci.Process) (*process, error) {
	fd, err := dupPollable(p.PidFD)
	if err != nil {
		return nil, err
	}
	_ = p.PidFD.Close()
	return &process{pid: p.Pid, pidfd: fd, done: make(chan struct{})}, nil
}

// signal sends to this process and no other, whatever became of its pid.
func (p *process) signal(sig int) error {
	err := control(p.pidfd, func(fd int) error { return unix.PidfdSendSignal(fd, unix.Signal(sig), nil, 0) })
	switch {
	case err == nil:
		return nil
	case err == unix.ESRCH || p.exited():
		return fmt.Errorf("process %d has exited: %w", p.pid, errdefs.ErrNotFound)
	case err == unix.EINVAL:
		return fmt.Errorf("signal %d: no such signal: %w", sig, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("process %d: signal %d: %w", p.pid, sig, err)
}

// published tells whether the exit was published.
func (p *process) published() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) exited() bool {
	if p.published() {
		return true
	}
	gone := false
	err := control(p.pidfd, func(fd int) (err error) {
		gone, err = kernel.Exited(fd)
		return err
	})
	return gone || err != nil
}

// wait parks until the process has ended, reaps it and returns its exit.
func (p *process) wait(c *children) wire.Exit {
	// An error means that the pidfd is not pollable (it always is since Linux 5.3):
	// the wait below blocks a thread instead.
	_ = waitReadable(p.pidfd, unix.POLLIN)
	e := wire.Exit{Pid: p.pid, Code: 255}
	ws, err := c.wait(p.pid)
	e.FinishedAt = time.Now().UTC()
	switch {
	case err != nil: // ECHILD: somebody else reaped it; the code is lost
	case ws.Signaled():
		e.Signal = int(ws.Signal())
		e.Code = 128 + e.Signal
	default:
		e.Code = ws.ExitStatus()
	}
	return e
}

func (p *process) close() {
	_ = p.pidfd.Close()
	if p.console != nil {
		_ = p.console.Close()
	}
}

func (p *process) resize(w, h uint16) error {
	if p.console == nil {
		return fmt.Errorf("process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	return control(p.console, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: h, Col: w})
	})
}

// exec is a further process of a container.
type exec struct {
	*process
	id    id.Exec
	owner *conn // gets the exit
}

// hangUp closes our end of the exec's terminal.
func (x *exec) hangUp() {
	if x.console != nil {
		_ = x.console.Close() // again when the process is reaped, to no effect
	}
}
