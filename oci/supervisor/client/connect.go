package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

const (
	socketName = "supervisor.sock"
	logName    = "supervisor.log"
	spawnTime  = 10 * time.Second
	helloTime  = 5 * time.Second
)

// connect dials the supervisor and starts it when nobody listens.
func (c *Client) connect(ctx context.Context) (*link, error) {
	cfg := c.cfg
	l, err := dial(cfg.StateDir)
	if err == nil {
		return l, nil
	}
	if !absent(err) || cfg.Binary == "" {
		return nil, err
	}
	ended, err := c.spawn()
	if err != nil {
		return nil, err
	}
	// One that was starting already, or has not quite ended, wins the lock: the
	// socket decides, not the process that we started.
	deadline := time.Now().Add(spawnTime)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("supervisor: %w", ctx.Err())
		case werr := <-ended:
			if l, err := dial(cfg.StateDir); err == nil {
				return l, nil
			}
			return nil, fmt.Errorf("supervisor: %s ended at its start, see %s: %w: %w", cfg.Binary,
				filepath.Join(cfg.StateDir, logName), werr, errdefs.ErrUnavailable)
		case <-time.After(pause):
		}
		l, err := dial(cfg.StateDir)
		if err == nil {
			return l, nil
		}
		if !absent(err) || time.Now().After(deadline) {
			return nil, err
		}
	}
}

// absent tells whether a dial found nobody, or one who is just leaving.
func absent(err error) bool {
	for _, e := range []error{unix.ENOENT, unix.ECONNREFUSED, unix.ECONNRESET, unix.EPIPE, errLeft} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

var errLeft = errors.New("supervisor closed the connection")

func dial(state string) (*link, error) {
	path := filepath.Join(state, socketName)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("supervisor: socket: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("supervisor: connect %s: %w: %w", path, err, errdefs.ErrUnavailable)
	}
	conn, err := wire.NewConn(fd)
	if err != nil {
		return nil, err
	}
	who, err := hello(conn)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return &link{conn: conn, who: who, done: make(chan struct{}), pending: map[uint64]waiting{}}, nil
}

// hello returns who serves, with the protocol version that both sides speak.
func hello(conn *wire.Conn) (who wire.HelloReply, err error) {
	body, err := json.Marshal(wire.Hello{Version: wire.Version, Events: true})
	if err != nil {
		return who, err
	}
	limit := time.Now().Add(helloTime)
	_ = conn.SetSendDeadline(limit)
	_ = conn.SetRecvDeadline(limit)
	if err := conn.Send(wire.Frame{ID: 1, Op: wire.OpHello, Body: body}); err != nil {
		return who, fmt.Errorf("supervisor: hello: %w: %w: %w", err, errLeft, errdefs.ErrUnavailable)
	}
	for {
		f, files, err := conn.Recv()
		if err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, wire.ErrProtocol) {
				err = fmt.Errorf("%w: %w", err, errLeft)
			}
			return who, fmt.Errorf("supervisor: hello: %w: %w", err, errdefs.ErrUnavailable)
		}
		wire.CloseFiles(files)
		if f.ID != 1 {
			continue // an exit that was quicker; the list that follows has it
		}
		_ = conn.SetRecvDeadline(time.Time{})
		if f.Err != nil {
			return who, f.Err
		}
		if err := json.Unmarshal(f.Body, &who); err != nil {
			return who, fmt.Errorf("supervisor: hello: %w: %w", err, errdefs.ErrInternal)
		}
		return who, nil
	}
}

// spawning keeps two clients of one process from starting two supervisors.
var spawning sync.Mutex

// spawn starts the supervisor in a session of its own. It must outlive us, so
// nothing ties it to us but the reaping, which ends with the client.
func (c *Client) spawn() (<-chan error, error) {
	cfg := c.cfg
	spawning.Lock()
	defer spawning.Unlock()
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("supervisor: state directory: %w", err)
	}
	log, err := os.OpenFile(filepath.Join(cfg.StateDir, logName), os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("supervisor: log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(cfg.Binary, "--state", cfg.StateDir)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	fd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &fd}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("supervisor: %w: %w", err, errdefs.ErrUnavailable)
	}
	ended := make(chan error, 1)
	if fd < 0 || unix.SetNonblock(fd, true) != nil { // no pidfd before Linux 5.3: init reaps it
		return ended, cmd.Process.Release()
	}
	pidfd := os.NewFile(uintptr(fd), "supervisor")
	stop := context.AfterFunc(c.ctx, func() { _ = pidfd.SetReadDeadline(time.Unix(1, 0)) })
	c.done.Go(func() {
		defer pidfd.Close()
		defer stop()
		if !readable(pidfd) {
			_ = cmd.Process.Release()
			return
		}
		err := cmd.Wait()
		if err == nil {
			err = errLeft
		}
		ended <- err
	})
	return ended, nil
}

// readable parks until f is readable, and reports false when its deadline passes.
func readable(f *os.File) bool {
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	return raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return n > 0 || err != nil && err != unix.EINTR
	}) == nil
}
