// Package stats reads the use of CPU, memory, swap and process slots, and the
// pressure, of cgroups (v1 and v2) from their files, in one pass.
//
// The files of a cgroup are opened for each reading, relative to one directory
// descriptor, and closed again: a kept descriptor per file would be ten for
// each container of the node and save a few microseconds of a reading.
package stats

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/sandbox/model"
)

const (
	// minWindow is the shortest time that a CPU rate is computed over: the counter
	// moves in scheduler ticks, so a shorter one gives noise.
	minWindow = time.Second
	// keepSample is how long the CPU sample of a cgroup that nobody reads is kept.
	keepSample = 10 * time.Minute
)

// Collector reads cgroups. It may be used concurrently.
type Collector struct {
	at  Hierarchies
	now func() time.Time

	mu      sync.Mutex // guards what follows; never held across a system call
	samples map[string]*sample
	swept   time.Time
}

// sample is the start of the running CPU window of one cgroup.
type sample struct {
	at        time.Time
	cpu       uint64
	nanocores *uint64 // of the window before; nil until one is complete
	used      time.Time
}

// NewCollector returns a collector of the cgroups mounted at h (see FindHierarchies).
func NewCollector(h Hierarchies) *Collector {
	return &Collector{at: h, now: time.Now, samples: map[string]*sample{}}
}

// Read returns one reading of the cgroup at cgroupDir, a path below the root of
// each hierarchy. A cgroup that does not exist (any more) is
// errdefs.ErrNotFound. CPUNanocores is nil until a second has passed since the
// first reading; swap and pressure are nil where the kernel does not count them.
func (c *Collector) Read(cgroupDir string) (model.Stats, error) {
	dir, err := cleanDir(cgroupDir)
	if err != nil {
		return model.Stats{}, err
	}
	r := reader{buf: buffers.Get().(*[]byte)}
	defer buffers.Put(r.buf)
	var s model.Stats
	s.At = c.now()
	if c.at.Unified != "" {
		err = r.v2(path.Join(c.at.Unified, dir), &s)
	} else {
		err = r.v1(c.at.V1, dir, &s)
	}
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) { // ENODEV: removed while it was read
			c.Forget(cgroupDir)
			return model.Stats{}, fmt.Errorf("cgroup %q: %w: %w", cgroupDir, err, errdefs.ErrNotFound)
		}
		return model.Stats{}, fmt.Errorf("cgroup %q: %w", cgroupDir, err)
	}
	s.CPUNanocores = c.rate(dir, s.At, s.CPUNanoseconds)
	return s, nil
}

// Forget drops what is remembered of a cgroup that is gone.
func (c *Collector) Forget(cgroupDir string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.samples, path.Clean("/"+cgroupDir))
}

// rate returns the CPU use in billionths of a core over the last complete window.
func (c *Collector) rate(dir string, at time.Time, cpu uint64) *uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at.Sub(c.swept) > keepSample {
		for d, s := range c.samples {
			if at.Sub(s.used) > keepSample {
				delete(c.samples, d)
			}
		}
		c.swept = at
	}
	s := c.samples[dir]
	if s == nil || cpu < s.cpu { // less than before: another cgroup of the same name
		c.samples[dir] = &sample{at: at, cpu: cpu, used: at}
		return nil
	}
	s.used = at
	if window := at.Sub(s.at); window >= minWindow {
		rate := uint64(float64(cpu-s.cpu) / window.Seconds())
		s.at, s.cpu, s.nanocores = at, cpu, &rate
	}
	return s.nanocores
}

func cleanDir(dir string) (string, error) {
	for e := range strings.SplitSeq(dir, "/") {
		if e == ".." {
			return "", fmt.Errorf("cgroup %q: leads out of the hierarchy: %w", dir, errdefs.ErrInvalidArgument)
		}
	}
	return path.Clean("/" + dir), nil
}
