package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

const (
	// maxExecOutput bounds each stream of ExecSync; the field allows 16 MiB.
	maxExecOutput = 16 << 20
	// drainAfterExit is how long output is still read after a process has ended:
	// its descendants may hold the pipes open for ever.
	drainAfterExit = 300 * time.Millisecond
)

// pipe is a pipe whose write end goes to a process. Only the read end is
// non-blocking: the flag belongs to the pipe's end, and programs do not expect it.
func pipe() (r, w *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, err
	}
	if err := unix.SetNonblock(p[0], true); err != nil {
		return nil, nil, errors.Join(err, unix.Close(p[0]), unix.Close(p[1]))
	}
	return os.NewFile(uintptr(p[0]), "pipe"), os.NewFile(uintptr(p[1]), "pipe"), nil
}

// process is what an exec runs: the identity and limits of the container's own
// process with another program.
func (r *containerRecord) process(cmd []string, tty bool) *specs.Process {
	p := *r.Process
	p.Args, p.Terminal = cmd, tty
	if r.RawEnv != nil {
		p.Env = make([]string, len(r.RawEnv))
		for i, kv := range r.RawEnv {
			p.Env[i] = string(kv)
		}
	}
	if tty {
		p.Env = append(append([]string(nil), p.Env...), "TERM=xterm")
	}
	return &p
}

// capped collects up to a limit and throws the rest away.
type capped struct {
	buf  []byte
	left int
}

func (c *capped) Write(p []byte) (int, error) {
	n := min(len(p), c.left)
	c.buf, c.left = append(c.buf, p[:n]...), c.left-n
	return len(p), nil
}

// ExecSync runs a command and returns its output and exit code. After timeout
// (0: none) it kills the command with all its descendants and returns an error
// that is context.DeadlineExceeded.
func (e *Engine) ExecSync(ctx context.Context, ref string, cmd []string, timeout time.Duration) (*ExecResult, error) {
	c, rec, err := e.runningFor(ref, cmd)
	if err != nil {
		return nil, err
	}
	outR, outW, err := pipe()
	if err != nil {
		return nil, err
	}
	defer outR.Close()
	errR, errW, err := pipe()
	if err != nil {
		outW.Close()
		return nil, err
	}
	defer errR.Close()
	x := id.NewExec()
	crashpoint.Here("exec", "start", "do")
	_, _, exit, err := e.cfg.Streams.Exec(ctx, wire.Exec{ID: c.id, Exec: x, Process: rec.process(cmd, false)}, nil, outW, errW)
	crashpoint.Here("exec", "start", "done")
	outW.Close()
	errW.Close()
	if err != nil {
		return nil, e.unanswered(ctx, c, x, err)
	}
	stdout, stderr := &capped{left: maxExecOutput}, &capped{left: maxExecOutput}
	var readers sync.WaitGroup
	readers.Go(func() { _, _ = io.Copy(stdout, outR) })
	readers.Go(func() { _, _ = io.Copy(stderr, errR) })
	defer readers.Wait()

	var alarm <-chan time.Time
	if timeout > 0 {
		t := time.NewTimer(timeout)
		defer t.Stop()
		alarm = t.C
	}
	select {
	case end := <-exit:
		crashpoint.Here("exec", "exit", "known")
		e.drain(&readers, outR, errR)
		crashpoint.Here("exec", "output", "read")
		if end.Unknown { // a probe must not take it for the program's answer
			return nil, fmt.Errorf("command %q: %w", cmd[0], errLostExit)
		}
		return &ExecResult{Stdout: stdout.buf, Stderr: stderr.buf, ExitCode: int32(end.Code)}, nil
	case <-alarm:
		err = fmt.Errorf("command %q ran longer than %v: %w", cmd[0], timeout, context.DeadlineExceeded)
	case <-ctx.Done():
		err = ctx.Err()
	case <-e.ctx.Done():
		err = fmt.Errorf("%w: %w", errClosed, errdefs.ErrUnavailable)
	}
	e.killExec(c.id, x, exit)
	e.drain(&readers, outR, errR)
	return nil, err
}

