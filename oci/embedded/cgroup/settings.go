package cgroup

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// collector gathers the settings of one spec; the first error stays.
type collector struct {
	out      []setting
	warnings []string
	err      error
}

// add appends a setting of linux.resources.<field> and returns it for refinement.
func (k *collector) add(field, controller, file, value string) *setting {
	k.out = append(k.out, setting{controller: controller, file: file, value: value, field: "linux.resources." + field})
	return &k.out[len(k.out)-1]
}

// without is add for a limit that only refines others: where the kernel has no
// such file, lacking is the warning.
func (k *collector) without(lacking, field, controller, file, value string) {
	k.add(field, controller, file, value).lacking = lacking
}

func (k *collector) warn(field, text string) {
	k.warnings = append(k.warnings, "linux.resources."+field+": "+text)
}

func (k *collector) refuse(kind error, field, format string, args ...any) {
	if k.err == nil {
		k.err = fmt.Errorf("linux.resources.%s: %s: %w", field, fmt.Sprintf(format, args...), kind)
	}
}

// set returns whether an optional number is there. Zero is how tools spell "not
// set" for all of those that are asked with it.
func set[T comparable](p *T) bool {
	var zero T
	return p != nil && *p != zero
}

// Weight converts cgroup v1 CPU shares (2-262144) to a v2 weight (1-10000): 2
// becomes 1, the default 1024 the default 100, 262144 becomes 10000. Between them
// lies the curve that container tools agreed on in 2025: log10(weight) =
// (l*l + 125*l)/612 - 7/34, with l = log2(shares).
func Weight(shares uint64) uint64 {
	switch {
	case shares <= 2:
		return 1
	case shares >= 262144:
		return 10000
	}
	l := math.Log2(float64(shares))
	return uint64(math.Ceil(math.Pow(10, (l*l+125*l)/612-7.0/34)))
}

// IOWeight converts blkio weights (10-1000) to those of io.weight (1-10000).
func IOWeight(w uint16) uint64 { return 1 + (uint64(max(w, 10))-10)*9999/990 }

// checkWeight refuses weights out of the range of the block schedulers.
func (k *collector) checkWeight(field string, w *uint16) bool {
	if !set(w) {
		return false
	}
	if *w < 10 || *w > 1000 {
		k.refuse(errdefs.ErrInvalidArgument, field, "%d: want 10 to 1000", *w)
		return false
	}
	return true
}

// throttles calls add for each limit of a block device.
func throttles(b *specs.LinuxBlockIO, add func(field, key string, rate uint64, v1, v2 string)) {
	for _, t := range []struct {
		field   string
		devices []specs.LinuxThrottleDevice
		v1, v2  string
	}{
		{"throttleReadBpsDevice", b.ThrottleReadBpsDevice, "blkio.throttle.read_bps_device", "rbps"},
		{"throttleWriteBpsDevice", b.ThrottleWriteBpsDevice, "blkio.throttle.write_bps_device", "wbps"},
		{"throttleReadIOPSDevice", b.ThrottleReadIOPSDevice, "blkio.throttle.read_iops_device", "riops"},
		{"throttleWriteIOPSDevice", b.ThrottleWriteIOPSDevice, "blkio.throttle.write_iops_device", "wiops"},
	} {
		for i, d := range t.devices {
			add(fmt.Sprintf("blockIO.%s[%d]", t.field, i), device(d.Major, d.Minor), d.Rate, t.v1, t.v2)
		}
	}
}

func device(major, minor int64) string { return num(major) + ":" + num(minor) }

// rdma is the same on v1 and v2.
func (k *collector) rdma(limits map[string]specs.LinuxRdma) {
	for _, name := range slices.Sorted(maps.Keys(limits)) {
		l, line := limits[name], name
		if l.HcaHandles != nil {
			line += " hca_handle=" + num(*l.HcaHandles)
		}
		if l.HcaObjects != nil {
			line += " hca_object=" + num(*l.HcaObjects)
		}
		if line == name {
			continue
		}
		s := k.add("rdma."+name, "rdma", "rdma.max", line)
		s.key, s.unset = name, "hca_handle=max hca_object=max"
	}
}

// hugepages limits what is used and, where the kernel tells them apart, what is
// reserved.
func (k *collector) hugepages(limits []specs.LinuxHugepageLimit, suffix string) {
	for i, l := range limits {
		field := fmt.Sprintf("hugepageLimits[%d]", i)
		if !isPageSize(l.Pagesize) {
			k.refuse(errdefs.ErrInvalidArgument, field+".pageSize", "%q: want a size such as \"2MB\"", l.Pagesize)
			return
		}
		k.add(field, "hugetlb", "hugetlb."+l.Pagesize+suffix, num(l.Limit))
		k.add(field, "hugetlb", "hugetlb."+l.Pagesize+".rsvd"+suffix, num(l.Limit)).quiet = true
	}
}

func isPageSize(s string) bool {
	n := len(s)
	if n < 3 || s[n-1] != 'B' || s[n-2] != 'K' && s[n-2] != 'M' && s[n-2] != 'G' {
		return false
	}
	v, err := strconv.ParseUint(s[:n-2], 10, 32)
	return err == nil && v > 0 && s[0] != '+'
}

// tasks is the value of pids.max: -1 is no limit. 0 becomes 1, which lets a
// process live and not fork, as systemd, which takes no 0, has it.
func tasks(limit int64) string {
	if limit == 0 {
		return "1"
	}
	return maxOr(limit)
}

func num[T ~int64 | ~uint64 | ~uint32 | ~uint16](v T) string { return fmt.Sprint(v) }

// maxOr writes -1, and anything negative, as "max".
func maxOr(v int64) string {
	if v < 0 {
		return "max"
	}
	return strconv.FormatInt(v, 10)
}
