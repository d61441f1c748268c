// Package client is the daemon's side of the supervisor's protocol. A Client
// finds the supervisor of the node or starts it, and does so again whenever the
// connection breaks. It holds what keeps containers alive and their output and
// exit codes readable without a supervisor (holdings.go), and hands it to the next
// one before that serves anything else (takeover.go).
//
// Locks: Client.mu and holdings.mu guard the fields below them and are held for
// moments, neither within the other. A connection has a lock of its own, and one
// around sending.
package client

import (
	"cmp"
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
	// ExitUnknown is the code of an exec that no supervisor could tell the end of.
	ExitUnknown = 255
	// tries is how many supervisors a request is sent to that can be repeated.
	tries = 3
)

// Config says where the supervisor is.
type Config struct {
	// StateDir is the supervisor's state directory, an absolute path.
	StateDir string
	// Binary is started as "Binary --state StateDir" when no supervisor answers.
	Binary string
	// Build is the build that Binary is of (version.String). A running supervisor of
	// another is asked to become Binary, once for each that is met and can; "" asks none.
	Build string
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
	held   holdings
	asked  string // the build that was last asked to become another; used by open alone
	// waitTime is the constant but in tests.
	waitTime time.Duration

	mu    sync.Mutex
	why   error                                           // why the last try to connect again failed
	link  *link                                           // nil while there is no connection
	ready chan struct{}                                   // closed while link is set
	kept  func(put func(keys []string, files []*os.File)) // nil before KeptBy
}

// link is one connection and what waits on it.
type link struct {
	conn *wire.Conn
	who  wire.HelloReply
	done chan struct{} // closed when nothing is read any more

	mu      sync.Mutex
	last    uint64
	pending map[uint64]waiting
	broken  bool
}

// waiting is a request whose answer is to come.
type waiting struct {
	ch chan answer // nil: the caller has given up
	// keep is called by the reader of the connection, nil for nothing, with an answer
	// that is no error: what the answer brings is held when the next frame is read,
	// and before the next connection is made, whether somebody waits for it or not.
	// The files stay the reader's.
	keep func(f wire.Frame, files []*os.File)
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
	c.done.Go(c.exits.run)
	l, err := c.open(ctx)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	c.use(l)
	c.done.Go(func() { c.run(l) })
	return c, nil
}

// open connects, and hands over what is held.
func (c *Client) open(ctx context.Context) (l *link, err error) {
	for range tries {
		if l, err = c.openOnce(ctx); !errors.Is(err, wire.ErrBroken) || ctx.Err() != nil {
			break
		}
	}
	return l, err
}

func (c *Client) openOnce(ctx context.Context) (*link, error) {
	l, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	c.done.Go(func() { c.read(l) })
	stop := context.AfterFunc(ctx, func() { _ = l.conn.Close() })
	defer stop()
	if err := c.takeOver(ctx, l); err != nil {
		_ = l.conn.Close()
		<-l.done
		return nil, err
	}
	return l, nil
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
	c.held.close()
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

// lose makes callers wait for the next connection, if that is not here already.
func (c *Client) lose(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == l {
		c.link, c.ready = nil, make(chan struct{})
	}
}

// run connects again and again, until Close.
func (c *Client) run(l *link) {
	for {
		<-l.done
		c.lose(l)
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
		l, err := c.open(c.ctx)
		if err == nil {
			return l, nil
		}
		c.mu.Lock()
		c.why = err
		c.mu.Unlock()
		select {
		case <-c.ctx.Done():
		case <-time.After(pause):
		}
	}
	return nil, c.ctx.Err()
}

// read delivers what comes until the connection breaks; then what waits for an
// answer fails.
func (c *Client) read(l *link) {
	defer close(l.done)
	defer l.fail()
	for {
		f, files, err := l.conn.Recv()
		if err != nil {
			_ = l.conn.Close()
			return
		}
		if f.ID == 0 {
			switch f.Op {
			case wire.OpExit:
				c.exit(f)
			case wire.OpLane:
				c.keepLanes(f, files)
			case wire.OpLaneGone:
				var r wire.LanesReply
				if json.Unmarshal(f.Body, &r) == nil {
					c.held.dropLanes(r.IDs)
				}
			default: // of a later version
			}
			wire.CloseFiles(files)
			continue
		}
		l.mu.Lock()
		w := l.pending[f.ID]
		l.mu.Unlock()
		if w.keep != nil && f.Err == nil {
			w.keep(f, files)
		}
		l.mu.Lock()
		w = l.pending[f.ID] // it may have been given up meanwhile
		delete(l.pending, f.ID)
		l.mu.Unlock()
		if w.ch == nil { // nobody waits any more
			wire.CloseFiles(files)
			continue
		}
		w.ch <- answer{f, files}
	}
}

func (c *Client) exit(f wire.Frame) {
	var e wire.Exit
	if err := json.Unmarshal(f.Body, &e); err != nil {
		return
	}
	if e.Exec != "" {
		c.held.execExited(e)
		return
	}
	c.held.exited(e)
	c.exits.push(e)
}

// fail ends everything that waits for an answer over a broken connection.
func (l *link) fail() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broken = true
	for _, w := range l.pending {
		if w.ch != nil {
			close(w.ch)
		}
	}
	l.pending = nil
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
			c.mu.Lock()
			why := cmp.Or(c.why, wire.ErrBroken)
			c.mu.Unlock()
			return nil, fmt.Errorf("supervisor: none could be reached or started for %v, see %s: %w: %w", c.waitTime,
				filepath.Join(c.cfg.StateDir, logName), why, errdefs.ErrUnavailable)
		case <-c.ctx.Done():
			return nil, fmt.Errorf("supervisor: client is closed: %w", errdefs.ErrUnavailable)
		}
	}
}