// errLostExit is why the exit code of an exec is not known.
var errLostExit = fmt.Errorf("%s: %w", lostExit, errdefs.ErrUnavailable)

// runningFor returns a running container for an exec of cmd in it.
func (e *Engine) runningFor(ref string, cmd []string) (*container, containerRecord, error) {
	if len(cmd) == 0 {
		return nil, containerRecord{}, fmt.Errorf("cmd: must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	return e.running(ref)
}

// unanswered is the error of an exec that did not start, or did although the
// caller did not wait for the answer: nobody would ever end it then.
func (e *Engine) unanswered(ctx context.Context, c *container, x id.Exec, err error) error {
	if ctx.Err() != nil {
		e.killExec(c.id, x, nil)
	}
	return fmt.Errorf("container %s: exec: %w", id.Short(c.id), err)
}

// drain waits for the readers, and cuts them off when the pipes stay open.
func (e *Engine) drain(readers *sync.WaitGroup, files ...*os.File) {
	deadline := time.Now().Add(drainAfterExit)
	for _, f := range files {
		_ = f.SetReadDeadline(deadline)
	}
	readers.Wait()
}

// killExec kills a process of an exec with its descendants and waits for its
// end, if exit is given; also when the daemon is stopping.
func (e *Engine) killExec(c id.Container, x id.Exec, exit <-chan wire.Exit) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), 10*time.Second)
	defer cancel()
	crashpoint.Here("exec", "kill", "do")
	tell(ended(e.cfg.Runtime.Signal(ctx, wire.Signal{ID: c, Exec: x, Signal: int(unix.SIGKILL), All: true})), "Kill of an exec", "container", c)
	crashpoint.Here("exec", "kill", "done")
	if exit == nil {
		return
	}
	select {
	case <-exit:
	case <-ctx.Done():
	}
}

// Exec runs a command with a client's streams and returns its exit code.
func (e *Engine) Exec(ctx context.Context, ref string, cmd []string, s StreamIO) (int32, error) {
	c, rec, err := e.runningFor(ref, cmd)
	if err != nil {
		return 0, err
	}
	if s.TTY {
		return e.execTerminal(ctx, c, rec, cmd, s)
	}
	return e.execPipes(ctx, c, rec, cmd, s)
}

func (e *Engine) execPipes(ctx context.Context, c *container, rec containerRecord, cmd []string, s StreamIO) (int32, error) {
	var ours, theirs []*os.File
	defer func() {
		for _, f := range ours {
			f.Close()
		}
	}()
	closeTheirs := func() {
		for _, f := range theirs {
			if f != nil {
				f.Close()
			}
		}
	}
	output := func(to io.WriteCloser) (*os.File, error) {
		if to == nil {
			theirs = append(theirs, nil)
			return nil, nil
		}
		r, w, err := pipe()
		if err != nil {
			return nil, err
		}
		ours, theirs = append(ours, r), append(theirs, w)
		return r, nil
	}
	var stdinW, stdinR *os.File
	if s.Stdin != nil {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return 0, err
		}
		_ = unix.SetNonblock(p[1], true)
		stdinR, stdinW = os.NewFile(uintptr(p[0]), "stdin"), os.NewFile(uintptr(p[1]), "stdin")
		ours = append(ours, stdinW)
	}
	theirs = append(theirs, stdinR)
	outR, err := output(s.Stdout)
	if err != nil {
		closeTheirs()
		return 0, err
	}
	errR, err := output(s.Stderr)
	if err != nil {
		closeTheirs()
		return 0, err
	}
	x := id.NewExec()
	_, _, exit, err := e.cfg.Streams.Exec(ctx, wire.Exec{ID: c.id, Exec: x, Process: rec.process(cmd, false)}, theirs[0], theirs[1], theirs[2])
	closeTheirs()
	if err != nil {
		return 0, e.unanswered(ctx, c, x, err)
	}
	if stdinW != nil {
		// Not waited for: a client's stdin may never end. It ends with the client's
		// connection, which the caller closes after Exec.
		go func() {
			_, _ = io.Copy(stdinW, s.Stdin)
			stdinW.Close() // the program sees the end of its input
		}()
	}
	return e.await(ctx, exit, startPump(s.Stdout, outR), startPump(s.Stderr, errR))
}

