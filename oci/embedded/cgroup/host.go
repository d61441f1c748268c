// Package cgroup makes and limits the cgroups of containers, through the file
// system interface of cgroup v1 and v2 alone.
//
// On v2 a process is born in its cgroup (clone3). On v1 the single-threaded
// child writes "0" to the tasks files it inherits: a write to cgroup.procs
// takes the kernel's threadgroup lock and waits for an RCU grace period,
// 7-11 ms on a quiet machine.
package cgroup

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

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

// V2 reports whether the host's controllers are those of cgroup v2.
func (h *Host) V2() bool { return len(h.V1) == 0 }

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
	if len(h.V1) == 0 && h.Unified == "" {
		return nil, fmt.Errorf("cgroup mounts: no cgroup filesystem is mounted: %w", errdefs.ErrFailedPrecondition)
	}
	return h, nil
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

// Clean checks a cgroups path of a spec and returns it relative, without "..".
func Clean(p string) (string, error) {
	c := path.Clean("/" + p)
	if p == "" || c == "/" || strings.Contains(p, ":") || slices.Contains(strings.Split(p, "/"), "..") {
		return "", fmt.Errorf("linux.cgroupsPath %q: want a path such as \"/pod/container\" below the cgroup root: %w", p, errdefs.ErrInvalidArgument)
	}
	return c[1:], nil
}
