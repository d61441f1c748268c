package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// JoinDir opens the directory of the v2 hierarchy a process is born in
// (clone3); nil where there is none. On a hybrid host the process joins with
// JoinFiles as well.
func (c *Cgroup) JoinDir() (*os.File, error) {
	d := c.unifiedDir()
	if d == nil {
		return nil, nil
	}
	f, err := os.OpenFile(d.path, unix.O_DIRECTORY|unix.O_PATH, 0)
	if errors.Is(err, os.ErrNotExist) && !c.host.V2() {
		return nil, nil // made where that hierarchy could not be written
	}
	return f, err
}

// JoinDirBeside is JoinDir for a further process of a running container. One
// that handed controllers down in its own cgroup has moved its processes to a
// child, and the kernel takes no others in the middle: then it is the cgroup of
// the container's first process, given by its pid.
func (c *Cgroup) JoinDirBeside(first int) (*os.File, error) {
	d := c.unifiedDir()
	if !c.host.V2() || d == nil {
		return c.JoinDir()
	}
	if on, err := readFile(filepath.Join(d.path, "cgroup.subtree_control")); err != nil || on == "" {
		return c.JoinDir()
	}
	text, err := readFile("/proc/" + strconv.Itoa(first) + "/cgroup")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(text) {
		rel, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		at := filepath.Join(c.host.Unified, rel)
		if at != d.path && !strings.HasPrefix(at, d.path+"/") {
			return nil, fmt.Errorf("cgroup %s: process %d has left it for %s: %w", d.path, first, rel, errdefs.ErrFailedPrecondition)
		}
		return os.OpenFile(at, unix.O_DIRECTORY|unix.O_PATH, 0)
	}
	return nil, fmt.Errorf("cgroup %s: process %d is in no cgroup of v2: %w", d.path, first, errdefs.ErrFailedPrecondition)
}

// unifiedDir is the cgroup's directory in the v2 hierarchy, or nil.
func (c *Cgroup) unifiedDir() *dir {
	if n := len(c.dirs); n > 0 && c.dirs[n-1].unified() {
		return &c.dirs[n-1]
	}
	return nil
}

// v1 lists the directories in v1 hierarchies.
func (c *Cgroup) v1() []dir {
	if c.unifiedDir() != nil {
		return c.dirs[:len(c.dirs)-1]
	}
	return c.dirs
}

// JoinFiles opens the files to which a process writes "0" to join (v1).
func (c *Cgroup) JoinFiles() ([]*os.File, error) {
	var out []*os.File
	for _, d := range c.v1() {
		fd, err := open(filepath.Join(d.path, "tasks"), unix.O_WRONLY)
		if err != nil {
			for _, f := range out {
				f.Close()
			}
			return nil, explain(fmt.Errorf("cgroup %s: tasks: %w", d.path, err))
		}
		out = append(out, os.NewFile(uintptr(fd), "tasks"))
	}
	return out, nil
}

// Sub returns the cgroup below c that a further process of the container joins
// (`exec --cgroup`). Each of paths is relative to c: "path" for every hierarchy,
// or "controller[,controller...]:path" for some of cgroup v1. It must exist.
func (c *Cgroup) Sub(paths ...string) (*Cgroup, error) {
	out := &Cgroup{host: c.host, path: c.path, dirs: slices.Clone(c.dirs), unit: c.unit}
	seen := map[string]bool{}
	for _, arg := range paths {
		names, sub, qualified := strings.Cut(arg, ":")
		if !qualified {
			names, sub = "", arg
			if len(paths) > 1 {
				return nil, fmt.Errorf("cgroup %q: several paths need a \"controller:\" each: %w", arg, errdefs.ErrInvalidArgument)
			}
		} else if c.host.V2() {
			return nil, fmt.Errorf("cgroup %q: cgroup v2 has no controllers of their own path: give the path alone: %w", arg, errdefs.ErrInvalidArgument)
		}
		if slices.Contains(strings.Split(sub, "/"), "..") || strings.ContainsRune(sub, 0) {
			return nil, fmt.Errorf("cgroup %q: want a path below the container's cgroup: %w", arg, errdefs.ErrInvalidArgument)
		}
		for name := range strings.SplitSeq(names, ",") {
			if seen[name] {
				return nil, fmt.Errorf("cgroup %q: controller %q is named twice: %w", arg, name, errdefs.ErrInvalidArgument)
			}
			seen[name] = true
			if qualified && !slices.ContainsFunc(c.dirs, func(d dir) bool { return d.Has(name) }) {
				return nil, fmt.Errorf("cgroup %q: no controller %q is mounted: %w", arg, name, errdefs.ErrInvalidArgument)
			}
			for i, d := range out.dirs {
				if qualified && !d.Has(name) {
					continue
				}
				// The v2 hierarchy of a hybrid host need not have what v1 has.
				at := dir{d.Controller, filepath.Join(d.rel, sub), filepath.Join(d.path, sub)}
				if _, err := os.Stat(at.path); err != nil {
					if d.unified() && !c.host.V2() {
						continue
					}
					return nil, fmt.Errorf("cgroup %q: %w: %w", arg, err, errdefs.ErrNotFound)
				}
				out.dirs[i] = at
			}
		}
	}
	return out, nil
}

// View is a directory shown inside the container as Name below its cgroup mount.
type View struct {
	Name  string
	Dir   string
	Links []string // further names of a hierarchy with several controllers
}

// Views lists what a cgroup mount inside the container shows. On v2 it is one
// view without a name; whole gives the host's hierarchy, for a container that
// keeps the host's cgroup namespace.
func (c *Cgroup) Views(whole bool) []View {
	if c.host.V2() {
		if whole {
			return []View{{Dir: c.host.Unified}}
		}
		return []View{{Dir: c.dirs[0].path}}
	}
	var out []View
	for _, d := range c.v1() {
		name := filepath.Base(d.Mount)
		v := View{Name: name, Dir: d.path}
		for _, n := range d.Names {
			if n != name && !strings.HasPrefix(n, "name=") {
				v.Links = append(v.Links, n)
			}
		}
		out = append(out, v)
	}
	return out
}
