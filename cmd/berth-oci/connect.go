package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
)

// connections are the unix sockets on which the caller wants descriptors of the process.
type connections struct {
	consolePath, pidfdPath string
	console, pidfd         *os.File
}

func (c *connections) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&c.consolePath, "console-socket", "", "unix socket that receives the terminal's master")
	cmd.Flags().StringVar(&c.pidfdPath, "pidfd-socket", "", "unix socket that receives a pidfd of the process")
}

// check tells whether the console has a place to go.
func (c *connections) check(terminal, detach bool) error {
	switch {
	case detach && terminal && c.consolePath == "":
		return errors.New("cannot allocate tty if berth-oci will detach without setting console socket: use --console-socket, or set process.terminal to false")
	case c.consolePath != "" && !(detach && terminal):
		return errors.New("cannot use console socket if berth-oci will not detach or allocate tty")
	}
	return nil
}

// open connects before anything is made, so that a wrong path costs nothing.
func (c *connections) open() (err error) {
	if c.consolePath != "" {
		if c.console, err = dial(c.consolePath); err != nil {
			return fmt.Errorf("--console-socket: %w", err)
		}
	}
	if c.pidfdPath != "" {
		if c.pidfd, err = dial(c.pidfdPath); err != nil {
			return fmt.Errorf("--pidfd-socket: %w", err)
		}
	}
	return nil
}

func (c *connections) close() {
	for _, f := range []*os.File{c.console, c.pidfd} {
		if f != nil {
			f.Close()
		}
	}
}

// hand sends the process's descriptors. A detached process's console is closed then.
func (c *connections) hand(p oci.Process, detach bool) error {
	if detach && p.Console != nil {
		err := send(c.console, p.Console, "/dev/ptmx")
		p.Console.Close()
		if err != nil {
			return fmt.Errorf("--console-socket: %w", err)
		}
	}
	if c.pidfd != nil {
		if err := send(c.pidfd, p.PidFD, "pidfd"); err != nil {
			return fmt.Errorf("--pidfd-socket: %w", err)
		}
	}
	return nil
}

// maxSunPath is the longest path a unix socket's address holds.
const maxSunPath = 107

// listenWait is for callers that start the socket's server at the same time,
// which goes well with a runtime that takes longer to get here.
const listenWait = 300 * time.Millisecond

func dial(path string) (*os.File, error) {
	deadline := time.Now().Add(listenWait)
	for {
		f, err := connect(path)
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) || time.Now().After(deadline) {
			return f, err
		}
		time.Sleep(time.Millisecond)
	}
}

// connect connects to a unix stream socket at any path. Package net would bring
// in more start-up time than all of this takes.
func connect(path string) (*os.File, error) {
	at := path
	if len(path) > maxSunPath {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		defer unix.Close(fd)
		at = fmt.Sprintf("/proc/self/fd/%d", fd)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	for {
		if err = unix.Connect(fd, &unix.SockaddrUnix{Name: at}); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "connect", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// send passes a descriptor; the message is its name.
func send(to, f *os.File, name string) error {
	for {
		err := unix.Sendmsg(int(to.Fd()), []byte(name), unix.UnixRights(int(f.Fd())), nil, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("send descriptor to %s: %w", to.Name(), err)
		}
		return nil
	}
}
