package embedded

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

// launch says how a script's process is made.
type launch struct {
	clone  uintptr  // CLONE_NEWPID or 0
	pidNS  *os.File // PID namespace to be born in; nil: the caller's
	cgroup *os.File // cgroup v2 directory to be born in; nil: the script joins
	stdio  [3]*os.File
}

// scriptError is a system call of a script that failed.
type scriptError struct {
	record
}

func (e *scriptError) Error() string { return e.name + ": " + e.errno.Error() }
func (e *scriptError) Unwrap() error { return e.errno }

// child is a process that runs a script.
type child struct {
	oci.Process
	s      *script
	status *os.File
}

// agentTime bounds what a seccomp agent may take to let the program start.
const agentTime = 30 * time.Second

// message is what a child tells on its status pipe.
type message struct {
	kind  int // msgHold, msgFilter, msgSched; 0: the script is done
	value int
}

// spawn starts a process with the script. The caller follows it with next.
func (r *Runtime) spawn(s *script, l launch) (*child, error) {
	s.do("end of start program", unix.SYS_EXIT_GROUP, 126)
	prog, err := programFile(s.image())
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	status, statusW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("status pipe: %w", err)
	}
	fds := make([]uintptr, 0, int(s.program())+1+len(s.files))
	for _, f := range l.stdio {
		fds = append(fds, f.Fd())
	}
	for _, f := range s.extra {
		fds = append(fds, f.Fd())
	}
	fds = append(fds, statusW.Fd(), prog.Fd())
	for _, f := range s.files {
		fds = append(fds, f.Fd())
	}
	pidfd := -1
	attr := &syscall.ProcAttr{Files: fds, Env: []string{}, Sys: &syscall.SysProcAttr{Cloneflags: l.clone, PidFD: &pidfd}}
	if l.cgroup != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(l.cgroup.Fd())
	}
	pid, err := r.fork(fmt.Sprintf("/proc/self/fd/%d", s.program()), attr, l.pidNS)
	runtime.KeepAlive(s)
	runtime.KeepAlive(l)
	statusW.Close()
	if err != nil {
		status.Close()
		return nil, err
	}
	return &child{Process: oci.Process{Pid: pid, PidFD: os.NewFile(uintptr(pidfd), "pidfd")}, s: s, status: status}, nil
}

// next waits for the child's next message. After an error the child is killed
// and reaped.
func (c *child) next() (message, error) {
	var b [recordSize]byte
	for {
		n, err := io.ReadFull(c.status, b[:msgSize])
		if err == io.EOF {
			c.status.Close()
			return message{}, nil
		}
		kind, value := binary.LittleEndian.Uint64(b[:]), int(binary.LittleEndian.Uint64(b[8:]))
		switch {
		case err != nil:
			return message{}, c.fail(fmt.Errorf("start program: status of %d bytes: %w", n, err))
		case kind == msgPid:
			if err := c.become(value); err != nil {
				return message{}, c.fail(err)
			}
		case kind <= maxMessage:
			if kind == msgFilter {
				// An agent that does not answer for execve must not hold the caller for ever.
				_ = c.status.SetReadDeadline(time.Now().Add(agentTime)) // a pipe takes one
			}
			return message{int(kind), value}, nil
		default:
			_, err := io.ReadFull(c.status, b[msgSize:])
			var rec record
			if err == nil {
				rec, err = parseRecord(b[:], c.s.names, 0)
			}
			if err == nil {
				err = &scriptError{rec}
			}
			return message{}, c.fail(err)
		}
	}
}

// become follows a script into the process pid that it went on in, a child of
// ours like its first one, which ends.
func (c *child) become(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("pidfd of %d: %w", pid, err)
	}
	first := c.Process
	c.Process = oci.Process{Pid: pid, PidFD: os.NewFile(uintptr(fd), "pidfd")}
	return abandon(first)
}

// fail ends the child and returns err with what else went wrong.
func (c *child) fail(err error) error {
	return errors.Join(err, abandon(c.Process), c.status.Close())
}

// finish waits for the end of a script that does not wait itself.
func (c *child) finish() (oci.Process, error) {
	m, err := c.next()
	if err != nil {
		return oci.Process{}, err
	}
	if m.kind != 0 {
		return oci.Process{}, c.fail(fmt.Errorf("start program: message %d at its end", m.kind))
	}
	return c.Process, nil
}

// abandon kills and reaps a process that is not handed to the caller.
func abandon(p oci.Process) error {
	err := unix.PidfdSendSignal(int(p.PidFD.Fd()), unix.SIGKILL, nil, 0)
	if err == unix.ESRCH {
		err = nil
	}
	_, werr := kernel.Reap(p.Pid)
	if werr == unix.ECHILD {
		werr = nil // the caller's own reaper was faster
	}
	return errors.Join(err, werr, p.PidFD.Close())
}

// fork makes the process; path resolves in the child, after its fds are in
// place. A PID namespace is joined by the forking thread: it takes effect on
// children only, and is set back for the thread's next user.
func (r *Runtime) fork(path string, attr *syscall.ProcAttr, pidNS *os.File) (int, error) {
	if pidNS == nil {
		return forkExec(path, attr)
	}
	type result struct {
		pid int
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(pidNS.Fd()), unix.CLONE_NEWPID); err != nil {
			runtime.UnlockOSThread()
			done <- result{0, fmt.Errorf("join pid namespace: %w", err)}
			return
		}
		pid, err := forkExec(path, attr)
		// Left locked, the thread dies with this goroutine.
		if unix.Setns(int(r.pidNS.Fd()), unix.CLONE_NEWPID) == nil {
			runtime.UnlockOSThread()
		}
		done <- result{pid, err}
	}()
	res := <-done
	return res.pid, res.err
}

func forkExec(path string, attr *syscall.ProcAttr) (int, error) {
	pid, err := syscall.ForkExec(path, []string{"berth-start"}, attr)
	if err != nil {
		return 0, fmt.Errorf("fork: %w", err)
	}
	return pid, nil
}
