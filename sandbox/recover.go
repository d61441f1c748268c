package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/journal"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

const (
	lostInReboot     = "the node was rebooted"
	lostBySupervisor = "the supervisor that held it is gone"
	lostExit         = "it has ended, and how is not known: its supervisor was killed, and the kernel tells only parents (Linux 6.15 tells others, too)"
	lostInit         = "the first process of its PID namespace ended"
)

// recover makes the engine's memory out of the journal and what the supervisor
// says is true. It does what a truthful answer to the first question needs and no
// more: whatever may take long (a network's DEL, killed processes that are slow to
// end) goes on behind it, with the slot of its own pod or container taken, so that
// calls for that one wait and nobody else does.
func (e *Engine) recover(ctx context.Context) error {
	foreign := checkRoot(e.cfg.Root, e.cfg.State)
	known, err := e.supervised(ctx)
	if err != nil {
		return err
	}
	crashpoint.Here("recover", "supervisor", "asked")
	if foreign != nil && len(known) > 0 {
		return foreign
	}
	tell(claimState(e.cfg.Root, e.cfg.State), "State folder is not marked as this root folder's", "state", e.cfg.State)
	if err := e.load(); err != nil {
		return err
	}
	crashpoint.Here("recover", "records", "read")
	v := e.view.Load()
	for _, c := range v.containers {
		// Containers are made in ready pods only: the line that said so was lost with the power.
		if c.pod.record().State == lifecycle.Creating {
			tell(e.stepPod(c.pod, lifecycle.Made, nil), "Pod", "pod", c.pod.id)
		}
	}
	if err := e.fetchFiles(ctx, v.pods); err != nil {
		return err
	}
	restored := true
	for _, p := range v.pods {
		e.lastCreate.Store(max(e.lastCreate.Load(), p.created))
		if err := e.recoverPod(p, known); err != nil {
			klog.ErrorS(err, "Network record of a pod is not made again", "pod", p.id)
			restored = false
		}
		crashpoint.Here("recover", "pod", "done")
	}
	starting := false
	for _, c := range v.containers {
		e.lastCreate.Store(max(e.lastCreate.Load(), c.created))
		starting = starting || c.record().State == lifecycle.Starting
		e.recoverContainer(c, known[c.id])
		crashpoint.Here("recover", "container", "done")
	}
	if starting {
		e.owned.Go(e.lookAgain)
	}
	if restored { // else plugins would free the address of a pod that runs
		e.owned.Go(func() {
			tell(e.collectNetwork(e.ctx), "Network plugins could not be told of the attachments to keep")
		})
	}
	e.finishRemovals()
	return nil
}

// startWait is how long a start takes at most, but for hooks and a disk that
// hangs, once the supervisor has read the request.
const startWait = 2 * time.Second

// lookAgain compares once more when a start was under way: the supervisor may have
// been about to do what it was asked by the daemon that died.
func (e *Engine) lookAgain() {
	select {
	case <-e.ctx.Done():
	case <-time.After(startWait):
		tell(e.resync(e.ctx), "Containers could not be compared with the supervisor's")
	}
}

// startedBefore tells what became of the start of a container that the supervisor
// refuses to start because it was asked already, by a daemon that died before the
// answer came.
func (e *Engine) startedBefore(ctx context.Context, c id.Container) (wire.StartReply, bool) {
	for end := time.Now().Add(startWait); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
		known, err := e.supervised(ctx)
		if err != nil || known[c] == nil {
			break
		}
		if k := known[c]; k.State != wire.Created { // running, or the record of its exit comes or has come
			return wire.StartReply{Pid: k.Pid, StartedAt: k.StartedAt}, true
		}
	}
	return wire.StartReply{}, false
}