// call sends a request that can be done twice and waits for its answer; for keep see
// waiting.
func (c *Client) call(ctx context.Context, op wire.Op, body, reply any, keep func(wire.Frame, []*os.File), files ...*os.File) (got []*os.File, err error) {
	for range tries {
		if got, err = c.once(ctx, op, body, reply, keep, files...); !errors.Is(err, wire.ErrBroken) {
			break
		}
	}
	return got, err
}

// once sends one request and waits for its answer; for keep see waiting.
func (c *Client) once(ctx context.Context, op wire.Op, body, reply any, keep func(wire.Frame, []*os.File), files ...*os.File) ([]*os.File, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	l, err := c.wait(ctx)
	if err != nil {
		return nil, err
	}
	got, err := l.call(ctx, op, body, reply, keep, files...)
	if errors.Is(err, wire.ErrBroken) {
		c.lose(l) // here and not only in run: the next try may come before it
	}
	return got, err
}

func (l *link) call(ctx context.Context, op wire.Op, body, reply any, keep func(wire.Frame, []*os.File), files ...*os.File) ([]*os.File, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", op, err, errdefs.ErrInvalidArgument)
	}
	ch := make(chan answer, 1)
	l.mu.Lock()
	if l.broken {
		l.mu.Unlock()
		return nil, wire.ErrBroken
	}
	l.last++
	n := l.last
	l.pending[n] = waiting{ch, keep}
	l.mu.Unlock()
	return l.roundTrip(ctx, n, wire.Frame{ID: n, Op: op, Body: text}, files, ch, reply)
}

func (l *link) roundTrip(ctx context.Context, n uint64, f wire.Frame, files []*os.File, ch chan answer, reply any) ([]*os.File, error) {
	b, err := wire.Encode(f, len(files))
	if err != nil {
		l.mu.Lock()
		delete(l.pending, n)
		l.mu.Unlock()
		return nil, fmt.Errorf("%s: %w: %w", f.Op, err, errdefs.ErrInvalidArgument)
	}
	_ = l.conn.SetSendDeadline(time.Now().Add(sendTime))
	if err := l.conn.SendEncoded(b, files...); err != nil {
		_ = l.conn.Close() // half a frame may be out
		l.abandon(n, ch)
		return nil, fmt.Errorf("supervisor: %s: %w: %w", f.Op, err, wire.ErrBroken)
	}
	select {
	case a, ok := <-ch:
		if !ok {
			return nil, wire.ErrBroken
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
	w, waits := l.pending[n]
	if waits && w.keep != nil {
		w.ch = nil
		l.pending[n] = w
	} else {
		delete(l.pending, n)
	}
	l.mu.Unlock()
	if !waits {
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
