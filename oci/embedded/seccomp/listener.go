package seccomp

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// sendTime bounds the delivery of a listener: an agent that does not take it
// must not hold up the start of a container for ever.
const sendTime = 5 * time.Second

// maxSunPath is the longest path of a unix socket, without the closing NUL.
const maxSunPath = 107

// TakeFD duplicates descriptor n of a process (pidfd_getfd(2), Linux 5.6). It
// needs ptrace access to the process. The result is close-on-exec.
func TakeFD(pidfd *os.File, n int) (*os.File, error) {
	var fd int
	err := control(pidfd, func(p int) (err error) {
		fd, err = unix.PidfdGetfd(p, n, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("pidfd_getfd: descriptor %d of the process: %w", n, err)
	}
	return os.NewFile(uintptr(fd), "seccomp listener"), nil
}

// SendListener connects to the agent's socket and sends it the state with the
// listener (runtime-spec, "The Container Process State"): one message on a
// connection of its own, within 5 seconds. It sets st.Fds. listener stays the
// caller's: close it, so that notified calls fail with ENOSYS when the agent ends.
func SendListener(socket string, listener *os.File, st specs.ContainerProcessState) error {
	return sendBy(time.Now().Add(sendTime), socket, listener, st)
}

func sendBy(limit time.Time, socket string, listener *os.File, st specs.ContainerProcessState) error {
	st.Fds = []string{specs.SeccompFdName}
	text, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("seccomp agent: state: %w", err)
	}
	conn, err := dial(socket, limit)
	if err != nil {
		return fmt.Errorf("linux.seccomp.listenerPath %q: failed to connect with seccomp agent specified in the seccomp profile: %w", socket, err)
	}
	defer conn.Close()
	if err := send(conn, text, listener); err != nil {
		return fmt.Errorf("linux.seccomp.listenerPath %q: the agent did not take the listener: %w", socket, unavailable(err))
	}
	return nil
}

// dial connects. The kernel never lets a non-blocking connect to a unix socket
// wait: while the backlog is full it is refused and has to be tried again.
func dial(socket string, limit time.Time) (*os.File, error) {
	if !path.IsAbs(socket) || len(socket) > maxSunPath {
		return nil, fmt.Errorf("want an absolute path of at most %d bytes: %w", maxSunPath, errdefs.ErrInvalidArgument)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	conn := os.NewFile(uintptr(fd), socket)
	if err := conn.SetWriteDeadline(limit); err != nil {
		_ = conn.Close()
		return nil, err
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket})
		if err == nil {
			return conn, nil
		}
		if err != unix.EAGAIN && err != unix.EINTR || time.Now().After(limit) {
			_ = conn.Close()
			return nil, unavailable(err)
		}
		time.Sleep(pause)
	}
}

// send writes text; the listener rides with its first byte.
func send(conn *os.File, text []byte, listener *os.File) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	return control(listener, func(fd int) error {
		rights := unix.UnixRights(fd)
		var serr error
		err := raw.Write(func(c uintptr) bool {
			for len(text) > 0 {
				n, err := unix.SendmsgN(int(c), text, rights, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
				switch err {
				case nil:
					text, rights = text[n:], nil
				case unix.EINTR:
				case unix.EAGAIN:
					return false
				default:
					serr = err
					return true
				}
			}
			return true
		})
		return errors.Join(err, serr)
	})
}

// unavailable gives an errno of a missing or stuck agent its kind.
func unavailable(err error) error {
	for _, e := range []error{unix.ENOENT, unix.ECONNREFUSED, unix.EAGAIN, unix.EPIPE, unix.ECONNRESET, os.ErrDeadlineExceeded} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w; is the agent running?: %w", err, errdefs.ErrUnavailable)
		}
	}
	return err
}

// control calls f with the descriptor of file, which cannot be closed meanwhile.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	err = raw.Control(func(fd uintptr) { ferr = f(int(fd)) })
	return errors.Join(err, ferr)
}
