// Package client is the daemon's side of the supervisor's protocol. A Client
// finds the supervisor of the node or starts it, and does so again whenever the
// connection breaks.
//
// Locks: Client.mu guards the fields below it and is held for moments. The
// connection has a lock of its own around sending.
package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

const (
	// sendTime bounds the sending of one request: the supervisor always reads, so
	// one that does not is broken.
	sendTime = 10 * time.Second
	// waitTime bounds the waiting for a supervisor while none can be reached or started.
	waitTime = 30 * time.Second
	// ExitUnknown is the code of an exec whose record was lost with the connection.
	ExitUnknown = 255
)

// Config says where the supervisor is.
type Config struct {
	// StateDir is the supervisor's state directory, an absolute path.
	StateDir string
	// Binary is started as "Binary --state StateDir" when no supervisor answers.
	Binary string
	// Commands are the command lines of the handlers that are external runtimes.
	Commands map[string]oci.Command
}

// Client speaks to the supervisor. Its methods may be called concurrently. A
// context ends the waiting for an answer, not the work in the supervisor.
type Client struct {
	cfg    Config
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	done   sync.WaitGroup
	exits  *exitQueue
	resync chan struct{}
	// waitTime is the constant but in tests.
	waitTime time.Duration

	mu    sync.Mutex
	link  *link         // nil while there is no connection
	ready chan struct{} // closed while link is set
}

// link is one connection and what waits on it.
type link struct {
	conn *wire.Conn
	who  wire.HelloReply

	mu      sync.Mutex
	last    uint64
	pending map[uint64]chan answer
	execs   map[execKey]chan wire.Exit
	broken  bool
}

type execKey struct {
	container id.Container
	exec      id.Exec
}

type answer struct {
	frame wire.Frame
	files []*os.File
}

// Open connects to the supervisor, starting it when none answers.
func Open(ctx context.Context, cfg Config) (*Client, error) {
	if !filepath.IsAbs(cfg.StateDir) {
		return nil, fmt.Errorf("supervisor state directory %q: want an absolute path: %w", cfg.StateDir, errdefs.ErrInvalidArgument)
	}
	c := &Client{cfg: cfg, exits: newExitQueue(), resync: make(chan struct{}, 1), ready: make(chan struct{}), waitTime: waitTime}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	l, err := c.connect(ctx)
	if err != nil {
		c.cancel()
		c.done.Wait()
		return nil, err
	}
	c.use(l)
	c.done.Go(func() { c.run(l) })
	c.done.Go(c.exits.run)
	return c, nil
}

// Close ends the connection; the supervisor and its containers go on.
func (c *Client) Close() error {
	c.cancel()
	c.mu.Lock()
	l := c.link
	c.mu.Unlock()
	if l != nil {
		_ = l.conn.Close()
	}
	c.exits.close()
	c.done.Wait()
	return nil
}

// Exits delivers the exit records of containers. It is closed by Close.
func (c *Client) Exits() <-chan wire.Exit { return c.exits.out }

// Resync fires after the connection was lost and made again.
func (c *Client) Resync() <-chan struct{} { return c.resync }

func (c *Client) use(l *link) {
	c.mu.Lock()
	c.link = l
	close(c.ready)
	c.mu.Unlock()
}

// run reads, and connects again, until Close.
func (c *Client) run(l *link) {
	for {
		l.read(c.exits)
		c.mu.Lock()
		c.link, c.ready = nil, make(chan struct{})
		c.mu.Unlock()
		l.fail()
		next, err := c.reconnect()
		if err != nil {
			return // closed
		}
		l = next
		c.use(l)
		if c.ctx.Err() != nil { // Close may have looked before this link was there
			_ = l.conn.Close()
		}
		select {
		case c.resync <- struct{}{}:
		default:
		}
	}
}

func (c *Client) reconnect() (*link, error) {
	for pause := 10 * time.Millisecond; c.ctx.Err() == nil; pause = min(2*pause, time.Second) {
		if l, err := c.connect(c.ctx); err == nil {
			return l, nil
		}
		select {
		case <-c.ctx.Done():
		case <-time.After(pause):
		}
	}
	return nil, c.ctx.Err()
}

// read delivers what comes until the connection breaks.
func (l *link) read(exits *exitQueue) {
	for {
		f, files, err := l.conn.Recv()
		if err != nil {
			_ = l.conn.Close()
			return
		}
		if f.ID == 0 {
			wire.CloseFiles(files)
			if f.Op == wire.OpExit {
				l.exit(f, exits)
			}
			continue // a notification of a later version
		}
		l.mu.Lock()
		ch := l.pending[f.ID]
		delete(l.pending, f.ID)
		l.mu.Unlock()
		if ch == nil { // nobody waits any more
			wire.CloseFiles(files)
			continue
		}
		ch <- answer{f, files}
	}
}

func (l *link) exit(f wire.Frame, exits *exitQueue) {
	var e wire.Exit
	if err := json.Unmarshal(f.Body, &e); err != nil {
		return
	}
	if e.Exec == "" {
		exits.push(e)
		return
	}
	k := execKey{e.ID, e.Exec}
	l.mu.Lock()
	ch := l.execs[k]
	delete(l.execs, k)
	l.mu.Unlock()
	if ch != nil {
		ch <- e
	}
}

