package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/ranked"
	"github.com/berth-runtime/berth/sandbox/journal"
	"github.com/berth-runtime/berth/sandbox/leftovers"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
	"github.com/berth-runtime/berth/sandbox/spec"
	"github.com/berth-runtime/berth/sandbox/stats"
)

// Config is what an Engine needs.
type Config struct {
	// Root holds what may survive a boot (records, writable layers), State what
	// dies with it (pod files; a tmpfs in production).
	Root, State string

	Images  Images
	Network Network
	Runtime Runtime
	Streams RuntimeStreams
	FDs     RuntimeFDs

	// Handlers are the runtime handlers that pods may name besides "" and the
	// embedded runtime under its name.
	Handlers []Handler
	Policy   spec.Policy
	// Host is what the node can do; nil asks the kernel.
	Host *spec.Host
	// Now is the wall clock, which may be set back and forth; nil is time.Now. Only
	// what is shown as a time comes from it: waiting is by the monotonic clock.
	Now func() time.Time
	// Observe is told of each step of each operation; it must not block. May be nil.
	Observe func(op, step string, d time.Duration, err error)

	// Reconcile is how often leftovers are looked for; 0 is a minute, negative never.
	Reconcile time.Duration
	// Reconciled is told of each look for leftovers; it must not block. May be nil.
	Reconciled func(Round)
}

// Handler is an external runtime that pods may ask for.
type Handler struct {
	Name string
	// RecursiveReadonly: it can make mounts recursively read-only. It may become
	// true when the runtime has told.
	RecursiveReadonly *atomic.Bool
}

// Engine runs pods and containers. Its exported methods may be called concurrently.
type Engine struct {
	cfg        Config
	bootID     string
	collector  *stats.Collector
	cgroups    []string // mount points of all cgroup hierarchies
	empty      *os.File // the empty mount namespace
	podBook    *journal.Book
	ctrBook    *journal.Book
	past       *leftovers.Past
	ops        ops
	ctx        context.Context // of detached work; ends with Close
	cancel     context.CancelFunc
	owned      sync.WaitGroup // the event loop, the usage walker, the reconciler, operations, killers
	usage      usageTable
	lastCreate atomic.Int64          // nanoseconds; created_at is strictly increasing
	noUserNS   atomic.Pointer[error] // why pods get no user namespaces; nil: they do
	pods       index[id.Pod, pod]
	containers index[id.Container, container]

	mu   ranked.Mutex[engineLock] // of the writers of the indexes and view
	view atomic.Pointer[view]     // replaced under mu, read freely
}

// index finds objects by id, without a lock.
type index[K ~string, T any] struct{ m sync.Map }

func (x *index[K, T]) get(k K) *T {
	if v, ok := x.m.Load(k); ok {
		return v.(*T)
	}
	return nil
}

// view is an immutable copy of the indexes for readers, newest first.
type view struct {
	pods       []*pod
	containers []*container
}

// Open loads the records, compares them with the supervisor and the kernel, and
// returns a running engine that knows what is true. What was left half-done is
// taken up or taken down behind it.
func Open(ctx context.Context, cfg Config) (*Engine, error) {
	if cfg.Host == nil {
		h, err := spec.ProbeHost()
		if err != nil {
			return nil, err
		}
		cfg.Host = &h
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	e := &Engine{cfg: cfg}
	e.ctx, e.cancel = context.WithCancel(context.WithoutCancel(ctx))
	e.view.Store(&view{})
	var err error
	if e.bootID, err = readBootID(); err != nil {
		return nil, err
	}
	hierarchies, err := stats.FindHierarchies()
	if err != nil {
		return nil, err
	}
	e.collector = stats.NewCollector(hierarchies)
	if e.cgroups, err = cgroupMounts(); err != nil {
		return nil, err
	}
	if e.podBook, err = journal.Open(filepath.Join(recordsDir(cfg.Root), "pods")); err != nil {
		return nil, err
	}
	if e.ctrBook, err = journal.Open(filepath.Join(recordsDir(cfg.Root), "containers")); err != nil {
		return nil, err
	}
	if err := errors.Join(os.MkdirAll(e.podsDir(), 0o711), e.makeShards()); err != nil {
		return nil, err
	}
	if e.past, err = leftovers.OpenPast(filepath.Join(cfg.State, leftovers.PastFile)); err != nil {
		return nil, err
	}
	if e.empty, err = kernel.NewEmptyMountNS(); err != nil {
		return nil, errors.Join(err, e.past.Close())
	}
	if err := e.recover(ctx); err != nil {
		e.cancel()
		return nil, errors.Join(err, e.empty.Close(), e.past.Close())
	}
	e.cfg.FDs.KeptBy(e.kept)
	e.firstProbe()
	e.owned.Go(e.events)
	e.owned.Go(e.walkUsage)
	e.owned.Go(e.writeOwed)
	if cfg.Reconcile >= 0 {
		e.owned.Go(e.reconcile)
	}
	return e, nil
}

// cgroupMounts are the mount points of all cgroup hierarchies.
func cgroupMounts() (out []string, err error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return (m.FSType != "cgroup" && m.FSType != "cgroup2") || m.Root != "/", false
	})
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	for _, m := range mounts {
		out = append(out, m.Mountpoint)
	}
	return out, nil
}

