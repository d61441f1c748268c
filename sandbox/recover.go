package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

const (
	lostInReboot     = "the node was rebooted"
	lostBySupervisor = "the supervisor that held it is gone"
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
	for _, p := range v.pods {
		e.lastCreate.Store(max(e.lastCreate.Load(), p.created))
		e.recoverPod(ctx, p)
	}
	for _, c := range v.containers {
		e.lastCreate.Store(max(e.lastCreate.Load(), c.created))
		e.recoverContainer(ctx, c, known[c.id])
	}
	tell(e.sweep(ctx, known), "Leftovers of an earlier daemon")
	return nil
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

func (e *Engine) recoverPod(ctx context.Context, p *pod) {
	rec := p.record()
	sameBoot := rec.BootID == e.bootID
	switch rec.State {
	case lifecycle.Creating:
		// The caller got no id: take it down, and its retry makes a new one. What
		// cannot be taken down stays listed, so that the kubelet stops it again.
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
				break
			}
		}
		tell(e.stepPod(p, lifecycle.Lost, func(r *podRecord) { r.Reason, r.Init = why, "" }), "Pod is lost", "pod", p.id)
	case lifecycle.Stopping:
		if sameBoot {
			_ = e.fetchFiles(ctx, p) // as many as there are; stopping goes on without
		}
	case lifecycle.Removing:
		e.owned.Go(func() { tell(e.RemovePod(e.ctx, string(p.id)), "Removal of a pod is not finished", "pod", p.id) })
	}
	rec = p.record()
	p.status.Store(rec.status())
}

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
		err := errors.Join(e.cfg.Runtime.Delete(ctx, c.id), e.removeLayer(c.id))
		tell(errors.Join(err, e.stepContainer(c, lifecycle.Failed, nil)), "Half-made container", "container", c.id)
		return
	}
	if _, err := e.cfg.Images.Acquire(rec.ImageID, string(c.id)); err != nil {
		klog.ErrorS(err, "Image of a container is gone", "container", c.id, "image", rec.ImageID)
	}
	c.status.Store(rec.status())
	switch rec.State {
	case lifecycle.Exited:
		close(c.exited)
	case lifecycle.Removing:
		close(c.exited)
		e.owned.Go(func() {
			tell(e.RemoveContainer(e.ctx, string(c.id)), "Removal of a container is not finished", "container", c.id)
		})
	default:
		e.compare(c, known)
	}
}

// compare brings a container that should be there in line with the supervisor's word.
func (e *Engine) compare(c *container, known *wire.Info) {
	rec := c.record()
	switch {
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

// resync compares everything with a supervisor that was connected to anew.
func (e *Engine) resync(ctx context.Context) error {
	known, err := e.supervised(ctx)
	if err != nil {
		return err
	}
	v := e.view.Load()
	for _, c := range v.containers {
		switch c.record().State {
		case lifecycle.Created, lifecycle.Running:
			e.compare(c, known[c.id])
		}
	}
	var errs []error
	for _, p := range v.pods {
		rec := p.record()
		if rec.State != lifecycle.Ready {
			continue
		}
		if _, ok := known[rec.Init]; rec.Init != "" && !ok {
			e.initEnded(p)
		}
		// The daemon holds the namespaces too: a new supervisor gets them again.
		if keys, files := p.held(); len(keys) > 0 {
			errs = append(errs, e.cfg.FDs.PutFDs(ctx, keys, files))
		}
	}
	return errors.Join(errs...)
}

// sweep removes what belongs to no record: containers and descriptors of the
// supervisor, folders, and the network's attachments.
func (e *Engine) sweep(ctx context.Context, known map[id.Container]*wire.Info) error {
	var errs []error
	wanted := map[id.Container]bool{}
	held := map[string]bool{}
	var live []id.Pod
	v := e.view.Load()
	for _, p := range v.pods {
		rec := p.record()
		wanted[rec.Init] = true
		keys, _ := p.held()
		for _, k := range keys {
			held[k] = true
		}
		if p.holds() {
			live = append(live, p.id)
		}
	}
	for _, c := range v.containers {
		wanted[c.id] = true
	}
	for c := range known {
		if !wanted[c] {
			errs = append(errs, e.cfg.Runtime.Delete(ctx, c))
		}
	}
	keys, err := e.cfg.FDs.ListFDs(ctx)
	errs = append(errs, err)
	var drop []string
	for _, k := range keys {
		if !held[k] {
			drop = append(drop, k)
		}
	}
	if len(drop) > 0 {
		errs = append(errs, e.cfg.FDs.DropFDs(ctx, drop))
	}
	errs = append(errs,
		sweepDir(e.podsDir(), func(name string) bool { _, err := e.findPod(name); return err == nil }),
		sweepDir(e.containersDir(), func(name string) bool { return wanted[id.Container(name)] }))
	if err := e.cfg.Network.GC(ctx, live); err != nil && !errdefs.IsUnavailable(err) {
		errs = append(errs, fmt.Errorf("network: %w", err))
	}
	return errors.Join(errs...)
}

// sweepDir removes the entries of dir that nobody wants.
func sweepDir(dir string, wanted func(name string) bool) error {
	entries, err := os.ReadDir(dir)
	errs := []error{err}
	for _, e := range entries {
		if !wanted(e.Name()) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
