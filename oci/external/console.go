package external

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// consoleTime bounds the wait for a terminal after the command that sends it has
// ended well: it is in the socket by then.
const consoleTime = 5 * time.Second

// consoleSocket is where a runtime sends the master of the terminal that it made
// in the container.
type consoleSocket struct {
	fd   int
	path string
	name string // relative to the bundle
}

// listenConsole makes the socket. It is bound through the folder's descriptor:
// the whole path may be longer than a socket's address.
func listenConsole(dir, name string) (_ *consoleSocket, err error) {
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	s := &consoleSocket{fd: fd, path: filepath.Join(dir, name), name: name}
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: "/proc/self/fd/" + strconv.Itoa(int(d.Fd())) + "/" + name})
	if err == nil {
		err = unix.Listen(fd, 1)
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("console socket: %w", err)
	}
	return s, nil
}

func (s *consoleSocket) close() {
	_ = unix.Close(s.fd)
	_ = os.Remove(s.path)
}

// receive takes the terminal out of the socket, checks that it is one (invariant
// I3) and sets its size, which not every runtime does; size may be nil.
func (s *consoleSocket) receive(size *specs.Box) (*os.File, error) {
	deadline := time.Now().Add(consoleTime)
	if err := readable(s.fd, deadline); err != nil {
		return nil, err
	}
	conn, _, err := unix.Accept4(s.fd, unix.SOCK_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	defer unix.Close(conn)
	if err := readable(conn, deadline); err != nil {
		return nil, err
	}
	name, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*4))
	_, n, _, _, err := unix.Recvmsg(conn, name, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	var fds []int
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	for _, m := range msgs {
		if got, e := unix.ParseUnixRights(&m); e == nil {
			fds = append(fds, got...)
		}
	}
	if err == nil && len(fds) == 1 {
		if _, err = unix.IoctlGetInt(fds[0], unix.TIOCGPTN); err == nil {
			if size != nil {
				_ = unix.IoctlSetWinsize(fds[0], unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(size.Height), Col: uint16(size.Width)})
			}
			return os.NewFile(uintptr(fds[0]), "pty"), nil
		}
	}
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
	return nil, fmt.Errorf("console socket: %d descriptors came, want the master of one terminal (%v)", len(fds), err)
}

// readable waits until fd can be read.
func readable(fd int, deadline time.Time) error {
	for {
		f := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(f, max(1, int(time.Until(deadline).Milliseconds())))
		switch {
		case n > 0:
			return nil
		case err != nil && err != unix.EINTR:
			return fmt.Errorf("console socket: poll: %w", err)
		case time.Now().After(deadline):
			return fmt.Errorf("console socket: no terminal was sent: %w", os.ErrDeadlineExceeded)
		}
	}
}
