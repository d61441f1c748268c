package stats

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
)

// Hierarchies says where cgroup hierarchies are mounted. Unified is set on a
// host whose controllers are all on cgroup v2; otherwise V1 maps a v1 controller
// ("cpuacct", "memory", "pids") to its mount point.
type Hierarchies struct {
	Unified string
	V1      map[string]string
}

// FindHierarchies reads the mount table of this process. A host with a v1 memory
// controller is a v1 host, also when a v2 hierarchy is mounted beside it (hybrid).
func FindHierarchies() (Hierarchies, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "cgroup" && m.FSType != "cgroup2", false
	})
	if err != nil {
		return Hierarchies{}, fmt.Errorf("mount table: %w", err)
	}
	return hierarchies(mounts)
}

func hierarchies(mounts []*mountinfo.Info) (Hierarchies, error) {
	h := Hierarchies{V1: map[string]string{}}
	unified := ""
	for _, m := range mounts {
		if m.Root != "/" { // a bind of a part: its paths are not those of the hierarchy
			continue
		}
		if m.FSType == "cgroup2" {
			if unified == "" {
				unified = m.Mountpoint
			}
			continue
		}
		for o := range strings.SplitSeq(m.VFSOptions, ",") {
			switch o {
			case "cpuacct", "memory", "pids":
				if h.V1[o] == "" {
					h.V1[o] = m.Mountpoint
				}
			}
		}
	}
	switch {
	case h.V1["memory"] != "" && h.V1["cpuacct"] != "":
		return h, nil
	case unified != "":
		return Hierarchies{Unified: unified}, nil
	}
	return Hierarchies{}, fmt.Errorf("cgroups: neither cgroup v2 nor the v1 controllers cpuacct and memory are mounted; mount cgroup2 on /sys/fs/cgroup: %w", errdefs.ErrFailedPrecondition)
}
