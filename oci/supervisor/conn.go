package supervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// queueLimit is how many bytes of answers may wait for a client that does not
// read; beyond it the connection is closed and the client has to come back.
const queueLimit = 64 << 20

// conn is a client's connection. A reader goroutine starts one goroutine per
// request; a writer goroutine sends what they queue, so that a client that
// stopped reading holds up nobody.
type conn struct {
	s      *Server
	wire   *wire.Conn
	events atomic.Bool
	// version is the client's; 0 before its Hello.
	version atomic.Int32

	mu     sync.Mutex
	queue  []message
	size   int
	closed bool
	wake   chan struct{}
}

type message struct {
	bytes []byte
	files []*os.File    // ours, closed after sending
	sent  chan struct{} // closed when it is sent, or will not be; nil if nobody waits
}

// done lets go of a message.
func (m message) done() {
	wire.CloseFiles(m.files)
	if m.sent != nil {
		close(m.sent)
	}
}

// accept serves connections until the listener is closed.
func (s *Server) accept(l *os.File) {
	raw, err := l.SyscallConn()
	if err != nil {
		s.log.Error("accept", "error", err)
		return
	}
	for {
		var fd int
		var aerr error
		err := raw.Read(func(lfd uintptr) bool {
			fd, _, aerr = unix.Accept4(int(lfd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return aerr != unix.EAGAIN
		})
		if err != nil {
			return // closed
		}
		if aerr != nil {
			if aerr != unix.EINTR && aerr != unix.ECONNABORTED {
				s.log.Error("accept", "error", aerr)
				pauseAfter(aerr)
			}
			continue
		}
		if err := checkPeer(fd); err != nil {
			s.log.Warn("connection refused", "error", err)
			_ = unix.Close(fd)
			continue
		}
		w, err := wire.NewConn(fd)
		if err != nil {
			s.log.Error("accept", "error", err)
			continue
		}
		c := &conn{s: s, wire: w, wake: make(chan struct{}, 1)}
		s.mu.Lock()
		ending := s.ending
		if !ending {
			s.conns[c] = struct{}{}
		}
		s.mu.Unlock()
		if ending {
			c.close()
			continue
		}
		s.touch()
		s.goClient("send", c.send)
		s.goClient("receive", c.receive)
	}
}

func checkPeer(fd int) error {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return err
	}
	if cred.Uid != 0 {
		return fmt.Errorf("peer pid %d has uid %d, want 0: %w", cred.Pid, cred.Uid, errdefs.ErrPermissionDenied)
	}
	return nil
}

func (c *conn) close() {
	c.mu.Lock()
	c.closed = true
	queue := c.queue
	c.queue = nil
	c.mu.Unlock()
	for _, m := range queue {
		m.done()
	}
	_ = c.wire.Close()
	c.signal()
}

func (c *conn) gone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *conn) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *conn) receive() {
	defer func() {
		c.close()
		c.s.mu.Lock()
		delete(c.s.conns, c)
		containers := slices.Collect(maps.Values(c.s.containers))
		c.s.mu.Unlock()
		for _, k := range containers {
			k.hangUp(c)
		}
		c.s.touch()
	}()
	for {
		f, files, err := c.wire.Recv()
		if err != nil {
			if err != io.EOF && !errors.Is(err, os.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
				c.s.log.Warn("connection", "error", err)
			}
			return
		}
		c.s.goClient("serve", func() { c.serve(f, files) })
	}
}

// serve answers one request.
func (c *conn) serve(f wire.Frame, files []*os.File) {
	defer wire.CloseFiles(files)
	var after func()
	replied := false
	defer func() {
		if p := recover(); p != nil {
			c.s.log.Error("panic", "in", string(f.Op), "panic", p, "stack", string(debug.Stack()))
			if !replied {
				c.reply(f.ID, nil, nil, fmt.Errorf("%s: panic: %v: %w", f.Op, p, errdefs.ErrInternal))
			}
		}
	}()
	crashpoint.Here("serve", string(f.Op), "do")
	body, out, after, err := c.pass(f, files)
	crashpoint.Here("serve", string(f.Op), "done")
	replied = true
	c.reply(f.ID, body, out, err)
	if after != nil {
		after()
	}
}

// pass lets a request through the gate.
func (c *conn) pass(f wire.Frame, files []*os.File) (body any, out []*os.File, after func(), err error) {
	if f.Op == wire.OpUpgrade {
		r, err := decode[wire.Upgrade](f)
		if err == nil {
			err = c.s.upgrade(r.Binary)
		}
		return nil, nil, nil, err
	}
	c.s.gate.RLock()
	defer c.s.gate.RUnlock()
	return c.handle(f, files)
}

// reply queues the answer; files are taken over.
func (c *conn) reply(n uint64, body any, files []*os.File, err error) {
	f := wire.Frame{ID: n, Err: wire.ToError(err)}
	if err == nil && body != nil {
		text, merr := json.Marshal(body)
		if merr != nil {
			f.Err = wire.ToError(merr)
		}
		f.Body = text
	}
	b, eerr := wire.Encode(f, len(files))
	if eerr != nil {
		wire.CloseFiles(files)
		files = nil
		if b, eerr = wire.Encode(wire.Frame{ID: n, Err: wire.ToError(eerr)}, 0); eerr != nil {
			c.close()
			return
		}
	}
	c.post(message{bytes: b, files: files})
}

// notify queues an exit notification.
func (c *conn) notify(e any) {
	text, err := json.Marshal(e)
	if err != nil {
		return
	}
	b, err := wire.Encode(wire.Frame{Op: wire.OpExit, Body: text}, 0)
	if err != nil {
		return
	}
	c.post(message{bytes: b})
}

func (c *conn) post(m message) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		m.done()
		return
	}
	c.queue = append(c.queue, m)
	c.size += len(m.bytes)
	over := c.size > queueLimit
	c.mu.Unlock()
	if over {
		c.s.log.Warn("connection closed: its client does not read")
		c.close()
		return
	}
	c.signal()
}

func (c *conn) send() {
	for {
		c.mu.Lock()
		queue, closed := c.queue, c.closed
		c.queue, c.size = nil, 0
		c.mu.Unlock()
		if closed {
			for _, m := range queue {
				m.done()
			}
			return
		}
		for _, m := range queue {
			err := c.wire.SendEncoded(m.bytes, m.files...)
			m.done()
			crashpoint.Here("send", "done")
			if err != nil {
				c.close() // the rest fails at once and its files are closed
			}
		}
		if len(queue) == 0 {
			<-c.wake
		}
	}
}
