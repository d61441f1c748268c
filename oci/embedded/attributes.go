package embedded

import (
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var schedPolicies = map[specs.LinuxSchedulerPolicy]uint32{
	specs.SchedOther: unix.SCHED_NORMAL, specs.SchedFIFO: unix.SCHED_FIFO, specs.SchedRR: unix.SCHED_RR,
	specs.SchedBatch: unix.SCHED_BATCH, specs.SchedIdle: unix.SCHED_IDLE, specs.SchedDeadline: unix.SCHED_DEADLINE,
}

var schedFlags = map[specs.LinuxSchedulerFlag]uint64{
	specs.SchedFlagResetOnFork: unix.SCHED_FLAG_RESET_ON_FORK, specs.SchedFlagReclaim: unix.SCHED_FLAG_RECLAIM,
	specs.SchedFlagDLOverrun: unix.SCHED_FLAG_DL_OVERRUN, specs.SchedFlagKeepPolicy: unix.SCHED_FLAG_KEEP_POLICY,
	specs.SchedFlagKeepParams: unix.SCHED_FLAG_KEEP_PARAMS, specs.SchedFlagUtilClampMin: unix.SCHED_FLAG_UTIL_CLAMP_MIN,
	specs.SchedFlagUtilClampMax: unix.SCHED_FLAG_UTIL_CLAMP_MAX,
}

// minDLRuntime is the shortest runtime of SCHED_DEADLINE in nanoseconds: the
// kernel counts in units of 1024.
const minDLRuntime = 1 << 10

// schedAttr returns the struct sched_attr of process.scheduler for
// sched_setattr(2). What the kernel would refuse on every host is an error here;
// what depends on the host (the limits of sched_deadline_period_*, a cgroup
// without real-time budget, utilization clamps) fails when it is set.
func schedAttr(p *specs.Scheduler) ([]byte, error) {
	policy, ok := schedPolicies[p.Policy]
	switch {
	case p.Policy == "":
		return nil, invalid("process.scheduler.policy: missing")
	case p.Policy == specs.SchedISO:
		return nil, invalid("process.scheduler.policy SCHED_ISO: a number that Linux reserves and has no scheduler for; use SCHED_RR or SCHED_FIFO")
	case !ok:
		return nil, invalid("process.scheduler.policy %q: unknown", p.Policy)
	case p.Nice < -20 || p.Nice > 19:
		// The kernel would take the nearest value and say nothing.
		return nil, invalid("process.scheduler.nice %d: want -20 to 19", p.Nice)
	case p.Priority < 0 || p.Priority > 99:
		return nil, invalid("process.scheduler.priority %d: want 0 to 99", p.Priority)
	}
	// The spec has no values for the utilization clamps, so their flags set zero.
	a := unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: policy, Nice: p.Nice, Priority: uint32(p.Priority),
		Runtime: p.Runtime, Deadline: p.Deadline, Period: p.Period,
	}
	for i, f := range p.Flags {
		v, ok := schedFlags[f]
		if !ok {
			return nil, invalid("process.scheduler.flags[%d] %q: unknown", i, f)
		}
		a.Flags |= v
	}
	// With these flags the kernel takes the policy or its parameters from the
	// process as it is, and judges the combination itself.
	if a.Flags&(unix.SCHED_FLAG_KEEP_POLICY|unix.SCHED_FLAG_KEEP_PARAMS) == 0 {
		if err := checkSchedParams(p); err != nil {
			return nil, err
		}
	}
	return bytesOf(&a), nil
}

