package cgroup

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// clockTick is the unit of cpuacct.stat in nanoseconds: USER_HZ is 100 on every
// architecture that we build for.
const clockTick = 10_000_000

func (r *reader) statsV1(c *Cgroup, s *Stats) {
	for _, d := range c.v1() {
		for _, name := range d.Names {
			switch name {
			case "cpu":
				t := r.table(d.path, "cpu.stat")
				s.CPU.Throttling = Throttling{t["nr_periods"], t["nr_throttled"], t["throttled_time"]}
			case "cpuacct":
				r.cpuacct(d.path, &s.CPU.Usage)
			case "cpuset":
				r.cpuset(d.path, &s.CPUSet)
			case "memory":
				r.memoryV1(d.path, &s.Memory)
			case "pids":
				s.Pids = r.pids(d.path)
			case "blkio":
				r.blkioV1(d.path, &s.Blkio)
			case "hugetlb":
				r.hugetlbV1(d.path, s.Hugetlb)
			case "rdma":
				s.Rdma = r.rdma(d.path)
			}
		}
	}
}

// pids reads the controller's two files; no limit is 0.
func (r *reader) pids(dir string) PidsStats {
	p := PidsStats{Current: r.value(dir, "pids.current")}
	if max, _ := r.text(dir, "pids.max"); max != "max" {
		p.Limit = r.value(dir, "pids.max")
	}
	return p
}

func (r *reader) cpuacct(dir string, u *CPUUsage) {
	t := r.table(dir, "cpuacct.stat")
	u.User, u.Kernel = t["user"]*clockTick, t["system"]*clockTick
	u.Total = r.value(dir, "cpuacct.usage")
	text, _ := r.text(dir, "cpuacct.usage_percpu")
	for f := range strings.FieldsSeq(text) {
		if v, err := strconv.ParseUint(f, 10, 64); err == nil {
			u.Percpu = append(u.Percpu, v)
		}
	}
	all, _ := r.text(dir, "cpuacct.usage_all") // "cpu user system", then a line for each
	for line := range strings.Lines(all) {
		f := strings.Fields(line)
		if len(f) < 3 || f[0] == "cpu" {
			continue
		}
		user, err1 := strconv.ParseUint(f[1], 10, 64)
		kernel, err2 := strconv.ParseUint(f[2], 10, 64)
		if err1 == nil && err2 == nil {
			u.PercpuUser, u.PercpuKernel = append(u.PercpuUser, user), append(u.PercpuKernel, kernel)
		}
	}
}

func (r *reader) cpuset(dir string, s *CPUSetStats) {
	list := func(file string) []uint16 {
		text, _ := r.text(dir, file)
		ns, err := ParseList(text)
		if err != nil {
			r.fail(filepath.Join(dir, file), err)
		}
		return ns
	}
	s.CPUs, s.Mems = list("cpuset.cpus"), list("cpuset.mems")
	for file, v := range map[string]*uint64{
		"cpu_exclusive": &s.CPUExclusive, "mem_hardwall": &s.MemHardwall, "mem_exclusive": &s.MemExclusive,
		"memory_migrate": &s.MemoryMigrate, "memory_spread_page": &s.MemorySpreadPage, "memory_spread_slab": &s.MemorySpreadSlab,
		"memory_pressure": &s.MemoryPressure, "sched_load_balance": &s.SchedLoadBalance,
	} {
		*v = r.value(dir, "cpuset."+file)
	}
	if text, ok := r.text(dir, "cpuset.sched_relax_domain_level"); ok {
		v, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			r.fail(filepath.Join(dir, "cpuset.sched_relax_domain_level"), err)
		}
		s.SchedRelaxDomainLevel = v // -1: the system's
	}
}

