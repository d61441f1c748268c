package external

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// Container is a container of an external runtime.
//
// mu is held alone by Start and Delete and shared by all others, as the
// supervisor calls them.
type Container struct {
	rt         *Runtime
	id         id.Container
	dir        string // the bundle
	cgroup     *cgroup.Cgroup
	cgroupPath string

	mu      sync.RWMutex
	specMu  sync.Mutex  // guards spec's resources until Start
	spec    *specs.Spec // what Start writes to config.json
	mounts  *os.File    // the bundle's mount namespace; nil once deleted
	made    bool        // the runtime may know the container
	started bool
	init    *os.File // pidfd of the first process
	pid     int
}

var (
	_ oci.Container = (*Container)(nil)
	_ oci.Signaler  = (*Container)(nil)
)

// run runs a command about this container.
func (c *Container) run(ctx context.Context, k call) error {
	if c.mounts == nil {
		return fmt.Errorf("container %s: deleted: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	_, err := c.rt.run(ctx, c.mounts, c.dir, k)
	return err
}

// Start implements oci.Container: the runtime's "create", then its "start".
func (c *Container) Start(ctx context.Context, io oci.Stdio) (oci.Process, error) {
	if err := ctx.Err(); err != nil {
		return oci.Process{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.started || c.mounts == nil {
		return oci.Process{}, fmt.Errorf("container %s: already started or deleted: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.started = true
	p, err := c.start(ctx, io)
	if err != nil {
		// The process that waits for "start" must not stay.
		return oci.Process{}, errors.Join(fmt.Errorf("start container: %w", err), c.forget())
	}
	return p, nil
}

func (c *Container) start(ctx context.Context, io oci.Stdio) (_ oci.Process, err error) {
	c.specMu.Lock()
	b, err := json.Marshal(c.spec)
	c.specMu.Unlock()
	if err != nil {
		return oci.Process{}, fmt.Errorf("%s: %w", configFile, err)
	}
	if err := os.WriteFile(filepath.Join(c.dir, configFile), b, 0o600); err != nil {
		return oci.Process{}, err
	}
	c.made = true
	p, err := c.spawn(ctx, "create", []string{"--bundle", c.dir}, c.spec.Process, io)
	if err != nil {
		return oci.Process{}, err
	}
	init, err := kernel.Dup(p.PidFD)
	if err == nil {
		if err = c.run(ctx, call{verb: "start", args: []string{string(c.id)}}); err != nil {
			init.Close()
		}
	}
	if err != nil {
		return oci.Process{}, errors.Join(err, abandon(p))
	}
	c.init, c.pid = init, p.Pid
	return p, nil
}

// spawn runs a command that makes a process, and finds that process.
func (c *Container) spawn(ctx context.Context, verb string, args []string, of *specs.Process, io oci.Stdio) (_ oci.Process, err error) {
	terminal, size := of.Terminal, of.ConsoleSize
	n := strconv.FormatUint(c.rt.serial.Add(1), 10)
	pidFile := filepath.Join(c.dir, "pid-"+n)
	defer os.Remove(pidFile)
	args = append(args, "--pid-file", pidFile)
	var s *consoleSocket
	if terminal {
		io = oci.Stdio{Extra: io.Extra}
		if s, err = listenConsole(c.dir, "tty-"+n); err != nil {
			return oci.Process{}, err
		}
		defer s.close()
		// Relative to the working directory: a socket's path is limited to 107 bytes.
		args = append(args, "--console-socket", s.name)
	}
	if len(io.Extra) > 0 {
		args = append(args, "--preserve-fds", strconv.Itoa(len(io.Extra)))
	}
	if err := c.run(ctx, call{verb: verb, args: append(args, string(c.id)), stdio: &io}); err != nil {
		return oci.Process{}, err
	}
	p, err := readProcess(pidFile)
	if err != nil {
		return oci.Process{}, fmt.Errorf("handler %q: %s: %w", c.rt.cfg.Handler, verb, err)
	}
	if terminal {
		if p.Console, err = s.receive(size); err != nil {
			return oci.Process{}, errors.Join(fmt.Errorf("handler %q: %s: %w", c.rt.cfg.Handler, verb, err), abandon(p))
		}
	}
	return p, nil
}

// readProcess opens the process whose pid a runtime wrote. One that has ended is
// a zombie, which is ours to reap: its number cannot be another's.
func readProcess(file string) (oci.Process, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return oci.Process{}, fmt.Errorf("pid file: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return oci.Process{}, fmt.Errorf("pid file: %.20q is no pid: %w", b, errdefs.ErrInternal)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return oci.Process{}, fmt.Errorf("process %d: pidfd_open: %w", pid, err)
	}
	return oci.Process{Pid: pid, PidFD: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// abandon kills and reaps a process that is not handed to the caller.
func abandon(p oci.Process) error {
	err := unix.PidfdSendSignal(int(p.PidFD.Fd()), unix.SIGKILL, nil, 0)
	if err == unix.ESRCH {
		err = nil
	}
	if p.Console != nil {
		p.Console.Close()
	}
	_, werr := kernel.Reap(p.Pid)
	if werr == unix.ECHILD {
		werr = nil // a runtime may have given it another parent
	}
	return errors.Join(err, werr, p.PidFD.Close())
}

// running is nil while the first process runs.
func (c *Container) running() error {
	if c.init != nil && c.mounts != nil {
		if gone, err := kernel.Exited(int(c.init.Fd())); err == nil && !gone {
			return nil
		}
	}
	return fmt.Errorf("container %s: not running: %w", c.id, errdefs.ErrFailedPrecondition)
}

// Exec implements oci.Container.
func (c *Container) Exec(ctx context.Context, p *specs.Process, io oci.Stdio) (oci.Process, error) {
	if err := ctx.Err(); err != nil {
		return oci.Process{}, err
	}
	switch {
	case p == nil:
		return oci.Process{}, invalid("process: missing")
	case len(p.Args) == 0 || p.Args[0] == "":
		return oci.Process{}, invalid("process.args: empty")
	case !filepath.IsAbs(p.Cwd):
		return oci.Process{}, invalid("process.cwd %q: want an absolute path", p.Cwd)
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	if err := c.running(); err != nil {
		return oci.Process{}, err
	}
	b, err := json.Marshal(p)
	if err != nil {
		return oci.Process{}, fmt.Errorf("process: %w", err)
	}
	file, err := c.writeFile("process", b)
	if err != nil {
		return oci.Process{}, err
	}
	defer os.Remove(file)
	got, err := c.spawn(ctx, "exec", []string{"--process", file, "--detach"}, p, io)
	if err != nil {
		if gone := c.running(); gone != nil {
			return oci.Process{}, gone
		}
		return oci.Process{}, fmt.Errorf("exec in container: %w", err)
	}
	return got, nil
}

// writeFile writes a file for one command; calls may be concurrent.
func (c *Container) writeFile(kind string, b []byte) (string, error) {
	path := filepath.Join(c.dir, kind+"-"+strconv.FormatUint(c.rt.serial.Add(1), 10))
	return path, os.WriteFile(path, b, 0o600)
}

// SignalFirst implements oci.Signaler.
func (c *Container) SignalFirst(sig int) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if err := c.running(); err != nil {
		return err
	}
	return c.run(context.Background(), call{verb: "kill", args: []string{string(c.id), strconv.Itoa(sig)}})
}

// KillAll implements oci.Container. Processes of the cgroup are killed there,
// which no fork escapes. A container that is elsewhere, in a virtual machine, is
// killed by its runtime.
func (c *Container) KillAll() error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	within := false
	if c.cgroup != nil {
		if pids, err := c.cgroup.Processes(); err == nil {
			within = slices.Contains(pids, c.pid)
		}
		if err := c.cgroup.KillAll(); err != nil {
			return err
		}
	}
	if within || c.running() != nil {
		return nil
	}
	err := c.run(context.Background(), call{verb: "kill", args: []string{string(c.id), "KILL"}})
	if err != nil && c.running() != nil {
		return nil
	}
	return err
}

// OOMKills implements oci.Container.
func (c *Container) OOMKills() (uint64, error) {
	if c.cgroup == nil {
		return 0, fmt.Errorf("container %s: its spec has no linux.cgroupsPath: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	n, err := c.cgroup.OOMKills()
	if errors.Is(err, os.ErrNotExist) { // not made yet
		return 0, nil
	}
	return n, err
}

// Update implements oci.Container. Before Start the limits are those that the
// container will be created with. The runtime reverts what it can on failure.
func (c *Container) Update(r *specs.LinuxResources) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("resources: %w", err)
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	if !c.started {
		c.specMu.Lock()
		defer c.specMu.Unlock()
		if c.spec.Linux.Resources == nil {
			c.spec.Linux.Resources = &specs.LinuxResources{}
		}
		// Decoding over what is there leaves alone what the JSON does not name.
		return json.Unmarshal(b, c.spec.Linux.Resources)
	}
	// In a file: for "-" some runtimes open /dev/stdin, which not every host has.
	file, err := c.writeFile("resources", b)
	if err != nil {
		return err
	}
	defer os.Remove(file)
	return c.run(context.Background(), call{verb: "update", args: []string{"--resources", file, string(c.id)}})
}

// Pause implements oci.Container.
func (c *Container) Pause() error { return c.simple("pause") }

// Resume implements oci.Container.
func (c *Container) Resume() error { return c.simple("resume") }

func (c *Container) simple(verb string) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if err := c.running(); err != nil {
		return err
	}
	return c.run(context.Background(), call{verb: verb, args: []string{string(c.id)}})
}

// Delete implements oci.Container.
func (c *Container) Delete() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mounts == nil {
		return removeBundle(c.dir)
	}
	if err := c.forget(); err != nil {
		return err
	}
	if c.init != nil {
		_ = c.init.Close()
		c.init = nil
	}
	err := c.mounts.Close() // ends the bundle's mounts with the last process
	c.mounts = nil
	return errors.Join(err, removeBundle(c.dir))
}

// forget makes the runtime forget the container, and removes its cgroup.
func (c *Container) forget() error {
	if c.made {
		err := c.run(context.Background(), call{verb: "delete", args: []string{"--force", string(c.id)}})
		if err != nil && c.rt.knows(c.id) {
			return err
		}
		c.made = false
	}
	return c.rt.removeCgroup(c.cgroup)
}

// knows tells whether the runtime keeps state of a container. A runtime that
// cannot be called, or says in its own words that there is no such container, must
// not keep one from being removed that it never made.
func (r *Runtime) knows(c id.Container) bool {
	entries, err := os.ReadDir(r.stateDir())
	return err != nil || slices.ContainsFunc(entries, func(e os.DirEntry) bool { return strings.Contains(e.Name(), string(c)) })
}

// removeCgroup removes what a runtime that failed half-way left of a cgroup.
func (r *Runtime) removeCgroup(g *cgroup.Cgroup) error {
	if g == nil {
		return nil
	}
	return errors.Join(g.KillAll(), g.Delete())
}
