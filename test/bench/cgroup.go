package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// cgroups makes the cgroup of a pod before the runtime is asked for the pod, in
// every mounted hierarchy, and takes it away afterwards: on a node that is the
// kubelet's work.
type cgroups struct {
	parent string   // below this the pods' own are made; "" leaves them to the runtime
	mounts []string // where hierarchies are mounted
}

func newCgroups(parent string) (*cgroups, error) {
	if parent == "" || strings.HasSuffix(parent, ".slice") {
		return &cgroups{parent: parent}, nil
	}
	if !filepath.IsAbs(parent) || filepath.Clean(parent) == "/" {
		return nil, fmt.Errorf("--cgroup-parent %q: want an absolute path below the root, a .slice or nothing", parent)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return &cgroups{parent: filepath.Clean(parent), mounts: cgroupMounts(string(b))}, nil
}

// cgroupMounts finds where whole hierarchies of cgroup v1 and v2 are mounted.
func cgroupMounts(mountinfo string) []string {
	var found []string
	for line := range strings.Lines(mountinfo) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if ok && len(l) >= 5 && len(r) > 0 && (r[0] == "cgroup" || r[0] == "cgroup2") && l[3] == "/" {
			found = append(found, l[4])
		}
	}
	return found
}

// path is what a pod's cgroup_parent is.
func (c *cgroups) path(pod string) string {
	if len(c.mounts) == 0 {
		return c.parent
	}
	return c.parent + "/" + pod
}

func (c *cgroups) make(pod string) error {
	for _, m := range c.mounts {
		dir := m
		for part := range strings.SplitSeq(strings.TrimPrefix(c.path(pod), "/"), "/") {
			up := dir
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil {
				if errors.Is(err, fs.ErrExist) {
					continue
				}
				return err
			}
			// A v1 cpuset without processors and memory takes no process.
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				v, err := os.ReadFile(filepath.Join(up, f))
				if err != nil || filepath.Base(m) != "cpuset" {
					continue
				}
				if err := os.WriteFile(filepath.Join(dir, f), v, 0o644); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// remove takes a pod's cgroup away. One that the runtime left something in stays,
// and is for removeAll to tell about.
func (c *cgroups) remove(pod string) {
	for _, m := range c.mounts {
		os.Remove(filepath.Join(m, c.path(pod)))
	}
}

// removeAll takes the parent away, and names what the runtime left in it.
func (c *cgroups) removeAll() error {
	var errs []error
	for _, m := range c.mounts {
		root := filepath.Join(m, c.parent)
		var dirs []string
		filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			if err := os.Remove(dirs[i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("clean up: cgroup: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}
