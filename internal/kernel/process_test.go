package kernel

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A process lives on however often the thread that asks is interrupted.
func TestExited(t *testing.T) {
	pidfd := -1
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &unix.SysProcAttr{PidFD: &pidfd, Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // the signals go to the thread that asks
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	defer func() { _ = cmd.Process.Kill() }()

	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, unix.SIGUSR2)
	defer signal.Stop(interrupts)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func(pid, tid int) {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Tgkill(pid, tid, unix.SIGUSR2)
			}
		}
	}(os.Getpid(), unix.Gettid())
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
		if gone, err := Exited(pidfd); gone || err != nil {
			t.Errorf("of a live process: %v, %v", gone, err)
			break
		}
	}
	close(stop)
	<-stopped

	_ = cmd.Process.Kill()
	if ws, err := Reap(cmd.Process.Pid); err != nil || ws.Signal() != unix.SIGKILL {
		t.Errorf("reap: %#x, %v", uint32(ws), err)
	}
	if gone, err := Exited(pidfd); !gone || err != nil {
		t.Errorf("of a dead process: %v, %v", gone, err)
	}
}

// TestExitStatus: how a process ended can be read by whoever holds its pidfd,
// first of the zombie and then, from Linux 6.15 on, of nothing at all.
func TestExitStatus(t *testing.T) {
	for script, want := range map[string]func(unix.WaitStatus) bool{
		"exit 0":      func(ws unix.WaitStatus) bool { return ws.Exited() && ws.ExitStatus() == 0 },
		"exit 42":     func(ws unix.WaitStatus) bool { return ws.Exited() && ws.ExitStatus() == 42 },
		"kill -9 $$":  func(ws unix.WaitStatus) bool { return ws.Signaled() && ws.Signal() == unix.SIGKILL },
		"kill -15 $$": func(ws unix.WaitStatus) bool { return ws.Signaled() && ws.Signal() == unix.SIGTERM },
	} {
		fd := -1
		pid, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", "sleep 0.05; " + script}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{PidFD: &fd}})
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := ZombieStatus(pid); ok {
			t.Errorf("%s: runs, but counts as a zombie", script)
		}
		if ws, ok, err := ExitStatus(fd); ok {
			t.Errorf("%s: runs, but has status %v (%v)", script, ws, err)
		}
		for gone := false; !gone; time.Sleep(time.Millisecond) {
			if gone, err = Exited(fd); err != nil {
				t.Fatal(err)
			}
		}
		if ws, ok := ZombieStatus(pid); !ok || !want(ws) {
			t.Errorf("%s: zombie with status %#x, %v", script, uint32(ws), ok)
		}
		if ws, ok, _ := ExitStatus(fd); ok {
			t.Errorf("%s: not reaped, but has status %v", script, ws)
		}
		if _, err := Reap(pid); err != nil {
			t.Fatal(err)
		}
		switch ws, ok, err := ExitStatus(fd); {
		case errors.Is(err, errdefs.ErrNotImplemented):
			t.Logf("this kernel does not tell: %v", err)
		case err != nil || !ok || !want(ws):
			t.Errorf("%s: status %#x, %v, %v", script, uint32(ws), ok, err)
		}
		unix.Close(fd)
	}
}

// TestExitStatusWhileReaped: whoever asks at the very moment at which somebody else
// reaps the process gets the status, or is told to ask again.
func TestExitStatusWhileReaped(t *testing.T) {
	for range 500 {
		fd := -1
		pid, err := syscall.ForkExec("/bin/true", []string{"true"}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{PidFD: &fd}})
		if err != nil {
			t.Fatal(err)
		}
		reaped := make(chan error, 1)
		go func() {
			_, err := Reap(pid)
			reaped <- err
		}()
		for ok := false; !ok; {
			_, known, err := ExitStatus(fd)
			if err != nil {
				if err := <-reaped; err != nil {
					t.Fatal(err)
				}
				if _, ok, _ := ExitStatus(fd); !ok {
					t.Skipf("this kernel does not tell: %v", err)
				}
				t.Fatalf("just being reaped: %v", err)
			}
			ok = known
		}
		if err := <-reaped; err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
}
