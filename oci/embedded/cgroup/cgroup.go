package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/undo"
)

// Cgroup is the cgroup of one container: one directory on v2, one in each
// hierarchy on v1, and one more in the v2 hierarchy of a hybrid host.
type Cgroup struct {
	host *Host
	path string // as asked for: for errors
	dirs []dir  // v1: in the order of host.V1, then hybrid's unified one; v2: one
	unit Unit   // nil: the directories are ours alone

	pending *specs.LinuxResources // until Adopt; then nil
}

type dir struct {
	Controller
	rel  string // below the mount, without a slash in front
	path string // absolute
}

// Create makes the cgroup at path (see Clean) with the limits and device rules
// of r (runtime-spec, "Control groups"); parents are made if they are missing.
// What r asks for and the kernel can not do is an error that names the field,
// before anything is made where that can be known. On error nothing new is left
// but parents. warnings name limits that only refine others and that this kernel
// has no file for.
//
// Where the cgroup file system is not ours to write, the error is of kind
// PermissionDenied: a caller without privileges may go on without a cgroup.
func (h *Host) Create(path string, r *specs.LinuxResources) (c *Cgroup, warnings []string, err error) {
	p, err := Clean(path)
	if err != nil {
		return nil, nil, err
	}
	if c, err = h.at(p); err != nil {
		return nil, nil, err
	}
	if warnings, err = c.make(r); err != nil {
		return nil, nil, err
	}
	return c, warnings, nil
}

// make makes the directories with the limits and device rules of r.
func (c *Cgroup) make(r *specs.LinuxResources) (warnings []string, err error) {
	if r == nil {
		r = &specs.LinuxResources{}
	}
	p, err := c.plan(r)
	if err != nil {
		return nil, err
	}
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run())
		}
	}()
	kept := c.dirs[:0:0]
	for _, d := range c.dirs {
		err := c.host.makeDir(d, &u)
		if err != nil && c.host.Hybrid() && d.unified() && errors.Is(err, errdefs.ErrPermissionDenied) {
			continue // it has no limits: the container stays in ours
		}
		if err != nil {
			return nil, err
		}
		kept = append(kept, d)
	}
	c.dirs = kept
	if err := c.apply(p.settings, &p.warnings); err != nil {
		return nil, err
	}
	if err := c.setDevices(p); err != nil {
		return nil, err
	}
	return p.warnings, nil
}

// Open returns the cgroup at path as it is. A relative path is looked up from
// the caller's own cgroup of now; another process keeps Paths and uses Reopen.
func (h *Host) Open(path string) (*Cgroup, error) {
	p, err := Clean(path)
	if err != nil {
		return nil, err
	}
	return h.at(p)
}

// Paths lists the directory of each controller, with "" for the v2 hierarchy:
// the form that tools know from a container's state as "cgroup_paths".
func (c *Cgroup) Paths() map[string]string {
	out := map[string]string{}
	for _, d := range c.dirs {
		if d.unified() {
			out[""] = d.path
		}
		for _, n := range d.Names {
			out[n] = d.path
		}
	}
	return out
}

// Reopen implements Manager. A path of the spec may be relative to the cgroup of
// the process that made the container, so dirs alone count. Directories outside of
// the host's hierarchies are refused with an error of kind InvalidArgument.
func (h *Host) Reopen(_ string, paths map[string]string) (*Cgroup, error) {
	c := &Cgroup{host: h}
	for _, d := range h.hierarchies() {
		name := ""
		if !d.unified() {
			name = d.Names[0]
		}
		p, ok := paths[name]
		if !ok {
			continue
		}
		rel, below := strings.CutPrefix(filepath.Clean(p), strings.TrimSuffix(d.Mount, "/")+"/")
		if !below {
			return nil, fmt.Errorf("cgroup path %q of controller %q: not below %s: %w", p, name, d.Mount, errdefs.ErrInvalidArgument)
		}
		c.path = "/" + rel
		c.dirs = append(c.dirs, dir{d, rel, filepath.Join(d.Mount, rel)})
	}
	if len(c.dirs) == 0 {
		return nil, fmt.Errorf("cgroup paths %v: none in a mounted hierarchy: %w", paths, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

// Exists reports whether the cgroup has a directory.
func (c *Cgroup) Exists() bool {
	for _, d := range c.dirs {
		if _, err := os.Stat(d.path); err == nil {
			return true
		}
	}
	return false
}

// makeDir makes the directory of one hierarchy and its missing parents. Only
// the leaf is put on the undo stack: siblings may already use a parent.
func (h *Host) makeDir(d dir, u *undo.Stack) error {
	fresh := os.Mkdir(d.path, 0o755)
	if fresh == nil {
		u.Push(func() error { return removeDir(d.path) })
		switch {
		case h.V2():
			if h.complete(d) {
				return nil
			}
		case !d.Has("cpuset"):
			return nil
		default:
			// A parent that was there has its cpus and nodes, unless somebody else is
			// just making it: then it is gone through from the top.
			if inheritCpuset(filepath.Dir(d.path), d.path) == nil {
				cpus, _ := readFile(filepath.Join(d.path, "cpuset.cpus"))
				mems, _ := readFile(filepath.Join(d.path, "cpuset.mems"))
				if cpus != "" && mems != "" {
					return nil
				}
			}
		}
	}
	at := d.Mount
	parts := strings.Split(d.rel, "/")
	for i, p := range parts {
		parent := at
		at = filepath.Join(at, p)
		if h.V2() {
			enableControllers(parent)
		}
		err := os.Mkdir(at, 0o755)
		if err == nil && i == len(parts)-1 {
			u.Push(func() error { return removeDir(d.path) })
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return explain(fmt.Errorf("cgroup %s: %w", at, err))
		}
		if d.Has("cpuset") {
			if err := inheritCpuset(parent, at); err != nil {
				return err
			}
		}
	}
	if h.V2() {
		return checkDomain(d.path)
	}
	return nil
}

// inheritCpuset copies the parent's cpus and nodes: a v1 cpuset is born empty
// and takes no process then.
func inheritCpuset(parent, dir string) error {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		have, err := readFile(filepath.Join(dir, f))
		if err != nil {
			return err
		}
		if have != "" {
			continue
		}
		v, err := readFile(filepath.Join(parent, f))
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(dir, f), v); err != nil {
			return err
		}
	}
	return nil
}

// Delete removes the cgroup and what its processes made below it, and ends its
// unit where systemd made it. The kernel says EBUSY for a moment after the last
// process was reaped. Deleting a cgroup that is gone is no error.
func (c *Cgroup) Delete() error {
	var errs []error
	if c.unit != nil {
		errs = append(errs, c.unit.Stop())
	}
	for _, d := range c.dirs {
		errs = append(errs, removeDir(d.path))
	}
	return errors.Join(errs...)
}

// deleteWait bounds the wait for the kernel to let go of a dead process.
const deleteWait = 5 * time.Second

func removeDir(path string) error {
	deadline := time.Now().Add(deleteWait)
	for pause := 50 * time.Microsecond; ; pause = min(2*pause, 20*time.Millisecond) {
		err := unix.Rmdir(path)
		switch {
		case err == nil, err == unix.ENOENT:
			return nil
		case err == unix.EINTR:
			continue
		case err != unix.EBUSY || time.Now().After(deadline):
			return explain(fmt.Errorf("cgroup %s: rmdir: %w", path, err))
		}
		entries, _ := os.ReadDir(path)
		for _, e := range entries {
			if e.IsDir() {
				if err := removeDir(filepath.Join(path, e.Name())); err != nil {
					return err
				}
			}
		}
		time.Sleep(pause)
	}
}
