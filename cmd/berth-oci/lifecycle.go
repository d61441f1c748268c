package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/embedded"
	"github.com/berth-runtime/berth/oci/embedded/state"
)

func (a *app) startCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "start ID",
		Short: "Run the program of a created container",
		Args:  exactly(1),
		RunE:  func(cmd *cobra.Command, args []string) error { return a.start(cmd.Context(), args[0]) },
	}
}

func (a *app) start(ctx context.Context, name string) (err error) {
	d, r, err := a.locked(name)
	if err != nil {
		return err
	}
	defer d.Close()
	status, err := d.Status(r)
	if err != nil {
		return err
	}
	switch status {
	case state.Created:
	case state.Stopped:
		return fmt.Errorf("%s: cannot start a container that has stopped", name)
	case state.Running:
		return fmt.Errorf("%s: cannot start an already running container", name)
	default:
		return fmt.Errorf("%s: cannot start a container in the %s state", name, status)
	}
	rt, c, err := a.reopen(d, r)
	if err != nil {
		return err
	}
	defer rt.Close()
	n := newNotifier(d.Path)
	if err := n.listen(); err != nil {
		return err
	}
	pidfd, err := r.PidFD()
	if err != nil {
		return err
	}
	defer pidfd.Close()
	if err := release(ctx, d, c); err != nil {
		// The program does not run, or a poststart hook refused it: in neither case
		// is it to go on. What is left is a stopped container, as the spec has it.
		if kerr := r.Signal(unix.SIGKILL); kerr != nil && !errors.Is(kerr, state.ErrNotRunning) {
			err = errors.Join(err, kerr)
		}
		return err
	}
	if err := d.Close(); err != nil { // others may delete it while its program gets ready
		return err
	}
	return n.forward(r.Saved.Pid, pidfd)
}

// release lets the first process through its gate, which is removed then.
func release(ctx context.Context, d *state.Dir, c *embedded.Container) error {
	gate, err := d.OpenGate()
	if err != nil {
		return err
	}
	defer gate.Close()
	if err := c.Release(ctx, gate); err != nil {
		return err
	}
	return d.RemoveGate()
}

// locked opens a container for a change of its life.
func (a *app) locked(name string) (*state.Dir, state.Record, error) {
	d, err := a.states().Open(name)
	if err != nil {
		return nil, state.Record{}, err
	}
	if err := d.Lock(); err != nil {
		return nil, state.Record{}, err
	}
	r, err := d.Load()
	if err != nil {
		return nil, r, errors.Join(err, d.Close())
	}
	return d, r, nil
}

// opened opens a container to look at it.
func (a *app) opened(name string) (*state.Dir, state.Record, state.Status, error) {
	d, err := a.states().Open(name)
	if err != nil {
		return nil, state.Record{}, "", err
	}
	r, err := d.Load()
	if err != nil {
		return nil, r, "", err
	}
	status, err := d.Status(r)
	return d, r, status, err
}

func (a *app) killCommand() *cobra.Command {
	all := false
	c := &cobra.Command{
		Use:   "kill ID [SIGNAL]",
		Short: "Send a signal (default: TERM) to the first process of a container",
		Args:  between(1, 2),
		RunE: func(_ *cobra.Command, args []string) error {
			sig := unix.SIGTERM
			if len(args) == 2 && args[1] != "" {
				var err error
				if sig, err = parseSignal(args[1]); err != nil {
					return err
				}
			}
			err := a.kill(args[0], sig, all)
			if all && errors.Is(err, state.ErrNotRunning) {
				return nil
			}
			return err
		},
	}
	c.Flags().SetInterspersed(false) // a signal may look like a flag
	c.Flags().BoolVarP(&all, "all", "a", false, "send it to all processes of the container")
	return c
}

func parseSignal(s string) (unix.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil && n >= 0 && n <= 64 {
		return unix.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n, ok := strings.CutPrefix(name, "SIGRTMIN"); ok {
		if off, err := strconv.Atoi("0" + strings.TrimPrefix(n, "+")); err == nil && off <= 30 {
			return unix.Signal(34 + off), nil
		}
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	return 0, fmt.Errorf("unknown signal %q: want a name such as TERM, or a number up to 64", s)
}

func (a *app) kill(name string, sig unix.Signal, all bool) error {
	d, r, status, err := a.opened(name)
	if err != nil {
		return err
	}
	// SIGKILL ends a PID namespace with its first process, except where that is
	// shared with others; and a process that cgroup v1 has frozen not at all.
	whole := sig == unix.SIGKILL && (!r.OwnPIDs || status == state.Paused || all)
	if !whole && !all {
		return r.Signal(sig)
	}
	if status == state.Stopped && (r.OwnPIDs || all && !whole) {
		return fmt.Errorf("%s: %w", name, state.ErrNotRunning)
	}
	rt, c, err := a.reopen(d, r)
	if err != nil {
		return err
	}
	defer rt.Close()
	if whole {
		if err := killAll(c); err != nil {
			return err
		}
		if err := r.Signal(sig); status != state.Stopped && !errors.Is(err, state.ErrNotRunning) {
			return err
		}
		return nil
	}
	pids, err := c.Processes()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && err != unix.ESRCH {
			return fmt.Errorf("%s: signal %d to %d: %w", name, sig, pid, err)
		}
	}
	return nil
}

func (a *app) deleteCommand() *cobra.Command {
	force := false
	c := &cobra.Command{
		Use:   "delete ID",
		Short: "Delete a container that has stopped",
		Args:  exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			err := a.delete(args[0], force)
			if force && errors.Is(err, state.ErrNotExist) {
				return nil
			}
			return err
		},
	}
	c.Flags().BoolVarP(&force, "force", "f", false, "kill it first if it runs")
	return c
}

// deathWait bounds the wait for a killed first process to be gone.
const deathWait = 10 * time.Second

func (a *app) delete(name string, force bool) error {
	d, err := a.states().Open(name)
	if err != nil {
		return err
	}
	if err := d.Lock(); err != nil {
		return err
	}
	defer d.Close()
	r, err := d.Load()
	if errors.Is(err, state.ErrNotExist) {
		// A create was killed before it made anything, or a delete when all was gone.
		return errors.Join(err, d.Remove())
	}
	if err != nil {
		return err
	}
	status, err := d.Status(r)
	if err != nil {
		return err
	}
	if !force && status != state.Stopped && status != state.Created {
		return fmt.Errorf("cannot delete container %s that is not stopped: %s", name, status)
	}
	if r.Saved.Pid == 0 {
		if err := d.KillStrays(); err != nil {
			return err
		}
	}
	rt, c, err := a.reopen(d, r)
	if err != nil {
		return err
	}
	defer rt.Close()
	if err := killAll(c); err != nil {
		return err
	}
	if err := r.Signal(unix.SIGKILL); err != nil && !errors.Is(err, state.ErrNotRunning) {
		return err
	}
	if err := r.WaitGone(deathWait); err != nil {
		return err
	}
	if err := c.Delete(); err != nil {
		return err
	}
	return d.Remove()
}
