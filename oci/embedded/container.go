package embedded

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// nsFile is a namespace the container's processes join.
type nsFile struct {
	kind kernel.Namespace
	file *os.File
}

// Container is a container of the embedded runtime.
type Container struct {
	rt      *Runtime
	id      id.Container
	plan    *plan
	podInit bool
	cgroup  *cgroup.Cgroup // nil: the processes stay in the runtime's

	// Set by Create, closed by Delete, used by scripts of both.
	joinDir   *os.File   // cgroup v2
	joinFiles []*os.File // cgroup v1
	ns        []nsFile
	joinPID   *os.File // PID namespace to be born in
	mountNS   *os.File
	pts       *os.File // the devpts at /dev/pts

	// Used up by Start.
	joinCgroupNS        *os.File
	maskDir, maskNull   *os.File
	dev                 *os.File // of the assembly; closed there
	devReadonly         bool
	procs               []procMount
	ptyMaster, ptySlave *os.File

	mu       sync.RWMutex // Exec holds it shared, Start and Delete alone
	init     *os.File     // pidfd of the first process; guarded by mu
	started  bool         // guarded by mu
	deleted  bool         // guarded by mu
	warnMu   sync.Mutex
	warnings []string // guarded by warnMu after Create
}

var _ oci.Container = (*Container)(nil)

// Warnings lists the parts of the spec that the host or our own privileges did
// not allow: capabilities, raised limits.
func (c *Container) Warnings() []string {
	c.warnMu.Lock()
	defer c.warnMu.Unlock()
	return append([]string(nil), c.warnings...)
}

func (c *Container) warn(w []string) {
	c.warnMu.Lock()
	c.warnings = append(c.warnings, w...)
	c.warnMu.Unlock()
	for _, x := range w {
		c.rt.log.Warn("container spec is only partly applied", "container", string(c.id), "reason", x)
	}
}

// Start implements oci.Container.
func (c *Container) Start(ctx context.Context, io oci.Stdio) (oci.Process, error) {
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
	p, err := c.start(io)
	if err != nil {
		return oci.Process{}, fmt.Errorf("start container: %w", err)
	}
	init, err := dup(p.PidFD)
	if err != nil {
		return oci.Process{}, errors.Join(err, abandon(p))
	}
	c.init = init
	return p, nil
}

func (c *Container) start(io oci.Stdio) (oci.Process, error) {
	p := c.plan.spec.Process
	if c.podInit && p == nil {
		p = &specs.Process{Cwd: "/", NoNewPrivileges: true}
	}
	s := newScript()
	warnings, err := c.begin(s, p)
	if err != nil {
		return oci.Process{}, err
	}
	c.join(s)
	c.mountProc(s)
	l := launch{cgroup: c.joinDir, pidNS: c.joinPID, stdio: c.stdio(io)}
	if c.plan.ns[specs.PIDNamespace].mode == nsNew {
		l.clone = unix.CLONE_NEWPID
	}
	terminal := p.Terminal && !c.podInit
	if terminal {
		l.stdio = [3]*os.File{c.ptySlave, c.ptySlave, c.ptySlave}
	}
	if err := giveStdio(l.stdio, p.User.UID, terminal); err != nil {
		return oci.Process{}, err
	}
	more, err := c.identity(s, p, terminal)
	if err != nil {
		return oci.Process{}, err
	}
	var cells []execCell
	if c.podInit {
		s.sleepForEver()
	} else {
		cells = s.exec(p)
	}
	proc, err := c.rt.run(s, l)
	if err != nil {
		return oci.Process{}, explain(err, p, cells)
	}
	if terminal {
		proc.Console, c.ptyMaster = c.ptyMaster, nil
	}
	c.warn(append(warnings, more...))
	return proc, nil
}

