package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

const (
	// patience is how long killed processes may take to end before a call that waits
	// for them answers with what they wait for: a process in uninterruptible sleep
	// ends when what it sleeps in ends, which may be never.
	patience = 1700 * time.Millisecond
	// lookTime bounds the look at them. It reads nothing that is known to block.
	lookTime = 200 * time.Millisecond
	// maxDescribed is how many processes an error names.
	maxDescribed = 3
)

// stuck says why a container that was killed has not ended, publishes it in its
// status, and returns it as an error. The container is killed again and again
// until it ends, whoever asks.
func (e *Engine) stuck(c *container) error {
	rec := c.record()
	if rec.State != lifecycle.Running && rec.State != lifecycle.Starting {
		return nil // its end was quicker
	}
	why := e.whatHolds(c, rec)
	if rec.State == lifecycle.Starting {
		why = "its start has not ended: " + why
	}
	c.mu.Lock()
	if s := c.rec.State; s == lifecycle.Running || s == lifecycle.Starting {
		shown := c.rec.status()
		shown.Message = "was killed and has not ended: " + why
		c.status.Store(shown)
	}
	c.mu.Unlock()
	return fmt.Errorf("container %s (%s): was killed and has not ended; it is killed again until it has: %s: %w",
		id.Short(c.id), rec.Config.Meta.Name, why, errdefs.ErrUnavailable)
}

// whatHolds describes the processes of a container that do not end. One look at a
// time: should it block after all, it costs one goroutine and no caller.
func (e *Engine) whatHolds(c *container, rec containerRecord) string {
	if !c.ending.looking.CompareAndSwap(false, true) {
		return "an earlier look at its processes has not come back"
	}
	seen := make(chan string, 1)
	e.owned.Go(func() {
		defer c.ending.looking.Store(false)
		seen <- e.describeProcesses(rec.Pid, rec.Cgroup, rec.Config.Mounts)
	})
	select {
	case s := <-seen:
		if s == "" {
			return "its processes are gone, and the supervisor has not reported the end yet"
		}
		return s
	case <-time.After(lookTime):
		return "its processes cannot be looked at"
	}
}

// describeProcesses says what the living processes of a cgroup do, those in
// uninterruptible sleep first, and which file system they wait for; "" when there
// is none. first may be one of them that is in no cgroup of ours (any more).
func (e *Engine) describeProcesses(first int, cgroup string, mounts []Mount) string {
	pids, frozen := e.processesIn(cgroup)
	if first > 0 && !slices.Contains(pids, first) {
		pids = append(pids, first)
	}
	var alive []kernel.Waiting
	for _, p := range pids {
		if w, err := kernel.LookAt(p); err == nil && w.State != 'Z' && w.State != 'X' {
			alive = append(alive, w)
		}
	}
	slices.SortStableFunc(alive, func(a, b kernel.Waiting) int { return urgency(a) - urgency(b) })
	var say []string
	for _, w := range alive[:min(len(alive), maxDescribed)] {
		say = append(say, w.String()+waitingFor(w, mounts))
	}
	if n := len(alive) - maxDescribed; n > 0 {
		say = append(say, fmt.Sprintf("and %d more", n))
	}
	if len(alive) > 0 && frozen != "" {
		say = append(say, "cgroup "+frozen+" is frozen")
	}
	return strings.Join(say, "; ")
}

func urgency(w kernel.Waiting) int {
	if w.State == 'D' {
		return 0
	}
	return 1
}

// waitingFor names the file system that a process waits for, and where the pod's
// configuration has it from.
func waitingFor(w kernel.Waiting, mounts []Mount) string {
	kind := w.FileSystem()
	if kind == "" {
		return ""
	}
	var at []string
	for _, m := range kernel.MountsOf(w.Pid, kind) {
		s := fmt.Sprintf("%s (type %s, source %s", m.Point, m.Type, m.Source)
		for _, c := range mounts {
			if filepath.Clean(c.ContainerPath) == m.Point && c.HostPath != "" {
				s += ", from " + c.HostPath
			}
		}
		at = append(at, s+")")
	}
	if len(at) == 0 {
		return ", waiting for a file system of type " + kind
	}
	return ", waiting for the server of a file system of type " + kind + ": " + strings.Join(at, " or ")
}

// processesIn lists the processes of a cgroup and of those below it, and the
// first of these that is frozen.
func (e *Engine) processesIn(dir string) (pids []int, frozen string) {
	if dir == "" || dir == "/" {
		return nil, ""
	}
	for _, root := range e.cgroups {
		_ = filepath.WalkDir(filepath.Join(root, dir), func(at string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil
			}
			text, _ := os.ReadFile(filepath.Join(at, "cgroup.procs"))
			for f := range strings.FieldsSeq(string(text)) {
				if n, err := strconv.Atoi(f); err == nil && n > 0 && !slices.Contains(pids, n) {
					pids = append(pids, n)
				}
			}
			if frozen == "" && isFrozen(at) {
				frozen = strings.TrimPrefix(at, root)
			}
			return nil
		})
	}
	return pids, frozen
}

// isFrozen leaves out v1's FREEZING: a kill freezes for a moment, so that no fork
// escapes it, and what sleeps uninterruptibly cannot be frozen.
func isFrozen(at string) bool {
	v1, _ := os.ReadFile(filepath.Join(at, "freezer.state"))
	v2, _ := os.ReadFile(filepath.Join(at, "cgroup.events"))
	return strings.HasPrefix(string(v1), "FROZEN") || strings.Contains(string(v2), "frozen 1")
}

// deleteContainer has the supervisor kill and remove a container, and removes what
// is left of its cgroup where the supervisor that made it is gone. While processes
// of it do not end it does not wait longer than a stop does: the supervisor goes
// on, and the next call joins it.
func (e *Engine) deleteContainer(ctx context.Context, c id.Container, cgroup string) error {
	parent := ctx
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	e.owned.Go(func() {
		look := time.NewTicker(patience)
		defer look.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-look.C:
				if why := e.describeProcesses(0, cgroup, nil); why != "" {
					cancel(fmt.Errorf("container %s: has processes that were killed and have not ended: %s: %w", id.Short(c), why, errdefs.ErrUnavailable))
				}
			}
		}
	})
	err := e.cfg.Runtime.Delete(ctx, c)
	if why := context.Cause(ctx); err != nil && why != nil && parent.Err() == nil {
		return why
	}
	if err == nil {
		e.clearCgroup(cgroup)
	}
	return err
}

// errRuns is why a pod's network and namespaces are not freed yet.
var errRuns = errors.New("its network stays until its containers have ended")
