package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

const (
	lostInReboot     = "the node was rebooted"
	lostBySupervisor = "the supervisor that held it is gone"
	lostInit         = "the first process of its PID namespace ended"
)

// recover makes the engine's memory out of the journal and what the supervisor
// says is true, and takes down what was half-made when the daemon died. What a
// removal left half-done is finished in the background.
func (e *Engine) recover(ctx context.Context) error {
	known, err := e.supervised(ctx)
	if err != nil {
		return err
	}
	tell(e.podBook.Load(func(_ string, body []byte) error {
		r, err := decodePod(body)
		if err == nil {
			e.insertPod(&pod{id: r.ID, created: r.CreatedAt.UnixNano(), slot: newSlot(), rec: r})
		}
		return err
	}), "Pod records that cannot be read")
	tell(e.ctrBook.Load(func(key string, body []byte) error {
		r, err := decodeContainer(body)
		if err != nil {
			return err
		}
		p, err := e.findPod(string(r.Pod))
		if err != nil { // its pod's record is gone or torn
			klog.InfoS("Container without a pod is removed", "container", key, "pod", r.Pod)
			return errors.Join(e.cfg.Runtime.Delete(ctx, r.ID), e.removeLayer(r.ID), e.ctrBook.Remove(key))
		}
		e.insertContainer(&container{id: r.ID, pod: p, created: r.CreatedAt.UnixNano(), slot: newSlot(), exited: make(chan struct{}), rec: r})
		return nil
	}), "Container records that cannot be read")
	v := e.view.Load()
	for _, c := range v.containers {
		// Containers are made in ready pods only: the line that said so was lost with the power.
		if c.pod.record().State == lifecycle.Creating {
			tell(e.stepPod(c.pod, lifecycle.Made, nil), "Pod", "pod", c.pod.id)
		}
	}
	for _, p := range v.pods {
		e.lastCreate.Store(max(e.lastCreate.Load(), p.created))
		e.recoverPod(ctx, p, known)
	}
	for _, c := range v.containers {
		e.lastCreate.Store(max(e.lastCreate.Load(), c.created))
		e.recoverContainer(ctx, c, known[c.id])
	}
	tell(e.collectNetwork(ctx), "Network plugins could not be told of the attachments to keep")
	e.finishRemovals()
	return nil
}

// finishRemovals goes on with the removals that the last daemon began.
func (e *Engine) finishRemovals() {
	v := e.view.Load()
	for _, c := range v.containers {
		if c.record().State == lifecycle.Removing {
			e.owned.Go(func() {
				tell(e.RemoveContainer(e.ctx, string(c.id)), "Removal of a container is not finished", "container", c.id)
			})
		}
	}
	for _, p := range v.pods {
		if p.record().State == lifecycle.Removing {
			e.owned.Go(func() { tell(e.RemovePod(e.ctx, string(p.id)), "Removal of a pod is not finished", "pod", p.id) })
		}
	}
}

// supervised is the supervisor's containers by id.
func (e *Engine) supervised(ctx context.Context) (map[id.Container]*wire.Info, error) {
	list, err := e.cfg.Runtime.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("supervisor: %w", err)
	}
	known := map[id.Container]*wire.Info{}
	for i := range list {
		known[list[i].ID] = &list[i]
	}
	return known, nil
}

