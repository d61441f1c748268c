package embedded

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
)

// Exec implements oci.Container.
func (c *Container) Exec(ctx context.Context, p *specs.Process, io oci.Stdio) (_ oci.Process, err error) {
	if err := ctx.Err(); err != nil {
		return oci.Process{}, err
	}
	if p == nil {
		return oci.Process{}, invalid("process: missing")
	}
	if err := checkProcess(p, true); err != nil {
		return oci.Process{}, err
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.plan.refused != nil {
		return oci.Process{}, c.plan.refused
	}
	if c.init == nil || c.podInit && c.procs == nil {
		return oci.Process{}, fmt.Errorf("container %s: not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if c.plan.user() {
		if err := c.plan.checkIDs(&p.User); err != nil {
			return oci.Process{}, err
		}
	}
	s := newScript(io.Extra)
	warnings, err := c.begin(s, p)
	if err != nil {
		return oci.Process{}, err
	}
	l := launch{stdio: c.stdio(io)}
	var master *os.File
	if p.Terminal {
		if c.pts == nil {
			return oci.Process{}, invalid("process.terminal: the container has no devpts at /dev/pts")
		}
		var slave *os.File
		if master, slave, err = openPty(c.pts, p.ConsoleSize); err != nil {
			return oci.Process{}, err
		}
		defer slave.Close()
		m := master
		defer func() {
			if err != nil {
				m.Close()
			}
		}()
		l.stdio = [3]*os.File{slave, slave, slave}
	}
	if err := c.giveStdio(l.stdio, p.User.UID, p.Terminal); err != nil {
		return oci.Process{}, err
	}
	agent, err := c.newAgentGate(s, p)
	if err != nil {
		return oci.Process{}, err
	}
	defer agent.close()
	if tracer(p) {
		c.tracers.Store(true)
	}
	late := c.mayBeTraced()
	ch, err := c.spawnInside(s, c.init, c.pid, l, late, func() error {
		c.session(s)
		more, err := c.identity(s, p, p.Terminal && !late)
		warnings = append(warnings, more...)
		in := agent.in
		if late {
			in = s.appear(p.Terminal, in)
		}
		s.holdForScheduler(p, in)
		if err == nil {
			err = c.seal(s, p, in)
		}
		s.exec(p)
		return err
	})
	var proc oci.Process
	if err == nil {
		proc, err = c.followExec(ch, p, agent.release)
	}
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return oci.Process{}, fmt.Errorf("container %s: not running: %w", c.id, errdefs.ErrFailedPrecondition)
		}
		return oci.Process{}, fmt.Errorf("exec in container: %w", explain(err, p.Args[0]))
	}
	proc.Console = master
	c.warn(warnings)
	return proc, nil
}

// agentGate is what a process with a listener in its filter waits at until the
// listener has been handed out, for execs as for the first process, and one whose
// scheduling policy a fork would lose until it has that.
type agentGate struct {
	in            childFD
	wait, release *os.File
}

// newAgentGate makes the gate for the script of p where there is something to wait for.
func (c *Container) newAgentGate(s *script, p *specs.Process) (g agentGate, err error) {
	g.in = -1
	if (c.plan.filter == nil || !c.plan.filter.Listener) && !lostByFork(p) {
		return g, nil
	}
	if g.wait, g.release, err = os.Pipe(); err == nil {
		g.in = s.fd(g.wait)
	}
	return g, err
}

func (g agentGate) close() {
	if g.wait != nil {
		g.wait.Close()
		g.release.Close()
	}
}

// spawnInside starts a script, begun by begin, in the namespaces of the
// container's first process and goes on with what rest appends, which makes the
// entry into the PID namespace if that is to be late.
func (c *Container) spawnInside(s *script, pidfd *os.File, pid int, l launch, late bool, rest func() error) (*child, error) {
	l.cgroup = c.joinDir
	root, err := c.enterRunning(s, pidfd, pid, late)
	if err != nil {
		return nil, err
	}
	if root != nil {
		defer root.Close()
	}
	if c.plan.ns[specs.PIDNamespace].mode != nsHost && !c.rt.plain && !late {
		l.pidNS = pidfd
	}
	if err := rest(); err != nil {
		return nil, err
	}
	ch, err := c.rt.spawn(s, l)
	if errors.Is(err, unix.EBUSY) && l.cgroup != nil {
		// The container administers cgroups of its own below: see JoinDirBeside.
		if l.cgroup, err = c.cgroup.JoinDirBeside(pid); err != nil {
			return nil, err
		}
		defer l.cgroup.Close()
		ch, err = c.rt.spawn(s, l)
	}
	return ch, err
}

// followExec waits until the program of an exec, p, runs.
func (c *Container) followExec(ch *child, p *specs.Process, gate *os.File) (oci.Process, error) {
	for {
		m, err := ch.next()
		if err != nil || m.kind == 0 {
			return ch.Process, err
		}
		if m.kind == msgSched {
			err = setScheduler(ch.Pid, p)
		} else {
			err = c.sendFilter(ch.PidFD, ch.Pid, m.value)
		}
		if err == nil {
			_, err = gate.Write([]byte{1})
		}
		if err != nil {
			return oci.Process{}, ch.fail(err)
		}
	}
}
