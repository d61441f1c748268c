package kernel

import (
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"testing"
	"time"

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
