package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/ranked"
)

// opLimit bounds an operation as a whole; network plugins have their own,
// shorter limits.
const opLimit = 4 * time.Minute

// ops are the running operations by key. A caller with the key of a running one
// waits for that one: a retry joins. What an operation made is found by its
// identity afterwards, so a late retry gets the same answer for as long as the
// object is there; a failed operation is run again.
type ops struct {
	mu      ranked.Mutex[leafLock]
	running map[string]*op // guarded by mu
	closed  bool           // guarded by mu
}

type op struct {
	done  chan struct{}
	value any
	err   error
}

// do runs f under key, detached from ctx, or joins the operation that runs
// under it. When ctx ends first, do returns its error and the work goes on.
func (e *Engine) do(ctx context.Context, key string, f func(context.Context) (any, error)) (any, error) {
	e.ops.mu.Lock()
	o, ok := e.ops.running[key]
	if !ok {
		if e.ops.closed {
			e.ops.mu.Unlock()
			return nil, fmt.Errorf("%w: %w", errClosed, errdefs.ErrUnavailable)
		}
		if e.ops.running == nil {
			e.ops.running = map[string]*op{}
		}
		o = &op{done: make(chan struct{})}
		e.ops.running[key] = o
		e.owned.Go(func() { e.runOp(key, o, f) })
	}
	e.ops.mu.Unlock()
	select {
	case <-o.done:
		return o.value, o.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: still going on, call again to join it: %w", key, ctx.Err())
	}
}

func (e *Engine) runOp(key string, o *op, f func(context.Context) (any, error)) {
	ctx, cancel := context.WithTimeout(e.ctx, opLimit)
	defer cancel()
	o.err = fmt.Errorf("%s: panicked, see the daemon's log: %w", key, errdefs.ErrInternal)
	defer func() {
		if p := recover(); p != nil {
			klog.ErrorS(nil, "Operation panicked", "op", key, "panic", fmt.Sprint(p), "stack", stack())
		}
		e.ops.mu.Lock()
		delete(e.ops.running, key)
		e.ops.mu.Unlock()
		close(o.done)
	}()
	o.value, o.err = f(ctx)
}

// drain refuses new operations and waits for the running ones until ctx ends.
func (o *ops) drain(ctx context.Context) {
	o.mu.Lock()
	o.closed = true
	var wait []*op
	for _, r := range o.running {
		wait = append(wait, r)
	}
	o.mu.Unlock()
	for _, r := range wait {
		select {
		case <-r.done:
		case <-ctx.Done():
			return
		}
	}
}

// step is one part of an operation. undo takes back what do made; it is also
// called for a step whose do failed half-way when partial is set.
type step struct {
	name    string
	do      func(context.Context) error
	undo    func(context.Context) error
	partial bool
}

// attempt calls a step's do or undo with a panic made an error, so that the rest
// is undone all the same.
func attempt(ctx context.Context, name string, f func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			klog.ErrorS(nil, "Step panicked", "step", name, "panic", fmt.Sprint(p), "stack", stack())
			err = fmt.Errorf("%s: panicked, see the daemon's log: %w", name, errdefs.ErrInternal)
		}
	}()
	return f(ctx)
}

// run does the steps in order. When one fails, it undoes those before it, newest
// first and all of them, on a context of its own, and returns the step's error;
// undone says whether everything could be taken back.
func (e *Engine) run(ctx context.Context, name string, steps []step) (undone error, err error) {
	for i, s := range steps {
		began := time.Now()
		crashpoint.Here(name, s.name, "do")
		err := attempt(ctx, s.name, s.do)
		crashpoint.Here(name, s.name, "done")
		d := time.Since(began)
		if e.cfg.Observe != nil {
			e.cfg.Observe(name, s.name, d, err)
		}
		if err == nil {
			continue
		}
		klog.V(2).InfoS("Operation failed", "op", name, "step", s.name, "duration", d, "err", err)
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), opLimit)
		defer cancel()
		var errs []error
		for j := i; j >= 0; j-- {
			if u := steps[j].undo; u != nil && (j < i || steps[j].partial) {
				crashpoint.Here(name, steps[j].name, "undo")
				if uerr := attempt(back, steps[j].name, u); uerr != nil {
					errs = append(errs, fmt.Errorf("undo of %s: %w", steps[j].name, uerr))
				}
				crashpoint.Here(name, steps[j].name, "undone")
			}
		}
		return errors.Join(errs...), err
	}
	return nil, nil
}

// slot lets one operation at a time change an object.
type slot struct {
	ch   chan struct{}
	rank ranked.Rank
}

func newSlot(r ranked.Rank) slot { return slot{make(chan struct{}, 1), r} }

// seize takes a slot that nobody else can know of yet, for a goroutine that is
// about to begin.
func (s slot) seize() (release func()) {
	s.ch <- struct{}{}
	return func() { <-s.ch }
}

// take waits for the slot; call the returned function to give it back.
func (s slot) take(ctx context.Context) (func(), error) {
	ranked.Enter(s.rank)
	select {
	case s.ch <- struct{}{}:
		return func() { <-s.ch; ranked.Leave(s.rank) }, nil
	case <-ctx.Done():
		ranked.Leave(s.rank)
		return nil, fmt.Errorf("another operation on it still runs: %w", ctx.Err())
	}
}
