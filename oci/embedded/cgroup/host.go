// Package cgroup makes, limits, reads and removes the cgroups of containers on
// cgroup v1, v2 and hybrid hosts. *Host does so through the file system alone;
// the package systemd below has systemd make them.
//
// On v2 a process is born in its cgroup (clone3). On v1 the single-threaded
// child writes "0" to the tasks files it inherits: a write to cgroup.procs
// takes the kernel's threadgroup lock and waits for an RCU grace period,
// 7-11 ms on a quiet machine. On a hybrid host it does both: limits live in v1,
// and the container has a directory without limits in the v2 hierarchy too.
package cgroup

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Manager makes cgroups. *Host is the one that asks nobody; systemd.Driver has
// systemd make them.
type Manager interface {
	// Check refuses a linux.cgroupsPath that the manager can not read, with an
	// error of kind InvalidArgument.
	Check(path string) error
	// Create makes the cgroup at path (linux.cgroupsPath) with limits and device
	// rules; see Host.Create. When the cgroup's NeedsProcess says so, nothing is
	// there until its Adopt.
	Create(path string, r *specs.LinuxResources) (c *Cgroup, warnings []string, err error)
	// Open returns the cgroup that Create made for path, as it is.
	Open(path string) (*Cgroup, error)
	// Reopen is Open for another process than the one that called Create: dirs
	// are what Paths of the cgroup said.
	Reopen(path string, dirs map[string]string) (*Cgroup, error)
}

// Controller is one mounted cgroup v1 hierarchy.
type Controller struct {
	Names []string // "cpu", "cpuacct"; "name=systemd" for a named one
	Mount string   // absolute path of its mount point
}

// Has reports whether the hierarchy carries the controller name.
func (c Controller) Has(name string) bool { return slices.Contains(c.Names, name) }

// Host is the machine's cgroup mounts. With any v1 controller mounted (a
// "hybrid" host too) limits live in v1; Unified alone is cgroup v2.
type Host struct {
	V1      []Controller
	Unified string // mount point of cgroup v2, "" if there is none
}

var _ Manager = (*Host)(nil)

// V2 reports whether the host's controllers are those of cgroup v2.
func (h *Host) V2() bool { return len(h.V1) == 0 }

// Hybrid reports whether the host has v1 controllers and the v2 hierarchy.
func (h *Host) Hybrid() bool { return len(h.V1) > 0 && h.Unified != "" }

// Detect reads the cgroup mounts of the calling process.
func Detect() (*Host, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cgroup mounts: %w", err)
	}
	defer f.Close()
	h, err := parseMountinfo(f)
	if err != nil {
		return nil, err
	}
	h.dropHidden()
	if len(h.V1) == 0 && h.Unified == "" {
		return nil, fmt.Errorf("cgroup mounts: no cgroup filesystem is mounted: %w", errdefs.ErrFailedPrecondition)
	}
	return h, nil
}

// dropHidden leaves out mounts that something else was mounted over.
func (h *Host) dropHidden() {
	shows := func(mount string, magic int64) bool {
		var fs unix.Statfs_t
		return unix.Statfs(mount, &fs) == nil && int64(fs.Type) == magic
	}
	h.V1 = slices.DeleteFunc(h.V1, func(c Controller) bool { return !shows(c.Mount, unix.CGROUP_SUPER_MAGIC) })
	if h.Unified != "" && !shows(h.Unified, unix.CGROUP2_SUPER_MAGIC) {
		h.Unified = ""
	}
}

