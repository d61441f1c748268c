package supervisor

import (
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/crilog"
	"github.com/berth-runtime/berth/oci/supervisor/lane"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// stdio is what a container's first process is started with.
type stdio struct {
	child   oci.Stdio
	stdin   *os.File // our end; nil without a stdin
	outputs []*output
	log     *crilog.Log // nil: output is discarded

	container id.Container
	lanes     *lane.Pool // what its output passes on the way to the log
}

func (c *container) openStdio(lanes *lane.Pool, logPath string) (_ *stdio, err error) {
	io := &stdio{container: c.id, lanes: lanes}
	defer func() {
		if err != nil {
			io.closeChild()
			io.closeOurs()
		}
	}()
	if logPath != "" {
		if io.log, err = crilog.Open(logPath); err != nil {
			return nil, err
		}
	}
	if c.stdin {
		if io.stdin, io.child.In, err = pipe("stdin", true); err != nil {
			return nil, err
		}
	}
	for i, name := range []string{"stdout", "stderr"} {
		ours, theirs, err := pipe(name, false)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			io.child.Out = theirs
		} else {
			io.child.Err = theirs
		}
		io.outputs = append(io.outputs, io.output(i, ours, nil))
	}
	return io, nil
}

// output makes the reader of f. left is the lane that a killed supervisor left
// with bytes of this stream (crilog.Adopt); nil: none.
func (io *stdio) output(number int, f *os.File, left *lane.Lane) *output {
	o := &output{number: number, file: f, done: make(chan struct{})}
	if io.log != nil {
		o.log = io.log.Stream(io.lanes, lane.Owner{Container: string(io.container), Stream: number}, left)
	}
	return o
}

// useConsole replaces the pipes, which the process did not get, by the pty
// master, and keeps a duplicate in p for resizing and for stdin.
func (io *stdio) useConsole(p *process, master *os.File, left *lane.Lane) error {
	defer master.Close()
	for _, o := range io.outputs {
		_ = o.file.Close()
	}
	io.outputs = nil
	if io.stdin != nil {
		_ = io.stdin.Close()
		io.stdin = nil
	}
	f, err := dupPollable(master)
	if err != nil {
		return err
	}
	if p.console, err = dupFile(f); err != nil {
		_ = f.Close()
		return err
	}
	io.outputs = []*output{io.output(0, f, left)}
	return nil
}

func (io *stdio) closeChild() {
	for _, f := range []*os.File{io.child.In, io.child.Out, io.child.Err} {
		if f != nil {
			_ = f.Close()
		}
	}
	io.child = oci.Stdio{}
}

func (io *stdio) closeOurs() {
	if io.stdin != nil {
		_ = io.stdin.Close()
	}
	for _, o := range io.outputs {
		_ = o.file.Close()
	}
	if io.log != nil {
		_ = io.log.Close()
	}
}

func (c *container) reopenLog(s *Server, path string) error {
	if _, err := c.running(); err != nil {
		return err
	}
	c.mu.Lock()
	log, r := c.log, c.reopening
	if log != nil && r == nil {
		r = &reopening{done: make(chan struct{})}
		c.reopening = r
		s.goNamed("reopen", func() {
			err := log.Reopen(path)
			c.mu.Lock()
			r.err, c.reopening = err, nil
			c.mu.Unlock()
			close(r.done)
		})
	}
	c.mu.Unlock()
	if log == nil {
		return fmt.Errorf("container %s has no log: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	limit := time.NewTimer(reopenTime)
	defer limit.Stop()
	select {
	case <-r.done:
		return r.err
	case <-limit.C:
		return fmt.Errorf("log %s: its disk has not answered for %v; it is reopened when it does: %w", path, reopenTime, errdefs.ErrUnavailable)
	}
}

// reopening is a change of the log file under way. A disk that does not answer
// makes it last; who asks again meanwhile waits for the same one.
type reopening struct {
	done chan struct{}
	err  error // set before done is closed
}

// reopenTime is how long a request waits for it.
const reopenTime = time.Second

// stdinFile returns a descriptor for the container's stdin, which is the
// caller's. With StdinOnce it is our own: the container sees the end of its
// input when the one client that it is for has gone, even by kill -9.
func (c *container) stdinFile() (*os.File, error) {
	p, err := c.running()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.stdin && p.console != nil:
		return dupFile(p.console)
	case c.stdinEnd == nil:
		return nil, fmt.Errorf("container %s: stdin is closed or was not asked for: %w", c.id, errdefs.ErrFailedPrecondition)
	case c.stdinOnce:
		f := c.stdinEnd
		c.stdinEnd = nil
		return f, nil
	}
	return dupFile(c.stdinEnd)
}

func (c *container) closeStdin() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stdinEnd == nil {
		return nil
	}
	f := c.stdinEnd
	c.stdinEnd = nil
	return f.Close()
}

// attach duplicates the output into files, which stay the caller's.
func (c *container) attach(s *Server, stdout, stderr *os.File) error {
	out, err := attachFile(stdout)
	if err != nil {
		return fmt.Errorf("attach stdout: %w", err)
	}
	er, err := attachFile(stderr)
	if err != nil {
		if out != nil {
			_ = out.Close()
		}
		return fmt.Errorf("attach stderr: %w", err)
	}
	if !c.attached.add(s.ctx, func(f func()) { s.goNamed("attach", f) }, out, er) {
		return fmt.Errorf("container %s has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (c *container) resize(r wire.Resize) error {
	c.mu.Lock()
	defer c.mu.Unlock() // follow may bring another terminal
	var p *process
	if r.Exec == "" {
		p = c.first
	} else if x := c.execs[r.Exec]; x != nil { // nil: not there, or being started
		p = x.process
	}
	if p == nil {
		return fmt.Errorf("process %s%s is not running: %w", c.id, r.Exec, errdefs.ErrNotFound)
	}
	return p.resize(r.Width, r.Height)
}
