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
	c, rec, err := e.running(ref)
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
	_, _, exit, err := e.cfg.Streams.Exec(ctx, wire.Exec{ID: c.id, Exec: x, Process: rec.process(cmd, false)}, nil, outW, errW)
	outW.Close()
	errW.Close()
	if err != nil {
		return nil, fmt.Errorf("container %s: exec: %w", id.Short(c.id), err)
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
		e.drain(&readers, outR, errR)
		return &ExecResult{Stdout: stdout.buf, Stderr: stderr.buf, ExitCode: int32(end.Code)}, nil
	case <-alarm:
		err = fmt.Errorf("command %q ran longer than %v: %w", cmd[0], timeout, context.DeadlineExceeded)
	case <-ctx.Done():
		err = ctx.Err()
	}
	e.killExec(c.id, x, exit)
	e.drain(&readers, outR, errR)
	return nil, err
}

// drain waits for the readers, and cuts them off when the pipes stay open.
func (e *Engine) drain(readers *sync.WaitGroup, files ...*os.File) {
	deadline := time.Now().Add(drainAfterExit)
	for _, f := range files {
		_ = f.SetReadDeadline(deadline)
	}
	readers.Wait()
}

// killExec kills a process of an exec with its descendants and waits for its end.
func (e *Engine) killExec(c id.Container, x id.Exec, exit <-chan wire.Exit) {
	ctx, cancel := context.WithTimeout(e.ctx, 10*time.Second)
	defer cancel()
	tell(ended(e.cfg.Runtime.Signal(ctx, wire.Signal{ID: c, Exec: x, Signal: int(unix.SIGKILL), All: true})), "Kill of an exec", "container", c)
	select {
	case <-exit:
	case <-ctx.Done():
	}
}

// Exec runs a command with a client's streams and returns its exit code.
func (e *Engine) Exec(ctx context.Context, ref string, cmd []string, s StreamIO) (int32, error) {
	c, rec, err := e.running(ref)
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
		return 0, fmt.Errorf("container %s: exec: %w", id.Short(c.id), err)
	}
	if stdinW != nil {
		// Not waited for: a client's stdin may never end. It ends with the client's
		// connection, which the caller closes after Exec.
		go func() {
			_, _ = io.Copy(stdinW, s.Stdin)
			stdinW.Close() // the program sees the end of its input
		}()
	}
	var readers sync.WaitGroup
	pump := func(to io.WriteCloser, from *os.File) {
		if from == nil {
			return
		}
		readers.Go(func() {
			_, _ = io.Copy(to, from)
			to.Close()
		})
	}
	pump(s.Stdout, outR)
	pump(s.Stderr, errR)
	var left []*os.File
	for _, f := range []*os.File{outR, errR} {
		if f != nil {
			left = append(left, f)
		}
	}
	return e.await(ctx, exit, &readers, left...)
}

// await returns the exit code once all output is delivered.
func (e *Engine) await(ctx context.Context, exit <-chan wire.Exit, readers *sync.WaitGroup, files ...*os.File) (int32, error) {
	select {
	case end := <-exit:
		e.drain(readers, files...)
		return int32(end.Code), nil
	case <-ctx.Done():
		// The client is gone: its streams close, the program goes on if it likes.
		for _, f := range files {
			f.Close()
		}
		readers.Wait()
		return 0, ctx.Err()
	case <-e.ctx.Done():
		for _, f := range files {
			f.Close()
		}
		readers.Wait()
		return 0, errClosed
	}
}

func (e *Engine) execTerminal(ctx context.Context, c *container, rec containerRecord, cmd []string, s StreamIO) (int32, error) {
	x := id.NewExec()
	_, console, exit, err := e.cfg.Streams.Exec(ctx, wire.Exec{ID: c.id, Exec: x, Process: rec.process(cmd, true)}, nil, nil, nil)
	if err != nil {
		return 0, fmt.Errorf("container %s: exec: %w", id.Short(c.id), err)
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
	var readers sync.WaitGroup
	if s.Stdout != nil {
		readers.Go(func() {
			_, _ = io.Copy(s.Stdout, console) // EIO when the last process on the terminal is gone
			s.Stdout.Close()
		})
	}
	return e.await(ctx, exit, &readers, console)
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
	if s.Stdin != nil && rec.Config.Stdin {
		in, err := e.cfg.Streams.Stdin(ctx, c.id)
		if err != nil {
			return fmt.Errorf("container %s: stdin: %w", id.Short(c.id), err)
		}
		go e.feed(c, rec, in, s.Stdin)
	}
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
	var readers sync.WaitGroup
	for to, from := range map[io.WriteCloser]*os.File{s.Stdout: outR, s.Stderr: errR} {
		if to != nil && from != nil {
			readers.Go(func() {
				_, _ = io.Copy(to, from)
				to.Close()
			})
		}
	}
	done := make(chan struct{})
	go func() { readers.Wait(); close(done) }()
	select {
	case <-done:
		if outR == nil && errR == nil { // stdin only: until the container ends
			select {
			case <-c.exited:
			case <-ctx.Done():
			case <-e.ctx.Done():
			}
		}
	case <-ctx.Done():
	case <-e.ctx.Done():
	}
	closeAll(outR, errR)
	<-done
	return ctx.Err()
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

// feed copies a client's input to the container. With stdin_once the first
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