func checkSchedParams(p *specs.Scheduler) error {
	realtime := p.Policy == specs.SchedFIFO || p.Policy == specs.SchedRR
	switch {
	case realtime && p.Priority == 0:
		return invalid("process.scheduler.priority 0: %s wants 1 to 99", p.Policy)
	case !realtime && p.Priority != 0:
		return invalid("process.scheduler.priority %d: %s has none; use nice, or SCHED_FIFO or SCHED_RR", p.Priority, p.Policy)
	}
	if p.Policy != specs.SchedDeadline {
		for _, v := range []struct {
			name  string
			value uint64
		}{{"runtime", p.Runtime}, {"deadline", p.Deadline}, {"period", p.Period}} {
			if v.value != 0 {
				return invalid("process.scheduler.%s %d: only for SCHED_DEADLINE", v.name, v.value)
			}
		}
		return nil
	}
	period, name := p.Period, "period"
	if period == 0 {
		period, name = p.Deadline, "deadline"
	}
	switch {
	case p.Deadline == 0:
		return invalid("process.scheduler.deadline 0: SCHED_DEADLINE wants the nanoseconds")
	case p.Runtime < minDLRuntime:
		return invalid("process.scheduler.runtime %d: want at least %d nanoseconds", p.Runtime, minDLRuntime)
	case p.Deadline < p.Runtime:
		return invalid("process.scheduler.deadline %d: below runtime %d", p.Deadline, p.Runtime)
	case period < p.Deadline:
		return invalid("process.scheduler.period %d: below deadline %d", period, p.Deadline)
	case period>>63 != 0:
		return invalid("process.scheduler.%s %d: want less than 2^63 nanoseconds", name, period)
	}
	return nil
}

var ioClasses = map[specs.IOPriorityClass]int{specs.IOPRIO_CLASS_RT: 1, specs.IOPRIO_CLASS_BE: 2, specs.IOPRIO_CLASS_IDLE: 3}

// ioClassShift is where ioprio_set(2) has the class.
const ioClassShift = 13

// ioPriority returns the value of process.ioPriority for ioprio_set(2).
func ioPriority(p *specs.LinuxIOPriority) (int, error) {
	class, ok := ioClasses[p.Class]
	if !ok {
		return 0, invalid("process.ioPriority.class %q: want IOPRIO_CLASS_RT, IOPRIO_CLASS_BE or IOPRIO_CLASS_IDLE", p.Class)
	}
	if p.Priority < 0 || p.Priority > 7 {
		return 0, invalid("process.ioPriority.priority %d: want 0 (highest) to 7", p.Priority)
	}
	return class<<ioClassShift | p.Priority, nil
}

var memoryModes = map[specs.MemoryPolicyModeType]int{
	specs.MpolDefault: unix.MPOL_DEFAULT, specs.MpolBind: unix.MPOL_BIND, specs.MpolInterleave: unix.MPOL_INTERLEAVE,
	specs.MpolWeightedInterleave: unix.MPOL_WEIGHTED_INTERLEAVE, specs.MpolPreferred: unix.MPOL_PREFERRED,
	specs.MpolPreferredMany: unix.MPOL_PREFERRED_MANY, specs.MpolLocal: unix.MPOL_LOCAL,
}

var memoryFlags = map[specs.MemoryPolicyFlagType]int{
	specs.MpolFNumaBalancing: unix.MPOL_F_NUMA_BALANCING, specs.MpolFRelativeNodes: unix.MPOL_F_RELATIVE_NODES,
	specs.MpolFStaticNodes: unix.MPOL_F_STATIC_NODES,
}

// The most a kernel can be built for on our architectures.
const (
	maxNodes = 1 << 10 // CONFIG_NODES_SHIFT
	maxCPUs  = 1 << 13 // CONFIG_NR_CPUS
)

