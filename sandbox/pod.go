package sandbox

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/ranked"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

// defaultCgroupParent holds the cgroups of pods that were given none.
const defaultCgroupParent = "/berth"

// pod is a pod sandbox.
type pod struct {
	id      id.Pod
	created int64 // nanoseconds; immutable
	slot    slot
	status  atomic.Pointer[PodStatus] // nil until it is listed

	mu    ranked.Mutex[objectLock]
	rec   podRecord           // guarded by mu
	owed  bool                // guarded by mu; the record on disk is older than rec
	files map[string]*os.File // guarded by mu; namespaces and mounts by name: net, ipc, uts, user, shm
}

// podRecord is the journal's view of a pod.
type podRecord struct {
	ID         id.Pod          `json:"id"`
	BootID     string          `json:"bootID"`
	State      lifecycle.State `json:"state"`
	Config     *PodConfig      `json:"config"`
	CreatedAt  time.Time       `json:"createdAt"`
	Attachment cni.Attachment  `json:"attachment"`
	Cgroup     string          `json:"cgroup"`           // parent of its containers' cgroups
	OwnCgroup  bool            `json:"ownCgroup"`        // made by the engine, so removed by it
	Init       id.Container    `json:"init,omitempty"`   // first process of a shared PID namespace
	Reason     string          `json:"reason,omitempty"` // why it is not ready
}

// containerIn is the cgroup of a container of the pod.
func (r *podRecord) containerIn(c id.Container) string { return path.Join(r.Cgroup, string(c)) }

func (r *podRecord) status() *PodStatus {
	s := &PodStatus{ID: r.ID, Config: r.Config, CreatedAt: r.CreatedAt, Reason: r.Reason, CgroupDir: r.Cgroup, State: PodNotReady}
	if lifecycle.ShowPod(r.State) == lifecycle.PodReady {
		s.State = PodReady
	}
	for _, ip := range r.Attachment.IPs {
		s.IPs = append(s.IPs, ip.String())
	}
	return s
}

// network is what the pod is to the network.
func (r *podRecord) network() cni.Pod {
	m := r.Config.Meta
	return cni.Pod{ID: r.ID, Name: m.Name, Namespace: m.Namespace, UID: m.UID, Labels: r.Config.Labels,
		Annotations: r.Config.Annotations, CgroupParent: r.Cgroup, PortMappings: r.Config.PortMappings}
}

// stepPod moves the pod by an event: change edits the record on the way.
func (e *Engine) stepPod(p *pod, ev lifecycle.Event, change func(*podRecord)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	next, effects, err := lifecycle.StepPod(p.rec.State, ev)
	if err != nil {
		return fmt.Errorf("pod sandbox %s: %w: %w", id.Short(p.id), err, errdefs.ErrFailedPrecondition)
	}
	rec := p.rec
	rec.State = next
	if change != nil {
		change(&rec)
	}
	forget := slices.Contains(effects, lifecycle.Forget)
	if forget && rec.OwnCgroup {
		e.forgotten(string(p.id), rec.Cgroup)
	}
	if p.rec.Init != "" && (forget || rec.Init == "") {
		e.forgotten(string(p.rec.Init), rec.containerIn(p.rec.Init))
	}
	for _, f := range effects {
		crashpoint.Here("pod", string(ev), string(f))
		switch f {
		case lifecycle.Journal:
			err := e.podBook.Write(string(p.id), &rec)
			if err != nil && !stays(p.rec.State, ev) {
				return err
			}
			if p.owed = err != nil; p.owed {
				tell(err, "Pod record is not written", "pod", p.id)
			}
		case lifecycle.Publish:
			p.status.Store(rec.status())
		case lifecycle.Forget:
			// A record that stays behind says half-made or going: the next daemon
			// takes down what is gone already.
			tell(e.podBook.Remove(string(p.id)), "Pod record is not removed", "pod", p.id)
			p.status.Store(nil)
			p.owed = false
			e.dropPod(p)
		}
	}
	p.rec = rec
	crashpoint.Here("pod", string(ev), "done")
	return nil
}

func (p *pod) record() podRecord {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rec
}

