package main

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/berth-runtime/berth/oci"
)

// attachment ties a process to the caller: its signals, its terminal, its exit
// code. A nil attachment is that of a detached process: the caller's stdio, as it is.
type attachment struct {
	signals chan os.Signal
	master  *os.File // of the process's terminal
	host    *os.File // the caller's terminal
	restore *term.State
	given   []*os.File // the process's ends of pipes, to be closed after its start
	outputs []output
}

// output is a stream being copied to the caller.
type output struct {
	from *os.File
	done chan struct{}
}

// attach starts to collect signals. As a subreaper it inherits the process's
// orphans where no PID namespace ends with it.
func attach(subreaper bool) *attachment {
	a := &attachment{signals: make(chan os.Signal, 256)}
	if subreaper {
		_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) // never fails since Linux 3.4
	}
	// Each signal costs a change of thread: the usual ones first, the rest while
	// the container is made.
	signal.Notify(a.signals, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2)
	go signal.Notify(a.signals)
	return a
}

// stdio is what the process gets for standard streams. The caller's own, except
// terminals: with one that it shares, a process could type for the caller (TIOCSTI).
func (a *attachment) stdio(terminal bool) (oci.Stdio, error) {
	own := [3]*os.File{os.Stdin, os.Stdout, os.Stderr}
	if terminal {
		return oci.Stdio{}, nil
	}
	if a == nil {
		return oci.Stdio{In: own[0], Out: own[1], Err: own[2]}, nil
	}
	for i, f := range own {
		if !term.IsTerminal(int(f.Fd())) {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			return oci.Stdio{}, fmt.Errorf("stdio: %w", err)
		}
		if i == 0 {
			own[i] = r
			// A read of a terminal cannot be called off: this one ends with berth-oci.
			go func() {
				_, _ = io.Copy(w, os.Stdin) // the process may not read, or be gone
				w.Close()
			}()
			a.given = append(a.given, r)
			continue
		}
		own[i] = w
		a.given = append(a.given, w)
		a.copyOut(f, r)
	}
	return oci.Stdio{In: own[0], Out: own[1], Err: own[2]}, nil
}

func (a *attachment) copyOut(to, from *os.File) {
	o := output{from, make(chan struct{})}
	a.outputs = append(a.outputs, o)
	go func() {
		defer close(o.done)
		_, _ = io.Copy(to, from) // a terminal ends with EIO, and nobody may be left to read
	}()
}

// console connects the process's terminal with the caller's.
func (a *attachment) console(p oci.Process) error {
	if a == nil {
		return nil
	}
	for _, f := range a.given {
		f.Close()
	}
	a.given = nil
	if p.Console == nil {
		return nil
	}
	a.master = p.Console
	// The line feeds are left to the caller's terminal, so that output that is
	// redirected has none of the terminal's.
	if err := changeTermios(p.Console, func(t *unix.Termios) { t.Oflag &^= unix.ONLCR }); err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	for _, f := range []*os.File{os.Stderr, os.Stdout, os.Stdin} {
		if term.IsTerminal(int(f.Fd())) {
			a.host = f
			break
		}
	}
	if a.host != nil {
		old, err := term.MakeRaw(int(a.host.Fd()))
		if err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
		a.restore = old
		if err := changeTermios(a.host, func(t *unix.Termios) { t.Oflag |= unix.OPOST }); err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
		a.resize()
	}
	go func() { _, _ = io.Copy(a.master, os.Stdin) }() // ends with berth-oci, as above
	a.copyOut(os.Stdout, a.master)
	return nil
}

func changeTermios(f *os.File, change func(*unix.Termios)) error {
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return err
	}
	change(t)
	return unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}

func (a *attachment) resize() {
	if a.master == nil || a.host == nil {
		return
	}
	if ws, err := unix.IoctlGetWinsize(int(a.host.Fd()), unix.TIOCGWINSZ); err == nil {
		_ = unix.IoctlSetWinsize(int(a.master.Fd()), unix.TIOCSWINSZ, ws) // the terminal may be gone
	}
}

// wait forwards signals until the process has ended and its output is copied,
// and returns its exit code: 128 + the signal that killed it.
func (a *attachment) wait(p oci.Process) (int, error) {
	go a.forward(p)
	var ws unix.WaitStatus
	for {
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		if err == unix.EINTR || err == nil && pid != p.Pid {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("wait: %w", err)
		}
		break
	}
	for _, o := range a.outputs {
		o.drain()
	}
	if ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return ws.ExitStatus(), nil
}

// drain waits for the rest of an output, but not for processes that were left
// behind with the stream and write nothing.
func (o output) drain() {
	idle := 0
	for idle < 3 {
		select {
		case <-o.done:
			return
		case <-time.After(10 * time.Millisecond):
		}
		p := []unix.PollFd{{Fd: int32(o.from.Fd()), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 0); err == nil && n == 0 {
			idle++
		} else {
			idle = 0
		}
	}
}

// forward passes signals on. By pidfd: the process may be reaped meanwhile.
func (a *attachment) forward(p oci.Process) {
	for s := range a.signals {
		switch s {
		case unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE: // ours: the child's end, the Go scheduler's, our output's
		case unix.SIGWINCH:
			a.resize()
		default:
			_ = unix.PidfdSendSignal(int(p.PidFD.Fd()), s.(unix.Signal), nil, 0) // it may have ended
		}
	}
}

// release gives the caller's terminal back. The signals end with the process.
func (a *attachment) release() {
	if a.restore != nil {
		_ = term.Restore(int(a.host.Fd()), a.restore) // it may have hung up
	}
}