// ParseList reads a list of processors or memory nodes such as "0-2,7".
func ParseList(text string) ([]uint16, error) {
	var out []uint16
	for part := range strings.SplitSeq(strings.TrimSpace(text), ",") {
		if part == "" {
			continue
		}
		from, to, ranged := strings.Cut(part, "-")
		a, err := strconv.ParseUint(from, 10, 16)
		if err != nil {
			return nil, err
		}
		b := a
		if ranged {
			if b, err = strconv.ParseUint(to, 10, 16); err != nil {
				return nil, err
			}
		}
		if b < a {
			return nil, fmt.Errorf("range %q: want the lower number first", part)
		}
		for n := a; n <= b; n++ {
			out = append(out, uint16(n))
		}
	}
	return out, nil
}

func (r *reader) memoryV1(dir string, m *MemoryStats) {
	m.Raw = r.table(dir, "memory.stat")
	m.Cache = m.Raw["cache"]
	for prefix, e := range map[string]*MemoryEntry{"memory": &m.Usage, "memory.memsw": &m.Swap, "memory.kmem": &m.Kernel, "memory.kmem.tcp": &m.KernelTCP} {
		*e = MemoryEntry{
			Limit: r.value(dir, prefix+".limit_in_bytes"), Usage: r.value(dir, prefix+".usage_in_bytes"),
			Max: r.value(dir, prefix+".max_usage_in_bytes"), Failcnt: r.value(dir, prefix+".failcnt"),
		}
	}
}

func (r *reader) hugetlbV1(dir string, out map[string]Hugetlb) {
	for _, size := range pageSizes() {
		// Reservations where the kernel counts them: they are what the limit is on.
		for _, prefix := range []string{"hugetlb." + size + ".rsvd", "hugetlb." + size} {
			usage, ok := r.number(dir, prefix+".usage_in_bytes")
			if !ok {
				continue
			}
			out[size] = Hugetlb{Usage: usage, Max: r.value(dir, prefix+".max_usage_in_bytes"), Failcnt: r.value(dir, prefix+".failcnt")}
			break
		}
	}
}

// blkioV1 reads the counters of the block scheduler that keeps them, or those of
// the throttling layer.
func (r *reader) blkioV1(dir string, b *BlkioStats) {
	tables := []struct {
		name string
		to   *[]BlkioEntry
	}{
		{"io_service_bytes", &b.IoServiceBytesRecursive}, {"io_serviced", &b.IoServicedRecursive},
		{"io_queued", &b.IoQueuedRecursive}, {"io_service_time", &b.IoServiceTimeRecursive},
		{"io_wait_time", &b.IoWaitTimeRecursive}, {"io_merged", &b.IoMergedRecursive},
		{"time", &b.IoTimeRecursive}, {"sectors", &b.SectorsRecursive},
	}
	for _, prefix := range []string{"blkio.bfq.", "blkio.", "blkio.throttle."} {
		for _, t := range tables {
			*t.to = r.blkioTable(dir, prefix+t.name+"_recursive")
		}
		if len(b.IoServiceBytesRecursive)+len(b.IoServicedRecursive) > 0 {
			return
		}
	}
	b.IoServiceBytesRecursive = r.blkioTable(dir, "blkio.throttle.io_service_bytes")
	b.IoServicedRecursive = r.blkioTable(dir, "blkio.throttle.io_serviced")
}

// blkioTable reads lines "8:0 Read 4096" and "8:0 12"; the total is left out.
func (r *reader) blkioTable(dir, file string) []BlkioEntry {
	text, _ := r.text(dir, file)
	var out []BlkioEntry
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 2 && len(f) != 3 {
			continue
		}
		e := BlkioEntry{}
		var ok bool
		if e.Major, e.Minor, ok = parseDevice(f[0]); !ok {
			continue
		}
		if len(f) == 3 {
			e.Op = f[1]
		}
		v, err := strconv.ParseUint(f[len(f)-1], 10, 64)
		if err != nil {
			r.fail(filepath.Join(dir, file), err)
			return nil
		}
		e.Value = v
		out = append(out, e)
	}
	return slices.Clip(out)
}

func parseDevice(s string) (major, minor uint64, ok bool) {
	a, b, ok := strings.Cut(s, ":")
	major, err1 := strconv.ParseUint(a, 10, 64)
	minor, err2 := strconv.ParseUint(b, 10, 64)
	return major, minor, ok && err1 == nil && err2 == nil
}
