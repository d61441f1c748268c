package client

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// plain is a request whose answer carries nothing; descriptors are closed.
func (c *Client) plain(ctx context.Context, op wire.Op, body any, files ...*os.File) error {
	got, err := c.call(ctx, op, body, nil, nil, files...)
	wire.CloseFiles(got)
	return err
}

// rawEnv returns the environment as bytes when JSON strings would change it: a
// value may be any bytes but NUL, and encoding/json replaces what is not UTF-8.
func rawEnv(p *specs.Process) [][]byte {
	if p == nil || !slices.ContainsFunc(p.Env, func(e string) bool { return !utf8.ValidString(e) }) {
		return nil
	}
	out := make([][]byte, len(p.Env))
	for i, e := range p.Env {
		out[i] = []byte(e)
	}
	return out
}

// Start runs a created container. After wire.ErrBroken it may run, without an owner.
func (c *Client) Start(ctx context.Context, r wire.Start) (wire.StartReply, error) {
	var reply wire.StartReply
	late := false
	got, err := c.once(ctx, wire.OpStart, r, &reply, func(f wire.Frame, files []*os.File) {
		var reply wire.StartReply
		if json.Unmarshal(f.Body, &reply) == nil && reply.Holding != nil {
			late = !c.held.started(*reply.Holding, files)
		}
	})
	wire.CloseFiles(got)
	if err == nil && late {
		c.holdLate(r.ID)
	}
	reply.Holding = nil
	return reply, err
}

// holdLate asks for what is to be held of a container. It is tried once: should
// the supervisor have gone meanwhile, the container has lost its streams with it.
func (c *Client) holdLate(container id.Container) {
	ctx, cancel := context.WithTimeout(c.ctx, sendTime)
	defer cancel()
	if l, err := c.wait(ctx); err == nil {
		_ = c.hold(ctx, l, []id.Container{container})
	}
}

// Signal sends a signal.
func (c *Client) Signal(ctx context.Context, r wire.Signal) error {
	return c.plain(ctx, wire.OpSignal, r)
}

// Delete kills what still runs and removes the container; one that is missing is success.
func (c *Client) Delete(ctx context.Context, container id.Container) error {
	got, err := c.call(ctx, wire.OpDelete, wire.Target{ID: container}, nil, func(wire.Frame, []*os.File) {
		c.held.forget(container) // before the next supervisor is given it
	})
	wire.CloseFiles(got)
	return err
}

// Update changes limits in place.
func (c *Client) Update(ctx context.Context, r wire.Update) error {
	return c.plain(ctx, wire.OpUpdate, r)
}

// Pause freezes a running container.
func (c *Client) Pause(ctx context.Context, container id.Container) error {
	return c.plain(ctx, wire.OpPause, wire.Target{ID: container})
}

// Resume thaws a paused container.
func (c *Client) Resume(ctx context.Context, container id.Container) error {
	return c.plain(ctx, wire.OpResume, wire.Target{ID: container})
}

// ReopenLog closes and opens the log of a running container between two records.
func (c *Client) ReopenLog(ctx context.Context, r wire.ReopenLog) error {
	return c.plain(ctx, wire.OpReopenLog, r)
}

// List returns all containers that were created and not deleted.
func (c *Client) List(ctx context.Context) ([]wire.Info, error) {
	var reply wire.ListReply
	got, err := c.call(ctx, wire.OpList, nil, &reply, nil)
	wire.CloseFiles(got)
	return reply.Containers, err
}

// Resize sets the size of a terminal.
func (c *Client) Resize(ctx context.Context, r wire.Resize) error {
	return c.plain(ctx, wire.OpResize, r)
}

// Attach duplicates the container's output into the files (nil: not wanted),
// which stay the caller's. The supervisor closes its duplicates when the output
// ends, or when their reader is more than 1 MiB behind.
func (c *Client) Attach(ctx context.Context, container id.Container, stdout, stderr *os.File) error {
	files := []*os.File{stdout, stderr}
	for i, f := range files {
		if f != nil {
			continue
		}
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer null.Close()
		files[i] = null
	}
	return c.plain(ctx, wire.OpAttach, wire.Target{ID: container}, files...)
}

// Stdin returns a descriptor for the container's stdin, which is the caller's to close.
func (c *Client) Stdin(ctx context.Context, container id.Container) (*os.File, error) {
	got, err := c.once(ctx, wire.OpStdin, wire.Target{ID: container}, nil, func(wire.Frame, []*os.File) {
		if c.held.stdinOnce(container) { // it is the caller's alone now
			c.held.closeStdin(container)
		}
	})
	if err != nil {
		return nil, err
	}
	return one(wire.OpStdin, got)
}