// pump copies a process's output to a client. It is not waited for when the
// client is gone: a write to it ends with its connection, which the caller closes.
type pump struct {
	from  *os.File
	ended chan struct{} // closed when the process has ended
	done  chan struct{} // closed when all output is delivered or the client is gone
	left  int           // what is still read after the end
}

// afterExit bounds what is read once a process has ended to what fits into its
// pipe or terminal: the rest is from descendants, which may never stop.
const afterExit = 64 << 10

func startPump(to io.WriteCloser, from *os.File) *pump {
	p := &pump{from: from, ended: make(chan struct{}), done: make(chan struct{}), left: afterExit}
	if from == nil {
		close(p.done)
		return p
	}
	go func() {
		defer close(p.done)
		if to == nil {
			_, _ = io.Copy(io.Discard, p)
		} else {
			_, _ = io.Copy(to, p)
			to.Close()
		}
		// After an error of the client's the process must not wait for a reader for ever.
		from.Close()
	}()
	return p
}

// Read waits as long as the process runs; afterwards each read may take
// drainAfterExit, however long the client took for what was read before.
func (p *pump) Read(b []byte) (int, error) {
	select {
	case <-p.ended:
		if p.left == 0 {
			return 0, io.EOF
		}
		b = b[:min(len(b), p.left)]
		_ = p.from.SetReadDeadline(time.Now().Add(drainAfterExit))
		n, err := p.from.Read(b)
		p.left -= n
		return n, err
	default:
	}
	n, err := p.from.Read(b)
	if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) { // from end
		<-p.ended
		return p.Read(b)
	}
	return n, err
}

// end tells the pump that the process has ended.
func (p *pump) end() {
	if p.from != nil {
		// Wakes a read that waits. Before the close, so that it cannot undo the
		// deadline of a read after it.
		_ = p.from.SetReadDeadline(time.Now())
	}
	close(p.ended)
}

// await returns the exit code once all output is delivered.
func (e *Engine) await(ctx context.Context, exit <-chan wire.Exit, pumps ...*pump) (int32, error) {
	var code int32
	var lost error
	select {
	case end := <-exit:
		if code = int32(end.Code); end.Unknown {
			lost = errLostExit
		}
	case <-ctx.Done():
		// The client is gone: its streams close, the program goes on if it likes.
		closePumps(pumps)
		return 0, ctx.Err()
	case <-e.ctx.Done():
		closePumps(pumps)
		return 0, errClosed
	}
	for _, p := range pumps {
		p.end()
	}
	for _, p := range pumps {
		select {
		case <-p.done:
		case <-ctx.Done():
			closePumps(pumps)
			return 0, ctx.Err()
		case <-e.ctx.Done():
			closePumps(pumps)
			return 0, errClosed
		}
	}
	return code, lost
}

func closePumps(pumps []*pump) {
	for _, p := range pumps {
		if p.from != nil {
			p.from.Close()
		}
	}
}

func (e *Engine) execTerminal(ctx context.Context, c *container, rec containerRecord, cmd []string, s StreamIO) (int32, error) {
	x := id.NewExec()
	_, console, exit, err := e.cfg.Streams.Exec(ctx, wire.Exec{ID: c.id, Exec: x, Process: rec.process(cmd, true)}, nil, nil, nil)
	if err != nil {
		return 0, e.unanswered(ctx, c, x, err)
	}
	if console == nil {
		return 0, fmt.Errorf("container %s: exec: the supervisor sent no terminal: %w", id.Short(c.id), errdefs.ErrInternal)
	}
	console, err = pollable(console)
	if err != nil {
		return 0, err
	}
	defer console.Close() // a hang-up for what still runs on it
	resizeDone := e.resizes(ctx, s.Resize, wire.Resize{ID: c.id, Exec: x})
	defer resizeDone()
	if s.Stdin != nil {
		go func() { _, _ = io.Copy(console, s.Stdin) }() // ends with the client's connection
	}
	// Its reads end with EIO when the last process on the terminal is gone.
	return e.await(ctx, exit, startPump(s.Stdout, console))
}

