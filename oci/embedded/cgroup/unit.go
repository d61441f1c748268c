package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Unit is another administrator's hold on a cgroup: systemd's scope. It keeps
// the directories and some of the limits, and puts them back when it likes, so
// it must know them.
type Unit interface {
	// Start makes the unit with the process pid in it.
	Start(pid int) error
	// Update tells the unit the limits of r; fields that are not set stay.
	Update(r *specs.LinuxResources) error
	// Stop ends the unit with what runs in it. One that is gone is no error.
	Stop() error
}

// Managed returns the cgroup at the absolute path of a unit that is still to be
// started: its limits are checked, and nothing is there until Adopt, which has the
// warnings, too.
func (h *Host) Managed(path string, r *specs.LinuxResources, u Unit) (*Cgroup, error) {
	c, err := h.OpenManaged(path, u)
	if err != nil {
		return nil, err
	}
	if r == nil {
		r = &specs.LinuxResources{}
	}
	if _, err := c.plan(r); err != nil {
		return nil, err
	}
	c.pending = r
	return c, nil
}

// OpenManaged returns the cgroup at path of a unit that runs.
func (h *Host) OpenManaged(path string, u Unit) (*Cgroup, error) {
	p, err := Clean(path)
	if err != nil {
		return nil, err
	}
	c, err := h.at(p)
	if err != nil {
		return nil, err
	}
	c.unit = u
	return c, nil
}

// NeedsProcess reports that the cgroup is not there before Adopt: systemd makes
// no scope without a process.
func (c *Cgroup) NeedsProcess() bool { return c.pending != nil }

// Adopt moves the process pid into the cgroup. Where NeedsProcess says so it
// makes the cgroup first, with its limits and device rules, and pid must be a
// process that waits meanwhile. Either it is the container's first process, held
// before it makes its cgroup namespace and before it runs anything of the
// container. Or it stands in for that one, from before the container's mounts
// are made (they show the cgroup) until the first process has joined by JoinDir
// and JoinFiles; then the caller ends it, and the scope lives on with the others.
//
// When making fails nothing is left, and pid has been killed. warnings name limits
// that this kernel has no file for.
//
// It writes to cgroup.procs, which costs 7-11 ms on cgroup v1.
func (c *Cgroup) Adopt(pid int) (warnings []string, err error) {
	if pid <= 0 {
		return nil, fmt.Errorf("cgroup %s: adopt process %d: want a pid: %w", c.path, pid, errdefs.ErrInvalidArgument)
	}
	if c.pending != nil && pid == os.Getpid() {
		return nil, fmt.Errorf("cgroup %s: adopt process %d: it is the caller itself, whom a failure would end: %w", c.path, pid, errdefs.ErrInvalidArgument)
	}
	if r := c.pending; r != nil {
		if err := c.unit.Start(pid); err != nil {
			return nil, err
		}
		// From here on pid is in the scope, which Delete stops.
		defer func() {
			if err != nil {
				err = errors.Join(err, c.leave(pid), c.Delete())
			}
		}()
		if warnings, err = c.make(r); err != nil {
			return nil, err
		}
		c.pending = nil
	}
	for _, d := range c.dirs {
		if c.unit != nil && d.Has("name=systemd") {
			continue // systemd's own: it has put the process there
		}
		if err := writeFile(filepath.Join(d.path, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return nil, fmt.Errorf("cgroup %s: adopt process %d: %w", c.path, pid, err)
		}
	}
	return warnings, nil
}

// leave ends the process of an adoption that failed: systemd takes its time to
// end a scope, and the directories go only with their last process.
func (c *Cgroup) leave(pid int) error {
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
		return fmt.Errorf("cgroup %s: end process %d: %w", c.path, pid, err)
	}
	return nil
}
