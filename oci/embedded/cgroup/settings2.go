package cgroup

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// settingsV2 turns limits into file writes of cgroup v2.
func settingsV2(r *specs.LinuxResources) ([]setting, []string, error) {
	k := &collector{}
	if r.Memory != nil {
		memoryV2(k, r.Memory)
	}
	if r.CPU != nil {
		cpuV2(k, r.CPU)
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		k.add("pids.limit", "", "pids.max", tasks(*p.Limit))
	}
	k.hugepages(r.HugepageLimits, ".max")
	if r.BlockIO != nil {
		blockV2(k, r.BlockIO)
	}
	if n := r.Network; n != nil && n.ClassID != nil {
		k.refuse(errdefs.ErrInvalidArgument, "network.classID", "cgroup v2 has no network classes; remove the field and match the cgroup in the packet filter")
	} else if n != nil && len(n.Priorities) > 0 {
		k.refuse(errdefs.ErrInvalidArgument, "network.priorities", "cgroup v2 has no network priorities; remove the field")
	}
	k.rdma(r.Rdma)
	for _, key := range slices.Sorted(maps.Keys(r.Unified)) {
		unified(k, key, r.Unified[key])
	}
	return k.out, k.warnings, k.err
}

func memoryV2(k *collector, m *specs.LinuxMemory) {
	if set(m.Limit) {
		k.add("memory.limit", "", "memory.max", maxOr(*m.Limit))
	}
	if v, ok, err := SwapV2(m); err != nil {
		k.err = err
	} else if ok {
		s := k.add("memory.swap", "", "memory.swap.max", maxOr(v))
		if s.lacking = "this kernel does not account swap"; v <= 0 {
			s.quiet, s.lacking = true, "" // no swap at all, or no limit on none
		}
	}
	if set(m.Reservation) {
		k.add("memory.reservation", "", "memory.low", maxOr(*m.Reservation))
	}
	if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
		k.warn("memory.disableOOMKiller", "not in cgroup v2")
	}
	if set(m.Kernel) { //nolint:staticcheck // SA1019: the spec has the field still
		k.warn("memory.kernel", "not in cgroup v2, where memory.limit covers kernel memory")
	}
	if set(m.KernelTCP) {
		k.warn("memory.kernelTCP", "not in cgroup v2, where memory.limit covers TCP memory")
	}
	if k.swappiness(m) {
		k.warn("memory.swappiness", "not in cgroup v2")
	}
	if m.UseHierarchy != nil && !*m.UseHierarchy {
		k.warn("memory.useHierarchy", "cgroup v2 always accounts memory with that of the parents")
	}
}

// SwapV2 returns the limit on swap alone, in bytes, -1 for none, that memory.limit
// and memory.swap of a spec, which counts memory and swap together, come to. ok
// tells that there is one.
func SwapV2(m *specs.LinuxMemory) (v int64, ok bool, err error) {
	unlimited := m.Limit != nil && *m.Limit < 0
	switch {
	case !set(m.Swap):
		return -1, unlimited, nil // no limit on memory is none on memory and swap
	case *m.Swap < 0:
		return -1, true, nil
	case unlimited:
		return *m.Swap, true, nil
	case !set(m.Limit) || *m.Swap < *m.Limit:
		return 0, false, fmt.Errorf("linux.resources.memory.swap %d: want at least memory.limit, which must be set: %w", *m.Swap, errdefs.ErrInvalidArgument)
	}
	return *m.Swap - *m.Limit, true, nil
}

