package spec

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/apparmor"
	"github.com/moby/sys/capability"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"
)

// DefaultAppArmorProfile is the name of the profile behind RuntimeDefault.
const DefaultAppArmorProfile = "berth-default"

// Host is what the node can do; it does not change while the daemon runs.
type Host struct {
	CgroupV2 bool // all controllers are on cgroup v2
	Seccomp  bool
	SELinux  bool
	// AppArmor says that the kernel confines with AppArmor, and AppArmorDefault
	// that the default profile is loaded.
	AppArmor, AppArmorDefault bool
	// RecursiveReadonly says that mount_setattr(2) exists (Linux 5.12).
	RecursiveReadonly bool
	// SwapController says that memory and swap can be limited together.
	SwapController bool
	// Capabilities is the bounding set of the daemon ("CAP_CHOWN"): nobody can get
	// more from it.
	Capabilities []string
	// HugepageSizes are the sizes that the hugetlb controller can limit ("2MB").
	HugepageSizes []string
	// MinOOMScoreAdj is the lowest oom_score_adj that the daemon may set.
	MinOOMScoreAdj int
}

// ProbeHost asks the kernel what this node can do, and loads the default
// AppArmor profile where AppArmor is on. One that cannot be loaded is not an
// error here: containers that ask for it get one.
func ProbeHost() (Host, error) {
	h := Host{
		Seccomp:           exists("/proc/sys/kernel/seccomp/actions_avail"),
		SELinux:           selinux.GetEnabled(),
		RecursiveReadonly: !errors.Is(unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{}), unix.ENOSYS),
	}
	if b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err == nil && bytes.HasPrefix(b, []byte("Y")) {
		h.AppArmor = true
		loaded, err := apparmor.IsLoaded(DefaultAppArmorProfile)
		h.AppArmorDefault = (err == nil && loaded) || apparmor.InstallDefault(DefaultAppArmorProfile) == nil
	}
	var err error
	if h.Capabilities, err = boundingSet(); err != nil {
		return Host{}, err
	}
	if err := h.probeCgroups(); err != nil {
		return Host{}, err
	}
	h.MinOOMScoreAdj = -1000
	if !slices.Contains(h.Capabilities, "CAP_SYS_RESOURCE") {
		// oom_score_adj_min is what a lowering is measured against; the value that the
		// daemon runs with is never below it.
		b, err := os.ReadFile("/proc/self/oom_score_adj")
		if err != nil {
			return Host{}, fmt.Errorf("oom score: %w", err)
		}
		if h.MinOOMScoreAdj, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			return Host{}, fmt.Errorf("oom score: %w", err)
		}
	}
	return h, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func boundingSet() ([]string, error) {
	all, err := capability.ListSupported()
	if err != nil {
		return nil, fmt.Errorf("capabilities of the kernel: %w", err)
	}
	var out []string
	for _, c := range all {
		ok, err := capability.GetBound(c)
		if err != nil {
			return nil, fmt.Errorf("capability bounding set: %w", err)
		}
		if ok {
			out = append(out, "CAP_"+strings.ToUpper(c.String()))
		}
	}
	return out, nil
}

func (h *Host) probeCgroups() error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (bool, bool) {
		return (m.FSType != "cgroup" && m.FSType != "cgroup2") || m.Root != "/", false
	})
	if err != nil {
		return fmt.Errorf("mount table: %w", err)
	}
	v1 := map[string]string{}
	unified := ""
	for _, m := range mounts {
		if m.FSType == "cgroup2" {
			unified = m.Mountpoint
			continue
		}
		for o := range strings.SplitSeq(m.VFSOptions, ",") {
			v1[o] = m.Mountpoint
		}
	}
	switch {
	case v1["memory"] != "":
		h.SwapController = exists(filepath.Join(v1["memory"], "memory.memsw.limit_in_bytes"))
	case unified != "":
		h.CgroupV2 = true
		h.SwapController = swapOnV2(unified)
	default:
		return fmt.Errorf("cgroups: neither cgroup v2 nor the v1 memory controller is mounted; mount cgroup2 on /sys/fs/cgroup: %w", errdefs.ErrFailedPrecondition)
	}
	hugetlb := v1["hugetlb"] != ""
	if h.CgroupV2 {
		b, err := os.ReadFile(filepath.Join(unified, "cgroup.controllers"))
		if err != nil {
			return fmt.Errorf("cgroups: %w", err)
		}
		hugetlb = slices.Contains(strings.Fields(string(b)), "hugetlb")
	}
	if hugetlb {
		h.HugepageSizes = hugepageSizes("/sys/kernel/mm/hugepages")
	}
	return nil
}

// swapOnV2 looks into the children of the root, which has no limit files itself.
// Before any of them has the memory controller, the kernel's having swap decides:
// on v2 it is accounted unless switched off at boot.
func swapOnV2(root string) bool {
	limits, _ := filepath.Glob(filepath.Join(root, "*", "memory.max")) // the error is of a bad pattern, and this is a good one
	if len(limits) == 0 {
		return exists("/proc/swaps")
	}
	return exists(filepath.Join(filepath.Dir(limits[0]), "memory.swap.max"))
}

// hugepageSizes reads directory names such as hugepages-2048kB.
func hugepageSizes(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // no huge pages in this kernel
	}
	var out []string
	for _, e := range entries {
		kb, ok := strings.CutSuffix(strings.TrimPrefix(e.Name(), "hugepages-"), "kB")
		n, err := strconv.ParseUint(kb, 10, 32)
		if !ok || err != nil {
			continue
		}
		out = append(out, pageSizeName(n<<10))
	}
	return out
}

// pageSizeName writes a size as the hugetlb controller's files do ("2MB").
func pageSizeName(n uint64) string {
	units := []string{"B", "KB", "MB", "GB", "TB"}
	i := 0
	for n >= 1024 && n%1024 == 0 && i < len(units)-1 {
		n, i = n/1024, i+1
	}
	return strconv.FormatUint(n, 10) + units[i]
}