// flagsOfV1 are super options of a cgroup v1 mount that name no controller.
var flagsOfV1 = []string{"rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "none"}

func parseMountinfo(r io.Reader) (*Host, error) {
	h := &Host{}
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		left, right, ok := strings.Cut(sc.Text(), " - ")
		l, f := strings.Fields(left), strings.Fields(right)
		// Binds of a sub-cgroup (root not "/") are some container's view.
		if !ok || len(l) < 5 || len(f) < 3 || l[3] != "/" {
			continue
		}
		mount := unescape(l[4])
		switch f[0] {
		case "cgroup2":
			if h.Unified == "" {
				h.Unified = mount
			}
		case "cgroup":
			c := Controller{Mount: mount}
			for o := range strings.SplitSeq(f[2], ",") {
				if slices.Contains(flagsOfV1, o) || strings.HasPrefix(o, "release_agent=") || strings.HasPrefix(o, "seclabel") {
					continue
				}
				c.Names = append(c.Names, o)
			}
			known := slices.ContainsFunc(h.V1, func(x Controller) bool { return slices.Equal(x.Names, c.Names) })
			if len(c.Names) > 0 && !known {
				h.V1 = append(h.V1, c)
			}
		}
	}
	return h, sc.Err()
}

// unescape undoes mountinfo's octal escapes.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// Clean checks a cgroups path of a spec and returns it without needless slashes.
// An absolute path lies below the root of each hierarchy. A relative one lies
// below the caller's own cgroup in each v1 hierarchy, and beside it on v2, where
// a cgroup with processes can not hand controllers down (as runc chooses;
// runtime-spec, "Cgroups Path").
func Clean(p string) (string, error) {
	c := path.Clean("/" + p)
	if p == "" || c == "/" || strings.Contains(p, ":") || slices.Contains(strings.Split(p, "/"), "..") {
		return "", fmt.Errorf("linux.cgroupsPath %q: want a path such as \"/pod/container\" below the cgroup root: %w", p, errdefs.ErrInvalidArgument)
	}
	if p[0] != '/' {
		return c[1:], nil
	}
	return c, nil
}

// Check implements Manager.
func (h *Host) Check(path string) error {
	_, err := Clean(path)
	return err
}

// at returns the cgroup of a cleaned path.
func (h *Host) at(p string) (*Cgroup, error) {
	c := &Cgroup{host: h, path: p}
	base := func(Controller) (string, error) { return "/", nil }
	if p[0] != '/' {
		own, err := readFile("/proc/self/cgroup")
		if err != nil {
			return nil, fmt.Errorf("linux.cgroupsPath %q: relative: %w", p, err)
		}
		base = func(d Controller) (string, error) { return ownCgroup(own, d, h.V2()) }
	}
	for _, d := range h.hierarchies() {
		b, err := base(d)
		if err != nil {
			return nil, fmt.Errorf("linux.cgroupsPath %q: relative: %w", p, err)
		}
		rel := path.Join(b, p)[1:]
		c.dirs = append(c.dirs, dir{Controller: d, rel: rel, path: filepath.Join(d.Mount, rel)})
	}
	return c, nil
}

// hierarchies lists where a container has a directory; the v2 one has no names.
func (h *Host) hierarchies() []Controller {
	if h.Unified == "" {
		return h.V1
	}
	return append(slices.Clip(h.V1), Controller{Mount: h.Unified})
}

// ownCgroup reads, from the text of /proc/self/cgroup, where a relative path
// starts in a hierarchy.
func ownCgroup(text string, d Controller, v2 bool) (string, error) {
	for line := range strings.Lines(text) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		own := f[2]
		if d.unified() && f[0] == "0" && f[1] == "" {
			if v2 {
				own = path.Dir(own)
			}
		} else if f[1] == "" || !d.Has(strings.Split(f[1], ",")[0]) {
			continue
		}
		if slices.Contains(strings.Split(own, "/"), "..") || !strings.HasPrefix(own, "/") {
			return "", fmt.Errorf("own cgroup %q lies outside of the mount %s: give an absolute path: %w", own, d.Mount, errdefs.ErrFailedPrecondition)
		}
		return own, nil
	}
	return "", fmt.Errorf("own cgroup in %s: not listed: %w", d.Mount, errdefs.ErrFailedPrecondition)
}

// unified reports whether this is the hierarchy of cgroup v2.
func (c Controller) unified() bool { return len(c.Names) == 0 }
