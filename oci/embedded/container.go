package embedded

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

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
	bundle  string
	plan    *plan
	podInit bool
	cgroup  *cgroup.Cgroup // nil: the processes stay in the runtime's
	rdt     *rdt           // nil: no group of resctrl

	// Set by Create, closed by Delete, used by scripts of both.
	joinDir   *os.File   // cgroup v2
	joinFiles []*os.File // cgroup v1, resctrl
	ns        []nsFile
	joinPID   *os.File // PID namespace to be born in
	pts       *os.File // the devpts at /dev/pts

	// Used up by Start.
	standIn             *holder  // a process in the cgroup, where it needs one
	userNS              *os.File // of the container, not the runtime's own
	mountNS             *os.File // nil: the runtime's own
	rootDir             *os.File // the root, where it is only a directory of the mount namespace
	joinCgroupNS        *os.File
	maskDir, maskNull   *os.File
	dev                 *os.File // of the assembly; closed there
	devReadonly         bool
	procs               []procMount
	ptyMaster, ptySlave *os.File

	mu       sync.RWMutex // Exec holds it shared, Start and Delete alone
	init     *os.File     // pidfd of the first process; guarded by mu
	pid      int          // of the first process; guarded by mu
	tail     Tail         // guarded by mu
	started  bool         // guarded by mu
	tracers  atomic.Bool  // execs may have brought CAP_SYS_PTRACE
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

// poststopTime bounds the hooks of a removal that have no timeout of their own.
const poststopTime = 2 * time.Minute

// Delete implements oci.Container.
func (c *Container) Delete() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.deleted {
		return nil
	}
	err := c.closeFiles()
	if c.cgroup != nil {
		err = errors.Join(err, c.cgroup.Delete())
	}
	if c.rdt != nil {
		err = errors.Join(err, c.rdt.delete())
	}
	if err != nil {
		return err
	}
	c.deleted = true
	if h := c.plan.spec.Hooks; h != nil && len(h.Poststop) > 0 {
		// All run, and none keeps the container: it is gone already.
		ctx, cancel := context.WithTimeout(context.Background(), poststopTime)
		defer cancel()
		state := c.hookState(specs.StateStopped, 0)
		for i := range h.Poststop {
			if err := runHooks(ctx, "poststop", h.Poststop[i:i+1], state, c.bundle); err != nil {
				c.rt.log.Warn("hook failed", "container", string(c.id), "error", err)
			}
		}
	}
	return nil
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
	if c.standIn != nil {
		_ = c.standIn.end() // killed, whatever it says
		c.standIn = nil
	}
	// The mount namespace too: it is to go with the last process, not with Delete.
	closeAll(&c.joinCgroupNS, &c.userNS, &c.mountNS, &c.rootDir, &c.maskDir, &c.maskNull, &c.ptyMaster, &c.ptySlave) // O_PATH and pty descriptors
	for i := range c.ns {
		closeAll(&c.ns[i].file) // as above
	}
	c.ns = nil
	for i := range c.procs {
		closeAll(&c.procs[i].at) // as above
		for k := range c.procs[i].binds {
			closeAll(&c.procs[i].binds[k].file) // as above
		}
		for k := range c.procs[i].masked {
			closeAll(&c.procs[i].masked[k].file) // as above
		}
		c.procs[i].binds, c.procs[i].masked = nil, nil
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
