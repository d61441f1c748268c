package sandbox

import (
	"encoding/json"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/ranked"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

// container is a container of a pod.
type container struct {
	id      id.Container
	pod     *pod
	created int64 // nanoseconds; immutable
	slot    slot
	status  atomic.Pointer[ContainerStatus] // nil until it is listed
	exited  chan struct{}                   // closed when its end is visible
	ending  ending                          // how it is being stopped

	mu      ranked.Mutex[objectLock]
	rec     containerRecord // guarded by mu
	owed    bool            // guarded by mu; the record on disk is older than rec
	settled chan struct{}   // guarded by mu; made by a start, closed when its outcome is known
}

// containerRecord is the journal's view of a container.
type containerRecord struct {
	ID         id.Container     `json:"id"`
	Pod        id.Pod           `json:"pod"`
	BootID     string           `json:"bootID"`
	State      lifecycle.State  `json:"state"`
	Config     *ContainerConfig `json:"config"`
	CreatedAt  time.Time        `json:"createdAt"`
	StartedAt  time.Time        `json:"startedAt,omitzero"`
	FinishedAt time.Time        `json:"finishedAt,omitzero"`
	ExitCode   int32            `json:"exitCode,omitempty"`
	Reason     string           `json:"reason,omitempty"`
	Message    string           `json:"message,omitempty"`
	ImageID    string           `json:"imageID"`
	ImageName  string           `json:"imageName,omitempty"`
	LogPath    string           `json:"logPath,omitempty"`
	Resources  Resources        `json:"resources,omitzero"`
	Identity   Identity         `json:"identity"`
	StopSignal string           `json:"stopSignal"`
	Pid        int              `json:"pid,omitempty"`
	Cgroup     string           `json:"cgroup"`
	Process    *specs.Process   `json:"process"`          // what an exec inherits
	RawEnv     [][]byte         `json:"rawEnv,omitempty"` // its environment where JSON strings cannot carry it
}

// Reasons that the field gives for an end (and the kubelet reads).
const (
	reasonCompleted  = "Completed"
	reasonError      = "Error"
	reasonOOMKilled  = "OOMKilled"
	reasonStartError = "StartError"
	reasonUnknown    = "Unknown"
)

// orderTimes keeps created, started and finished in this order though the wall
// clock was set back meanwhile: a start before its creation helps nobody.
func (r *containerRecord) orderTimes() {
	if !r.StartedAt.IsZero() && r.StartedAt.Before(r.CreatedAt) {
		r.StartedAt = r.CreatedAt
	}
	if !r.FinishedAt.IsZero() && r.FinishedAt.Before(r.StartedAt) {
		r.FinishedAt = r.StartedAt
	}
}

func (r *containerRecord) status() *ContainerStatus {
	s := &ContainerStatus{
		ID: r.ID, Pod: r.Pod, Config: r.Config, CreatedAt: r.CreatedAt, StartedAt: r.StartedAt, FinishedAt: r.FinishedAt,
		ExitCode: r.ExitCode, Reason: r.Reason, Message: r.Message, ImageID: r.ImageID, ImageRef: r.ImageID, ImageName: r.ImageName,
		LogPath: r.LogPath, Resources: r.Resources, Identity: r.Identity, StopSignal: r.StopSignal, CgroupDir: r.Cgroup,
	}
	switch lifecycle.ShowContainer(r.State) {
	case lifecycle.Nothing, lifecycle.CtrCreated:
		s.State = ContainerCreated
	case lifecycle.CtrRunning:
		s.State, s.Pid = ContainerRunning, r.Pid
	case lifecycle.CtrExited:
		s.State = ContainerExited
	}
	return s
}

// stepContainer moves the container by an event: change edits the record on the way.
func (e *Engine) stepContainer(c *container, ev lifecycle.Event, change func(*containerRecord)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return e.stepContainerLocked(c, ev, change)
}

func (e *Engine) stepContainerLocked(c *container, ev lifecycle.Event, change func(*containerRecord)) error {
	next, effects, err := lifecycle.StepContainer(c.rec.State, ev)
	if err != nil {
		return fmt.Errorf("container %s: is %s: %w", id.Short(c.id), word(c.rec.State), errdefs.ErrFailedPrecondition)
	}
	rec := c.rec
	rec.State = next
	if change != nil && len(effects) > 0 {
		change(&rec)
		rec.orderTimes()
	}
	for _, f := range effects {
		crashpoint.Here("container", string(ev), string(f))
		switch f {
		case lifecycle.Journal:
			err := e.ctrBook.Write(string(c.id), &rec)
			if err != nil && !stays(c.rec.State, ev) {
				return err
			}
			if c.owed = err != nil; c.owed {
				tell(err, "Container record is not written", "container", c.id)
			}
		case lifecycle.Publish:
			c.status.Store(rec.status())
		case lifecycle.Forget:
			e.forgotten(string(c.id), rec.Cgroup)
			tell(e.ctrBook.Remove(string(c.id)), "Container record is not removed", "container", c.id)
			c.status.Store(nil)
			c.owed = false
			e.dropContainer(c)
		}
	}
	was := c.rec.State
	c.rec = rec
	if next == lifecycle.Starting {
		c.settled = make(chan struct{})
	} else if was == lifecycle.Starting && c.settled != nil {
		close(c.settled)
	}
	if next == lifecycle.Exited && was != lifecycle.Exited {
		close(c.exited)
	}
	crashpoint.Here("container", string(ev), "done")
	return nil
}

// word is the state as a caller knows it.
func word(s lifecycle.State) string {
	switch s {
	case lifecycle.Running, lifecycle.Starting:
		return "running"
	case lifecycle.Created, lifecycle.Creating:
		return "created and not running"
	}
	return "not running any more"
}

func (c *container) record() containerRecord {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec
}

// running returns the record of a running container, else FailedPrecondition.
func (e *Engine) running(ref string) (*container, containerRecord, error) {
	c, err := e.findContainer(ref)
	if err != nil {
		return nil, containerRecord{}, err
	}
	rec := c.record()
	if rec.State != lifecycle.Running {
		return nil, rec, fmt.Errorf("container %s: is %s; only a running one can do this: %w", id.Short(c.id), word(rec.State), errdefs.ErrFailedPrecondition)
	}
	return c, rec, nil
}

func decodeContainer(body []byte) (containerRecord, error) {
	var r containerRecord
	if err := json.Unmarshal(body, &r); err != nil {
		return r, err
	}
	if r.Config == nil || r.ID == "" || r.Pod == "" {
		return r, fmt.Errorf("container record without id, pod or config: %w", errdefs.ErrDataLoss)
	}
	return r, nil
}