// closeLimit is how long Close waits for running operations; what it cuts short
// is on record and finished or undone by the next engine.
const closeLimit = 10 * time.Second

// Close waits for running operations, but not for ever, and stops the engine's
// own goroutines. Containers go on.
func (e *Engine) Close() error {
	ctx, stop := context.WithTimeout(context.Background(), closeLimit)
	defer stop()
	e.ops.drain(ctx)
	e.cancel()
	done := make(chan struct{})
	go func() { e.owned.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		return fmt.Errorf("engine: operations still run: %w", ctx.Err())
	}
	if len(e.view.Load().pods) == 0 {
		e.removeCgroup(defaultCgroupParent)
	}
	return errors.Join(e.empty.Close(), e.past.Close())
}

// recordsDir holds the records of pods and of containers, a folder each.
func recordsDir(root string) string { return filepath.Join(root, "sandboxes") }

func podsDir(state string) string        { return filepath.Join(state, "pods") }
func (e *Engine) podsDir() string        { return podsDir(e.cfg.State) }
func (e *Engine) podDir(p id.Pod) string { return filepath.Join(e.podsDir(), string(p)) }

// created is the time of making an object: never the same twice and never
// going back, since kubelets sort attempts by it.
func (e *Engine) created() time.Time {
	for {
		last := e.lastCreate.Load()
		now := max(e.cfg.Now().UnixNano(), last+1)
		if e.lastCreate.CompareAndSwap(last, now) {
			return time.Unix(0, now)
		}
	}
}

func (e *Engine) insertPod(p *pod) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.pods.m.Store(p.id, p)
	v := e.view.Load()
	e.view.Store(&view{pods: inserted(v.pods, p, p.created, func(q *pod) int64 { return q.created }), containers: v.containers})
}

func (e *Engine) insertContainer(c *container) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers.m.Store(c.id, c)
	v := e.view.Load()
	e.view.Store(&view{pods: v.pods, containers: inserted(v.containers, c, c.created, func(d *container) int64 { return d.created })})
}

func (e *Engine) dropPod(p *pod) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.pods.m.Delete(p.id)
	v := e.view.Load()
	e.view.Store(&view{pods: without(v.pods, p), containers: v.containers})
}

func (e *Engine) dropContainer(c *container) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers.m.Delete(c.id)
	v := e.view.Load()
	e.view.Store(&view{pods: v.pods, containers: without(v.containers, c)})
}

// inserted is a copy of all, newest first, with x in its place.
func inserted[T any](all []*T, x *T, at int64, created func(*T) int64) []*T {
	i, _ := slices.BinarySearchFunc(all, at, func(y *T, at int64) int { return cmp.Compare(at, created(y)) })
	out := make([]*T, 0, len(all)+1)
	return append(append(append(out, all[:i]...), x), all[i:]...)
}

// without is a copy of all that lacks x.
func without[T any](all []*T, x *T) []*T {
	return slices.DeleteFunc(slices.Clone(all), func(y *T) bool { return y == x })
}