// memoryPolicy returns the arguments of linux.memoryPolicy for set_mempolicy(2);
// mode has the flags in it. Whether the nodes exist and belong to the container's
// cpuset is for the kernel to say.
func memoryPolicy(p *specs.LinuxMemoryPolicy) (mode int, mask []byte, maxNode int, err error) {
	mode, ok := memoryModes[p.Mode]
	if !ok {
		return 0, nil, 0, invalid("linux.memoryPolicy.mode %q: unknown", p.Mode)
	}
	flags := 0
	for i, f := range p.Flags {
		v, ok := memoryFlags[f]
		if !ok {
			return 0, nil, 0, invalid("linux.memoryPolicy.flags[%d] %q: unknown", i, f)
		}
		flags |= v
	}
	const placed = unix.MPOL_F_STATIC_NODES | unix.MPOL_F_RELATIVE_NODES
	switch {
	case flags&placed == placed:
		return 0, nil, 0, invalid("linux.memoryPolicy.flags: MPOL_F_STATIC_NODES and MPOL_F_RELATIVE_NODES exclude each other")
	case flags&unix.MPOL_F_NUMA_BALANCING != 0 && mode != unix.MPOL_BIND && mode != unix.MPOL_PREFERRED_MANY:
		return 0, nil, 0, invalid("linux.memoryPolicy.flags: MPOL_F_NUMA_BALANCING is for MPOL_BIND and MPOL_PREFERRED_MANY, not %s", p.Mode)
	}
	none := strings.TrimSpace(p.Nodes) == ""
	switch mode {
	case unix.MPOL_DEFAULT, unix.MPOL_LOCAL:
		if !none {
			return 0, nil, 0, invalid("linux.memoryPolicy.nodes %q: %s takes none", p.Nodes, p.Mode)
		}
	case unix.MPOL_PREFERRED: // no nodes: the one the process runs on
	default:
		if none {
			return 0, nil, 0, invalid("linux.memoryPolicy.nodes: %s needs at least one", p.Mode)
		}
	}
	if none {
		if mode != unix.MPOL_DEFAULT && flags&placed != 0 {
			return 0, nil, 0, invalid("linux.memoryPolicy.flags: %s without nodes takes no flag about nodes", p.Mode)
		}
		return mode | flags, nil, 1, nil
	}
	if mask, err = bitList("linux.memoryPolicy.nodes", p.Nodes, maxNodes); err != nil {
		return 0, nil, 0, err
	}
	// The kernel reads one bit less than it is told.
	return mode | flags, mask, len(mask)*8 + 1, nil
}

// personalityOf returns the value of linux.personality for personality(2).
func personalityOf(p *specs.LinuxPersonality) (uintptr, error) {
	if len(p.Flags) > 0 {
		return 0, invalid("linux.personality.flags[0] %q: unknown; the spec defines no flags", p.Flags[0])
	}
	switch p.Domain {
	case specs.PerLinux:
		return 0, nil // PER_LINUX
	case specs.PerLinux32:
		return 0x8, nil // PER_LINUX32
	}
	return 0, invalid("linux.personality.domain %q: want LINUX or LINUX32", p.Domain)
}

// cpuMask returns the mask of sched_setaffinity(2) for a list such as "0-3,7",
// the value of the JSON field.
func cpuMask(field, list string) ([]byte, error) { return bitList(field, list, maxCPUs) }

// bitList returns a bit mask of whole 64-bit words. The bounds are checked before
// a range is walked (CVE-2018-20699).
func bitList(field, list string, bound int) ([]byte, error) {
	if len(list) > 8*bound { // each number once, with room to spare
		return nil, invalid("%s: a list of %d bytes; use ranges", field, len(list))
	}
	var mask []byte
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			last = first
		}
		// 32 bits: longer digits are an error of the parser.
		lo, err1 := strconv.ParseUint(first, 10, 32)
		hi, err2 := strconv.ParseUint(last, 10, 32)
		switch {
		case err1 != nil || err2 != nil:
			return nil, invalid("%s %q: want numbers and ranges as in 0-3,7", field, list)
		case lo > hi:
			return nil, invalid("%s %q: the range %s runs backwards", field, list, part)
		case hi >= uint64(bound):
			return nil, invalid("%s %q: %d is above %d, the last that Linux can have", field, list, hi, bound-1)
		}
		if need := int(hi/64+1) * 8; need > len(mask) {
			mask = append(mask, make([]byte, need-len(mask))...)
		}
		for i := lo; i <= hi; i++ {
			mask[i/8] |= 1 << (i % 8) // both architectures are little-endian
		}
	}
	return mask, nil
}
