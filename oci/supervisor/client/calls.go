package client

import (
	"context"
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
	got, err := c.call(ctx, op, body, nil, files, nil)
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

// Start runs a created container.
func (c *Client) Start(ctx context.Context, r wire.Start) (wire.StartReply, error) {
	var reply wire.StartReply
	got, err := c.call(ctx, wire.OpStart, r, &reply, nil, nil)
	wire.CloseFiles(got)
	return reply, err
}

// Signal sends a signal.
func (c *Client) Signal(ctx context.Context, r wire.Signal) error {
	return c.plain(ctx, wire.OpSignal, r)
}

// Delete kills what still runs and removes the container; one that is missing is success.
func (c *Client) Delete(ctx context.Context, container id.Container) error {
	return c.plain(ctx, wire.OpDelete, wire.Target{ID: container})
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
	got, err := c.call(ctx, wire.OpList, nil, &reply, nil, nil)
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
	got, err := c.call(ctx, wire.OpStdin, wire.Target{ID: container}, nil, nil, nil)
	if err != nil {
		return nil, err
	}
	return one(wire.OpStdin, got)
}

// CloseStdin closes the supervisor's end of the container's stdin.
func (c *Client) CloseStdin(ctx context.Context, container id.Container) error {
	return c.plain(ctx, wire.OpCloseStdin, wire.Target{ID: container})
}

// Exec starts a process. exit delivers its one exit record; the code is
// ExitUnknown when the connection to the supervisor is lost before.
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
	w := &execWait{key: execKey{r.ID, r.Exec}, exit: make(chan wire.Exit, 1)}
	var reply wire.ExecReply
	got, err := c.call(ctx, wire.OpExec, r, &reply, files, w)
	if err != nil {
		return 0, nil, nil, err
	}
	if terminal {
		if console, err = one(wire.OpExec, got); err != nil {
			return 0, nil, nil, err
		}
	} else {
		wire.CloseFiles(got)
	}
	return reply.Pid, console, w.exit, nil
}

// UserNamespace makes a user namespace and returns it, and one of each of r.Kinds.
func (c *Client) UserNamespace(ctx context.Context, r wire.UserNamespace) ([]*os.File, error) {
	got, err := c.call(ctx, wire.OpUserNamespace, r, nil, nil, nil)
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
	got, err := c.call(ctx, wire.OpGetFD, wire.Keys{Keys: keys}, nil, nil, nil)
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
	got, err := c.call(ctx, wire.OpListFD, nil, &reply, nil, nil)
	wire.CloseFiles(got)
	return reply.Keys, err
}

func one(op wire.Op, files []*os.File) (*os.File, error) {
	if len(files) != 1 {
		wire.CloseFiles(files)
		return nil, fmt.Errorf("supervisor: answer to %s has %d descriptors, want 1: %w", op, len(files), errdefs.ErrInternal)
	}
	return files[0], nil
}
