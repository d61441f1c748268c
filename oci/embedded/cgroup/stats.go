package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Stats is one reading of a cgroup. As JSON it is the "data" of the event
// "stats" that `runc events` prints, which other tools read.
type Stats struct {
	CPU               CPUStats           `json:"cpu"`
	CPUSet            CPUSetStats        `json:"cpuset"`
	Memory            MemoryStats        `json:"memory"`
	Pids              PidsStats          `json:"pids"`
	Blkio             BlkioStats         `json:"blkio"`
	Hugetlb           map[string]Hugetlb `json:"hugetlb"` // by page size, such as "2MB"
	Rdma              *RdmaStats         `json:"rdma,omitempty"`
	IntelRdt          struct{}           `json:"intel_rdt"` // readers want the key
	NetworkInterfaces []NetworkInterface `json:"network_interfaces"`
}

// CPUStats are times in nanoseconds.
type CPUStats struct {
	Usage      CPUUsage   `json:"usage,omitzero"`
	Throttling Throttling `json:"throttling,omitzero"`
	PSI        *PSI       `json:"psi,omitempty"`
}

// CPUUsage is what was used, in nanoseconds; by processor on v1 alone.
type CPUUsage struct {
	Total        uint64   `json:"total,omitempty"`
	Percpu       []uint64 `json:"percpu,omitempty"`
	PercpuKernel []uint64 `json:"percpu_kernel,omitempty"`
	PercpuUser   []uint64 `json:"percpu_user,omitempty"`
	Kernel       uint64   `json:"kernel"`
	User         uint64   `json:"user"`
}

// Throttling counts the periods in which the quota ran out.
type Throttling struct {
	Periods          uint64 `json:"periods,omitempty"`
	ThrottledPeriods uint64 `json:"throttledPeriods,omitempty"`
	ThrottledTime    uint64 `json:"throttledTime,omitempty"` // nanoseconds
}

// CPUSetStats are the files of v1's cpuset controller.
type CPUSetStats struct {
	CPUs                  []uint16 `json:"cpus,omitempty"`
	CPUExclusive          uint64   `json:"cpu_exclusive"`
	Mems                  []uint16 `json:"mems,omitempty"`
	MemHardwall           uint64   `json:"mem_hardwall"`
	MemExclusive          uint64   `json:"mem_exclusive"`
	MemoryMigrate         uint64   `json:"memory_migrate"`
	MemorySpreadPage      uint64   `json:"memory_spread_page"`
	MemorySpreadSlab      uint64   `json:"memory_spread_slab"`
	MemoryPressure        uint64   `json:"memory_pressure"`
	SchedLoadBalance      uint64   `json:"sched_load_balance"`
	SchedRelaxDomainLevel int64    `json:"sched_relax_domain_level"`
}

// MemoryStats are bytes. Swap counts memory and swap together, on v2 as well;
// Raw is memory.stat.
type MemoryStats struct {
	Cache     uint64            `json:"cache,omitempty"`
	Usage     MemoryEntry       `json:"usage,omitzero"`
	Swap      MemoryEntry       `json:"swap,omitzero"`
	Kernel    MemoryEntry       `json:"kernel,omitzero"`
	KernelTCP MemoryEntry       `json:"kernelTCP,omitzero"`
	Raw       map[string]uint64 `json:"raw,omitempty"`
	PSI       *PSI              `json:"psi,omitempty"`
}

// MemoryEntry is one counter of memory. A limit of all ones is none (v2).
type MemoryEntry struct {
	Limit   uint64 `json:"limit"`
	Usage   uint64 `json:"usage,omitempty"`
	Max     uint64 `json:"max,omitempty"` // the most there was
	Failcnt uint64 `json:"failcnt"`       // how often the limit was hit
}

// PidsStats counts threads; a limit of 0 is none.
type PidsStats struct {
	Current uint64 `json:"current,omitempty"`
	Limit   uint64 `json:"limit,omitempty"`
}

// BlkioStats are counters of block devices.
type BlkioStats struct {
	IoServiceBytesRecursive []BlkioEntry `json:"ioServiceBytesRecursive,omitempty"`
	IoServicedRecursive     []BlkioEntry `json:"ioServicedRecursive,omitempty"`
	IoQueuedRecursive       []BlkioEntry `json:"ioQueueRecursive,omitempty"`
	IoServiceTimeRecursive  []BlkioEntry `json:"ioServiceTimeRecursive,omitempty"`
	IoWaitTimeRecursive     []BlkioEntry `json:"ioWaitTimeRecursive,omitempty"`
	IoMergedRecursive       []BlkioEntry `json:"ioMergedRecursive,omitempty"`
	IoTimeRecursive         []BlkioEntry `json:"ioTimeRecursive,omitempty"`
	SectorsRecursive        []BlkioEntry `json:"sectorsRecursive,omitempty"`
	PSI                     *PSI         `json:"psi,omitempty"`
}

// BlkioEntry is one counter of one device; Op is such as "Read", or empty.
type BlkioEntry struct {
	Major uint64 `json:"major,omitempty"`
	Minor uint64 `json:"minor,omitempty"`
	Op    string `json:"op,omitempty"`
	Value uint64 `json:"value,omitempty"`
}