// load reads the journal into the indexes. Without all of the pods' records it would
// take their containers for containers without a pod.
func (e *Engine) load() error {
	err := e.podBook.Load(func(_ string, body []byte) error {
		r, err := decodePod(body)
		if err == nil {
			e.insertPod(&pod{id: r.ID, created: r.CreatedAt.UnixNano(), slot: newSlot(podSlot), rec: r})
		}
		return err
	})
	if errors.Is(err, journal.ErrUnread) {
		return fmt.Errorf("pod records: %w", err)
	}
	tell(err, "Pod records that cannot be read")
	err = e.ctrBook.Load(func(key string, body []byte) error {
		r, err := decodeContainer(body)
		if err != nil {
			return err
		}
		p, err := e.findPod(string(r.Pod))
		if err != nil { // its pod's record is gone or torn
			klog.InfoS("Container without a pod is removed", "container", key, "pod", r.Pod)
			e.owned.Go(func() {
				tell(errors.Join(e.deleteContainer(e.ctx, r.ID, r.Cgroup), e.removeLayer(r.ID), e.ctrBook.Remove(key)), "Container without a pod", "container", key)
				if parent := path.Dir(r.Cgroup); path.Dir(parent) == defaultCgroupParent {
					e.removeCgroup(parent) // the pod's, made by the engine
				}
			})
			return nil
		}
		e.insertContainer(&container{id: r.ID, pod: p, created: r.CreatedAt.UnixNano(), slot: newSlot(containerSlot), exited: make(chan struct{}), rec: r})
		return nil
	})
	if errors.Is(err, journal.ErrUnread) {
		return fmt.Errorf("container records: %w", err)
	}
	tell(err, "Container records that cannot be read")
	return nil
}

// finishRemovals goes on with the removals that the last daemon began.
func (e *Engine) finishRemovals() {
	v := e.view.Load()
	for _, c := range v.containers {
		if c.record().State == lifecycle.Removing {
			e.owned.Go(func() {
				e.insist("Removal of a container", func() error { return e.RemoveContainer(e.ctx, string(c.id)) })
			})
		}
	}
	for _, p := range v.pods {
		if p.record().State == lifecycle.Removing {
			e.owned.Go(func() { e.insist("Removal of a pod", func() error { return e.RemovePod(e.ctx, string(p.id)) }) })
		}
	}
}

const (
	insistFirst = time.Second // between two tries of what nobody else tries again
	insistLast  = time.Minute
)

