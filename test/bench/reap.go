package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// reap runs a command as the child of a subreaper that collects every orphan at
// once. Runtimes leave orphans to the first process of the machine; where that
// one is slow to collect them, a runtime that looks whether a process is gone
// would be measured with that slowness.
//
// A command that is killed by SIGKILL is started again, as a service manager does;
// its children are ours meanwhile. It ends when no child is left. On SIGTERM or SIGINT it sees to that: it hands
// the signal on to the command, and once the command is gone ends what that left
// behind.
func reap(args []string) error {
	if len(args) < 1 {
		return errors.New("usage: bench reap COMMAND [ARGUMENT...]")
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("subreaper: %w", err)
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	told := make(chan os.Signal, 1)
	signal.Notify(told, os.Interrupt, unix.SIGTERM)
	r := &reaper{mainGone: make(chan struct{}), start: func() (int, error) {
		p, err := os.StartProcess(path, args, &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Env: os.Environ()})
		if err != nil {
			return 0, err
		}
		return p.Pid, nil
	}}
	if r.main, err = r.start(); err != nil {
		return err
	}
	done := make(chan struct{})
	var ending sync.WaitGroup
	ending.Go(func() {
		select {
		case <-told:
			r.end(done)
		case <-done:
		}
	})
	err = r.collect()
	close(done)
	ending.Wait()
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	return nil
}

// reaper holds mu while it collects a child, so that a pid seen under mu is that
// of the same process until mu is let go.
type reaper struct {
	start    func() (pid int, err error) // the command
	mainGone chan struct{}               // closed when the command has ended for good

	mu     sync.Mutex
	main   int  // guarded by mu
	ending bool // guarded by mu
}

// collect waits for children until there are none, and tells how main ended.
func (r *reaper) collect() error {
	var result error
	for {
		err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err == unix.EINTR {
			continue
		}
		if err == unix.ECHILD {
			return result
		}
		if err != nil {
			return err
		}
		r.mu.Lock()
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		main, again := err == nil && pid == r.main, false
		if main && ws.Signaled() && ws.Signal() == unix.SIGKILL && !r.ending {
			var pid int
			if pid, err = r.start(); err == nil {
				r.main, again = pid, true
			}
		}
		r.mu.Unlock()
		if !main || again {
			continue
		}
		close(r.mainGone)
		if ws.Signaled() {
			result = fmt.Errorf("ended by signal %v", ws.Signal())
		} else if ws.ExitStatus() != 0 {
			result = fmt.Errorf("exit status %d", ws.ExitStatus())
		}
	}
}

// end asks the command to end, gives it ten seconds, and then goes through all
// children: two seconds after SIGTERM they are killed. The children of a killed
// child become children here, so it goes on until done.
func (r *reaper) end(done <-chan struct{}) {
	r.mu.Lock()
	r.ending = true
	unix.Kill(r.main, unix.SIGTERM)
	r.mu.Unlock()
	select {
	case <-r.mainGone:
	case <-time.After(10 * time.Second):
	case <-done:
		return
	}
	r.signal(unix.SIGTERM)
	kill := time.Now().Add(2 * time.Second)
	for {
		select {
		case <-done:
			return
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(kill) {
			r.signal(unix.SIGKILL)
		}
	}
}

func (r *reaper) signal(sig unix.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, pid := range allPids() {
		if st, err := readStat(pid); err == nil && st.parent == os.Getpid() {
			unix.Kill(pid, sig)
		}
	}
}