// findPod finds a pod by id or unique prefix.
func (e *Engine) findPod(ref string) (*pod, error) {
	if p := e.pods.get(id.Pod(ref)); p != nil {
		return p, nil
	}
	return byPrefix(e.view.Load().pods, "pod sandbox", ref, func(p *pod) string { return string(p.id) })
}

// findContainer finds a container by id or unique prefix.
func (e *Engine) findContainer(ref string) (*container, error) {
	if c := e.containers.get(id.Container(ref)); c != nil {
		return c, nil
	}
	return byPrefix(e.view.Load().containers, "container", ref, func(c *container) string { return string(c.id) })
}

func byPrefix[T any](all []*T, noun, ref string, key func(*T) string) (*T, error) {
	var found *T
	if ref != "" {
		for _, x := range all {
			if !strings.HasPrefix(key(x), ref) {
				continue
			}
			if found != nil {
				return nil, fmt.Errorf("%s %q: more than one id begins so; give more digits: %w", noun, ref, errdefs.ErrInvalidArgument)
			}
			found = x
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%s %q: not found: %w", noun, ref, errdefs.ErrNotFound)
	}
	return found, nil
}

// Pod returns the status of a pod sandbox by id or unique prefix.
func (e *Engine) Pod(ref string) (*PodStatus, error) {
	p, err := e.findPod(ref)
	if err != nil {
		return nil, err
	}
	if s := p.status.Load(); s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("pod sandbox %q: not found: %w", ref, errdefs.ErrNotFound)
}

// ListPods returns the pods that f selects, newest first.
func (e *Engine) ListPods(f PodFilter) []*PodStatus {
	var out []*PodStatus
	matches := 0
	for _, p := range e.view.Load().pods {
		s := p.status.Load()
		if s == nil || !strings.HasPrefix(string(s.ID), f.ID) {
			continue
		}
		if matches++; (f.State != nil && *f.State != s.State) || !selects(f.Labels, s.Config.Labels) {
			continue
		}
		out = append(out, s)
	}
	if f.ID != "" && matches > 1 { // a prefix must be unique, whatever else is asked for
		return nil
	}
	return out
}

// Container returns the status of a container by id or unique prefix.
func (e *Engine) Container(ref string) (*ContainerStatus, error) {
	c, err := e.findContainer(ref)
	if err != nil {
		return nil, err
	}
	if s := c.status.Load(); s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("container %q: not found: %w", ref, errdefs.ErrNotFound)
}

// ListContainers returns the containers that f selects, newest first.
func (e *Engine) ListContainers(f ContainerFilter) []*ContainerStatus {
	var out []*ContainerStatus
	v := e.view.Load()
	if f.Pod != "" {
		p, err := byPrefix(v.pods, "pod sandbox", f.Pod, func(p *pod) string { return string(p.id) })
		if err != nil {
			return nil
		}
		f.Pod = string(p.id)
	}
	matches := 0
	for _, c := range v.containers {
		s := c.status.Load()
		if s == nil || !strings.HasPrefix(string(s.ID), f.ID) {
			continue
		}
		if matches++; (f.Pod != "" && string(s.Pod) != f.Pod) || (f.State != nil && *f.State != s.State) || !selects(f.Labels, s.Config.Labels) {
			continue
		}
		out = append(out, s)
	}
	if f.ID != "" && matches > 1 {
		return nil
	}
	return out
}

func selects(want, have map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// Ready returns nil when containers can be run, else why not.
func (e *Engine) Ready() error {
	if r, ok := e.cfg.Runtime.(interface{ Ready() error }); ok {
		return r.Ready()
	}
	return nil
}

// tell logs what goes wrong behind an operation's back.
func tell(err error, msg string, kv ...any) {
	if err != nil {
		klog.ErrorS(err, msg, kv...)
	}
}

// stays says whether an event is applied although its record cannot be written:
// what has happened has happened, and stopping and removing must work on a full
// disk. What is only asked for is refused, and so is the end of making: with a
// record that says half-made, the next daemon would take a used pod down.
func stays(from lifecycle.State, ev lifecycle.Event) bool {
	return ev != lifecycle.Ask && ev != lifecycle.Start && !(from == lifecycle.Creating && ev == lifecycle.Made)
}

var errClosed = errors.New("the daemon is stopping")