// insist does what no caller asks for any more until it succeeds, or the engine is
// closed: the next daemon goes on then.
func (e *Engine) insist(what string, f func() error) {
	for pause := insistFirst; ; pause = min(2*pause, insistLast) {
		err := f()
		if err == nil || e.ctx.Err() != nil {
			return
		}
		klog.ErrorS(err, what+" is not finished; it is tried again", "after", pause)
		select {
		case <-e.ctx.Done():
			return
		case <-time.After(pause):
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

// recoverPod publishes what is true of a pod. Its files have been fetched. The error
// is of the network's own record.
func (e *Engine) recoverPod(p *pod, known map[id.Container]*wire.Info) (err error) {
	rec := p.record()
	switch rec.State {
	case lifecycle.Creating:
		// The caller got no id: take it down, and its retry makes a new one.
		release := p.slot.seize()
		e.owned.Go(func() {
			defer release()
			tell(e.unmakePod(e.ctx, p), "Half-made pod", "pod", p.id)
		})
		return nil
	case lifecycle.Ready:
		var why string
		switch {
		case rec.BootID != e.bootID:
			why = lostInReboot
		case !p.hasAll():
			why = lostBySupervisor
		case rec.Init != "" && !runs(known[rec.Init]):
			why = lostInit
		}
		if rec.BootID == e.bootID && p.hasAll() {
			err = e.restoreNetwork(e.ctx, p)
		}
		if why != "" {
			tell(e.stepPod(p, lifecycle.Lost, func(r *podRecord) { r.Reason = why }), "Pod is lost", "pod", p.id)
		}
	}
	rec = p.record()
	p.status.Store(rec.status())
	return err
}

// unmakePod takes down what there is of a half-made pod and forgets it. What
// cannot be taken down stays listed as not ready, so that the kubelet stops it
// again. The slot is taken.
func (e *Engine) unmakePod(ctx context.Context, p *pod) error {
	ctx, cancel := context.WithTimeout(ctx, opLimit)
	defer cancel()
	if err := e.takeDownPod(ctx, p); err != nil {
		if e.ctx.Err() != nil { // the next daemon begins again
			return err
		}
		return errors.Join(err, e.stepPod(p, lifecycle.Stop, func(r *podRecord) { r.Reason = err.Error() }))
	}
	crashpoint.Here("unmake pod", "taken down")
	if rec := p.record(); rec.OwnCgroup {
		e.removeCgroup(rec.Cgroup)
	}
	return e.stepPod(p, lifecycle.Failed, nil)
}

// restoreNetwork lets the network know of a pod whose record it may have lost.
func (e *Engine) restoreNetwork(ctx context.Context, p *pod) error {
	rec := p.record()
	if r, ok := e.cfg.Network.(cni.Restorer); ok && rec.Attachment.Network != "" {
		return r.Restore(ctx, rec.network(), rec.Attachment)
	}
	return nil
}

func runs(i *wire.Info) bool { return i != nil && i.State == wire.Running }

// fileNames are the namespaces and mounts that a ready pod holds.
func fileNames(c *PodConfig) (names []string) {
	if c.Namespaces.Network != NamespaceNode {
		names = append(names, "net", "uts")
	}
	if c.Namespaces.IPC != NamespaceNode {
		names = append(names, "ipc", "shm")
	}
	if c.Namespaces.User != nil {
		names = append(names, "user")
	}
	return names
}

// hasAll says whether everything that a ready pod holds is open.
func (p *pod) hasAll() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range fileNames(p.rec.Config) {
		if p.files[n] == nil {
			return false
		}
	}
	return true
}

// wantsFiles says whether something of the pod may be kept by the supervisor: a
// half-made pod's network likes to see its namespace again, too.
func (e *Engine) wantsFiles(rec *podRecord) bool {
	if rec.BootID != e.bootID {
		return false
	}
	switch rec.State {
	case lifecycle.Creating, lifecycle.Ready, lifecycle.Stopping:
		return true
	case lifecycle.NotReady:
		return rec.Init != "" || rec.Attachment.Network != ""
	}
	return false
}

// fetchers is how many answers with descriptors are under way at a time.
const fetchers = 4

// fetchFiles gets the pods' namespaces and mounts back from the supervisor, many
// with each request: a round trip for each of 500 pods would take longer than a
// kubelet likes to wait. What is not there is no error.
func (e *Engine) fetchFiles(ctx context.Context, pods []*pod) error {
	keys, err := e.cfg.FDs.ListFDs(ctx)
	if err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	there := make(map[string]bool, len(keys))
	for _, k := range keys {
		there[k] = true
	}
	type file struct {
		p    *pod
		name string
	}
	var want []file
	for _, p := range pods {
		rec := p.record()
		if !e.wantsFiles(&rec) {
			continue
		}
		for _, n := range fileNames(rec.Config) {
			if there[fdKey(p.id, n)] {
				want = append(want, file{p, n})
			}
		}
	}
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	free := make(chan struct{}, fetchers)
	for batch := range slices.Chunk(want, wire.MaxFDs) {
		free <- struct{}{}
		wg.Go(func() {
			defer func() { <-free }()
			keys := make([]string, len(batch))
			for i, f := range batch {
				keys[i] = fdKey(f.p.id, f.name)
			}
			files, err := e.cfg.FDs.GetFDs(ctx, keys)
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("supervisor: %w", err))
				return
			}
			for i, f := range batch {
				f.p.keep(f.name, files[i])
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// recoverContainer publishes what is true of a container.
func (e *Engine) recoverContainer(c *container, known *wire.Info) {
	rec := c.record()
	if rec.BootID != e.bootID {
		known = nil
	}
	if rec.State == lifecycle.Creating {
		release := c.slot.seize()
		e.owned.Go(func() {
			defer release()
			tell(e.unmakeContainer(e.ctx, c), "Half-made container", "container", c.id)
		})
		return
	}
	used := []string{rec.ImageID}
	for _, m := range rec.Config.Mounts {
		switch {
		case m.ImageRef != "": // its name may be another image's by now, or nobody's
			used = append(used, m.ImageRef)
		case m.Image != "":
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
		e.silence(c, known)
	case lifecycle.Removing:
		close(c.exited)
	default:
		e.compare(c, rec, known)
	}
}

// unmakeContainer deletes what there is of a half-made container and forgets it.
// The slot is taken.
func (e *Engine) unmakeContainer(ctx context.Context, c *container) error {
	ctx, cancel := context.WithTimeout(ctx, opLimit)
	defer cancel()
	if err := errors.Join(e.deleteContainer(ctx, c.id, c.record().Cgroup), e.removeLayer(c.id)); err != nil {
		if e.ctx.Err() != nil { // the next daemon begins again
			return err
		}
		close(c.exited)
		if serr := e.stepContainer(c, lifecycle.Remove, nil); serr != nil {
			return errors.Join(err, serr)
		}
		e.owned.Go(func() {
			e.insist("Removal of a half-made container", func() error { return e.RemoveContainer(e.ctx, string(c.id)) })
		})
		return err
	}
	crashpoint.Here("unmake container", "taken down")
	return e.stepContainer(c, lifecycle.Failed, nil)
}

// silence kills a container that runs although it counts as ended: the answer to
// its start was lost, and so was the signal that followed.
func (e *Engine) silence(c *container, known *wire.Info) {
	if !runs(known) {
		return
	}
	e.owned.Go(func() {
		tell(ended(e.signal(c, wire.Signal{ID: c.id, Signal: int(unix.SIGKILL), All: true})), "Kill", "container", c.id)
	})
}

// compare brings a container that should be there, and was as rec says when the
// supervisor was asked, in line with its word.
func (e *Engine) compare(c *container, rec containerRecord, known *wire.Info) {
	switch {
	case known == nil && rec.State == lifecycle.Created && rec.BootID == e.bootID && c.pod.record().State == lifecycle.Ready:
		e.owned.Go(func() { e.remake(c) })
	case known == nil:
		if rec.BootID != e.bootID {
			e.lose(c, lostInReboot)
			return
		}
		e.loseSoon(c, lostBySupervisor)
	case known.State == wire.Exited && known.Exit != nil:
		if rec.State == lifecycle.Starting {
			tell(e.stepContainer(c, lifecycle.Started, func(r *containerRecord) { r.StartedAt = known.StartedAt }), "Container", "container", c.id)
		}
		e.exit(c, *known.Exit)
	case known.State == wire.Running && rec.State == lifecycle.Starting:
		tell(e.stepContainer(c, lifecycle.Started, func(r *containerRecord) { r.StartedAt, r.Pid = known.StartedAt, known.Pid }), "Container", "container", c.id)
	case known.State == wire.Running && rec.State == lifecycle.Created: // see lookAgain
		tell(errors.Join(e.stepContainer(c, lifecycle.Start, nil),
			e.stepContainer(c, lifecycle.Started, func(r *containerRecord) { r.StartedAt, r.Pid = known.StartedAt, known.Pid })), "Container", "container", c.id)
	case known.State == wire.Created && rec.State == lifecycle.Starting:
		tell(e.stepContainer(c, lifecycle.Made, nil), "Container", "container", c.id)
	case known.State == wire.Created && rec.State == lifecycle.Running:
		e.loseSoon(c, lostBySupervisor)
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
		if e.ctx.Err() != nil || errors.Is(err, wire.ErrBroken) {
			return // the next daemon tries again, or we with the next supervisor
		}
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

// loseSoon is lose, behind the caller's back if there may be processes to kill
// first: until they are gone the container counts as what it was.
func (e *Engine) loseSoon(c *container, why string) {
	if e.hasCgroup(c.record().Cgroup) {
		e.owned.Go(func() { e.lose(c, why) })
		return
	}
	e.lose(c, why)
}

// hasCgroup says whether a cgroup exists in any hierarchy.
func (e *Engine) hasCgroup(dir string) bool {
	return slices.ContainsFunc(e.cgroups, func(root string) bool {
		return unix.Access(filepath.Join(root, dir), unix.F_OK) == nil
	})
}

// resync compares everything with a supervisor that was connected to anew.
// Operations go on meanwhile, so the list proves something only about what was
// there before it was asked for and has not moved since.
func (e *Engine) resync(ctx context.Context) error {
	e.owned.Go(func() { e.probeUserNamespaces(e.ctx) }) // of the new one
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
	running := 0
	for _, i := range known {
		if i.State == wire.Running {
			running++
		}
	}
	klog.InfoS("The supervisor was lost and another one, or the same again, serves; see supervisor.log in the state folder", "running", running)
	for _, c := range v.containers {
		switch rec := c.record(); {
		case rec.State != was[c.id]:
		case rec.State == lifecycle.Created, rec.State == lifecycle.Running:
			e.compare(c, rec, known[c.id])
		case rec.State == lifecycle.Exited:
			e.silence(c, known[c.id])
		}
	}
	// Not only those of the list: a pod that is being made has given its
	// namespaces to the old supervisor.
	for _, p := range e.view.Load().pods {
		if init := p.record().Init; init != "" && was[init] == lifecycle.Ready && !runs(known[init]) {
			e.initEnded(p)
			if rec := p.record(); known[init] == nil { // it may run on without its supervisor
				e.owned.Go(func() { e.clearCgroup(rec.containerIn(init)) })
			}
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