func cpuV2(k *collector, c *specs.LinuxCPU) {
	idle := k.idle(c)
	if idle == "0" { // first: the kernel takes no weight while the cgroup is idle
		k.without(noIdle, "cpu.idle", "", "cpu.idle", idle)
	}
	if set(c.Shares) && idle != "1" {
		k.add("cpu.shares", "", "cpu.weight", num(Weight(*c.Shares)))
	}
	quota, period := "", ""
	if set(c.Quota) {
		quota = maxOr(*c.Quota)
	}
	if set(c.Period) {
		period = num(*c.Period)
	}
	switch {
	case quota != "" && period != "":
		k.add("cpu.quota", "", "cpu.max", quota+" "+period)
	case quota != "":
		k.add("cpu.quota", "", "cpu.max", quota) // the kernel keeps the period
	case period != "":
		k.add("cpu.period", "", "cpu.max", "max "+period).merge = func(now string) string {
			q, _, _ := strings.Cut(now, " ")
			return q + " " + period
		}
	}
	if c.Burst != nil {
		k.without(noBurst, "cpu.burst", "", "cpu.max.burst", num(*c.Burst))
	}
	if set(c.RealtimePeriod) {
		k.refuse(errdefs.ErrInvalidArgument, "cpu.realtimePeriod", "cgroup v2 has no realtime limits; remove the field")
	}
	if set(c.RealtimeRuntime) {
		k.refuse(errdefs.ErrInvalidArgument, "cpu.realtimeRuntime", "cgroup v2 has no realtime limits; remove the field")
	}
	if idle == "1" {
		k.without(noIdle, "cpu.idle", "", "cpu.idle", idle)
	}
	if c.Cpus != "" {
		k.add("cpu.cpus", "", "cpuset.cpus", c.Cpus)
	}
	if c.Mems != "" {
		k.add("cpu.mems", "", "cpuset.mems", c.Mems)
	}
}

func blockV2(k *collector, b *specs.LinuxBlockIO) {
	weight := func(field, key, bfq, io string) {
		s := k.add(field, "", "io.bfq.weight", bfq)
		s.alt, s.altValue, s.lacking = "io.weight", io, "no block scheduler with weights"
		if s.key, s.unset = key, "default"; key == "default" {
			s.unset = ""
		}
	}
	if k.checkWeight("blockIO.weight", b.Weight) {
		weight("blockIO.weight", "default", num(*b.Weight), num(IOWeight(*b.Weight)))
	}
	if set(b.LeafWeight) {
		k.warn("blockIO.leafWeight", "not in cgroup v2")
	}
	for i, d := range b.WeightDevice {
		field, key := fmt.Sprintf("blockIO.weightDevice[%d]", i), device(d.Major, d.Minor)
		if k.checkWeight(field+".weight", d.Weight) {
			weight(field+".weight", key, key+" "+num(*d.Weight), key+" "+num(IOWeight(*d.Weight)))
		}
		if set(d.LeafWeight) {
			k.warn(field+".leafWeight", "not in cgroup v2")
		}
	}
	throttles(b, func(field, key string, rate uint64, _, name string) {
		s := k.add(field, "", "io.max", key+" "+name+"="+num(rate))
		s.key, s.unset = key, "rbps=max wbps=max riops=max wiops=max"
	})
}

// core are files of every v2 cgroup that are limits; the others administer it.
var core = []string{"cgroup.max.depth", "cgroup.max.descendants"}

// unified adds a file of cgroup v2 by name. A value of several lines is for a
// file that takes one line for each device, one in a write.
func unified(k *collector, key, value string) {
	if strings.ContainsAny(key, "/\x00") || strings.Index(key, ".") <= 0 || strings.HasPrefix(key, "cgroup.") && !slices.Contains(core, key) {
		k.refuse(errdefs.ErrInvalidArgument, "unified", "%q is no limit of cgroup v2", key)
		return
	}
	for line := range strings.Lines(strings.TrimSpace(value)) {
		line = strings.TrimSpace(line)
		s := k.add("unified["+key+"]", "", key, line)
		f := strings.Fields(line)
		if len(f) > 1 && strings.Contains(line, "=") { // "8:16 rbps=1", "mlx4_0 hca_handle=2"
			s.key = f[0]
			if key == "io.max" {
				s.unset = "rbps=max wbps=max riops=max wiops=max"
			}
		}
	}
}
