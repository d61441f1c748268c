package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/durable"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/undo"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded"
	"github.com/berth-runtime/berth/oci/embedded/cgroup"
	sdcgroup "github.com/berth-runtime/berth/oci/embedded/cgroup/systemd"
	"github.com/berth-runtime/berth/oci/embedded/state"
)

// launch is what create and run were asked for.
type launch struct {
	bundle       string
	connect      connections
	pidFile      string
	preserveFDs  int
	runNow       bool // run
	detach       bool
	keep         bool
	noSubreaper  bool
	noNewKeyring bool
}

func (a *app) createCommand() *cobra.Command {
	l := &launch{detach: true, keep: true}
	c := &cobra.Command{
		Use:   "create ID",
		Short: "Create a container; start runs its program",
		Args:  exactly(1),
		RunE:  func(cmd *cobra.Command, args []string) error { return a.launch(cmd.Context(), args[0], l) },
	}
	l.flags(c)
	return c
}

func (a *app) runCommand() *cobra.Command {
	l := &launch{runNow: true}
	c := &cobra.Command{
		Use:   "run ID",
		Short: "Create and start a container, and end with its exit code",
		Args:  exactly(1),
		RunE:  func(cmd *cobra.Command, args []string) error { return a.launch(cmd.Context(), args[0], l) },
	}
	l.flags(c)
	c.Flags().BoolVarP(&l.detach, "detach", "d", false, "do not wait for the container's end")
	c.Flags().BoolVar(&l.keep, "keep", false, "do not delete the container at its end")
	c.Flags().BoolVar(&l.noSubreaper, "no-subreaper", false, "do not become the parent of the container's orphans")
	return c
}

func (l *launch) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVarP(&l.bundle, "bundle", "b", "", "directory of the bundle (default: the current one)")
	l.connect.flags(c)
	f.StringVar(&l.pidFile, "pid-file", "", "file to write the pid of the first process to")
	f.Bool("no-pivot", false, "accepted and without effect: the root does not depend on where the runtime's own lies")
	f.BoolVar(&l.noNewKeyring, "no-new-keyring", false, "leave the container in the caller's session keyring")
	f.IntVar(&l.preserveFDs, "preserve-fds", 0, "how many further descriptors to pass on, after stdio and $LISTEN_FDS")
}

// launch creates a container and, for run, starts it and waits for its end.
func (a *app) launch(ctx context.Context, name string, l *launch) (err error) {
	if l.pidFile != "" {
		if l.pidFile, err = filepath.Abs(l.pidFile); err != nil {
			return fmt.Errorf("--pid-file: %w", err)
		}
	}
	if err := state.ValidID(name); err != nil {
		return err
	}
	b, err := openBundle(l.bundle)
	if err != nil {
		return err
	}
	if err := l.connect.check(b.spec.Process.Terminal, l.detach); err != nil {
		return err
	}
	if again, err := needsUserNamespace(b.spec); err != nil {
		return err
	} else if again {
		return a.inUserNamespace(b.spec, l.preserveFDs)
	}
	if err := l.connect.open(); err != nil {
		return err
	}
	defer l.connect.close()
	m := &making{app: a, launch: l, name: name, bundle: b}
	defer m.close()
	if !l.detach {
		// Before the start, so that no signal is lost in between.
		m.att = attach(!l.noSubreaper)
		defer m.att.release()
	}
	p, err := m.make(ctx)
	if err != nil {
		return err
	}
	defer p.PidFD.Close()
	// Others may delete the container from here on.
	if err := m.dir.Close(); err != nil {
		return err
	}
	if l.detach {
		if l.runNow {
			return m.notify.forward(p.Pid, p.PidFD)
		}
		return nil
	}
	go func() {
		if err := m.notify.forward(os.Getpid(), p.PidFD); err != nil {
			m.log.Warn(err.Error())
		}
	}()
	code, err := m.att.wait(p)
	if !l.keep {
		err = errors.Join(err, m.delete())
	}
	if err != nil {
		return err
	}
	return exitStatus(code)
}

// making is a container on its way.
type making struct {
	*app
	*launch
	name   string
	bundle *bundle
	att    *attachment // nil: detached
	notify *notifier
	dir    *state.Dir
	rec    state.Record
	rt     *embedded.Runtime
	c      *embedded.Container
}

// make makes the container, as far as the command asks. On error nothing is left.
func (m *making) make(ctx context.Context) (p oci.Process, err error) {
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run())
		}
	}()
	extra, env, err := m.passedFiles(m.preserveFDs)
	if err != nil {
		return p, err
	}
	if err := m.create(ctx, &u, env); err != nil {
		return p, err
	}
	io, err := m.att.stdio(m.bundle.spec.Process.Terminal)
	if err != nil {
		return p, err
	}
	io.Extra = extra
	if p, err = m.prepare(ctx, &u, io); err != nil {
		return p, err
	}
	if err := m.connect.hand(p, m.detach); err != nil {
		return p, err
	}
	if err := m.att.console(p); err != nil {
		return p, err
	}
	if m.pidFile != "" {
		if err := writePid(m.pidFile, p.Pid); err != nil {
			return p, err
		}
	}
	if m.runNow {
		if err := m.notify.listen(); err != nil {
			return p, err
		}
		m.log.Debug("start", "container", m.name, "pid", p.Pid)
		if err := release(ctx, m.dir, m.c); err != nil {
			return p, err
		}
	}
	u.Release()
	return p, nil
}