// pollable returns f in non-blocking mode, known to the poller, so that a read
// can be cut off.
func pollable(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	f.Close()
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// resizes applies terminal sizes until the channel closes or stop is called.
func (e *Engine) resizes(ctx context.Context, sizes <-chan TermSize, to wire.Resize) (stop func()) {
	if sizes == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case s, ok := <-sizes:
				if !ok {
					return
				}
				if s.Width == 0 || s.Height == 0 {
					continue
				}
				to.Width, to.Height = s.Width, s.Height
				// A size that comes after the end is no error.
				tell(ended(e.cfg.Streams.Resize(ctx, to)), "Terminal resize", "container", to.ID)
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

// Attach connects a client to the streams of a container's first process, until
// the process ends or the client goes.
func (e *Engine) Attach(ctx context.Context, ref string, s StreamIO) error {
	c, rec, err := e.running(ref)
	if err != nil {
		return err
	}
	resizeDone := e.resizes(ctx, s.Resize, wire.Resize{ID: c.id})
	defer resizeDone()
	outR, outW, err := e.attachPipe(s.Stdout)
	if err != nil {
		return err
	}
	errR, errW, err := e.attachPipe(s.Stderr)
	if err != nil {
		closeAll(outR, outW)
		return err
	}
	err = e.cfg.Streams.Attach(ctx, c.id, outW, errW)
	closeAll(outW, errW)
	if err != nil {
		closeAll(outR, errR)
		return fmt.Errorf("container %s: attach: %w", id.Short(c.id), err)
	}
	pumps := []*pump{startPump(s.Stdout, outR), startPump(s.Stderr, errR)}
	defer closePumps(pumps)
	// Only now: an answer to the first input must not pass before the output is
	// attached.
	if s.Stdin != nil && rec.Config.Stdin {
		in, err := e.cfg.Streams.Stdin(ctx, c.id)
		if err != nil {
			return fmt.Errorf("container %s: stdin: %w", id.Short(c.id), err)
		}
		if in, err = pollable(in); err != nil {
			return fmt.Errorf("container %s: stdin: %w", id.Short(c.id), err)
		}
		defer in.Close() // cuts off a write that the container does not read
		go e.feed(c, rec, in, s.Stdin)
	}
	over := []<-chan struct{}{pumps[0].done, pumps[1].done}
	if outR == nil && errR == nil { // stdin only: until the container ends
		over = append(over, c.exited)
	}
	for _, done := range over {
		select {
		case <-done:
		case <-ctx.Done():
			return ctx.Err()
		case <-e.ctx.Done():
			return errClosed
		}
	}
	return nil
}

func (e *Engine) attachPipe(to io.WriteCloser) (r, w *os.File, err error) {
	if to != nil {
		return pipe()
	}
	w, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	return nil, w, err
}

func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// feed copies a client's input to the container until either is gone; a client's
// stdin ends with its connection, which the caller closes after Attach. With stdin_once the first
// client's end is the end of the container's input.
func (e *Engine) feed(c *container, rec containerRecord, in *os.File, from io.Reader) {
	_, err := io.Copy(in, from)
	in.Close()
	if rec.Config.StdinOnce && !rec.Config.TTY {
		ctx, cancel := context.WithTimeout(e.ctx, 10*time.Second)
		defer cancel()
		tell(ended(e.cfg.Streams.CloseStdin(ctx, c.id)), "Close of stdin", "container", c.id, "copy", fmt.Sprint(err))
	}
}
