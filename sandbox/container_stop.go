package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/ranked"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
	"github.com/berth-runtime/berth/sandbox/spec"
)

// A killed container that has not ended after killAgain is killed again: processes
// forked during the first time are caught by the next. The pause doubles up to
// killRarely, since what sleeps uninterruptibly ends no sooner for it.
const (
	killAgain  = time.Second
	killRarely = 8 * time.Second
)

// signalLimit bounds one signal: a supervisor that hangs must not keep a
// container from being killed when its grace is over.
const signalLimit = 5 * time.Second

// ending is how a container is being stopped: by all callers together, the
// shortest grace wins, and the stop signal is sent once.
type ending struct {
	mu       ranked.Mutex[leafLock]
	deadline time.Time     // guarded by mu; zero until somebody asks
	sooner   chan struct{} // guarded by mu; closed when the deadline moves

	looking atomic.Bool // somebody looks at what its processes wait for
}

// ask moves the deadline to at most now+grace; first says that nobody asked before.
func (g *ending) ask(grace time.Duration) (first bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	at := time.Now().Add(grace)
	if first = g.deadline.IsZero(); !first && !at.Before(g.deadline) {
		return false
	}
	g.deadline = at
	if g.sooner != nil {
		close(g.sooner)
	}
	g.sooner = make(chan struct{})
	return first
}

func (g *ending) when() (time.Time, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.deadline, g.sooner
}

