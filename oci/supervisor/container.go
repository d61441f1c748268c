package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/crilog"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

const (
	stuckTime  = 500 * time.Millisecond // longer than drainTime only a log disk that does not answer takes
	drainTime  = time.Second            // for output of processes that outlive the container's cgroup
	deleteTime = 10 * time.Second       // for killed processes to end; one in uninterruptible sleep may take longer
	treeTime   = 2 * time.Second
	maxUnheard = 64                // exits of execs that are kept for a daemon that comes back
	startTime  = 100 * time.Second // the kubelet waits for two minutes; meanwhile nobody can delete the container
)

// container is one container from Create to Delete.
//
// Locks: life is outside mu. life serialises Start and Delete of the runtime
// against its other methods and may be held for long; mu guards the fields and
// is held for moments. Neither is ever needed by another container.
type container struct {
	id        id.Container
	request   request
	stdin     bool
	stdinOnce bool

	made    chan struct{} // closed when Create has ended
	makeErr error         // set before made is closed
	oci     oci.Container // set before made is closed

	life sync.RWMutex

	mu        sync.Mutex
	starting  bool
	first     *process   // set by Start
	reopening *reopening // one under way
	log       *crilog.Log
	logPath   string
	outputs   []*output // of the first process
	stdinEnd  *os.File  // our end of the stdin pipe
	startedAt time.Time
	exit      *wire.Exit
	cgroups   map[string]string     // of the first process when it started
	execs     map[id.Exec]*exec     // nil for one that is being started
	unheard   map[id.Exec]wire.Exit // of execs whose connection was gone
	oomSeen   uint64                // OOM kills that did not end the first process
	deleting  *deletion

	attached attachers
}

// request is what made a container, kept for the next supervisor.
type request struct {
	op      wire.Op
	body    json.RawMessage
	seccomp *specs.LinuxSeccomp // the profile that body names by its digest; nil if it names none
}

// addTo completes a holding with what made its container.
func (q *request) addTo(h *wire.Holding) {
	h.Op, h.Create = q.op, q.body
	if q.seccomp != nil {
		h.Profile, _ = json.Marshal(q.seccomp) // decoded from JSON
	}
}

// deletion is a running Delete that concurrent calls join.
type deletion struct {
	done chan struct{}
	err  error
}

