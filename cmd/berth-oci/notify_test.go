package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// manager is a service manager's socket.
func manager(t *testing.T) (path string, next func() string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "n")
	s, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return path, func() string {
		t.Helper()
		b, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
		n, oobn, _, _, err := s.ReadMsgUnix(b, oob)
		if err != nil {
			t.Fatal(err)
		}
		if oobn > 0 { // the barrier's pipe: closing it is the answer
			msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
			if err != nil {
				t.Fatal(err)
			}
			fds, err := unix.ParseUnixRights(&msgs[0])
			if err != nil {
				t.Fatal(err)
			}
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
		return string(b[:n])
	}
}

func TestReadinessIsPassedOn(t *testing.T) {
	for _, how := range []string{"run --detach", "create and start", "run"} {
		t.Run(how, func(t *testing.T) {
			path, next := manager(t)
			b := newBench(t, "sleep")
			b.spec.Root.Readonly = false
			id := b.id()
			env := append(os.Environ(), "NOTIFY_SOCKET="+path)
			args := []string{"run", id}
			switch how {
			case "run --detach":
				args = []string{"run", "-d", id}
			case "create and start":
				c := b.command("create", id)
				c.Env = env
				b.finish(c).ok()
				args = []string{"start", id}
			}
			c := b.command(args...)
			c.Env = env
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			b.eventually("running", func() bool { return strings.Contains(b.do("state", id).out, `"running"`) })
			pid := b.state(id).Pid
			program, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
			if err != nil || !strings.Contains(string(program), "NOTIFY_SOCKET=/run/notify/notify.sock") {
				t.Fatalf("environment: %q %v", program, err)
			}
			// As the program would, through the container's root.
			to := fmt.Sprintf("/proc/%d/root/run/notify/notify.sock", pid)
			s, err := net.Dial("unixgram", to)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			for _, m := range []string{"STATUS=not for the manager\n", "MAINPID=1", "X=1\nREADY=1\n"} {
				if _, err := s.Write([]byte(m)); err != nil {
					t.Fatal(err)
				}
			}
			main := pid
			if how == "run" {
				main = c.Process.Pid
			}
			for _, want := range []string{"READY=1\n", fmt.Sprintf("MAINPID=%d\n", main), "BARRIER=1"} {
				if got := next(); got != want {
					t.Fatalf("the manager got %q, want %q", got, want)
				}
			}
			if how == "run" {
				b.do("kill", id, "KILL").ok()
				_ = c.Wait()
				return
			}
			if err := c.Wait(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestNobodyWaitsForAProgramThatEnds(t *testing.T) {
	path, _ := manager(t)
	b := newBench(t, "true")
	b.spec.Root.Readonly = false
	id := b.id()
	c := b.command("run", "-d", id)
	c.Env = append(os.Environ(), "NOTIFY_SOCKET="+path)
	b.finish(c).ok()
	b.status(id, "stopped")
}
