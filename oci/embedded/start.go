package embedded

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

// Start implements oci.Container.
func (c *Container) Start(ctx context.Context, io oci.Stdio) (oci.Process, error) {
	p, err := c.first(ctx, io, nil)
	if err != nil {
		return oci.Process{}, fmt.Errorf("start container: %w", err)
	}
	return p, nil
}

// first makes the first process. With a gate it is left waiting there.
func (c *Container) first(ctx context.Context, io oci.Stdio, gate *Gate) (oci.Process, error) {
	if err := ctx.Err(); err != nil {
		return oci.Process{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.started || c.deleted {
		return oci.Process{}, fmt.Errorf("container %s: already started or deleted: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.started = true
	defer c.closeStartFiles()
	p := c.plan.spec.Process
	if c.podInit && p == nil {
		p = &specs.Process{Cwd: "/", NoNewPrivileges: true}
	}
	if p.ExecCPUAffinity != nil { // of further processes alone (runtime-spec, "Process")
		own := *p
		own.ExecCPUAffinity, p = nil, &own
	}
	f, err := c.compile(p, io, gate)
	if err != nil {
		return oci.Process{}, err
	}
	defer f.close()
	proc, err := c.follow(ctx, f, gate)
	if err != nil {
		arg0 := ""
		if len(p.Args) > 0 {
			arg0 = p.Args[0]
		}
		return oci.Process{}, explain(err, arg0)
	}
	if c.init, err = kernel.Dup(proc.PidFD); err != nil {
		return oci.Process{}, errors.Join(err, abandon(proc))
	}
	c.pid = proc.Pid
	if p.Terminal && !c.podInit {
		proc.Console, c.ptyMaster = c.ptyMaster, nil
	}
	c.warn(f.warnings)
	return proc, nil
}

// firstScript is the compiled start of the first process.
type firstScript struct {
	*script
	process  *specs.Process
	launch   launch
	warnings []string
	// Where the process waits, if it does: for its scheduling policy, for the early
	// hooks, at the gate, for the listener of its filter.
	wait, gate *os.File
	early      bool
	held       bool // there is a gate or something like it
}

func (f *firstScript) close() {
	if f.wait != nil {
		f.wait.Close()
		f.gate.Close()
	}
}

// release lets the process go on.
func (f *firstScript) release() error {
	_, err := f.gate.Write([]byte{1})
	return err
}

// compile writes the script of the first process.
func (c *Container) compile(p *specs.Process, io oci.Stdio, gate *Gate) (_ *firstScript, err error) {
	h := c.plan.spec.Hooks
	f := &firstScript{script: newScript(io.Extra), process: p, launch: launch{cgroup: c.joinDir, pidNS: c.joinPID, stdio: c.stdio(io)}}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	s := f.script
	f.early = len(c.plan.earlyHooks()) > 0 || h != nil && len(h.CreateContainer) > 0
	f.held = gate != nil || h != nil && len(h.StartContainer) > 0
	listener := c.plan.filter != nil && c.plan.filter.Listener
	// What the process waits at comes first in its table: at the gate the rest is closed.
	in, gateGo, gateStatus := childFD(-1), childFD(-1), childFD(-1)
	if gate != nil {
		gateGo, gateStatus = s.fd(gate.Go), s.fd(gate.Status)
	}
	if f.early || f.held || listener || lostByFork(p) {
		if f.wait, f.gate, err = os.Pipe(); err != nil {
			return nil, err
		}
		in = s.fd(f.wait)
	}
	if f.warnings, err = c.begin(s, p); err != nil {
		return nil, err
	}
	c.join(s)
	c.session(s)
	s.holdForScheduler(p, in)
	if c.plan.ns[specs.PIDNamespace].mode == nsNew && c.userNS == nil {
		f.launch.clone = unix.CLONE_NEWPID
	}
	if f.early {
		s.hold(in)
	}
	c.enterRoot(s)
	terminal := p.Terminal && !c.podInit
	if terminal {
		f.launch.stdio = [3]*os.File{c.ptySlave, c.ptySlave, c.ptySlave}
	}
	if err := c.giveStdio(f.launch.stdio, p.User.UID, terminal); err != nil {
		return nil, err
	}
	more, err := c.identity(s, p, terminal)
	if err != nil {
		return nil, err
	}
	f.warnings = append(f.warnings, more...)
	if c.podInit {
		s.sleepForEver()
		return f, nil
	}
	if f.held {
		s.lookup(p)
		at, _ := s.message(msgHold)
		s.tell(at)
		if gate != nil {
			s.do("gate", unix.SYS_DUP3, gateStatus, s.status(), unix.O_CLOEXEC)
			s.do("gate", unix.SYS_CLOSE_RANGE, gateStatus, uintptr(0xffffffff), 0)
			in = gateGo
			s.endAtGate(in, gateStatus)
			c.tail = Tail{First: len(s.ops), Arg0: p.Args[0]}
		}
		s.wait(in)
	}
	if err := c.seal(s, p, in); err != nil {
		return nil, err
	}
	s.exec(p)
	if gate != nil {
		c.tail.Names = s.names[c.tail.First:]
	}
	return f, nil
}

// follow starts the script and does what the process waits for, up to the gate
// or to the user's program.
func (c *Container) follow(ctx context.Context, f *firstScript, gate *Gate) (oci.Process, error) {
	ch, err := c.rt.spawn(f.script, f.launch)
	if err != nil {
		return oci.Process{}, err
	}
	early, held := f.early, f.held
	for {
		m, err := ch.next()
		if err != nil {
			return oci.Process{}, err
		}
		switch {
		case m.kind == 0:
			return ch.Process, c.afterStart(ctx, ch)
		case m.kind == msgFilter:
			err = c.sendFilter(ch.PidFD, ch.Pid, m.value)
		case m.kind == msgSched:
			err = setScheduler(ch.Pid, f.process)
		case early:
			early, err = false, c.runEarlyHooks(ctx, ch)
		case held && gate != nil:
			ch.status.Close() // a pipe; the process now has the gate
			return ch.Process, nil
		case held:
			held, err = false, c.runStartHooks(ctx, ch.PidFD, ch.Pid)
		default:
			err = fmt.Errorf("start program: message %d out of turn", m.kind)
		}
		if err == nil {
			err = f.release()
		}
		if err != nil {
			return oci.Process{}, ch.fail(err)
		}
	}
}

// runEarlyHooks runs the hooks of creation, while the process waits with the
// host's tree around its root.
func (c *Container) runEarlyHooks(ctx context.Context, ch *child) error {
	h := c.plan.spec.Hooks
	state := c.hookState(specs.StateCreating, ch.Pid)
	//lint:ignore SA1019 prestart is deprecated and still in use
	err := runHooks(ctx, "prestart", h.Prestart, state, c.bundle)
	if err == nil {
		err = runHooks(ctx, "createRuntime", h.CreateRuntime, state, c.bundle)
	}
	if err != nil {
		return err
	}
	return c.runInside(ctx, "createContainer", h.CreateContainer, state, func(h specs.Hook, in, out *os.File) (oci.Process, error) {
		s := newScript(nil)
		if _, err := c.begin(s, nil); err != nil {
			return oci.Process{}, err
		}
		hook, err := c.spawnInside(s, ch.PidFD, ch.Pid, launch{stdio: [3]*os.File{in, out, out}}, false, func() error {
			// Where the root lies in the host's tree, as with runc: hooks name what they
			// add to it from there. Before the ids: directories above may be closed to them.
			s.do("chdir", unix.SYS_CHDIR, c.plan.spec.Root.Path)
			if c.plan.user() {
				s.do("setresgid", unix.SYS_SETRESGID, 0, 0, 0).ignore(unix.EINVAL)
				s.do("setresuid", unix.SYS_SETRESUID, 0, 0, 0).ignore(unix.EINVAL)
			}
			s.do("close_range", unix.SYS_CLOSE_RANGE, s.status(), uintptr(0xffffffff), unix.CLOSE_RANGE_CLOEXEC)
			s.do("signal mask", unix.SYS_RT_SIGPROCMASK, 2, make([]byte, 8), 0, 8)
			s.execHook(h)
			return nil
		})
		if err != nil {
			return oci.Process{}, err
		}
		return hook.finish()
	})
}

// runStartHooks runs the startContainer hooks, as the container's user and under
// its filter: they are programs of the container.
func (c *Container) runStartHooks(ctx context.Context, pidfd *os.File, pid int) error {
	h := c.plan.spec.Hooks
	if h == nil || len(h.StartContainer) == 0 {
		return nil
	}
	return c.runInside(ctx, "startContainer", h.StartContainer, c.hookState(specs.StateCreated, pid), func(h specs.Hook, in, out *os.File) (oci.Process, error) {
		p := *c.plan.spec.Process
		p.Terminal, p.ExecCPUAffinity = false, nil
		if h.Env == nil {
			h.Env = p.Env
		}
		s := newScript(nil)
		if _, err := c.begin(s, &p); err != nil {
			return oci.Process{}, err
		}
		agent, err := c.newAgentGate(s, &p)
		if err != nil {
			return oci.Process{}, err
		}
		defer agent.close()
		ch, err := c.spawnInside(s, pidfd, pid, launch{stdio: [3]*os.File{in, out, out}}, false, func() error {
			c.session(s)
			if _, err := c.identity(s, &p, false); err != nil {
				return err
			}
			s.holdForScheduler(&p, agent.in)
			if err := c.seal(s, &p, agent.in); err != nil {
				return err
			}
			s.execHook(h)
			return nil
		})
		if err != nil {
			return oci.Process{}, err
		}
		return c.followExec(ch, &p, agent.release)
	})
}

// afterStart runs the poststart hooks. One that fails ends the container.
func (c *Container) afterStart(ctx context.Context, ch *child) error {
	if c.plan.spec.Hooks == nil || len(c.plan.spec.Hooks.Poststart) == 0 {
		return nil
	}
	err := runHooks(ctx, "poststart", c.plan.spec.Hooks.Poststart, c.hookState(specs.StateRunning, ch.Pid), c.bundle)
	if err != nil {
		return errors.Join(err, abandon(ch.Process))
	}
	return nil
}

// sleepForEver is the end of a pod's init: the kernel reaps its children, since
// it ignores SIGCHLD, and closing the status pipe tells that it is ready.
func (s *script) sleepForEver() {
	const sigIgn = 1
	act := make([]byte, 32) // struct sigaction of the kernel
	act[0] = sigIgn
	s.do("ignore SIGCHLD", unix.SYS_RT_SIGACTION, int(unix.SIGCHLD), act, 0, 8)
	s.do("close", unix.SYS_CLOSE_RANGE, s.status(), uintptr(0xffffffff), 0)
	s.do("pause", unix.SYS_PPOLL, 0, 0, 0, 0).ignoreAny().skip(-1)
}

func (c *Container) stdio(io oci.Stdio) [3]*os.File {
	out := [3]*os.File{io.In, io.Out, io.Err}
	for i, f := range out {
		if f == nil {
			out[i] = c.rt.null
		}
	}
	return out
}

// giveStdio lets a user other than root open its own pipes and terminal again
// through /proc/self/fd. Nothing else is changed: a file or a socket is the
// caller's.
func (c *Container) giveStdio(files [3]*os.File, user uint32, terminal bool) error {
	uid, ok := c.plan.maps.uid(user)
	if !ok {
		return invalid("process.user.uid %d: not in the user namespace of the container", user)
	}
	if uid == 0 {
		return nil
	}
	for _, f := range files {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return fmt.Errorf("stdio: %w", err)
		}
		if !terminal && st.Mode&unix.S_IFMT != unix.S_IFIFO || st.Uid == uid {
			continue
		}
		err := unix.Fchown(int(f.Fd()), int(uid), -1)
		if c.rt.nested || c.rt.plain {
			continue // the caller's files may belong to somebody without a name here
		}
		if err != nil {
			return fmt.Errorf("stdio: chown: %w", err)
		}
	}
	return nil
}
