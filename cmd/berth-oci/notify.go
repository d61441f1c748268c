package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// notifier passes the readiness of a program (sd_notify(3)) on to the service
// manager that runs berth-oci. The manager takes messages from processes of the
// service only, and its socket is not in the container.
type notifier struct {
	host string // the service manager's socket; "@..." is an abstract one
	dir  string // holds the socket that the container gets
	sock int    // -1 before listen
}

const (
	notifyDir  = "notify" // in the container's directory
	notifyName = "notify.sock"
	notifyIn   = "/run/notify" // where the container has it
)

// newNotifier returns nil where nobody wants to be notified.
func newNotifier(stateDir string) *notifier {
	host := os.Getenv("NOTIFY_SOCKET")
	if host == "" {
		return nil
	}
	return &notifier{host: host, dir: filepath.Join(stateDir, notifyDir), sock: -1}
}

// offer puts the socket's directory into the container, and its name into the environment.
func (n *notifier) offer(s *specs.Spec) error {
	if n == nil {
		return nil
	}
	if err := os.Mkdir(n.dir, 0o755); err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	s.Mounts = append(s.Mounts, specs.Mount{
		Destination: notifyIn, Type: "bind", Source: n.dir, Options: []string{"bind", "nosuid", "noexec", "nodev", "ro"},
	})
	s.Process.Env = append(s.Process.Env, "NOTIFY_SOCKET="+filepath.Join(notifyIn, notifyName))
	return nil
}

// listen makes the socket. It comes before the program runs, which may notify at once.
func (n *notifier) listen() error {
	if n == nil {
		return nil
	}
	dir, err := os.Open(n.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil // created by somebody who was not to notify
	}
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	defer dir.Close()
	at := filepath.Join(n.dir, notifyName)
	if err := os.Remove(at); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: socket: %w", err)
	}
	// By the directory's descriptor: the path may be longer than an address.
	err = unix.Bind(sock, &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), notifyName)})
	if err == nil {
		err = os.Chmod(at, 0o777) // the program may be any user
	}
	if err != nil {
		unix.Close(sock)
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	n.sock = sock
	return nil
}

// forward waits until the program says READY=1 or ends, and tells the service
// manager, naming main as the service's main process.
func (n *notifier) forward(main int, pidfd *os.File) error {
	if n == nil || n.sock < 0 {
		return nil
	}
	defer unix.Close(n.sock)
	for {
		p := []unix.PollFd{{Fd: int32(n.sock), Events: unix.POLLIN}, {Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && err != unix.EINTR {
			return fmt.Errorf("NOTIFY_SOCKET: poll: %w", err)
		}
		ready, err := n.read()
		if err != nil {
			return err
		}
		if ready {
			return n.tell(main)
		}
		if p[1].Revents != 0 {
			return nil
		}
	}
}

// read takes one message. Nothing of it goes on but that the program is ready:
// the container is not to speak for the whole service.
func (n *notifier) read() (ready bool, err error) {
	b := make([]byte, 4096)
	k, _, err := unix.Recvfrom(n.sock, b, 0)
	if err == unix.EAGAIN || err == unix.EINTR {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("NOTIFY_SOCKET: receive: %w", err)
	}
	for line := range bytes.Lines(b[:k]) {
		if string(bytes.TrimSpace(line)) == "READY=1" {
			return true, nil
		}
	}
	return false, nil
}

// barrierWait is how long the service manager may take to answer.
const barrierWait = 30 * time.Second

// tell says that the service is ready, and waits until that was read: berth-oci
// may end right afterwards, and who is gone cannot be told apart.
func (n *notifier) tell(main int) error {
	to := &unix.SockaddrUnix{Name: n.host}
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: socket: %w", err)
	}
	defer unix.Close(s)
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	defer r.Close()
	for _, m := range []string{"READY=1\n", "MAINPID=" + strconv.Itoa(main) + "\n"} {
		if err := unix.Sendto(s, []byte(m), 0, to); err != nil {
			w.Close()
			return fmt.Errorf("NOTIFY_SOCKET %s: %w", n.host, err)
		}
	}
	err = unix.Sendmsg(s, []byte("BARRIER=1"), unix.UnixRights(int(w.Fd())), to, 0)
	w.Close()
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET %s: %w", n.host, err)
	}
	if err := r.SetReadDeadline(time.Now().Add(barrierWait)); err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	_, _ = r.Read(make([]byte, 1)) // its end is the answer; an older manager never gives it
	return nil
}
