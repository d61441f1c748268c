package supervisor

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// process is the first one of a container, or an exec: a child of ours, or of a
// supervisor that is gone.
type process struct {
	pid     int
	pidfd   *os.File // non-blocking; open until the exit is published
	foreign bool     // not our child: its supervisor is gone
	// console is our duplicate of the pty master, for resizing; nil without a terminal.
	console *os.File
	reaped  atomic.Pointer[wire.Exit] // how it ended, from the moment on at which nobody else can tell
	done    chan struct{}             // closed after the exit was published
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
	if e := p.reaped.Load(); e != nil { // by the program before this one
		return *e
	}
	// An error means that the pidfd is not pollable (it always is since Linux 5.3):
	// the wait below blocks a thread instead.
	_ = waitReadable(p.pidfd, unix.POLLIN)
	if ws, err := p.status(c); err == nil {
		p.ended(ws)
	}
	if e := p.reaped.Load(); e != nil {
		return *e
	}
	// Somebody else reaped it; the code is lost.
	return wire.Exit{Pid: p.pid, Code: 255, Unknown: true, FinishedAt: time.Now().UTC()}
}

// ended notes how the process ended.
func (p *process) ended(ws unix.WaitStatus) {
	e := &wire.Exit{Pid: p.pid, FinishedAt: time.Now().UTC()}
	if ws.Signaled() {
		e.Signal = int(ws.Signal())
		e.Code = 128 + e.Signal
	} else {
		e.Code = ws.ExitStatus()
	}
	p.reaped.CompareAndSwap(nil, e)
}

// reapTime is how long whoever got a foreign process as its child may take to reap it.
const reapTime = 30 * time.Second

// status returns how the process, which has ended, ended.
func (p *process) status(c *children) (ws unix.WaitStatus, err error) {
	if !p.foreign {
		return c.wait(p.pid, p.ended)
	}
	deadline := time.Now().Add(reapTime)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		var ok, reaped bool
		// Asked in this order: what is read of a zombie counts if it was not reaped then.
		zombie, isZombie := kernel.ZombieStatus(p.pid)
		cerr := control(p.pidfd, func(fd int) error {
			ws, ok, err = kernel.ExitStatus(fd)
			reaped = unix.PidfdSendSignal(fd, 0, nil, 0) == unix.ESRCH
			return nil
		})
		switch {
		case cerr != nil:
			return 0, cerr
		case ok:
			return ws, nil
		case isZombie && !reaped && tracing():
			return zombie, nil
		case reaped && err != nil, time.Now().After(deadline):
			return 0, fmt.Errorf("process %d was reaped by another: %w", p.pid, errors.Join(err, errdefs.ErrNotFound))
		}
		time.Sleep(pause)
	}
}

// tracing tells whether we have CAP_SYS_PTRACE.
var tracing = sync.OnceValue(func() bool {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	return unix.Capget(&h, &d[0]) == nil && d[0].Effective&(1<<unix.CAP_SYS_PTRACE) != 0
})

func (p *process) close() {
	_ = p.pidfd.Close()
	if p.console != nil {
		_ = p.console.Close()
	}
}

func (p *process) resize(w, h uint16) error {
	if p == nil || p.console == nil {
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
