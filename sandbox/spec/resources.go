package spec

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/sandbox/model"
)

func resources(in Input, s *specs.Spec) error {
	r, err := limits(in.Container.Resources, model.Resources{}, in.Policy, in.Host)
	if err != nil {
		return err
	}
	if n := in.Policy.PidsLimit; n > 0 {
		r.Pids = &specs.LinuxPids{Limit: &n}
	}
	s.Linux.Resources = r
	return nil
}

// UpdateResources returns the change that an update asks for: fields that are
// unset in update stay unset, and the runtime keeps what they limit. current is
// what the container has; it decides whether the swap limit follows the memory limit.
func UpdateResources(update, current model.Resources, p Policy, h Host) (*specs.LinuxResources, error) {
	return limits(update, current, p, h)
}

func limits(r, current model.Resources, p Policy, h Host) (*specs.LinuxResources, error) {
	out := &specs.LinuxResources{}
	var err error
	if out.CPU, err = cpuLimits(r); err != nil {
		return nil, err
	}
	if out.Memory, err = memoryLimits(r, current, h); err != nil {
		return nil, err
	}
	if out.HugepageLimits, err = hugepageLimits(r.Hugepages, p, h); err != nil {
		return nil, err
	}
	if out.Unified, err = unified(r.Unified, h); err != nil {
		return nil, err
	}
	return out, nil
}

func cpuLimits(r model.Resources) (*specs.LinuxCPU, error) {
	switch {
	case r.CPUShares < 0:
		return nil, fmt.Errorf("resources.cpu_shares %d: negative; use 2 or more: %w", r.CPUShares, errdefs.ErrInvalidArgument)
	case r.CPUPeriod < 0:
		return nil, fmt.Errorf("resources.cpu_period %d: negative; use 1000 to 1000000 microseconds: %w", r.CPUPeriod, errdefs.ErrInvalidArgument)
	case r.CPUQuota < -1:
		return nil, fmt.Errorf("resources.cpu_quota %d: below -1; use -1 for no limit: %w", r.CPUQuota, errdefs.ErrInvalidArgument)
	}
	for field, set := range map[string]string{"cpuset_cpus": r.CpusetCpus, "cpuset_mems": r.CpusetMems} {
		if strings.Trim(set, "0123456789,- ") != "" {
			return nil, fmt.Errorf("resources.%s %q: not a list such as 0-3,7: %w", field, set, errdefs.ErrInvalidArgument)
		}
	}
	c := specs.LinuxCPU{Cpus: r.CpusetCpus, Mems: r.CpusetMems}
	if r.CPUShares > 0 {
		n := uint64(r.CPUShares)
		c.Shares = &n
	}
	if r.CPUPeriod > 0 {
		n := uint64(r.CPUPeriod)
		c.Period = &n
	}
	if r.CPUQuota != 0 {
		c.Quota = &r.CPUQuota
	}
	if c == (specs.LinuxCPU{}) {
		return nil, nil
	}
	return &c, nil
}

// memoryLimits makes memory plus swap follow the memory limit when the request
// says nothing of swap: otherwise a limited container would get as much swap
// again. On a host that cannot limit swap a swap limit is not an error.
func memoryLimits(r, current model.Resources, h Host) (*specs.LinuxMemory, error) {
	switch {
	case r.MemoryLimit < -1:
		return nil, fmt.Errorf("resources.memory_limit_in_bytes %d: below -1; use -1 for no limit: %w", r.MemoryLimit, errdefs.ErrInvalidArgument)
	case r.SwapLimit < -1:
		return nil, fmt.Errorf("resources.memory_swap_limit_in_bytes %d: below -1; use -1 for no limit: %w", r.SwapLimit, errdefs.ErrInvalidArgument)
	case r.SwapLimit > 0 && r.SwapLimit < r.MemoryLimit:
		return nil, fmt.Errorf("resources.memory_swap_limit_in_bytes %d: below memory_limit_in_bytes %d, and counts memory and swap together: %w", r.SwapLimit, r.MemoryLimit, errdefs.ErrInvalidArgument)
	}
	if r.MemoryLimit == 0 && (r.SwapLimit == 0 || !h.SwapController) {
		return nil, nil
	}
	m := &specs.LinuxMemory{}
	if r.MemoryLimit != 0 {
		m.Limit = &r.MemoryLimit
	}
	if !h.SwapController {
		return m, nil
	}
	const swapFile = "memory.swap.max"
	_, inUpdate := r.Unified[swapFile]
	_, before := current.Unified[swapFile]
	switch {
	case r.SwapLimit != 0:
		m.Swap = &r.SwapLimit
	case m.Limit != nil && current.SwapLimit == 0 && !inUpdate && !before:
		m.Swap = &r.MemoryLimit
	}
	return m, nil
}

// hugepageLimits merges repeated sizes (the last one wins). The kubelet sends an
// entry for every page size of the node, so zeros are dropped where there is
// nothing to limit.
func hugepageLimits(in []model.HugepageLimit, p Policy, h Host) ([]specs.LinuxHugepageLimit, error) {
	var out []specs.LinuxHugepageLimit
	for i, l := range in {
		size := l.PageSize
		if num := strings.TrimRight(size, "KMGTB"); num == "" || num == size || strings.Trim(num, "0123456789") != "" {
			return nil, fmt.Errorf("resources.hugepage_limits[%d].page_size %q: not a size such as 2MB: %w", i, size, errdefs.ErrInvalidArgument)
		}
		if !slices.Contains(h.HugepageSizes, size) {
			if l.Limit == 0 || p.TolerateMissingHugetlb {
				continue
			}
			return nil, fmt.Errorf("resources.hugepage_limits[%d]: this node cannot limit pages of %s; enable the hugetlb cgroup controller, or tolerate its absence: %w", i, size, errdefs.ErrFailedPrecondition)
		}
		at := slices.IndexFunc(out, func(o specs.LinuxHugepageLimit) bool { return o.Pagesize == size })
		if at < 0 {
			at = len(out)
			out = append(out, specs.LinuxHugepageLimit{Pagesize: size})
		}
		out[at].Limit = l.Limit
	}
	return out, nil
}

// unified copies cgroup v2 keys. Those of the cgroup core are refused: they
// move processes and delegate, and are no limits.
func unified(in map[string]string, h Host) (map[string]string, error) {
	if len(in) == 0 {
		return nil, nil
	}
	if !h.CgroupV2 {
		return nil, fmt.Errorf("resources.unified: this node uses cgroup v1, which has no such keys; leave it empty: %w", errdefs.ErrInvalidArgument)
	}
	out := make(map[string]string, len(in))
	for k, v := range in {
		if controller, file, ok := strings.Cut(k, "."); !ok || controller == "" || file == "" || controller == "cgroup" || strings.ContainsAny(k, "/\x00") {
			return nil, fmt.Errorf("resources.unified %q: not a file of a cgroup v2 controller: %w", k, errdefs.ErrInvalidArgument)
		}
		out[k] = v
	}
	return out, nil
}