// StopContainer sends the stop signal, and SIGKILL to all of its processes after
// grace. It returns when the end is visible in the status. When ctx ends first
// the container is stopped all the same. Processes that do not end on SIGKILL (in
// uninterruptible sleep, say) are an error of kind Unavailable soon after grace,
// which says what they wait for; the killing goes on, and a later call succeeds
// once they are gone. Missing and exited containers are success.
func (e *Engine) StopContainer(ctx context.Context, ref string, grace time.Duration) error {
	c, err := e.findContainer(ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return e.stop(ctx, c, grace)
}

func (e *Engine) stop(ctx context.Context, c *container, grace time.Duration) error {
	if s := c.record().State; s != lifecycle.Running && s != lifecycle.Starting {
		return nil
	}
	if e.ctx.Err() != nil {
		return fmt.Errorf("%w: %w", errClosed, errdefs.ErrUnavailable)
	}
	if c.ending.ask(grace) {
		e.owned.Go(func() { e.end(c) })
	}
	began := time.Now()
	for {
		at, sooner := c.ending.when()
		if at.Before(began) { // killed by an earlier call: it may be ending now
			at = began
		}
		t := time.NewTimer(time.Until(at.Add(patience)))
		select {
		case <-c.exited:
			t.Stop()
			return nil
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("container %s: is still being stopped: %w", id.Short(c.id), ctx.Err())
		case <-e.ctx.Done():
			t.Stop()
			return fmt.Errorf("container %s: is still being stopped: %w: %w", id.Short(c.id), errClosed, errdefs.ErrUnavailable)
		case <-sooner:
			t.Stop()
		case <-t.C:
			return e.stuck(c)
		}
	}
}

// end stops a container to the end, whoever still waits for it.
func (e *Engine) end(c *container) {
	c.mu.Lock()
	rec, settled := c.rec, c.settled
	c.mu.Unlock()
	if rec.State == lifecycle.Starting && settled != nil { // its program is being run
		select {
		case <-settled:
		case <-e.ctx.Done():
			return
		}
	}
	select {
	case <-c.exited: // it could not be run, or has ended by itself
		return
	default:
	}
	if at, _ := c.ending.when(); time.Now().Before(at) {
		sig, err := signalOf(rec.StopSignal)
		if err != nil {
			sig = unix.SIGTERM
		}
		crashpoint.Here("stop container", "signal", "do")
		tell(ended(e.signal(c, wire.Signal{ID: c.id, Signal: int(sig)})), "Stop signal", "container", c.id)
		crashpoint.Here("stop container", "signal", "done")
	}
	for pause := killAgain; ; {
		at, sooner := c.ending.when()
		wait := time.Until(at)
		if wait <= 0 {
			crashpoint.Here("stop container", "kill", "do")
			tell(ended(e.signal(c, wire.Signal{ID: c.id, Signal: int(unix.SIGKILL), All: true})), "Kill", "container", c.id)
			crashpoint.Here("stop container", "kill", "done")
			wait, pause = pause, min(2*pause, killRarely)
		}
		t := time.NewTimer(wait)
		select {
		case <-c.exited:
			t.Stop()
			return
		case <-e.ctx.Done(): // the next daemon's caller asks again
			t.Stop()
			return
		case <-sooner:
			t.Stop()
		case <-t.C:
		}
	}
}

// signal sends within signalLimit.
func (e *Engine) signal(c *container, s wire.Signal) error {
	ctx, cancel := context.WithTimeout(e.ctx, signalLimit)
	defer cancel()
	return e.cfg.Runtime.Signal(ctx, s)
}

// ended makes success of "there is nobody to signal".
func ended(err error) error {
	if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) || errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// RemoveContainer removes a container and its writable layer, by force if it
// runs. Its log stays. A missing one is success.
func (e *Engine) RemoveContainer(ctx context.Context, ref string) error {
	c, err := e.findContainer(ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = e.do(ctx, "remove container "+id.Short(c.id), func(ctx context.Context) (any, error) {
		return nil, e.removeContainer(ctx, c)
	})
	return err
}

func (e *Engine) removeContainer(ctx context.Context, c *container) error {
	if err := e.stop(ctx, c, 0); err != nil {
		return err
	}
	release, err := c.slot.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	if c.record().State == lifecycle.None { // removed while this call waited
		return nil
	}
	if err := e.stop(ctx, c, 0); err != nil { // started while this call waited
		return err
	}
	if err := e.stepContainer(c, lifecycle.Remove, nil); err != nil {
		return err
	}
	_, err = e.run(ctx, "remove container", []step{
		{name: "delete", do: func(ctx context.Context) error { return e.deleteContainer(ctx, c.id, c.record().Cgroup) }},
		{name: "layer", do: func(context.Context) error { return e.removeLayer(c.id) }},
		{name: "forget", do: func(context.Context) error {
			e.cfg.Images.Release(string(c.id))
			crashpoint.Here("remove container", "image", "released")
			e.collector.Forget(c.record().Cgroup)
			return e.stepContainer(c, lifecycle.Removed, nil)
		}},
	})
	if err != nil {
		return fmt.Errorf("remove container %s: %w", id.Short(c.id), err)
	}
	return nil
}

// UpdateContainer changes limits: what r leaves unset stays as it is. When it
// fails nothing has changed.
func (e *Engine) UpdateContainer(ctx context.Context, ref string, r *Resources) error {
	c, err := e.findContainer(ref)
	if err != nil {
		return err
	}
	change, err := json.Marshal(r)
	if err != nil {
		return err
	}
	key := fmt.Sprintf("update container %s to %s", id.Short(c.id), change)
	_, err = e.do(ctx, key, func(ctx context.Context) (any, error) {
		release, err := c.slot.take(ctx)
		if err != nil {
			return nil, err
		}
		defer release()
		return nil, e.updateContainer(ctx, c, r)
	})
	return err
}

func (e *Engine) updateContainer(ctx context.Context, c *container, r *Resources) error {
	rec := c.record()
	if rec.State != lifecycle.Running && rec.State != lifecycle.Created {
		return fmt.Errorf("container %s: is %s; its limits cannot be changed: %w", id.Short(c.id), word(rec.State), errdefs.ErrFailedPrecondition)
	}
	if r.MemoryLimit > 0 && (rec.Resources.MemoryLimit == 0 || r.MemoryLimit < rec.Resources.MemoryLimit) {
		// Below what is in use the kernel would kill instead of refusing.
		if s, err := e.collector.Read(rec.Cgroup); err == nil && s.WorkingSet > uint64(r.MemoryLimit) {
			return fmt.Errorf("linux.memory_limit_in_bytes %d: below the %d bytes in use: %w", r.MemoryLimit, s.WorkingSet, errdefs.ErrInvalidArgument)
		}
	}
	change, err := spec.UpdateResources(*r, rec.Resources, e.cfg.Policy, *e.cfg.Host)
	if err != nil {
		return err
	}
	crashpoint.Here("update container", "update", "do")
	if err := e.cfg.Runtime.Update(ctx, wire.Update{ID: c.id, Resources: change}); err != nil {
		return fmt.Errorf("container %s: update: %w", id.Short(c.id), err)
	}
	crashpoint.Here("update container", "update", "done")
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rec.Resources = merge(c.rec.Resources, *r)
	c.status.Store(c.rec.status())
	err = e.ctrBook.Write(string(c.id), &c.rec)
	c.owed = err != nil
	tell(err, "Container record is not written", "container", c.id)
	crashpoint.Here("update container", "record", "written")
	return nil
}

// merge is old with the set fields of update.
func merge(old, update Resources) Resources {
	set := func(to *int64, v int64) {
		if v != 0 {
			*to = v
		}
	}
	out := old
	set(&out.CPUPeriod, update.CPUPeriod)
	set(&out.CPUQuota, update.CPUQuota)
	set(&out.CPUShares, update.CPUShares)
	set(&out.MemoryLimit, update.MemoryLimit)
	set(&out.SwapLimit, update.SwapLimit)
	set(&out.OOMScoreAdj, update.OOMScoreAdj)
	if update.CpusetCpus != "" {
		out.CpusetCpus = update.CpusetCpus
	}
	if update.CpusetMems != "" {
		out.CpusetMems = update.CpusetMems
	}
	if len(update.Hugepages) > 0 {
		out.Hugepages = append([]HugepageLimit(nil), old.Hugepages...)
	next:
		for _, h := range update.Hugepages {
			for i := range out.Hugepages {
				if out.Hugepages[i].PageSize == h.PageSize {
					out.Hugepages[i].Limit = h.Limit
					continue next
				}
			}
			out.Hugepages = append(out.Hugepages, h)
		}
	}
	if len(update.Unified) > 0 {
		out.Unified = map[string]string{}
		for _, m := range []map[string]string{old.Unified, update.Unified} {
			for k, v := range m {
				out.Unified[k] = v
			}
		}
	}
	return out
}

// ReopenLog makes a running container's log file anew, after a rotation. For any
// other container it is an error and makes no file.
func (e *Engine) ReopenLog(ctx context.Context, ref string) error {
	c, rec, err := e.running(ref)
	if err != nil {
		return err
	}
	if rec.LogPath == "" {
		return fmt.Errorf("container %s: has no log: %w", id.Short(c.id), errdefs.ErrFailedPrecondition)
	}
	crashpoint.Here("reopen log", "do")
	err = e.cfg.Runtime.ReopenLog(ctx, wire.ReopenLog{ID: c.id, Path: rec.LogPath})
	crashpoint.Here("reopen log", "done")
	return err
}
