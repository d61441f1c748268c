package cgroup

import (
	"fmt"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// settingsV1 turns limits into file writes of cgroup v1.
func (h *Host) settingsV1(r *specs.LinuxResources) ([]setting, []string, error) {
	k := &collector{}
	if len(r.Unified) > 0 {
		k.refuse(errdefs.ErrInvalidArgument, "unified", "this host has cgroup v1; remove the field")
	}
	if r.Memory != nil {
		h.memoryV1(k, r.Memory)
	}
	if r.CPU != nil {
		cpuV1(k, r.CPU)
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		k.add("pids.limit", "pids", "pids.max", tasks(*p.Limit))
	}
	k.hugepages(r.HugepageLimits, ".limit_in_bytes")
	if r.BlockIO != nil {
		blockV1(k, r.BlockIO)
	}
	if n := r.Network; n != nil {
		if n.ClassID != nil {
			k.add("network.classID", "net_cls", "net_cls.classid", num(*n.ClassID))
		}
		for i, p := range n.Priorities {
			k.add(fmt.Sprintf("network.priorities[%d]", i), "net_prio", "net_prio.ifpriomap", p.Name+" "+num(p.Priority)).key = p.Name
		}
	}
	k.rdma(r.Rdma)
	return k.out, k.warnings, k.err
}

func (h *Host) memoryV1(k *collector, m *specs.LinuxMemory) {
	const noSwap = "this kernel does not account swap"
	if u := m.UseHierarchy; u != nil {
		if *u {
			k.without("this kernel knows no other way", "memory.useHierarchy", "memory", "memory.use_hierarchy", "1")
		} else {
			k.warn("memory.useHierarchy", "memory is accounted with that of the parents, which kernels no longer let one choose")
		}
	}
	if set(m.Limit) {
		k.add("memory.limit", "memory", "memory.limit_in_bytes", num(*m.Limit))
	}
	switch {
	case set(m.Swap):
		if h.hasFile("memory", "memory.memsw.limit_in_bytes") {
			k.add("memory.swap", "memory", "memory.memsw.limit_in_bytes", num(*m.Swap))
		} else {
			k.warn("memory.swap", noSwap)
		}
	case m.Limit != nil && *m.Limit < 0:
		// No limit on memory is none on memory and swap.
		k.add("memory.limit", "memory", "memory.memsw.limit_in_bytes", "-1").quiet = true
	}
	if set(m.Reservation) {
		k.add("memory.reservation", "memory", "memory.soft_limit_in_bytes", num(*m.Reservation))
	}
	if kernel := kernelMemory(m); set(kernel) {
		k.without("this kernel has no limit on kernel memory", "memory.kernel", "memory", "memory.kmem.limit_in_bytes", num(*kernel))
	}
	if set(m.KernelTCP) {
		k.without("this kernel has no limit on TCP memory", "memory.kernelTCP", "memory", "memory.kmem.tcp.limit_in_bytes", num(*m.KernelTCP))
	}
	if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
		k.add("memory.disableOOMKiller", "memory", "memory.oom_control", "1")
	}
	if k.swappiness(m) {
		k.without("this kernel has no swappiness of a cgroup's own", "memory.swappiness", "memory", "memory.swappiness", num(*m.Swappiness))
	}
}

// kernelMemory is a field that the spec has and advises against.
func kernelMemory(m *specs.LinuxMemory) *int64 {
	return m.Kernel //lint:ignore SA1019 who sets it gets it, or a warning
}

// swappiness reports whether there is one; all bits set is "not set", too.
func (k *collector) swappiness(m *specs.LinuxMemory) bool {
	if m.Swappiness == nil || int64(*m.Swappiness) == -1 {
		return false
	}
	if *m.Swappiness > 100 {
		k.refuse(errdefs.ErrInvalidArgument, "memory.swappiness", "%d: want 0 to 100", *m.Swappiness)
		return false
	}
	return true
}

