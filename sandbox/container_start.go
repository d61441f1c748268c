package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

// startErrorCode is the exit code of a container whose program could not be run.
const startErrorCode = 128

// StartContainer runs the program of a created container. When that cannot be
// done the container is exited with code 128, reason StartError.
func (e *Engine) StartContainer(ctx context.Context, ref string) error {
	c, err := e.findContainer(ref)
	if err != nil {
		return err
	}
	_, err = e.do(ctx, "start container "+id.Short(c.id), func(ctx context.Context) (any, error) {
		release, err := c.slot.take(ctx)
		if err != nil {
			return nil, err
		}
		defer release()
		return nil, e.startContainer(ctx, c)
	})
	return err
}

func (e *Engine) startContainer(ctx context.Context, c *container) error {
	if s := c.pod.record().State; s != lifecycle.Ready {
		return fmt.Errorf("pod sandbox %s: is not ready: %w", id.Short(c.pod.id), errdefs.ErrFailedPrecondition)
	}
	if err := e.stepContainer(c, lifecycle.Start, nil); err != nil {
		return err
	}
	began := time.Now()
	rec := c.record()
	var reply wire.StartReply
	var err error
	// Looked at again now that a stop of the pod would find this start and wait for it.
	if s := c.pod.record().State; s != lifecycle.Ready {
		err = fmt.Errorf("pod sandbox %s: was stopped meanwhile: %w", id.Short(c.pod.id), errdefs.ErrFailedPrecondition)
	} else {
		// A panic must not leave the container starting for ever.
		err = attempt(ctx, "start", func(ctx context.Context) (err error) {
			reply, err = e.launch(ctx, rec)
			if errors.Is(err, wire.ErrBroken) || errdefs.IsNotFound(err) {
				reply, err = e.launchAgain(ctx, c, err)
			}
			return err
		})
		if errdefs.IsFailedPrecondition(err) {
			if before, ok := e.startedBefore(ctx, c.id); ok {
				reply, err = before, nil
			}
		}
	}
	if e.cfg.Observe != nil {
		e.cfg.Observe("start container", "start", time.Since(began), err)
	}
	if err != nil {
		err = fmt.Errorf("container %s: start: %w", rec.Config.Meta.Name, err)
		if e.ctx.Err() != nil {
			return err // we stopped waiting: the next daemon finds out what became of it
		}
		// The program may run although the answer was lost: it must not go on.
		kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), signalLimit)
		defer cancel()
		_ = e.cfg.Runtime.Signal(kill, wire.Signal{ID: c.id, Signal: int(unix.SIGKILL), All: true})
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.rec.State != lifecycle.Starting { // it ran and its end is known
			return err
		}
		now := e.cfg.Now()
		return errors.Join(err, e.stepContainerLocked(c, lifecycle.StartFailed, func(r *containerRecord) {
			r.ExitCode, r.Reason, r.Message = startErrorCode, reasonStartError, err.Error()
			r.StartedAt, r.FinishedAt = now, now
		}))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rec.State != lifecycle.Starting { // it ended before this answer
		return nil
	}
	return e.stepContainerLocked(c, lifecycle.Started, func(r *containerRecord) {
		r.StartedAt, r.Pid = reply.StartedAt, reply.Pid
	})
}

func (e *Engine) launch(ctx context.Context, rec containerRecord) (wire.StartReply, error) {
	if rec.LogPath != "" {
		if err := os.MkdirAll(filepath.Dir(rec.LogPath), 0o755); err != nil {
			return wire.StartReply{}, fmt.Errorf("log_path: %w", err)
		}
	}
	crashpoint.Here("start container", "log folder", "made")
	reply, err := e.cfg.Runtime.Start(ctx, wire.Start{ID: rec.ID, LogPath: rec.LogPath})
	crashpoint.Here("start container", "start", "answered")
	return reply, err
}

// launches is how many supervisors in a row may die at the start of one container.
const launches = 4

// launchAgain starts a container whose supervisor died before it was started, or
// before it could tell. The container's slot is taken.
func (e *Engine) launchAgain(ctx context.Context, c *container, why error) (reply wire.StartReply, err error) {
	for range launches {
		if reply, err = e.launchOnceMore(ctx, c, why); !errors.Is(err, wire.ErrBroken) {
			break
		}
		why = err
	}
	return reply, err
}

