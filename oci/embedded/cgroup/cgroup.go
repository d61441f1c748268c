package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/undo"
)

// Cgroup is the cgroup of one container: one directory on v2, one in each
// hierarchy on v1.
type Cgroup struct {
	host *Host
	path string // relative to each hierarchy's root
	dirs []dir  // v1: in the order of host.V1; v2: one
}

type dir struct {
	Controller
	path string
}

// View is a directory shown inside the container as Name below its cgroup mount.
type View struct {
	Name  string
	Dir   string
	Links []string // further names of a hierarchy with several controllers
}

// Create makes the cgroup at path (see Clean) with the limits and device rules
// of r; parents are made if they are missing. On error nothing new is left but
// parents. warnings name limits that this kernel has no file for.
func (h *Host) Create(path string, r *specs.LinuxResources) (c *Cgroup, warnings []string, err error) {
	rel, err := Clean(path)
	if err != nil {
		return nil, nil, err
	}
	if r == nil {
		r = &specs.LinuxResources{}
	}
	sets, warnings, err := h.settings(r)
	if err != nil {
		return nil, nil, err
	}
	c = h.at(rel)
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Run())
		}
	}()
	for _, d := range c.dirs {
		if err := h.makeDir(d, rel, &u); err != nil {
			return nil, nil, err
		}
	}
	if err := c.apply(sets); err != nil {
		return nil, nil, err
	}
	if err := c.setDevices(r.Devices); err != nil {
		return nil, nil, err
	}
	return c, warnings, nil
}

// Open returns the cgroup at path as it is.
func (h *Host) Open(path string) (*Cgroup, error) {
	rel, err := Clean(path)
	if err != nil {
		return nil, err
	}
	return h.at(rel), nil
}

func (h *Host) at(rel string) *Cgroup {
	c := &Cgroup{host: h, path: rel}
	if h.V2() {
		c.dirs = []dir{{Controller{Mount: h.Unified}, filepath.Join(h.Unified, rel)}}
		return c
	}
	for _, v := range h.V1 {
		c.dirs = append(c.dirs, dir{v, filepath.Join(v.Mount, rel)})
	}
	return c
}

// makeDir makes the directory of one hierarchy and its missing parents. Only
// the leaf is put on the undo stack: siblings may already use a parent.
func (h *Host) makeDir(d dir, rel string, u *undo.Stack) error {
	at := d.Mount
	parts := strings.Split(rel, "/")
	fresh := os.Mkdir(d.path, 0o755)
	if fresh == nil {
		u.Push(func() error { return removeDir(d.path) })
		if !h.V2() && !d.Has("cpuset") {
			return nil
		}
		// A parent that was there has its cpus and nodes, unless somebody else is
		// just making it: then it is gone through from the top.
		if d.Has("cpuset") && inheritCpuset(filepath.Dir(d.path), d.path) == nil {
			cpus, _ := readFile(filepath.Join(d.path, "cpuset.cpus"))
			mems, _ := readFile(filepath.Join(d.path, "cpuset.mems"))
			if cpus != "" && mems != "" {
				return nil
			}
		}
	}
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
			return fmt.Errorf("cgroup %s: %w", at, err)
		}
		if d.Has("cpuset") {
			if err := inheritCpuset(parent, at); err != nil {
				return err
			}
		}
	}
	return nil
}

// enableControllers hands every controller of a v2 cgroup down to its children.
// One by one: the kernel takes all or nothing, and a controller in use by the
// domain's own threads must not keep back the others. What is missing shows up
// when its limit is written.
func enableControllers(dir string) {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	on, _ := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	enabled := map[string]bool{}
	for _, c := range strings.Fields(string(on)) {
		enabled[c] = true
	}
	for _, c := range strings.Fields(string(have)) {
		if !enabled[c] {
			_ = writeFile(filepath.Join(dir, "cgroup.subtree_control"), "+"+c)
		}
	}
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

// Path is the cgroup's path relative to each hierarchy's root.
func (c *Cgroup) Path() string { return c.path }

// JoinDir opens the directory a process is born in (v2), or returns nil.
func (c *Cgroup) JoinDir() (*os.File, error) {
	if !c.host.V2() {
		return nil, nil
	}
	return os.OpenFile(c.dirs[0].path, unix.O_DIRECTORY|unix.O_PATH, 0)
}

// JoinFiles opens the files to which a process writes "0" to join (v1).
func (c *Cgroup) JoinFiles() ([]*os.File, error) {
	if c.host.V2() {
		return nil, nil
	}
	var out []*os.File
	for _, d := range c.dirs {
		fd, err := unix.Open(filepath.Join(d.path, "tasks"), unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			for _, f := range out {
				f.Close()
			}
			return nil, fmt.Errorf("cgroup %s: tasks: %w", d.path, err)
		}
		out = append(out, os.NewFile(uintptr(fd), "tasks"))
	}
	return out, nil
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
	for _, d := range c.dirs {
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

// Delete removes the cgroup and what its processes made below it. The kernel
// says EBUSY for a moment after the last process was reaped.
func (c *Cgroup) Delete() error {
	var errs []error
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
			return fmt.Errorf("cgroup %s: rmdir: %w", path, err)
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

// readFile reads a small cgroup file without its final newline. Without package
// os, which would make the poller watch each of these files for a moment.
func readFile(path string) (string, error) {
	fail := func(err error) (string, error) {
		return "", fmt.Errorf("cgroup: %w", &fs.PathError{Op: "read", Path: path, Err: err})
	}
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(fd)
	var all []byte
	var b [4096]byte
	for {
		n, err := unix.Read(fd, b[:])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fail(err)
		case n == 0:
			return strings.TrimSpace(string(all)), nil
		}
		all = append(all, b[:n]...)
	}
}

func open(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// control is a cgroup file open for writing.
type control struct {
	fd   int
	path string
}

func openControl(path string) (control, error) {
	fd, err := open(path, unix.O_WRONLY)
	if err != nil {
		return control{}, fmt.Errorf("cgroup: open %s: %w", path, err)
	}
	return control{fd, path}, nil
}

func (c control) close() { unix.Close(c.fd) }

// write writes one value. The memory controller answers EINTR when the Go
// runtime's preemption signal meets a reclaim; the write is repeated.
func (c control) write(value string) error {
	for {
		_, err := unix.Write(c.fd, []byte(value))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("cgroup: write %q to %s: %w", value, c.path, err)
		}
		return nil
	}
}

func writeFile(path, value string) error {
	c, err := openControl(path)
	if err != nil {
		return err
	}
	defer c.close()
	return c.write(value)
}
