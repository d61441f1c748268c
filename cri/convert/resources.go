package convert

import (
	"maps"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/sandbox"
)

// Resources reads resource limits. nil stays nil. field is the message's path.
func Resources(field string, r *runtimeapi.LinuxContainerResources) (*sandbox.Resources, error) {
	if r == nil {
		return nil, nil
	}
	if err := checkResources(field, r); err != nil {
		return nil, err
	}
	out := &sandbox.Resources{
		CPUPeriod:   r.CpuPeriod,
		CPUQuota:    r.CpuQuota,
		CPUShares:   r.CpuShares,
		MemoryLimit: r.MemoryLimitInBytes,
		SwapLimit:   r.MemorySwapLimitInBytes,
		OOMScoreAdj: r.OomScoreAdj,
		CpusetCpus:  r.CpusetCpus,
		CpusetMems:  r.CpusetMems,
		Unified:     maps.Clone(r.Unified),
	}
	for _, h := range r.HugepageLimits {
		out.Hugepages = append(out.Hugepages, sandbox.HugepageLimit{PageSize: h.GetPageSize(), Limit: h.GetLimit()})
	}
	return out, nil
}

func checkResources(field string, r *runtimeapi.LinuxContainerResources) error {
	switch {
	case r.CpuPeriod < 0:
		return invalid(field+".cpu_period", "%d is negative; use microseconds, or 0 for unset", r.CpuPeriod)
	case r.CpuQuota < -1:
		return invalid(field+".cpu_quota", "%d is below -1; use microseconds per period, -1 for unlimited or 0 for unset", r.CpuQuota)
	case r.CpuShares < 0:
		return invalid(field+".cpu_shares", "%d is negative; use 2 to 262144, or 0 for unset", r.CpuShares)
	case r.MemoryLimitInBytes < -1:
		return invalid(field+".memory_limit_in_bytes", "%d is negative; use bytes, or 0 for unset", r.MemoryLimitInBytes)
	case r.MemorySwapLimitInBytes < -1:
		return invalid(field+".memory_swap_limit_in_bytes", "%d is below -1; use bytes, -1 for unlimited or 0 for unset", r.MemorySwapLimitInBytes)
	case r.OomScoreAdj < -1000 || r.OomScoreAdj > 1000:
		return invalid(field+".oom_score_adj", "%d is outside -1000 to 1000", r.OomScoreAdj)
	}
	return nil
}

// ResourcesProto gives limits back as they were sent: an in-place resize is done
// when the kubelet reads the very values that it asked for.
func ResourcesProto(r *sandbox.Resources) *runtimeapi.LinuxContainerResources {
	out := &runtimeapi.LinuxContainerResources{
		CpuPeriod:              r.CPUPeriod,
		CpuQuota:               r.CPUQuota,
		CpuShares:              r.CPUShares,
		MemoryLimitInBytes:     r.MemoryLimit,
		MemorySwapLimitInBytes: r.SwapLimit,
		OomScoreAdj:            r.OOMScoreAdj,
		CpusetCpus:             r.CpusetCpus,
		CpusetMems:             r.CpusetMems,
		Unified:                r.Unified,
	}
	for _, h := range r.Hugepages {
		out.HugepageLimits = append(out.HugepageLimits, &runtimeapi.HugepageLimit{PageSize: h.PageSize, Limit: h.Limit})
	}
	return out
}