func (e *Engine) recoverPod(ctx context.Context, p *pod, known map[id.Container]*wire.Info) {
	rec := p.record()
	sameBoot := rec.BootID == e.bootID
	switch rec.State {
	case lifecycle.Creating:
		// The caller got no id: take it down, and its retry makes a new one. What
		// cannot be taken down stays listed, so that the kubelet stops it again.
		if sameBoot {
			_ = e.fetchFiles(ctx, p) // if it got so far: the network likes to see its namespace again
		}
		if err := e.takeDownPod(ctx, p); err != nil {
			tell(e.stepPod(p, lifecycle.Stop, func(r *podRecord) { r.Reason = err.Error() }), "Half-made pod", "pod", p.id)
			return
		}
		if rec.OwnCgroup {
			e.removeCgroup(rec.Cgroup)
		}
		tell(e.stepPod(p, lifecycle.Failed, nil), "Half-made pod", "pod", p.id)
		return
	case lifecycle.Ready:
		why := lostInReboot
		if sameBoot {
			why = lostBySupervisor
			if e.fetchFiles(ctx, p) == nil {
				if rec.Init == "" || runs(known[rec.Init]) {
					break
				}
				why = lostInit
			}
		}
		tell(e.stepPod(p, lifecycle.Lost, func(r *podRecord) { r.Reason = why }), "Pod is lost", "pod", p.id)
	case lifecycle.Stopping, lifecycle.NotReady:
		if sameBoot && (rec.State == lifecycle.Stopping || p.holds()) {
			_ = e.fetchFiles(ctx, p) // stopping goes on without
		}
	}
	rec = p.record()
	p.status.Store(rec.status())
}

func runs(i *wire.Info) bool { return i != nil && i.State == wire.Running }

// fetchFiles gets the pod's namespaces and mounts back from the supervisor.
func (e *Engine) fetchFiles(ctx context.Context, p *pod) error {
	c := p.record().Config
	var names, keys []string
	if c.Namespaces.Network != NamespaceNode {
		names = append(names, "net", "uts")
	}
	if c.Namespaces.IPC != NamespaceNode {
		names = append(names, "ipc", "shm")
	}
	if c.Namespaces.User != nil {
		names = append(names, "user")
	}
	if len(names) == 0 {
		return nil
	}
	for _, n := range names {
		keys = append(keys, fdKey(p.id, n))
	}
	files, err := e.cfg.FDs.GetFDs(ctx, keys)
	if err != nil {
		return err
	}
	for i, n := range names {
		p.keep(n, files[i])
	}
	return nil
}

func (e *Engine) recoverContainer(ctx context.Context, c *container, known *wire.Info) {
	rec := c.record()
	if rec.BootID != e.bootID {
		known = nil
	}
	if rec.State == lifecycle.Creating {
		ev := lifecycle.Failed
		err := errors.Join(e.deleteContainer(ctx, c.id, rec.Cgroup), e.removeLayer(c.id))
		if err != nil {
			ev = lifecycle.Remove // tried again, as any removal
			close(c.exited)
		}
		tell(errors.Join(err, e.stepContainer(c, ev, nil)), "Half-made container", "container", c.id)
		return
	}
	used := []string{rec.ImageID}
	for _, m := range rec.Config.Mounts {
		if m.Image != "" {
			used = append(used, m.Image)
		}
	}
	for _, image := range used {
		if _, err := e.cfg.Images.Acquire(image, string(c.id)); err != nil {
			klog.ErrorS(err, "Image of a container is gone", "container", c.id, "image", image)
		}
	}
	c.status.Store(rec.status())
	switch rec.State {
	case lifecycle.Exited:
		close(c.exited)
		e.silence(ctx, c, known)
	case lifecycle.Removing:
		close(c.exited)
	default:
		e.compare(c, known)
	}
}

// silence kills a container that runs although it counts as ended: the answer to
// its start was lost, and so was the signal that followed.
func (e *Engine) silence(ctx context.Context, c *container, known *wire.Info) {
	if runs(known) {
		tell(ended(e.cfg.Runtime.Signal(ctx, wire.Signal{ID: c.id, Signal: int(unix.SIGKILL), All: true})), "Kill", "container", c.id)
	}
}