// sleepForEver is the end of a pod's init: the kernel reaps its children, since
// it ignores SIGCHLD, and closing the status pipe tells that it is ready.
func (s *script) sleepForEver() {
	const sigIgn = 1
	act := make([]byte, 32) // struct sigaction of the kernel
	act[0] = sigIgn
	s.do("ignore SIGCHLD", unix.SYS_RT_SIGACTION, int(unix.SIGCHLD), act, 0, 8)
	s.do("close", unix.SYS_CLOSE_RANGE, statusFD, uintptr(0xffffffff), 0)
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
func giveStdio(files [3]*os.File, uid uint32, terminal bool) error {
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
		if err := unix.Fchown(int(f.Fd()), int(uid), -1); err != nil {
			return fmt.Errorf("stdio: chown: %w", err)
		}
	}
	return nil
}

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
	if c.init == nil || c.podInit && c.procs == nil {
		return oci.Process{}, fmt.Errorf("container %s: not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	s := newScript()
	warnings, err := c.begin(s, p)
	if err != nil {
		return oci.Process{}, err
	}
	kinds := unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP
	s.do("join namespaces", unix.SYS_SETNS, s.fd(c.init), kinds)
	l := launch{cgroup: c.joinDir, stdio: c.stdio(io)}
	if c.plan.ns[specs.PIDNamespace].mode != nsHost {
		l.pidNS = c.init
	}
	var master *os.File
	if p.Terminal {
		if c.pts == nil {
			return oci.Process{}, invalid("process.terminal: the container has no devpts at /dev/pts")
		}
		m, slave, err := openPty(c.pts, p.ConsoleSize)
		if err != nil {
			return oci.Process{}, err
		}
		defer slave.Close()
		defer func() {
			if err != nil {
				m.Close()
			}
		}()
		master, l.stdio = m, [3]*os.File{slave, slave, slave}
	}
	if err := giveStdio(l.stdio, p.User.UID, p.Terminal); err != nil {
		return oci.Process{}, err
	}
	more, err := c.identity(s, p, p.Terminal)
	if err != nil {
		return oci.Process{}, err
	}
	cells := s.exec(p)
	proc, err := c.rt.run(s, l)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return oci.Process{}, fmt.Errorf("container %s: not running: %w", c.id, errdefs.ErrFailedPrecondition)
		}
		return oci.Process{}, fmt.Errorf("exec in container: %w", explain(err, p, cells))
	}
	proc.Console = master
	c.warn(append(warnings, more...))
	return proc, nil
}

// cgroupOrErr is for the operations that need a cgroup.
func (c *Container) cgroupOrErr() (*cgroup.Cgroup, error) {
	if c.cgroup == nil {
		return nil, fmt.Errorf("container %s: its spec has no linux.cgroupsPath: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	return c.cgroup, nil
}

// KillAll implements oci.Container.
func (c *Container) KillAll() error {
	cg, err := c.cgroupOrErr()
	if err != nil {
		return err
	}
	return cg.KillAll()
}

// OOMKills implements oci.Container.
func (c *Container) OOMKills() (uint64, error) {
	cg, err := c.cgroupOrErr()
	if err != nil {
		return 0, err
	}
	return cg.OOMKills()
}

// Update implements oci.Container.
func (c *Container) Update(r *specs.LinuxResources) error {
	cg, err := c.cgroupOrErr()
	if err != nil {
		return err
	}
	warnings, err := cg.Update(r)
	if err != nil {
		return err
	}
	c.warn(warnings)
	return nil
}

// Pause implements oci.Container.
func (c *Container) Pause() error {
	cg, err := c.cgroupOrErr()
	if err != nil {
		return err
	}
	return cg.Freeze()
}

// Resume implements oci.Container.
func (c *Container) Resume() error {
	cg, err := c.cgroupOrErr()
	if err != nil {
		return err
	}
	return cg.Thaw()
}

// Delete implements oci.Container.
func (c *Container) Delete() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.closeFiles()
	if c.cgroup != nil {
		err = errors.Join(err, c.cgroup.Delete())
	}
	c.deleted = err == nil
	return err
}

func closeAll(files ...**os.File) error {
	var errs []error
	for _, f := range files {
		if *f != nil {
			errs = append(errs, (*f).Close())
			*f = nil
		}
	}
	return errors.Join(errs...)
}

// closeStartFiles closes what only Start needs.
func (c *Container) closeStartFiles() {
	// The mount namespace too: it is to go with the last process, not with Delete.
	closeAll(&c.joinCgroupNS, &c.mountNS, &c.maskDir, &c.maskNull, &c.ptyMaster, &c.ptySlave) // O_PATH and pty descriptors
	for i := range c.ns {
		closeAll(&c.ns[i].file) // as above
	}
	c.ns = nil
	for i := range c.procs {
		closeAll(&c.procs[i].at) // as above
		for k := range c.procs[i].binds {
			closeAll(&c.procs[i].binds[k].file) // as above
		}
		c.procs[i].binds = nil
	}
}

// closeFiles closes everything the container holds.
func (c *Container) closeFiles() error {
	c.closeStartFiles()
	c.dev = nil
	var errs []error
	for i := range c.joinFiles {
		errs = append(errs, closeAll(&c.joinFiles[i]))
	}
	c.joinFiles = nil
	return errors.Join(append(errs, closeAll(&c.joinDir, &c.joinPID, &c.pts, &c.init))...)
}
