package cgroup

import (
	"math"
	"path/filepath"
	"strconv"
	"strings"
)

func (r *reader) statsV2(dir string, s *Stats) {
	t := r.table(dir, "cpu.stat") // there without the controller, too
	const us = 1000
	s.CPU.Usage = CPUUsage{Total: t["usage_usec"] * us, User: t["user_usec"] * us, Kernel: t["system_usec"] * us}
	s.CPU.Throttling = Throttling{t["nr_periods"], t["nr_throttled"], t["throttled_usec"] * us}
	s.CPU.PSI = r.psi(dir, "cpu.pressure")
	r.memoryV2(dir, &s.Memory)
	if _, ok := r.number(dir, "pids.current"); ok {
		s.Pids = r.pids(dir)
	} else if text, ok := r.text(dir, "cgroup.procs"); ok {
		s.Pids.Current = uint64(len(strings.Fields(text))) // without the controller: processes
	}
	r.ioV2(dir, &s.Blkio)
	for _, size := range pageSizes() {
		for _, prefix := range []string{"hugetlb." + size + ".rsvd", "hugetlb." + size} {
			if usage, ok := r.number(dir, prefix+".current"); ok {
				s.Hugetlb[size] = Hugetlb{Usage: usage, Failcnt: r.table(dir, "hugetlb."+size+".events")["max"]}
				break
			}
		}
	}
	s.Rdma = r.rdma(dir)
}

func (r *reader) memoryV2(dir string, m *MemoryStats) {
	m.PSI = r.psi(dir, "memory.pressure")
	if m.Raw = r.table(dir, "memory.stat"); m.Raw == nil {
		return
	}
	m.Cache = m.Raw["file"]
	entry := func(prefix string) MemoryEntry {
		return MemoryEntry{Usage: r.value(dir, prefix+".current"), Limit: r.value(dir, prefix+".max"), Max: r.value(dir, prefix+".peak")}
	}
	m.Usage = entry("memory")
	m.Usage.Failcnt = r.table(dir, "memory.events")["max"]
	swap := entry("memory.swap")
	m.Swap = MemoryEntry{Usage: m.Usage.Usage + swap.Usage, Limit: math.MaxUint64}
	if swap.Limit != math.MaxUint64 && m.Usage.Limit != math.MaxUint64 {
		m.Swap.Limit = m.Usage.Limit + swap.Limit
	}
	m.Kernel.Usage = m.Raw["kernel"] // Linux 5.18
}

// ioV2 reads io.stat: lines "8:0 rbytes=1 wbytes=2 rios=3 ...".
func (r *reader) ioV2(dir string, b *BlkioStats) {
	b.PSI = r.psi(dir, "io.pressure")
	text, _ := r.text(dir, "io.stat")
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		major, minor, ok := parseDevice(f[0])
		if !ok {
			continue
		}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			to, op := &b.IoServiceBytesRecursive, "Read"
			switch k {
			case "rbytes":
			case "wbytes":
				op = "Write"
			case "rios":
				to = &b.IoServicedRecursive
			case "wios":
				to, op = &b.IoServicedRecursive, "Write"
			default:
				continue
			}
			n, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				r.fail(filepath.Join(dir, "io.stat"), err)
				return
			}
			*to = append(*to, BlkioEntry{major, minor, op, n})
		}
	}
}

// psi reads a pressure file: lines "some avg10=0.00 avg60=0.00 avg300=0.00 total=0".
func (r *reader) psi(dir, file string) *PSI {
	text, ok := r.text(dir, file)
	if !ok {
		return nil
	}
	p := &PSI{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		d := &p.Some
		if f[0] == "full" {
			d = &p.Full
		}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			var err error
			switch k {
			case "avg10":
				d.Avg10, err = strconv.ParseFloat(v, 64)
			case "avg60":
				d.Avg60, err = strconv.ParseFloat(v, 64)
			case "avg300":
				d.Avg300, err = strconv.ParseFloat(v, 64)
			case "total":
				d.Total, err = strconv.ParseUint(v, 10, 64)
			}
			if err != nil {
				r.fail(filepath.Join(dir, file), err)
				return nil
			}
		}
	}
	return p
}