// CloseStdin closes the supervisor's end of the container's stdin.
func (c *Client) CloseStdin(ctx context.Context, container id.Container) error {
	// The container sees the end of its input when all copies are closed.
	c.held.closeStdin(container)
	return c.plain(ctx, wire.OpCloseStdin, wire.Target{ID: container})
}

// Exec starts a process. exit delivers its one exit record, whatever happens to
// the supervisor meanwhile; the code is ExitUnknown when nobody can tell.
func (c *Client) Exec(ctx context.Context, r wire.Exec, stdin, stdout, stderr *os.File) (pid int, console *os.File, exit <-chan wire.Exit, err error) {
	if r.Env == nil {
		r.Env = rawEnv(r.Process)
	}
	terminal := r.Process != nil && r.Process.Terminal
	var files []*os.File
	if !terminal {
		for _, f := range []*os.File{stdin, stdout, stderr} {
			if f == nil {
				null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
				if err != nil {
					return 0, nil, nil, err
				}
				defer null.Close()
				f = null
			}
			files = append(files, f)
		}
	}
	key := execKey{r.ID, r.Exec}
	ended, err := c.held.exec(key)
	if err != nil {
		return 0, nil, nil, err
	}
	var reply wire.ExecReply
	got, err := c.once(ctx, wire.OpExec, r, &reply, func(f wire.Frame, files []*os.File) {
		var reply wire.ExecReply
		if json.Unmarshal(f.Body, &reply) != nil {
			return
		}
		var console *os.File
		if terminal && len(files) > 0 {
			console, files = files[0], files[1:]
		}
		c.held.execStarted(key, reply.Pid, console, files) // the pidfd, from version 4 on
	}, files...)
	if err != nil {
		c.held.noExec(key)
		return 0, nil, nil, err
	}
	if terminal {
		if len(got) == 0 {
			c.held.noExec(key)
			return 0, nil, nil, fmt.Errorf("supervisor: answer to %s has no terminal: %w", wire.OpExec, errdefs.ErrInternal)
		}
		console, got = got[0], got[1:]
	}
	wire.CloseFiles(got)
	return reply.Pid, console, ended, nil
}

// UserNamespace makes a user namespace and returns it, and one of each of r.Kinds.
func (c *Client) UserNamespace(ctx context.Context, r wire.UserNamespace) ([]*os.File, error) {
	got, err := c.call(ctx, wire.OpUserNamespace, r, nil, nil)
	if err != nil {
		return nil, err
	}
	if len(got) != 1+len(r.Kinds) {
		wire.CloseFiles(got)
		return nil, fmt.Errorf("supervisor: %d descriptors for a user namespace with %d others: %w", len(got), len(r.Kinds), errdefs.ErrInternal)
	}
	return got, nil
}

// PutFDs keeps descriptors in the supervisor under keys, replacing former ones.
func (c *Client) PutFDs(ctx context.Context, keys []string, files []*os.File) error {
	if len(keys) != len(files) {
		return fmt.Errorf("keys: %d for %d files: %w", len(keys), len(files), errdefs.ErrInvalidArgument)
	}
	return c.plain(ctx, wire.OpPutFD, wire.Keys{Keys: keys}, files...)
}

// GetFDs returns duplicates of kept descriptors: all, or errdefs.ErrNotFound.
func (c *Client) GetFDs(ctx context.Context, keys []string) ([]*os.File, error) {
	got, err := c.call(ctx, wire.OpGetFD, wire.Keys{Keys: keys}, nil, nil)
	if err != nil {
		return nil, err
	}
	if len(got) != len(keys) {
		wire.CloseFiles(got)
		return nil, fmt.Errorf("supervisor: %d descriptors for %d keys: %w", len(got), len(keys), errdefs.ErrInternal)
	}
	return got, nil
}

// DropFDs closes kept descriptors; missing ones are success.
func (c *Client) DropFDs(ctx context.Context, keys []string) error {
	return c.plain(ctx, wire.OpDropFD, wire.Keys{Keys: keys})
}

// ListFDs lists the keys of the kept descriptors, sorted.
func (c *Client) ListFDs(ctx context.Context) ([]string, error) {
	var reply wire.ListFDReply
	got, err := c.call(ctx, wire.OpListFD, nil, &reply, nil)
	wire.CloseFiles(got)
	return reply.Keys, err
}

// KeptBy says who knows the descriptors that a new supervisor must be given, as
// those of the last are gone: k calls put for each group that was put together.
// Without it they are the caller's to put again after Resync.
func (c *Client) KeptBy(k func(put func(keys []string, files []*os.File))) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kept = k
}

func one(op wire.Op, files []*os.File) (*os.File, error) {
	if len(files) != 1 {
		wire.CloseFiles(files)
		return nil, fmt.Errorf("supervisor: answer to %s has %d descriptors, want 1: %w", op, len(files), errdefs.ErrInternal)
	}
	return files[0], nil
}
