package embedded

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

// Gate is what a created container's first process waits at: two FIFOs. A byte
// in Go lets it run the user's program; Status then hangs up when the program
// runs, or carries the record of the system call that failed.
type Gate struct {
	Go, Status *os.File
}

// Names of the FIFOs.
const (
	gateGo     = "go"
	gateStatus = "status"
)

// MakeGate makes the gate's FIFOs in the directory dir, for Prepare: each is
// open for reading and writing, so that it lives as long as the process.
func MakeGate(dir string) (Gate, error) {
	for _, n := range []string{gateGo, gateStatus} {
		if err := unix.Mkfifo(filepath.Join(dir, n), 0o600); err != nil {
			return Gate{}, fmt.Errorf("mkfifo %s: %w", filepath.Join(dir, n), err)
		}
	}
	return openGate(dir, unix.O_RDWR, unix.O_RDWR)
}

// OpenGate opens the gate that MakeGate made in dir, for Release. Nobody at the
// gate, because the process has gone or was let through before, is
// errdefs.ErrFailedPrecondition.
func OpenGate(dir string) (Gate, error) {
	g, err := openGate(dir, unix.O_WRONLY|unix.O_NONBLOCK, unix.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) {
		return Gate{}, fmt.Errorf("no process waits to be started: %w", errdefs.ErrFailedPrecondition)
	}
	return g, err
}