func cpuV1(k *collector, c *specs.LinuxCPU) {
	idle := k.idle(c)
	if idle == "0" { // first: the kernel takes no shares while the cgroup is idle
		k.without(noIdle, "cpu.idle", "cpu", "cpu.idle", idle)
	}
	if set(c.Shares) && idle != "1" {
		k.add("cpu.shares", "cpu", "cpu.shares", num(*c.Shares))
	}
	if set(c.Period) {
		k.add("cpu.period", "cpu", "cpu.cfs_period_us", num(*c.Period))
	}
	if set(c.Quota) {
		k.add("cpu.quota", "cpu", "cpu.cfs_quota_us", num(*c.Quota))
	}
	if c.Burst != nil {
		k.without(noBurst, "cpu.burst", "cpu", "cpu.cfs_burst_us", num(*c.Burst))
	}
	if set(c.RealtimePeriod) {
		k.add("cpu.realtimePeriod", "cpu", "cpu.rt_period_us", num(*c.RealtimePeriod))
	}
	if set(c.RealtimeRuntime) {
		k.add("cpu.realtimeRuntime", "cpu", "cpu.rt_runtime_us", num(*c.RealtimeRuntime))
	}
	if idle == "1" {
		k.without(noIdle, "cpu.idle", "cpu", "cpu.idle", idle)
	}
	if c.Cpus != "" {
		k.add("cpu.cpus", "cpuset", "cpuset.cpus", c.Cpus)
	}
	if c.Mems != "" {
		k.add("cpu.mems", "cpuset", "cpuset.mems", c.Mems)
	}
}

const (
	noIdle  = "this kernel has no idle cgroups (Linux 5.15)"
	noBurst = "this kernel has no CPU bursts (Linux 5.14)"
)

// idle returns the value of cpu.idle, "" where there is none. An idle cgroup has
// the smallest weight there is, and the kernel refuses another.
func (k *collector) idle(c *specs.LinuxCPU) string {
	if c.Idle == nil {
		return ""
	}
	if *c.Idle != 0 && *c.Idle != 1 {
		k.refuse(errdefs.ErrInvalidArgument, "cpu.idle", "%d: want 0 or 1", *c.Idle)
		return ""
	}
	if *c.Idle == 1 && set(c.Shares) {
		k.warn("cpu.shares", "without effect: cpu.idle is 1")
	}
	return num(*c.Idle)
}

func blockV1(k *collector, b *specs.LinuxBlockIO) {
	const noWeight = "no block scheduler with weights"
	weight := func(field, file, bfq, key, value string) {
		s := k.add(field, "blkio", file, value)
		s.alt, s.altValue, s.lacking = bfq, value, noWeight
		if key != "" {
			s.key, s.unset = key, "0"
		}
	}
	if k.checkWeight("blockIO.weight", b.Weight) {
		weight("blockIO.weight", "blkio.weight", "blkio.bfq.weight", "", num(*b.Weight))
	}
	if k.checkWeight("blockIO.leafWeight", b.LeafWeight) {
		k.without(noWeight, "blockIO.leafWeight", "blkio", "blkio.leaf_weight", num(*b.LeafWeight))
	}
	for i, d := range b.WeightDevice {
		field, key := fmt.Sprintf("blockIO.weightDevice[%d]", i), device(d.Major, d.Minor)
		if k.checkWeight(field+".weight", d.Weight) {
			weight(field+".weight", "blkio.weight_device", "blkio.bfq.weight_device", key, key+" "+num(*d.Weight))
		}
		if k.checkWeight(field+".leafWeight", d.LeafWeight) {
			weight(field+".leafWeight", "blkio.leaf_weight_device", "", key, key+" "+num(*d.LeafWeight))
		}
	}
	throttles(b, func(field, key string, rate uint64, file, _ string) {
		s := k.add(field, "blkio", file, key+" "+num(rate))
		s.key, s.unset = key, "0"
	})
}