// compare brings a container that should be there in line with the supervisor's word.
func (e *Engine) compare(c *container, known *wire.Info) {
	rec := c.record()
	switch {
	case known == nil && rec.State == lifecycle.Created && rec.BootID == e.bootID && c.pod.record().State == lifecycle.Ready:
		e.owned.Go(func() { e.remake(c) })
	case known == nil:
		why := lostBySupervisor
		if rec.BootID != e.bootID {
			why = lostInReboot
		}
		e.lose(c, why)
	case known.State == wire.Exited && known.Exit != nil:
		if rec.State == lifecycle.Starting {
			tell(e.stepContainer(c, lifecycle.Started, func(r *containerRecord) { r.StartedAt = known.StartedAt }), "Container", "container", c.id)
		}
		e.exit(c, *known.Exit)
	case known.State == wire.Running && rec.State == lifecycle.Starting:
		tell(e.stepContainer(c, lifecycle.Started, func(r *containerRecord) { r.StartedAt, r.Pid = known.StartedAt, known.Pid }), "Container", "container", c.id)
	case known.State == wire.Created && rec.State == lifecycle.Starting:
		tell(e.stepContainer(c, lifecycle.Made, nil), "Container", "container", c.id)
	case known.State == wire.Created && rec.State == lifecycle.Running:
		e.lose(c, lostBySupervisor)
	}
}

// remake makes a created container again in a supervisor that does not know it.
func (e *Engine) remake(c *container) {
	release, err := c.slot.take(e.ctx)
	if err != nil {
		return // the daemon is stopping
	}
	defer release()
	if c.record().State != lifecycle.Created { // started, which makes it again, or removed
		return
	}
	if all, err := e.supervised(e.ctx); err != nil || all[c.id] != nil { // started and failed, or made meanwhile
		return
	}
	ctx, cancel := context.WithTimeout(e.ctx, opLimit)
	defer cancel()
	if err := e.makeAgain(ctx, c); err != nil {
		klog.ErrorS(err, "Created container is lost", "container", c.id)
		e.lose(c, lostBySupervisor)
	}
}

// kept calls put for what the supervisor keeps of each pod.
func (e *Engine) kept(put func(keys []string, files []*os.File)) {
	for _, p := range e.view.Load().pods {
		put(p.held())
	}
}

// resync compares everything with a supervisor that was connected to anew.
// Operations go on meanwhile, so the list proves something only about what was
// there before it was asked for and has not moved since.
func (e *Engine) resync(ctx context.Context) error {
	e.probeUserNamespaces(ctx) // of the new one
	v := e.view.Load()
	was := map[id.Container]lifecycle.State{}
	for _, c := range v.containers {
		was[c.id] = c.record().State
	}
	for _, p := range v.pods {
		if rec := p.record(); rec.Init != "" {
			was[rec.Init] = rec.State
		}
	}
	known, err := e.supervised(ctx)
	if err != nil {
		return err
	}
	for _, c := range v.containers {
		switch s := c.record().State; {
		case s != was[c.id]:
		case s == lifecycle.Created, s == lifecycle.Running:
			e.compare(c, known[c.id])
		case s == lifecycle.Exited:
			e.silence(ctx, c, known[c.id])
		}
	}
	// Not only those of the list: a pod that is being made has given its
	// namespaces to the old supervisor.
	for _, p := range e.view.Load().pods {
		if init := p.record().Init; init != "" && was[init] == lifecycle.Ready && !runs(known[init]) {
			if rec := p.record(); known[init] == nil {
				e.clearCgroup(rec.containerIn(init)) // it may run on without its supervisor
			}
			e.initEnded(p)
		}
		e.owned.Go(func() { tell(e.holdAgain(p), "Namespaces of a pod are not kept", "pod", p.id) })
	}
	return nil
}

// holdAgain gives a new supervisor what the daemon holds of a pod. It waits for
// the pod's slot: what a stop drops must not come back.
func (e *Engine) holdAgain(p *pod) error {
	release, err := p.slot.take(e.ctx)
	if err != nil {
		return nil // the daemon is stopping
	}
	defer release()
	keys, files := p.held()
	if p.record().State != lifecycle.Ready || len(keys) == 0 {
		return nil
	}
	return e.cfg.FDs.PutFDs(e.ctx, keys, files)
}