func (e *Engine) launchOnceMore(ctx context.Context, c *container, why error) (wire.StartReply, error) {
	all, err := e.supervised(ctx)
	if err != nil {
		return wire.StartReply{}, errors.Join(why, err)
	}
	rec := c.record()
	switch known := all[c.id]; {
	case known == nil:
		// Its program may run, started by a supervisor that did not live to tell. It
		// must not run twice.
		e.clearCgroup(rec.Cgroup)
		if err := e.makeAgain(ctx, c); err != nil {
			return wire.StartReply{}, errors.Join(why, err)
		}
	case !errors.Is(why, wire.ErrBroken):
		return wire.StartReply{}, why
	case known.State != wire.Created: // only the connection was lost
		if known.Exit != nil { // its notification, too
			e.exit(c, *known.Exit)
		}
		return wire.StartReply{Pid: known.Pid, StartedAt: known.StartedAt}, nil
	}
	return e.launch(ctx, rec)
}

// exit records the end of a container's first process.
func (e *Engine) exit(c *container, x wire.Exit) {
	if c.record().State == lifecycle.Created { // an earlier daemon had it started, and nobody got the answer
		tell(e.stepContainer(c, lifecycle.Start, nil), "Container", "container", c.id)
	}
	err := e.stepContainer(c, lifecycle.Exit, func(r *containerRecord) {
		r.FinishedAt, r.ExitCode, r.Pid = x.FinishedAt, int32(x.Code), 0
		if r.StartedAt.IsZero() {
			r.StartedAt = x.FinishedAt
		}
		switch {
		case x.Unknown:
			r.Reason, r.Message = reasonUnknown, lostExit
		case x.OOMKilled:
			r.Reason = reasonOOMKilled
		case x.Code == 0:
			r.Reason = reasonCompleted
		default:
			r.Reason = reasonError
		}
	})
	tell(err, "Exit of a container in an impossible state", "container", c.id, "code", x.Code)
}

// lose records that a container's processes are gone and nobody knows how they ended.
func (e *Engine) lose(c *container, why string) {
	// A process without an owner must not go on: its output leads nowhere, nobody
	// would see its end, and its name could be running twice.
	e.clearCgroup(c.record().Cgroup)
	now := e.cfg.Now()
	err := e.stepContainer(c, lifecycle.Lost, func(r *containerRecord) {
		r.FinishedAt, r.ExitCode, r.Reason, r.Message, r.Pid = now, 255, reasonUnknown, why, 0
		if r.StartedAt.IsZero() {
			r.StartedAt = now
		}
	})
	tell(err, "Loss of a container in an impossible state", "container", c.id)
}

// events applies what the supervisor reports until the engine is closed.
func (e *Engine) events() {
	for {
		select {
		case <-e.ctx.Done():
			return
		case x, ok := <-e.cfg.Runtime.Exits():
			if !ok { // the connection is closed for good
				return
			}
			e.applyExit(x)
		case <-e.cfg.Runtime.Resync():
			tell(e.resync(e.ctx), "Containers could not be compared with the supervisor's")
		}
	}
}

func (e *Engine) applyExit(x wire.Exit) {
	if c := e.containers.get(x.ID); c != nil {
		e.exit(c, x)
		return
	}
	for _, p := range e.view.Load().pods {
		if p.record().Init == x.ID {
			e.initEnded(p)
			return
		}
	}
}

// initEnded handles the end of a shared PID namespace's first process: the
// kernel has killed everything in the namespace.
func (e *Engine) initEnded(p *pod) {
	switch p.record().State {
	case lifecycle.Creating:
		// Its maker is about to call it ready.
		e.owned.Go(func() {
			if release, err := p.slot.take(e.ctx); err == nil {
				defer release()
				if p.record().State == lifecycle.Ready {
					e.initEnded(p)
				}
			}
		})
		return
	case lifecycle.Ready:
	default:
		return
	}
	tell(e.stepPod(p, lifecycle.Lost, func(r *podRecord) { r.Reason = lostInit }),
		"Pod lost its first process", "pod", p.id)
}
