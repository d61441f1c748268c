package embedded

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

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

// run starts a process with the script and returns when the script is done:
// the user's program runs, or an error is reported and the process is reaped.
func (r *Runtime) run(s *script, l launch) (oci.Process, error) {
	s.do("end of start program", unix.SYS_EXIT_GROUP, 126)
	prog, err := programFile(s.image())
	if err != nil {
		return oci.Process{}, err
	}
	defer prog.Close()
	status, statusW, err := os.Pipe()
	if err != nil {
		return oci.Process{}, fmt.Errorf("status pipe: %w", err)
	}
	defer status.Close()
	fds := make([]uintptr, 0, firstFD+len(s.files))
	for _, f := range l.stdio {
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
	pid, err := r.fork(attr, l.pidNS)
	runtime.KeepAlive(s)
	runtime.KeepAlive(l)
	statusW.Close()
	if err != nil {
		return oci.Process{}, err
	}
	p := oci.Process{Pid: pid, PidFD: os.NewFile(uintptr(pidfd), "pidfd")}
	b, err := io.ReadAll(io.LimitReader(status, recordSize))
	if err == nil && len(b) == 0 {
		return p, nil
	}
	if err == nil {
		var rec record
		if rec, err = s.parse(b); err == nil {
			err = &scriptError{rec}
		}
	}
	return oci.Process{}, errors.Join(err, abandon(p))
}

// abandon kills and reaps a process that is not handed to the caller.
func abandon(p oci.Process) error {
	err := unix.PidfdSendSignal(int(p.PidFD.Fd()), unix.SIGKILL, nil, 0)
	if err == unix.ESRCH {
		err = nil
	}
	for {
		_, werr := unix.Wait4(p.Pid, nil, 0, nil)
		if werr != unix.EINTR {
			return errors.Join(err, werr, p.PidFD.Close())
		}
	}
}

// programPath resolves in the child, after its fds are in place.
const programPath = "/proc/self/fd/4"

// fork makes the process. A PID namespace is joined by the forking thread:
// it takes effect on children only, and is set back for the thread's next user.
func (r *Runtime) fork(attr *syscall.ProcAttr, pidNS *os.File) (int, error) {
	if pidNS == nil {
		return forkExec(attr)
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
		pid, err := forkExec(attr)
		// Left locked, the thread dies with this goroutine.
		if unix.Setns(int(r.pidNS.Fd()), unix.CLONE_NEWPID) == nil {
			runtime.UnlockOSThread()
		}
		done <- result{pid, err}
	}()
	res := <-done
	return res.pid, res.err
}

func forkExec(attr *syscall.ProcAttr) (int, error) {
	pid, err := syscall.ForkExec(programPath, []string{"berth-start"}, attr)
	if err != nil {
		return 0, fmt.Errorf("fork: %w", err)
	}
	return pid, nil
}