// fail ends everything that waits on a broken connection.
func (l *link) fail() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broken = true
	for _, ch := range l.pending {
		close(ch)
	}
	for k, ch := range l.execs {
		ch <- wire.Exit{ID: k.container, Exec: k.exec, Code: ExitUnknown, FinishedAt: time.Now().UTC()}
	}
	l.pending, l.execs = nil, nil
}

// wait returns the connection, waiting for it while it is being made again.
func (c *Client) wait(ctx context.Context) (*link, error) {
	c.mu.Lock()
	l := c.link
	c.mu.Unlock()
	if l != nil { // without a timer
		return l, nil
	}
	limit := time.NewTimer(c.waitTime)
	defer limit.Stop()
	for {
		c.mu.Lock()
		l, ready := c.link, c.ready
		c.mu.Unlock()
		if l != nil {
			return l, nil
		}
		select {
		case <-ready:
		case <-ctx.Done():
			return nil, fmt.Errorf("supervisor: not connected: %w: %w", ctx.Err(), errdefs.ErrUnavailable)
		case <-limit.C:
			return nil, fmt.Errorf("supervisor: none could be reached or started for %v, see %s: %w", c.waitTime,
				filepath.Join(c.cfg.StateDir, logName), errdefs.ErrUnavailable)
		case <-c.ctx.Done():
			return nil, fmt.Errorf("supervisor: client is closed: %w", errdefs.ErrUnavailable)
		}
	}
}

var errBroken = fmt.Errorf("supervisor: connection lost before the answer: %w", errdefs.ErrUnavailable)

// call sends one request and waits for its answer. exec, if it is set, gets the
// exit of the exec that the request starts.
func (c *Client) call(ctx context.Context, op wire.Op, body, reply any, files []*os.File, exec *execWait) ([]*os.File, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	text, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", op, err, errdefs.ErrInvalidArgument)
	}
	l, err := c.wait(ctx)
	if err != nil {
		return nil, err
	}
	ch := make(chan answer, 1)
	l.mu.Lock()
	if l.broken {
		l.mu.Unlock()
		return nil, errBroken
	}
	l.last++
	n := l.last
	l.pending[n] = ch
	if exec != nil {
		if _, ok := l.execs[exec.key]; ok {
			delete(l.pending, n)
			l.mu.Unlock()
			return nil, fmt.Errorf("exec %s: %w", exec.key.exec, errdefs.ErrAlreadyExists)
		}
		l.execs[exec.key] = exec.exit
	}
	l.mu.Unlock()
	got, err := l.roundTrip(ctx, n, wire.Frame{ID: n, Op: op, Body: text}, files, ch, reply)
	if err != nil && exec != nil {
		l.mu.Lock()
		delete(l.execs, exec.key)
		l.mu.Unlock()
	}
	return got, err
}

type execWait struct {
	key  execKey
	exit chan wire.Exit
}

func (l *link) roundTrip(ctx context.Context, n uint64, f wire.Frame, files []*os.File, ch chan answer, reply any) ([]*os.File, error) {
	b, err := wire.Encode(f, len(files))
	if err != nil {
		l.abandon(n, ch)
		return nil, fmt.Errorf("%s: %w: %w", f.Op, err, errdefs.ErrInvalidArgument)
	}
	_ = l.conn.SetSendDeadline(time.Now().Add(sendTime))
	if err := l.conn.SendEncoded(b, files...); err != nil {
		_ = l.conn.Close() // half a frame may be out
		l.abandon(n, ch)
		return nil, fmt.Errorf("supervisor: %s: %w: %w", f.Op, err, errdefs.ErrUnavailable)
	}
	select {
	case a, ok := <-ch:
		if !ok {
			return nil, errBroken
		}
		return a.take(f.Op, reply)
	case <-ctx.Done():
		l.abandon(n, ch)
		return nil, fmt.Errorf("supervisor: %s: %w", f.Op, ctx.Err())
	}
}

// abandon gives up waiting for answer n, which may have come meanwhile.
func (l *link) abandon(n uint64, ch chan answer) {
	l.mu.Lock()
	_, waiting := l.pending[n]
	delete(l.pending, n)
	l.mu.Unlock()
	if !waiting {
		if a, ok := <-ch; ok { // read took it off the map and sends, or fail closed it
			wire.CloseFiles(a.files)
		}
	}
}

func (a answer) take(op wire.Op, reply any) ([]*os.File, error) {
	if a.frame.Err != nil {
		wire.CloseFiles(a.files)
		return nil, a.frame.Err
	}
	if reply != nil {
		if err := json.Unmarshal(a.frame.Body, reply); err != nil {
			wire.CloseFiles(a.files)
			return nil, fmt.Errorf("supervisor: answer to %s: %w", op, errors.Join(err, errdefs.ErrInternal))
		}
	}
	return a.files, nil
}
