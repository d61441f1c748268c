package embedded

import (
	"context"
	"errors"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
)

// Gate is what a created container's first process waits at: two FIFOs, each
// open for reading and writing. A byte in Go lets it run the user's program;
// Status then hangs up when the program runs, or carries the record of the
// system call that failed.
type Gate struct {
	Go, Status *os.File
}

// Tail explains a failure after the gate to a process that did not write the
// script. It is kept as JSON.
type Tail struct {
	First int      `json:"first"` // number of the first call after the gate
	Names []string `json:"names"` // what each is for
	Arg0  string   `json:"arg0"`  // of the program
	Cells []int    `json:"cells,omitempty"`
}

// Saved is what another process needs to find a container again. It is kept as JSON.
type Saved struct {
	ID      id.Container `json:"id"`
	Bundle  string       `json:"bundle"`
	Spec    *specs.Spec  `json:"spec"`
	Pid     int          `json:"pid"`
	Started string       `json:"started"` // of Pid: clock ticks after boot, with Pid its identity
	Cgroup  string       `json:"cgroup,omitempty"`
	Tail    Tail         `json:"tail"`
}

// MakeGate makes the gate's FIFOs in the directory dir.
func MakeGate(dir string) (Gate, error) { return Gate{}, errors.ErrUnsupported }

// OpenGate opens the gate that MakeGate made in dir.
func OpenGate(dir string) (Gate, error) { return Gate{}, errors.ErrUnsupported }

// Close closes the gate's descriptors.
func (g Gate) Close() error { return errors.Join(g.Go.Close(), g.Status.Close()) }

// Prepare makes the container's first process up to the gate, with the hooks
// prestart, createRuntime and createContainer. The process is the caller's child.
func (c *Container) Prepare(ctx context.Context, io oci.Stdio, g Gate) (oci.Process, error) {
	return oci.Process{}, errors.ErrUnsupported
}

// Release runs the startContainer hooks, lets a prepared process go, waits until
// the user's program runs, and runs the poststart hooks.
func (c *Container) Release(ctx context.Context, g Gate) error { return errors.ErrUnsupported }

// Save returns what Reopen needs. The container must be prepared or started.
func (c *Container) Save() Saved { return Saved{} }

// Reopen finds a container that another process made. Its first process may have
// ended; then only KillAll, Delete and readings of its cgroup succeed. Delete of
// a reopened container runs its poststop hooks as that of any other does.
func (r *Runtime) Reopen(s Saved) (*Container, error) { return nil, errors.ErrUnsupported }

// Signal sends sig to the container's first process.
func (c *Container) Signal(sig int) error { return errors.ErrUnsupported }

// Processes lists the pids in the container's cgroup and below.
func (c *Container) Processes() ([]int, error) { return nil, errors.ErrUnsupported }
