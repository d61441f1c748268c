package sandbox

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/ranked"
)

const (
	usagePeriod = 20 * time.Second
	usagePause  = 5 * time.Millisecond // between two containers: a node has hundreds
)

// layerUsage is what one writable layer takes on disk.
type layerUsage struct {
	bytes, inodes uint64
	at            time.Time
}

// usageTable holds the sizes of writable layers. They are measured in the
// background, never while somebody waits.
type usageTable struct {
	mu    ranked.Mutex[leafLock]
	byID  map[id.Container]layerUsage // guarded by mu
	total layerUsage                  // guarded by mu; of the last whole round
}

func (u *usageTable) get(c id.Container) layerUsage {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.byID[c]
}

func (u *usageTable) set(c id.Container, l layerUsage) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.byID == nil {
		u.byID = map[id.Container]layerUsage{}
	}
	u.byID[c] = l
}

func (u *usageTable) forget(c id.Container) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.byID, c)
}

// walkUsage measures all writable layers again and again until the engine is closed.
func (e *Engine) walkUsage() {
	tick := time.NewTicker(usagePeriod)
	defer tick.Stop()
	for {
		total := layerUsage{at: time.Now()}
		for _, c := range e.view.Load().containers {
			l := e.measure(c.id)
			e.usage.set(c.id, l)
			total.bytes += l.bytes
			total.inodes += l.inodes
			select {
			case <-e.ctx.Done():
				return
			case <-time.After(usagePause):
			}
		}
		e.usage.mu.Lock()
		e.usage.total = total
		for c := range e.usage.byID { // removed while the walk was in it
			if _, err := e.findContainer(string(c)); err != nil {
				delete(e.usage.byID, c)
			}
		}
		e.usage.mu.Unlock()
		select {
		case <-e.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// measure walks the upper folder of a container. What vanishes on the way counts nothing.
func (e *Engine) measure(c id.Container) layerUsage {
	l := layerUsage{at: time.Now()}
	_ = filepath.WalkDir(filepath.Join(e.containerDir(c), "upper"), func(_ string, d fs.DirEntry, err error) error {
		if err != nil || e.ctx.Err() != nil {
			return filepath.SkipDir
		}
		if info, err := d.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				l.inodes++
				l.bytes += uint64(st.Blocks) * 512
			}
		}
		return nil
	})
	return l
}

// WritableUsage sums the writable layers as of the last walk.
func (e *Engine) WritableUsage() imageservice.FsUsage {
	e.usage.mu.Lock()
	t := e.usage.total
	e.usage.mu.Unlock()
	if t.at.IsZero() {
		t.at = time.Now()
	}
	return imageservice.FsUsage{Mountpoint: e.containersDir(), Bytes: t.bytes, Inodes: t.inodes, At: t.at}
}

// ContainerStats reads the use of one running container.
func (e *Engine) ContainerStats(_ context.Context, ref string) (*ContainerStats, error) {
	s, err := e.Container(ref)
	if err != nil {
		return nil, err
	}
	if s.State != ContainerRunning {
		return nil, fmt.Errorf("container %s: is not running: %w", id.Short(s.ID), errdefs.ErrFailedPrecondition)
	}
	return e.statsOf(s)
}

func (e *Engine) statsOf(s *ContainerStatus) (*ContainerStats, error) {
	r, err := e.collector.Read(s.CgroupDir)
	if err != nil {
		return nil, err
	}
	l := e.usage.get(s.ID)
	if l.at.IsZero() { // not walked yet: a fresh layer
		l = layerUsage{at: r.At, inodes: 1}
	}
	return &ContainerStats{Container: s, Stats: r, WritableBytes: l.bytes, WritableInodes: l.inodes, WritableAt: l.at, FsMountpoint: e.containersDir()}, nil
}

// ListContainerStats reads the use of the running containers that f selects. One
// that ends meanwhile is left out.
func (e *Engine) ListContainerStats(ctx context.Context, f ContainerFilter) ([]*ContainerStats, error) {
	var out []*ContainerStats
	for _, s := range e.ListContainers(f) {
		if s.State != ContainerRunning {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if st, err := e.statsOf(s); err == nil {
			out = append(out, st)
		}
	}
	return out, nil
}