func (c *container) info() (wire.Info, bool) {
	select {
	case <-c.made:
	default:
		return wire.Info{}, false // not created yet
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	i := wire.Info{ID: c.id, State: wire.Created, StartedAt: c.startedAt, Exit: c.exit}
	if c.first != nil {
		i.State, i.Pid = wire.Running, c.first.pid
	}
	if c.exit != nil {
		i.State = wire.Exited
	}
	return i, c.makeErr == nil
}

// running returns the first process, or an error when there is none.
func (c *container) running() (*process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.first == nil:
		return nil, fmt.Errorf("container %s is not started: %w", c.id, errdefs.ErrFailedPrecondition)
	case c.exit != nil:
		return nil, fmt.Errorf("container %s has exited: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	return c.first, nil
}

// start runs the program. watch must be called after the reply was queued, so
// that the exit never overtakes it.
func (c *container) start(s *Server, r wire.Start) (_ wire.StartReply, held []*os.File, watch func(), err error) {
	c.mu.Lock()
	if c.starting || c.deleting != nil {
		c.mu.Unlock()
		return wire.StartReply{}, nil, nil, fmt.Errorf("container %s: already started or being deleted: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.starting = true
	c.mu.Unlock()

	io, err := c.openStdio(s.lanes, r.LogPath)
	if err != nil {
		c.mu.Lock()
		c.starting = false // nothing was tried yet: a retry with a better path may succeed
		c.mu.Unlock()
		return wire.StartReply{}, nil, nil, err
	}
	reply, err := c.launch(s, io, r.LogPath)
	io.closeChild()
	if err != nil {
		io.closeOurs()
		return wire.StartReply{}, nil, nil, err
	}
	c.mu.Lock()
	first := c.first
	c.mu.Unlock()
	h, held, _ := c.holding(s)
	reply.Holding = &h
	c.read(s, io)
	return reply, held, func() { s.goNamed("watch", func() { c.watch(s, first, io) }) }, nil
}

// read starts to read the outputs.
func (c *container) read(s *Server, io *stdio) {
	for _, o := range io.outputs {
		s.goNamed("output", func() {
			if err := o.run(c.attached.deliver); err != nil {
				s.log.Error("container output", "container", string(c.id), "stream", o.number, "error", err)
			}
		})
	}
}

// launch starts the first process. It holds life until the process is known as
// first: a Delete that waits for life must find it.
func (c *container) launch(s *Server, io *stdio, logPath string) (wire.StartReply, error) {
	c.life.Lock()
	defer c.life.Unlock()
	c.mu.Lock()
	if c.deleting != nil { // since start looked
		c.starting = false
		c.mu.Unlock()
		return wire.StartReply{}, fmt.Errorf("container %s: being deleted: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.mu.Unlock()
	forked := s.children.forking()
	ctx, cancel := context.WithTimeout(context.Background(), startTime) // for its hooks
	defer cancel()
	crashpoint.Here("start", "stdio", "made")
	p, err := c.oci.Start(ctx, io.child)
	crashpoint.Here("start", "program", "runs")
	if err == nil {
		s.children.add(p.Pid)
	}
	forked()
	if err != nil {
		return wire.StartReply{}, err
	}
	first, err := s.own(p)
	if err != nil {
		return wire.StartReply{}, err
	}
	if p.Console != nil {
		if err := io.useConsole(first, p.Console, nil); err != nil {
			s.log.Error("terminal of a container is lost", "container", string(c.id), "error", err)
		}
	}
	cgroups := cgroupsOf(p.Pid)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.first, c.log, c.logPath, c.outputs, c.stdinEnd = first, io.log, logPath, io.outputs, io.stdin
	c.startedAt, c.cgroups = time.Now().UTC(), cgroups
	return wire.StartReply{Pid: p.Pid, StartedAt: c.startedAt}, nil
}

// beforeKill notes the OOM kills so far, before we send SIGKILL to the first
// process: one of its children was their victim if the first process still runs.
// life must be held.
func (c *container) beforeKill() {
	n, err := c.oci.OOMKills()
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.first != nil && !c.first.exited() {
		c.oomSeen = n
	}
}

// watch waits for the end of the first process and publishes it.
func (c *container) watch(s *Server, first *process, io *stdio) {
	e := first.wait(s.children)
	crashpoint.Here("exit", "reaped")
	e.ID = c.id
	c.life.RLock()
	// Whatever is left in the cgroup has lost its first process and would hold
	// the output pipes open.
	if err := c.oci.KillAll(); err != nil {
		s.log.Warn("processes of an exited container", "container", string(c.id), "error", err)
	}
	if e.Signal == sigkill {
		n, err := c.oci.OOMKills()
		c.mu.Lock()
		e.OOMKilled = err == nil && n > c.oomSeen
		c.mu.Unlock()
	}
	c.life.RUnlock()
	crashpoint.Here("exit", "others", "killed")
	if stopOutputs(io.outputs, drainTime, stuckTime) {
		c.closeLog(s, io)
	} else {
		// Whoever stops and removes the container does not wait for its log disk.
		s.log.Error("log disk does not answer: the end of the container's output is not in its log yet", "container", string(c.id))
		s.goNamed("log", func() { c.closeLog(s, io) })
	}
	crashpoint.Here("exit", "output", "written")
	c.attached.end()
	c.mu.Lock()
	if c.stdinEnd != nil {
		_ = c.stdinEnd.Close()
		c.stdinEnd = nil
	}
	c.exit, c.outputs = &e, nil
	c.mu.Unlock()
	first.close()
	close(first.done)
	s.publish(e)
}

// closeLog ends the log when the outputs have.
func (c *container) closeLog(s *Server, io *stdio) {
	closeOutputs(io.outputs)
	if io.log == nil {
		return
	}
	if n := io.log.Dropped(); n > 0 {
		s.log.Warn("container log could not be written in full", "container", string(c.id), "bytes", n)
	}
	_ = io.log.Close()
}

// exec starts a further process. Its id is taken before the process is made, and
// life is held until the process is known, so that Delete finds it.
func (c *container) exec(s *Server, owner *conn, r wire.Exec, io oci.Stdio) (_ wire.ExecReply, held []*os.File, watch func(), err error) {
	if _, err := c.running(); err != nil {
		return wire.ExecReply{}, nil, nil, err
	}
	c.mu.Lock()
	if _, ok := c.execs[r.Exec]; ok {
		c.mu.Unlock()
		return wire.ExecReply{}, nil, nil, fmt.Errorf("exec %s: %w", r.Exec, errdefs.ErrAlreadyExists)
	}
	if c.execs == nil {
		c.execs = map[id.Exec]*exec{}
	}
	c.execs[r.Exec] = nil
	c.mu.Unlock()
	var x *exec
	defer func() {
		if x == nil { // also after a panic of the runtime
			c.mu.Lock()
			delete(c.execs, r.Exec)
			c.mu.Unlock()
		}
	}()
	c.life.RLock()
	defer c.life.RUnlock()
	forked := s.children.forking()
	p, err := c.oci.Exec(context.Background(), r.Process, io)
	crashpoint.Here("exec", "program", "runs")
	if err == nil {
		s.children.add(p.Pid)
	}
	forked()
	if err != nil {
		return wire.ExecReply{}, nil, nil, err
	}
	proc, err := s.own(p)
	if err != nil {
		return wire.ExecReply{}, nil, nil, err
	}
	if p.Console != nil {
		held = append(held, p.Console)
		if proc.console, err = dupFile(p.Console); err != nil {
			s.log.Error("terminal of an exec is lost to resizing", "container", string(c.id), "error", err)
		}
	}
	if owner.version.Load() >= wire.VersionTakeover {
		fd, err := dupFile(proc.pidfd)
		if err != nil { // the client would take the terminal for it
			fd = nil
			s.log.Error("exec cannot be taken over", "container", string(c.id), "error", err)
		} else {
			held = append(held, fd)
		}
	}
	x = &exec{process: proc, id: r.Exec, owner: owner}
	c.mu.Lock()
	c.execs[r.Exec] = x
	late := c.deleting != nil
	c.mu.Unlock()
	if late { // Delete may have killed before this process was in the cgroup
		_ = proc.signal(sigkill)
	}
	if owner.gone() { // it was lost before hangUp could see this exec
		x.hangUp()
	}
	return wire.ExecReply{Pid: p.Pid}, held, func() { s.goNamed("watch", func() { c.watchExec(s, x) }) }, nil
}

// hangUp ends the terminals of the execs that owner asked for. The daemon that
// held their other ends is gone, and with our duplicate, kept for resizing, the
// kernel would never send them SIGHUP. Programs without a terminal see the end
// of their stdin.
func (c *container) hangUp(owner *conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, x := range c.execs {
		if x != nil && x.owner == owner {
			x.hangUp()
		}
	}
}

func (c *container) watchExec(s *Server, x *exec) {
	e := x.wait(s.children)
	crashpoint.Here("exec", "reaped")
	e.ID, e.Exec = c.id, x.id
	c.mu.Lock()
	delete(c.execs, x.id)
	owner := x.owner
	if owner.gone() && len(c.unheard) < maxUnheard {
		if c.unheard == nil {
			c.unheard = map[id.Exec]wire.Exit{}
		}
		c.unheard[x.id] = e
	}
	x.close() // under the lock: follow may bring another terminal
	c.mu.Unlock()
	close(x.done)
	owner.notify(e)
}

// signal serves OpSignal.
func (c *container) signal(r wire.Signal) error {
	if r.All && r.Signal != sigkill {
		return fmt.Errorf("signal %d: only SIGKILL (9) goes to all processes: %w", r.Signal, errdefs.ErrInvalidArgument)
	}
	if r.Exec != "" {
		c.mu.Lock()
		x := c.execs[r.Exec]
		cgroups := c.cgroups
		c.mu.Unlock()
		if x == nil {
			return fmt.Errorf("exec %s in container %s: %w", r.Exec, c.id, errdefs.ErrNotFound)
		}
		if !r.All {
			return x.signal(r.Signal)
		}
		if err := killTree(x.process, cgroups, treeTime); err != nil {
			return fmt.Errorf("exec %s: processes still there after SIGKILL: %w: %w", r.Exec, err, errdefs.ErrUnavailable)
		}
		return nil
	}
	if r.All {
		c.life.RLock()
		defer c.life.RUnlock()
		c.beforeKill()
		return c.oci.KillAll()
	}
	p, err := c.running()
	if err != nil {
		return err
	}
	if r.Signal == sigkill {
		c.life.RLock()
		defer c.life.RUnlock()
		c.beforeKill()
	}
	return c.signalFirst(p, r.Signal)
}

// signalFirst sends a signal to the first process, by way of a runtime that wants
// it so.
func (c *container) signalFirst(p *process, sig int) error {
	k, own := c.oci.(oci.Signaler)
	if !own || p.exited() {
		return p.signal(sig)
	}
	err := k.SignalFirst(sig)
	if err != nil && (p.exited() || sig == sigkill) {
		return p.signal(sig) // that it has exited; or the kill that needs no runtime
	}
	return err
}

// errRunning is why a container is not deleted that only an ended one may be.
var errRunning = fmt.Errorf("container is running: %w", errdefs.ErrFailedPrecondition)

// delete kills, waits and removes; concurrent calls join the running one. With
// ended it leaves a container alone that is being started or runs.
func (c *container) delete(s *Server, ended bool) error {
	<-c.made
	if c.makeErr != nil {
		return nil // Create left nothing
	}
	c.mu.Lock()
	if d := c.deleting; d != nil {
		c.mu.Unlock()
		<-d.done
		return d.err
	}
	if ended && c.exit == nil && c.starting {
		c.mu.Unlock()
		return errRunning
	}
	d := &deletion{done: make(chan struct{})}
	c.deleting = d
	c.mu.Unlock()
	d.err = errdefs.ErrInternal // stands when remove panics
	defer close(d.done)
	if d.err = c.remove(s); d.err != nil {
		c.mu.Lock()
		c.deleting = nil
		c.mu.Unlock()
		return d.err
	}
	s.forget(c)
	return nil
}

func (c *container) remove(s *Server) error {
	deadline := time.Now().Add(deleteTime)
	for {
		c.life.RLock()
		c.beforeKill()
		kerr := c.oci.KillAll()
		c.life.RUnlock()
		left := 0
		for _, p := range c.processes() {
			if !p.exited() {
				_ = p.signal(sigkill) // also when the cgroup cannot be killed
			}
			// A drain of the output takes at most drainTime.
			select {
			case <-p.done:
			case <-time.After(drainTime + 200*time.Millisecond):
				left++
			}
		}
		// With life held no exec is on its way; one that was ends late but is known.
		c.life.Lock()
		if left == 0 && !slices.ContainsFunc(c.processes(), func(p *process) bool { return !p.published() }) {
			break
		}
		c.life.Unlock()
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("container %s: %d processes do not end: %w", c.id, left, errdefs.ErrUnavailable), kerr)
		}
	}
	defer c.life.Unlock()
	c.attached.end()
	crashpoint.Here("delete", "processes", "ended")
	forked := s.children.forking() // it may run hooks
	defer forked()
	return c.oci.Delete()
}

// processes are those that were started and are not forgotten.
func (c *container) processes() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*process
	if c.first != nil {
		out = append(out, c.first)
	}
	for _, x := range c.execs {
		if x != nil {
			out = append(out, x.process)
		}
	}
	return out
}
