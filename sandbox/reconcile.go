package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/oci/supervisor"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/leftovers"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

const (
	reconcilePeriod = time.Minute
	// reconcileSettle is how long something must have been nobody's. The kernel takes
	// a closed network namespace down within 100 ms, and a busy one within seconds.
	reconcileSettle = 2 * time.Second
	// removeLimit bounds the removal of one leftover: a CNI plugin's DEL has 100 s.
	removeLimit = 2 * time.Minute
	// logsEach is how many looks there are to one at the logs that the supervisor has open.
	logsEach = 10
)

// rounds is what looks for leftovers remember from one to the next.
type rounds struct {
	leftover.Sightings
	n    int
	logs bool // the last look saw an open log: the next one looks again
}

// Round is the outcome of one look for leftovers.
type Round struct {
	Took time.Duration
	// Found counts what is found for the first time and stayed for a second look,
	// Removed and Failed what was removed and what could not be.
	Found, Removed, Failed map[leftover.Kind]int
	// Err says where could not be looked.
	Err error
}

// reconcile looks for leftovers at once and in each period, and once more soon after
// a look that found what was not there before. It ends with the engine.
func (e *Engine) reconcile() {
	period := e.cfg.Reconcile
	if period == 0 {
		period = reconcilePeriod
	}
	seen := rounds{Sightings: leftover.Sightings{Settle: min(reconcileSettle, period)}}
	for again := false; ; {
		fresh := e.round(&seen)
		wait := period
		if again = fresh && !again; again {
			wait = min(period, seen.Settle+seen.Settle/10)
		}
		t := time.NewTimer(wait)
		select {
		case <-e.ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// round looks once, and removes what was found by an earlier look too.
func (e *Engine) round(seen *rounds) (fresh bool) {
	defer func() {
		if p := recover(); p != nil {
			klog.ErrorS(nil, "Look for leftovers panicked", "panic", fmt.Sprint(p), "stack", stack())
		}
	}()
	began := time.Now()
	found, err := e.leftovers(e.ctx, seen.n%logsEach == 0 || seen.logs)
	if e.ctx.Err() != nil {
		return false
	}
	seen.n++
	seen.logs = slices.ContainsFunc(found, func(f leftover.Finding) bool { return f.Kind == leftover.Log })
	leftover.Sort(found)
	count, first, n := seen.Seen(found, began)
	r := Round{Found: map[leftover.Kind]int{}, Removed: map[leftover.Kind]int{}, Failed: map[leftover.Kind]int{}, Err: err}
	for i, f := range count {
		if first[i] {
			r.Found[f.Kind]++
		}
		if f.Remove == nil {
			if first[i] {
				klog.InfoS("Leftover", "kind", f.Kind, "name", f.Name, "why", f.Detail, "remedy", f.Remedy)
			}
			continue
		}
		ctx, cancel := context.WithTimeout(e.ctx, removeLimit)
		crashpoint.Here("leftover", string(f.Kind), "do")
		err := f.Remove(ctx)
		crashpoint.Here("leftover", string(f.Kind), "done")
		cancel()
		if e.ctx.Err() != nil {
			return false
		}
		if err != nil {
			r.Failed[f.Kind]++
			klog.ErrorS(err, "Leftover is not removed", "kind", f.Kind, "name", f.Name, "why", f.Detail)
			continue
		}
		r.Removed[f.Kind]++
		klog.InfoS("Leftover removed", "kind", f.Kind, "name", f.Name, "why", f.Detail)
	}
	r.Took = time.Since(began)
	tell(r.Err, "Leftovers could not be looked for everywhere")
	if e.cfg.Reconciled != nil {
		e.cfg.Reconciled(r)
	}
	return n > 0
}

// leftovers asks everybody.
func (e *Engine) leftovers(ctx context.Context, logs bool) ([]leftover.Finding, error) {
	at := places(e.cfg.Root, e.cfg.State, e.cgroups, e.past, struct {
		Runtime
		RuntimeFDs
	}{e.cfg.Runtime, e.cfg.FDs})
	at.SkipLogs = !logs
	found, err := leftovers.Look(ctx, at, e.records())
	errs := []error{err}
	more, err := e.cfg.Network.Leftovers(ctx, cni.InUse{Pod: e.usesNetwork, IPs: e.addresses})
	if err != nil {
		errs = append(errs, fmt.Errorf("network: %w", err))
	}
	found = append(found, more...)
	if i, ok := e.cfg.Images.(interface {
		Leftovers(context.Context) ([]leftover.Finding, error)
	}); ok {
		more, err := i.Leftovers(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("images: %w", err))
		}
		found = append(found, more...)
	}
	return found, errors.Join(errs...)
}

// places is where the engine's own leftovers are.
func places(root, state string, cgroups []string, past *leftovers.Past, s leftovers.Supervisor) leftovers.Places {
	return leftovers.Places{
		Pods: podsDir(state), Layers: containersDir(root), Records: recordsDir(root), State: state,
		Cgroups: cgroups, Parent: defaultCgroupParent, Past: past, Supervisor: s, SupervisorPid: supervisorPid(state),
	}
}

// supervisorPid is the process id of the supervisor; 0 when none runs.
func supervisorPid(state string) int {
	b, err := os.ReadFile(filepath.Join(state, supervisor.LockName))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	comm, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	if err != nil || !strings.HasPrefix(string(comm), "berth-superv") { // the number is another's now
		return 0
	}
	return pid
}

// records is what the engine knows, for a look at what is there.
func (e *Engine) records() leftovers.Records {
	return leftovers.Records{
		Pod: func(p id.Pod) bool {
			return e.pods.get(p) != nil
		},
		Container: func(c id.Container) bool {
			return e.containers.get(c) != nil || slices.ContainsFunc(e.view.Load().pods, func(p *pod) bool { return p.record().Init == c })
		},
		Containers: func() map[id.Container]bool {
			out := map[id.Container]bool{}
			v := e.view.Load()
			for _, p := range v.pods {
				out[p.record().Init] = true
			}
			for _, c := range v.containers {
				out[c.id] = true
			}
			return out
		},
		Ended: func(c id.Container) bool {
			k := e.containers.get(c)
			return k != nil && k.record().State == lifecycle.Exited
		},
		Silence: func(ctx context.Context, c id.Container) error {
			return ended(e.cfg.Runtime.Signal(ctx, wire.Signal{ID: c, Signal: int(unix.SIGKILL), All: true}))
		},
		Keeps: func(key string) bool {
			owner, name, _ := strings.Cut(key, "/")
			p := e.pods.get(id.Pod(owner))
			return !slices.Contains(heldNames, name) || p != nil && (p.record().State == lifecycle.Creating || p.keeps(name))
		},
		Running: func() (out []leftovers.Running) {
			for _, c := range e.view.Load().containers {
				rec := c.record()
				if rec.State == lifecycle.Running {
					out = append(out, leftovers.Running{ID: c.id, Pid: rec.Pid, Cgroup: rec.Cgroup,
						Settle: func(ctx context.Context, _ *wire.Info) error { return e.settle(ctx, c, rec.StartedAt) }})
				}
			}
			return out
		},
		Logs: func() (out []string) {
			for _, c := range e.view.Load().containers {
				if s := c.status.Load(); s != nil && s.LogPath != "" {
					out = append(out, s.LogPath)
				}
			}
			return out
		},
	}
}

// settle brings a container that does not run, although its record says so, in line
// with what the supervisor says now.
func (e *Engine) settle(ctx context.Context, c *container, started time.Time) error {
	known, err := e.supervised(ctx)
	if err != nil {
		return err
	}
	if rec := c.record(); rec.State == lifecycle.Running && rec.StartedAt.Equal(started) {
		e.compare(c, rec, known[c.id])
	}
	return nil
}

// usesNetwork reports whether a pod is attached or on its way there or back.
func (e *Engine) usesNetwork(ref id.Pod) bool {
	p := e.pods.get(ref)
	return p != nil && p.usesNetwork()
}

func (p *pod) usesNetwork() bool { return p.record().State != lifecycle.NotReady || p.holds() }

// addresses are those of the pods that use the network.
func (e *Engine) addresses() (out []netip.Addr) {
	for _, p := range e.view.Load().pods {
		if p.usesNetwork() {
			out = append(out, p.record().Attachment.IPs...)
		}
	}
	return out
}

// forgotten is called before the record of a pod or container is removed, and before
// a record stops naming one: its cgroup must be seen to be gone.
func (e *Engine) forgotten(object, cgroup string) {
	tell(e.past.Add(object, cgroup), "A removed object is not remembered", "id", object)
}

// collectNetwork has plugins that can do it release what belongs to no attachment.
func (e *Engine) collectNetwork(ctx context.Context) error {
	n, ok := e.cfg.Network.(interface{ Collect(context.Context) error })
	if !ok {
		return nil
	}
	return n.Collect(ctx)
}
