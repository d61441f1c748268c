package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

// StopPod kills the pod's containers and frees its network and namespaces. It
// may be called again and again, also after an error; a missing pod is success.
func (e *Engine) StopPod(ctx context.Context, ref string) error {
	p, err := e.findPod(ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = e.do(ctx, "stop pod sandbox "+id.Short(p.id), func(ctx context.Context) (any, error) {
		release, err := p.slot.take(ctx)
		if err != nil {
			return nil, err
		}
		defer release()
		return nil, e.stopPod(ctx, p)
	})
	return err
}

// stopPod is StopPod with the pod's slot taken.
func (e *Engine) stopPod(ctx context.Context, p *pod) error {
	if s := p.record().State; s == lifecycle.None || (s == lifecycle.NotReady && !p.holds() && !e.anyRuns(p)) {
		return nil
	}
	if err := e.stepPod(p, lifecycle.Stop, nil); err != nil {
		return err
	}
	err := e.takeDownPod(ctx, p)
	if err != nil {
		p.mu.Lock()
		p.rec.Reason = err.Error()
		p.status.Store(p.rec.status())
		p.mu.Unlock()
		return fmt.Errorf("stop pod sandbox %s: %w", id.Short(p.id), err)
	}
	if p.record().State == lifecycle.Removing {
		return nil
	}
	return e.stepPod(p, lifecycle.Stopped, func(r *podRecord) {
		r.Reason, r.Init = "", ""
		r.Attachment.State, r.Attachment.NetNSPath = nil, "" // the addresses stay for the status
		r.Attachment.Network = ""
	})
}

// holds says whether the pod has something to free, or may have: one that is
// being made has it before the record says so.
func (p *pod) holds() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rec.State == lifecycle.Creating || len(p.files) > 0 || p.rec.Init != "" || p.rec.Attachment.Network != ""
}

// anyRuns says whether a container of the pod runs.
func (e *Engine) anyRuns(p *pod) bool {
	for _, c := range e.containersOf(p) {
		if s := c.record().State; s == lifecycle.Running || s == lifecycle.Starting {
			return true
		}
	}
	return false
}

// takeDownPod ends the pod's containers, and then frees what the pod holds, each
// part though another one fails. While a container runs nothing is freed: its
// processes are in the namespaces, and the address would be given to another pod.
func (e *Engine) takeDownPod(ctx context.Context, p *pod) error {
	cs := e.containersOf(p)
	errs := make([]error, len(cs)+4)
	var wg sync.WaitGroup
	for i, c := range cs {
		wg.Go(func() { errs[i] = e.stop(ctx, c, 0) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w: %w", errRuns, err)
	}
	crashpoint.Here("take down pod", "containers", "stopped")
	rec := p.record()
	if rec.Init != "" {
		errs[len(cs)] = e.deleteContainer(ctx, rec.Init, rec.containerIn(rec.Init))
	}
	crashpoint.Here("take down pod", "init", "deleted")
	if rec.Config.Namespaces.Network != NamespaceNode {
		errs[len(cs)+1] = e.detach(ctx, p)
	}
	crashpoint.Here("take down pod", "network", "detached")
	if errs[len(cs)] != nil {
		return errs[len(cs)] // a process of the shared PID namespace goes on
	}
	if errs[len(cs)+1] == nil { // else the next Detach wants the namespace again
		errs[len(cs)+2] = e.letGo(ctx, p)
	}
	crashpoint.Here("take down pod", "namespaces", "let go")
	errs[len(cs)+3] = os.RemoveAll(e.podDir(p.id))
	crashpoint.Here("take down pod", "files", "removed")
	return errors.Join(errs...)
}

// detach takes the pod off its network. The namespace may be gone (a reboot).
func (e *Engine) detach(ctx context.Context, p *pod) error {
	rec := p.record()
	ns, err := p.dup("net")
	if err != nil {
		ns = nil
	}
	err = e.cfg.Network.Detach(ctx, rec.network(), rec.Attachment, ns)
	if ns != nil {
		ns.Close()
	}
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	return nil
}

// RemovePod stops the pod, removes its containers and forgets it; a missing pod
// is success.
func (e *Engine) RemovePod(ctx context.Context, ref string) error {
	p, err := e.findPod(ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = e.do(ctx, "remove pod sandbox "+id.Short(p.id), func(ctx context.Context) (any, error) {
		release, err := p.slot.take(ctx)
		if err != nil {
			return nil, err
		}
		defer release()
		return nil, e.removePod(ctx, p)
	})
	return err
}

func (e *Engine) removePod(ctx context.Context, p *pod) error {
	if p.record().State == lifecycle.None { // removed while this call waited
		return nil
	}
	if err := e.stopPod(ctx, p); err != nil {
		return err
	}
	if err := e.stepPod(p, lifecycle.Remove, nil); err != nil {
		return err
	}
	cs := e.containersOf(p)
	errs := make([]error, len(cs))
	var wg sync.WaitGroup
	for i, c := range cs {
		wg.Go(func() { errs[i] = e.removeContainer(ctx, c) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove pod sandbox %s: %w", id.Short(p.id), err)
	}
	// A pod that was lost with all that it held has nothing to stop, and may have its files.
	if err := os.RemoveAll(e.podDir(p.id)); err != nil {
		return fmt.Errorf("remove pod sandbox %s: %w", id.Short(p.id), err)
	}
	if rec := p.record(); rec.OwnCgroup {
		e.removeCgroup(rec.Cgroup)
	}
	crashpoint.Here("remove pod sandbox", "cgroup", "removed")
	e.collector.Forget(p.record().Cgroup)
	return e.stepPod(p, lifecycle.Removed, nil)
}