// keep stores an open namespace or mount of the pod under name.
func (p *pod) keep(name string, f *os.File) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.files == nil {
		p.files = map[string]*os.File{}
	}
	p.files[name] = f
}

// dup returns a copy of the pod's open namespace, which the caller closes.
func (p *pod) dup(name string) (*os.File, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f, ok := p.files[name]
	if !ok {
		return nil, fmt.Errorf("pod sandbox %s: has no %s namespace: %w", id.Short(p.id), name, errdefs.ErrFailedPrecondition)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("pod sandbox %s: %s namespace: %w", id.Short(p.id), name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// held lists the keys and files that the supervisor keeps for the pod.
func (p *pod) held() (keys []string, files []*os.File) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, f := range p.files {
		keys, files = append(keys, fdKey(p.id, name)), append(files, f)
	}
	return keys, files
}

func fdKey(p id.Pod, name string) string { return string(p) + "/" + name }

// letGo closes the pod's namespaces and mounts, here and in the supervisor.
func (e *Engine) letGo(ctx context.Context, p *pod) error {
	if err := e.dropHeld(ctx, p); err != nil {
		return err
	}
	p.closeFiles()
	return nil
}

// heldNames are the names of all that a pod can hold.
var heldNames = []string{"net", "ipc", "uts", "user", "shm"}

// keeps says whether the pod holds what is called name.
func (p *pod) keeps(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.files[name] != nil
}

// dropHeld closes the supervisor's copies of the pod's namespaces and mounts.
func (e *Engine) dropHeld(ctx context.Context, p *pod) error {
	keys := make([]string, 0, len(heldNames))
	for _, n := range heldNames {
		keys = append(keys, fdKey(p.id, n))
	}
	return e.cfg.FDs.DropFDs(ctx, keys)
}

// closeFiles closes the daemon's copies, except those of the given names.
func (p *pod) closeFiles(except ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, f := range p.files {
		if !slices.Contains(except, name) {
			f.Close()
			delete(p.files, name)
		}
	}
}

// containersOf returns the pod's containers.
func (e *Engine) containersOf(p *pod) []*container {
	var out []*container
	for _, c := range e.view.Load().containers {
		if c.pod == p {
			out = append(out, c)
		}
	}
	return out
}

// removeCgroup removes an empty cgroup in every hierarchy.
func (e *Engine) removeCgroup(dir string) {
	for _, root := range e.cgroups {
		_ = unix.Rmdir(filepath.Join(root, dir)) // not there, or somebody else's is below it: stays
	}
}

// clearLimit is how long clearCgroup waits for killed processes to go.
const clearLimit = 2 * time.Second

// clearCgroup kills every process of a container's cgroup and removes the cgroup:
// for containers whose supervisor is gone.
func (e *Engine) clearCgroup(dir string) {
	if dir == "" || dir == "/" {
		return
	}
	for deadline := time.Now().Add(clearLimit); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		left := false
		for _, root := range e.cgroups {
			at := filepath.Join(root, dir)
			if err := unix.Rmdir(at); err == nil || err == unix.ENOENT { // busy until its last process is reaped
				continue
			}
			left = true
			if os.WriteFile(filepath.Join(at, "cgroup.kill"), []byte("1"), 0) == nil { // cgroup v2, Linux 5.14
				continue
			}
			pids, _ := os.ReadFile(filepath.Join(at, "cgroup.procs"))
			for _, pid := range strings.Fields(string(pids)) {
				if n, err := strconv.Atoi(pid); err == nil && n > 1 {
					_ = unix.Kill(n, unix.SIGKILL)
				}
			}
			// A frozen process dies only when it is thawed (v1 freezer).
			_ = os.WriteFile(filepath.Join(at, "freezer.state"), []byte("THAWED"), 0)
		}
		if !left {
			return
		}
	}
	klog.InfoS("Processes of a lost container do not end", "cgroup", dir)
}

func decodePod(body []byte) (podRecord, error) {
	var r podRecord
	if err := json.Unmarshal(body, &r); err != nil {
		return r, err
	}
	if r.Config == nil || r.ID == "" {
		return r, fmt.Errorf("pod record without id or config: %w", errdefs.ErrDataLoss)
	}
	return r, nil
}

func stack() string { return string(debug.Stack()) }