func openGate(dir string, goFlags, statusFlags int) (g Gate, err error) {
	for _, x := range []struct {
		name  string
		flags int
		to    **os.File
	}{{gateGo, goFlags, &g.Go}, {gateStatus, statusFlags, &g.Status}} {
		fd, err := unix.Open(filepath.Join(dir, x.name), x.flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err != nil {
			return Gate{}, errors.Join(fmt.Errorf("open %s: %w", filepath.Join(dir, x.name), err), closeAll(&g.Go, &g.Status))
		}
		*x.to = os.NewFile(uintptr(fd), x.name)
	}
	return g, nil
}

// Close closes the gate's descriptors.
func (g Gate) Close() error { return closeAll(&g.Go, &g.Status) }

// Tail explains a failure after the gate to a process that did not write the
// script. It is kept as JSON.
type Tail struct {
	First int      `json:"first"` // number of the first call after the gate
	Names []string `json:"names"` // what each is for
	Arg0  string   `json:"arg0"`  // of the program
}

// Saved is what another process needs to find a container again. It is kept as JSON.
type Saved struct {
	ID      id.Container `json:"id"`
	Bundle  string       `json:"bundle"`
	Spec    *specs.Spec  `json:"spec,omitempty"`
	Pid     int          `json:"pid"`
	Started string       `json:"started"` // of Pid: clock ticks after boot, with Pid its identity
	// Cgroups are the cgroup's directories (CgroupPaths): the path in the spec may
	// be relative to the cgroup of the process that made the container.
	Cgroups map[string]string `json:"cgroups,omitempty"`
	RDT     *rdt              `json:"rdt,omitempty"`
	Tail    Tail              `json:"tail"`
}

// Prepare makes the container's first process up to the gate, with the hooks
// prestart, createRuntime and createContainer (runtime-spec, "Lifecycle", steps 2
// to 5). The process is the caller's child.
func (c *Container) Prepare(ctx context.Context, io oci.Stdio, g Gate) (oci.Process, error) {
	p, err := c.first(ctx, io, &g)
	if err != nil {
		return oci.Process{}, fmt.Errorf("create container: %w", err)
	}
	return p, nil
}

// Release runs the startContainer hooks, lets a prepared process go, waits until
// the user's program runs, and runs the poststart hooks (steps 6 to 9). After an
// error the process has ended or is being killed.
func (c *Container) Release(ctx context.Context, g Gate) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.plan.refused != nil {
		return c.plan.refused
	}
	if c.init == nil {
		return fmt.Errorf("container %s: its process has gone: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	err := c.release(ctx, g)
	if err != nil {
		_ = unix.PidfdSendSignal(int(c.init.Fd()), unix.SIGKILL, nil, 0) // it may have gone by itself
		return fmt.Errorf("start container: %w", explain(err, c.tail.Arg0))
	}
	return nil
}

func (c *Container) release(ctx context.Context, g Gate) error {
	if err := c.runStartHooks(ctx, c.init, c.pid); err != nil {
		return err
	}
	for {
		if _, err := g.Go.Write([]byte{1}); err != nil {
			return fmt.Errorf("its process has gone: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		m, err := c.gateMessage(g.Status)
		if err != nil {
			return err
		}
		if m.kind == 0 {
			break
		}
		if err := c.sendFilter(c.init, c.pid, m.value); err != nil {
			return err
		}
	}
	if h := c.plan.spec.Hooks; h != nil {
		return runHooks(ctx, "poststart", h.Poststart, c.hookState(specs.StateRunning, c.pid), c.bundle)
	}
	return nil
}

// gateMessage reads what comes from a process that was let through the gate.
func (c *Container) gateMessage(status *os.File) (message, error) {
	var b [recordSize]byte
	n := 0
	for n < recordSize && (n != msgSize || binary.LittleEndian.Uint64(b[:]) > maxMessage) {
		k, err := status.Read(b[n:])
		if k == 0 && err == io.EOF {
			break
		}
		if err != nil {
			return message{}, fmt.Errorf("status of the start: %w", err)
		}
		n += k
	}
	switch {
	case n == 0:
		return message{}, nil
	case n == msgSize:
		return message{int(binary.LittleEndian.Uint64(b[:])), int(binary.LittleEndian.Uint64(b[8:]))}, nil
	}
	rec, err := parseRecord(b[:n], c.tail.Names, c.tail.First)
	if err != nil {
		return message{}, err
	}
	return message{}, &scriptError{rec}
}

// Save returns what Reopen needs. The container must be prepared or started.
func (c *Container) Save() (Saved, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	started, err := c.rt.startTime(c.pid)
	if err != nil {
		return Saved{}, err
	}
	s := Saved{ID: c.id, Bundle: c.bundle, Spec: c.plan.spec, Pid: c.pid, Started: started, RDT: c.rdt, Tail: c.tail}
	if c.cgroup != nil {
		s.Cgroups = c.cgroup.Paths()
	}
	return s, nil
}

// startTime reads when a process started, in clock ticks after boot. A zombie
// has none.
func (r *Runtime) startTime(pid int) (string, error) {
	f, err := r.openProc(strconv.Itoa(pid)+"/stat", unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, 4096)
	n, err := f.Read(b)
	if err != nil {
		return "", err
	}
	// The name in parentheses is the process's own choice.
	rest := string(b[:n])
	rest = rest[strings.LastIndexByte(rest, ')')+1:]
	fields := strings.Fields(rest)
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return "", fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	return fields[19], nil
}

// Reopen finds a container that another process made. Its first process may have
// ended; then only KillAll, Delete and readings of its cgroup succeed. Delete of
// a reopened container runs its poststop hooks as that of any other does.
func (r *Runtime) Reopen(s Saved) (*Container, error) {
	var init *os.File
	if fd, err := unix.PidfdOpen(s.Pid, 0); err == nil {
		init = os.NewFile(uintptr(fd), "pidfd")
		defer init.Close()
		if now, err := r.startTime(s.Pid); err != nil || now != s.Started {
			init = nil // the number is another's
		}
	}
	return r.reopen(oci.CreateRequest{ID: s.ID, Bundle: s.Bundle, Spec: s.Spec}, s, init)
}

// Bequeath implements oci.Heritable.
func (c *Container) Bequeath() (json.RawMessage, []*os.File, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	s := Saved{ID: c.id, Bundle: c.bundle, Pid: c.pid, RDT: c.rdt}
	if c.cgroup != nil {
		s.Cgroups = c.cgroup.Paths()
	}
	text, err := json.Marshal(s)
	return text, nil, err
}

// Adopt implements oci.Adopter.
func (r *Runtime) Adopt(_ context.Context, h oci.Heritage) (oci.Container, error) {
	var s Saved
	if err := json.Unmarshal(h.Saved, &s); err != nil {
		return nil, fmt.Errorf("adopt container %s: want what this runtime bequeathed: %w: %w", h.Request.ID, err, errdefs.ErrInvalidArgument)
	}
	s.Spec, s.Pid = h.Request.Spec, h.Pid
	init := h.PidFD
	if init != nil {
		if gone, err := kernel.Exited(int(init.Fd())); err != nil || gone {
			init = nil
		}
	}
	c, err := r.reopen(h.Request, s, init)
	if err != nil {
		return nil, fmt.Errorf("adopt container %s: %w", h.Request.ID, err)
	}
	return c, nil
}

// reopen makes a Container of one that runs already, with its first process, a
// pidfd that is borrowed; nil when it has ended.
func (r *Runtime) reopen(req oci.CreateRequest, s Saved, init *os.File) (_ *Container, err error) {
	p, err := r.plan(req)
	if err != nil {
		// Made by an older version, or on a host that has changed: it must be possible
		// to end and delete it all the same.
		if s.Spec == nil || s.Spec.Linux == nil {
			return nil, err
		}
		p = &plan{spec: s.Spec, refused: err}
	}
	c := &Container{rt: r, id: s.ID, bundle: s.Bundle, plan: p, podInit: req.PodInit, pid: s.Pid, tail: s.Tail, started: true}
	c.tracers.Store(true)
	defer func() {
		if err != nil {
			err = errors.Join(err, c.closeFiles())
		}
	}()
	if len(s.Cgroups) > 0 {
		if c.cgroup, err = r.cgroups.Reopen(s.Spec.Linux.CgroupsPath, s.Cgroups); err != nil {
			return nil, err
		}
	}
	if c.rdt = s.RDT; c.rdt == nil && s.Spec.Linux.IntelRdt != nil {
		c.rdt = leftRDT(s.ID, s.Spec.Linux.IntelRdt) // written down before it was created
	}
	if init == nil {
		return c, nil
	}
	return c, c.useInit(init)
}

// useInit opens what execs need of the first process.
func (c *Container) useInit(init *os.File) (err error) {
	if c.init, err = kernel.Dup(init); err != nil {
		return err
	}
	if c.cgroup != nil {
		if c.joinDir, err = c.cgroup.JoinDir(); err != nil {
			return err
		}
		if c.joinFiles, err = c.cgroup.JoinFiles(); err != nil {
			return err
		}
	}
	if c.rdt != nil {
		files, err := c.rdt.taskFiles()
		c.joinFiles = append(c.joinFiles, files...)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // removed by its administrator: the default group has the rest, too
			return err
		}
	}
	if c.plan.user() {
		if c.plan.maps, err = c.rt.mapsOf(c.pid); err != nil {
			return err
		}
	}
	return c.findPts()
}

// findPts opens the container's devpts for terminals of execs.
func (c *Container) findPts() error {
	root, err := c.rt.openProc(fmt.Sprintf("%d/root", c.pid), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil // it is just ending
	}
	defer root.Close()
	pts, err := openRealDir(root, "/dev/pts")
	if err != nil {
		return nil // it has none
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(pts.Fd()), &fs); err != nil || fs.Type != unix.DEVPTS_SUPER_MAGIC {
		return pts.Close()
	}
	c.pts = pts
	return nil
}

// Running reports whether the first process lives.
func (c *Container) Running() bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.init == nil {
		return false
	}
	gone, err := kernel.Exited(int(c.init.Fd()))
	return err == nil && !gone
}

// Signal sends sig to the container's first process.
func (c *Container) Signal(sig int) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.init == nil {
		return fmt.Errorf("container %s: not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	err := unix.PidfdSendSignal(int(c.init.Fd()), unix.Signal(sig), nil, 0)
	if err == unix.ESRCH {
		return fmt.Errorf("container %s: not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("container %s: signal %d: %w", c.id, sig, err)
	}
	return nil
}

// Processes lists the pids in the container's cgroup and below.
func (c *Container) Processes() ([]int, error) {
	cg, err := c.cgroupOrErr()
	if err != nil {
		return nil, err
	}
	return cg.Processes()
}