// create makes everything but the first process. env is added to the process's
// environment. What it made goes on the undo stack.
func (m *making) create(ctx context.Context, u *undo.Stack, env []string) (err error) {
	s := m.bundle.spec
	if m.dir, err = m.states().Create(m.name); err != nil {
		return err
	}
	u.Push(m.dir.Remove)
	noCgroup := m.isRootless() && s.Linux != nil && s.Linux.CgroupsPath == ""
	complete(s, m.name, m.bundle.dir, m.systemd, noCgroup)
	s.Process.Env = append(s.Process.Env, env...)
	setEnv(s.Process, s.Root.Path)
	m.rec = state.Record{
		OCIVersion: s.Version, Rootfs: s.Root.Path, Created: time.Now().UTC(), Annotations: s.Annotations,
		OwnPIDs: ownPIDs(s), NoCgroup: noCgroup, Systemd: m.systemd, KeepKeyring: m.noNewKeyring,
		Saved: embedded.Saved{ID: id.Container(m.name), Bundle: m.bundle.dir},
	}
	if m.rt, err = m.runtime(m.systemd, m.noNewKeyring); err != nil {
		return err
	}
	if s.Linux != nil {
		if m.rec.Saved.Cgroups, err = m.rt.CgroupPaths(s.Linux.CgroupsPath); err != nil {
			return err
		}
	}
	// The intent, before anything is made that it would take to find again.
	if err := errors.Join(m.dir.SaveSpec(m.bundle.raw), m.dir.Save(m.rec)); err != nil {
		return err
	}
	m.notify = newNotifier(m.dir.Path)
	if err := m.notify.offer(s); err != nil {
		return err
	}
	m.log.Debug("create", "container", m.name, "bundle", m.bundle.dir)
	if inside() {
		s = withoutUserNamespace(s)
	}
	c, err := m.rt.Create(ctx, oci.CreateRequest{ID: id.Container(m.name), Bundle: m.bundle.dir, Spec: s})
	if err != nil {
		return err
	}
	m.c = c.(*embedded.Container)
	u.Push(func() error { return errors.Join(killAll(m.c), m.c.Delete()) })
	return nil
}

// prepare makes the first process, which waits at the gate, and writes it down.
func (m *making) prepare(ctx context.Context, u *undo.Stack, io oci.Stdio) (oci.Process, error) {
	gate, err := m.dir.MakeGate()
	if err != nil {
		return oci.Process{}, err
	}
	// Not kept: a gate held open here would never hang up on the one who starts.
	defer gate.Close()
	p, err := m.c.Prepare(ctx, io, gate)
	if err != nil {
		return p, err
	}
	u.Push(func() error { return end(p) })
	if m.rec.Saved, err = m.c.Save(); err != nil {
		return p, err
	}
	return p, m.dir.Save(m.rec)
}

// delete removes the container after its end, unless somebody else has.
func (m *making) delete() error {
	err := m.dir.Lock()
	if errors.Is(err, state.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if now, err := m.dir.Load(); err != nil || now.Saved.Pid != m.rec.Saved.Pid {
		return nil // deleted, and perhaps made anew
	}
	return errors.Join(killAll(m.c), m.c.Delete(), m.dir.Remove())
}

// close lets go of what this process holds of the container.
func (m *making) close() {
	if m.rt != nil {
		m.rt.Close()
	}
	if m.dir != nil {
		m.dir.Close()
	}
}

// runtime makes the embedded runtime for this command.
func (a *app) runtime(systemd, keepKeyring bool) (*embedded.Runtime, error) {
	c := embedded.Config{KeepKeyring: keepKeyring, Log: a.log.Logger}
	if systemd {
		h, err := cgroup.Detect()
		if err != nil {
			return nil, err
		}
		// Its connection ends with this command.
		if c.Cgroups, err = sdcgroup.New(h, os.Geteuid() != 0); err != nil {
			return nil, err
		}
	}
	return embedded.New(c)
}

// reopen finds a container that another command made. The caller closes the runtime.
func (a *app) reopen(d *state.Dir, r state.Record) (*embedded.Runtime, *embedded.Container, error) {
	s, err := d.LoadSpec()
	if err != nil {
		return nil, nil, err
	}
	complete(s, d.ID, r.Saved.Bundle, r.Systemd, r.NoCgroup)
	r.Saved.Spec = s
	rt, err := a.runtime(r.Systemd, r.KeepKeyring)
	if err != nil {
		return nil, nil, err
	}
	c, err := rt.Reopen(r.Saved)
	if err != nil {
		return nil, nil, errors.Join(err, rt.Close())
	}
	return rt, c, nil
}

// killAll kills what is in the container's cgroup; without one there is the
// first process alone, which the caller kills.
func killAll(c *embedded.Container) error {
	if err := c.KillAll(); err != nil && !errdefs.IsFailedPrecondition(err) {
		return err
	}
	return nil
}

// end kills and reaps a process of ours.
func end(p oci.Process) error {
	err := unix.Kill(p.Pid, unix.SIGKILL) // ours and not yet reaped: the number is its own
	_, werr := kernel.Reap(p.Pid)
	return errors.Join(err, werr)
}

func ownPIDs(s *specs.Spec) bool {
	if s.Linux == nil {
		return false
	}
	for _, n := range s.Linux.Namespaces {
		if n.Type == specs.PIDNamespace {
			return n.Path == ""
		}
	}
	return false
}

// writePid writes the pid file: whoever waits for it finds a whole number.
func writePid(path string, pid int) error {
	if err := durable.WriteFile(path, strconv.AppendInt(nil, int64(pid), 10), 0o644, false); err != nil {
		return fmt.Errorf("--pid-file: %w", err)
	}
	return nil
}