// Hugetlb is the use of huge pages of one size, in bytes.
type Hugetlb struct {
	Usage   uint64 `json:"usage,omitempty"`
	Max     uint64 `json:"max,omitempty"`
	Failcnt uint64 `json:"failcnt"`
}

// RdmaStats are the limits and the use of RDMA devices.
type RdmaStats struct {
	Limit   []RdmaEntry `json:"limit,omitempty"`
	Current []RdmaEntry `json:"current,omitempty"`
}

// RdmaEntry is one RDMA device. A limit of all ones is none.
type RdmaEntry struct {
	Device     string `json:"device,omitempty"`
	HcaHandles uint32 `json:"hca_handles,omitempty"`
	HcaObjects uint32 `json:"hca_objects,omitempty"`
}

// PSI is pressure stall information: how much of the time some, and all, of the
// processes waited.
type PSI struct {
	Some PSIData `json:"some,omitzero"`
	Full PSIData `json:"full,omitzero"`
}

// PSIData are percentages over 10, 60 and 300 seconds, and microseconds in total.
type PSIData struct {
	Avg10  float64 `json:"avg10"`
	Avg60  float64 `json:"avg60"`
	Avg300 float64 `json:"avg300"`
	Total  uint64  `json:"total"`
}

// NetworkInterface counts the traffic of one interface. No cgroup knows it: who
// knows the container's network namespace fills it in.
type NetworkInterface struct {
	Name                                    string
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// Stats reads the cgroup's counters. What the kernel does not count stays zero.
// A cgroup that is gone is an error of kind NotFound.
func (c *Cgroup) Stats() (*Stats, error) {
	if !c.Exists() {
		return nil, fmt.Errorf("cgroup %s: %w", c.path, errdefs.ErrNotFound)
	}
	s := &Stats{Hugetlb: map[string]Hugetlb{}}
	r := &reader{}
	if c.host.V2() {
		r.statsV2(c.dirs[0].path, s)
	} else {
		r.statsV1(c, s)
	}
	return s, r.err
}

// reader reads counters; files that are not there give zeros, and the first other
// error stays.
type reader struct{ err error }

func (r *reader) fail(path string, err error) {
	if r.err == nil {
		r.err = fmt.Errorf("cgroup: %s: %w", path, err)
	}
}

// text reads a file. ok is false when the kernel has none.
func (r *reader) text(dir, file string) (text string, ok bool) {
	p := filepath.Join(dir, file)
	text, err := readFile(p)
	switch {
	case err == nil:
		return text, true
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EOPNOTSUPP):
		return "", false // not in this kernel, or switched off (psi=0, a removed cgroup)
	}
	r.fail(p, err)
	return "", false
}

// number reads a file of one number; "max" is all ones.
func (r *reader) number(dir, file string) (uint64, bool) {
	text, ok := r.text(dir, file)
	if !ok {
		return 0, false
	}
	if text == "max" {
		return math.MaxUint64, true
	}
	v, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		if n, ierr := strconv.ParseInt(text, 10, 64); ierr == nil && n < 0 {
			return 0, true // counters of the kernel can be briefly below zero
		}
		r.fail(filepath.Join(dir, file), err)
	}
	return v, true
}

func (r *reader) value(dir, file string) uint64 {
	v, _ := r.number(dir, file)
	return v
}

// table reads a file of lines "name number".
func (r *reader) table(dir, file string) map[string]uint64 {
	text, ok := r.text(dir, file)
	if !ok {
		return nil
	}
	out := map[string]uint64{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 2 {
			continue
		}
		if v, err := strconv.ParseUint(f[1], 10, 64); err == nil {
			out[f[0]] = v
		}
	}
	return out
}

func (r *reader) rdma(dir string) *RdmaStats {
	s := RdmaStats{Limit: r.rdmaEntries(dir, "rdma.max"), Current: r.rdmaEntries(dir, "rdma.current")}
	if s.Limit == nil && s.Current == nil {
		return nil
	}
	return &s
}

func (r *reader) rdmaEntries(dir, file string) []RdmaEntry {
	text, _ := r.text(dir, file)
	var out []RdmaEntry
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		e := RdmaEntry{Device: f[0]}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			n, err := strconv.ParseUint(v, 10, 32)
			if err != nil {
				n = math.MaxUint32 // "max"
			}
			switch k {
			case "hca_handle":
				e.HcaHandles = uint32(n)
			case "hca_object":
				e.HcaObjects = uint32(n)
			}
		}
		out = append(out, e)
	}
	return out
}

// pageSizes lists the machine's huge page sizes as cgroup files spell them.
func pageSizes() []string {
	entries, _ := os.ReadDir("/sys/kernel/mm/hugepages")
	var out []string
	for _, e := range entries {
		kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(e.Name(), "hugepages-"), "kB"), 10, 64)
		switch {
		case err != nil:
		case kb >= 1<<20:
			out = append(out, num(kb>>20)+"GB")
		case kb >= 1<<10:
			out = append(out, num(kb>>10)+"MB")
		default:
			out = append(out, num(kb)+"KB")
		}
	}
	return out
}
