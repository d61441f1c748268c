package cgroup

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// setting is one value to write. controller is looked up among the v1
// hierarchies; v2 has one directory.
type setting struct {
	controller string
	file       string
	value      string
	field      string // of the spec, for errors
}

// settings turns limits into file writes, in an order the kernel accepts when
// the cgroup is new. Limits whose file is missing and that only refine another
// (swap accounting switched off) become warnings.
func (h *Host) settings(r *specs.LinuxResources) ([]setting, []string, error) {
	if h.V2() {
		return settingsV2(r)
	}
	return h.settingsV1(r)
}

func (h *Host) settingsV1(r *specs.LinuxResources) (out []setting, warnings []string, err error) {
	if len(r.Unified) > 0 {
		return nil, nil, fmt.Errorf("linux.resources.unified: this host has cgroup v1; remove the field: %w", errdefs.ErrInvalidArgument)
	}
	add := func(field, controller, file, value string) {
		out = append(out, setting{controller, file, value, "linux.resources." + field})
	}
	if m := r.Memory; m != nil {
		if m.Limit != nil && *m.Limit != 0 {
			add("memory.limit", "memory", "memory.limit_in_bytes", num(*m.Limit))
		}
		if m.Swap != nil && *m.Swap != 0 {
			if h.hasFile("memory", "memory.memsw.limit_in_bytes") {
				add("memory.swap", "memory", "memory.memsw.limit_in_bytes", num(*m.Swap))
			} else {
				warnings = append(warnings, "linux.resources.memory.swap: this kernel does not account swap")
			}
		}
		if m.Reservation != nil && *m.Reservation != 0 {
			add("memory.reservation", "memory", "memory.soft_limit_in_bytes", num(*m.Reservation))
		}
		if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
			add("memory.disableOOMKiller", "memory", "memory.oom_control", "1")
		}
		if m.Swappiness != nil {
			add("memory.swappiness", "memory", "memory.swappiness", num(*m.Swappiness))
		}
	}
	if c := r.CPU; c != nil {
		if c.Shares != nil && *c.Shares != 0 {
			add("cpu.shares", "cpu", "cpu.shares", num(*c.Shares))
		}
		if c.Period != nil && *c.Period != 0 {
			add("cpu.period", "cpu", "cpu.cfs_period_us", num(*c.Period))
		}
		if c.Quota != nil && *c.Quota != 0 {
			add("cpu.quota", "cpu", "cpu.cfs_quota_us", num(*c.Quota))
		}
		if c.Burst != nil && *c.Burst != 0 {
			add("cpu.burst", "cpu", "cpu.cfs_burst_us", num(*c.Burst))
		}
		if c.Cpus != "" {
			add("cpu.cpus", "cpuset", "cpuset.cpus", c.Cpus)
		}
		if c.Mems != "" {
			add("cpu.mems", "cpuset", "cpuset.mems", c.Mems)
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil && *p.Limit != 0 {
		add("pids.limit", "pids", "pids.max", maxOr(*p.Limit))
	}
	for _, l := range r.HugepageLimits {
		add("hugepageLimits", "hugetlb", "hugetlb."+l.Pagesize+".limit_in_bytes", num(l.Limit))
	}
	if b := r.BlockIO; b != nil {
		if b.Weight != nil && *b.Weight != 0 {
			file := "blkio.weight"
			if !h.hasFile("blkio", file) {
				file = "blkio.bfq.weight"
			}
			if h.hasFile("blkio", file) {
				add("blockIO.weight", "blkio", file, num(*b.Weight))
			} else {
				warnings = append(warnings, "linux.resources.blockIO.weight: no block scheduler with weights")
			}
		}
		throttles(b, func(field string, d specs.LinuxThrottleDevice, v1, _ string) {
			add("blockIO."+field, "blkio", v1, fmt.Sprintf("%d:%d %d", d.Major, d.Minor, d.Rate))
		})
	}
	if n := r.Network; n != nil {
		return nil, nil, fmt.Errorf("linux.resources.network: network classes are not supported; remove the field: %w", errdefs.ErrNotImplemented)
	}
	return out, warnings, nil
}

func settingsV2(r *specs.LinuxResources) (out []setting, warnings []string, err error) {
	add := func(field, file, value string) {
		out = append(out, setting{"", file, value, "linux.resources." + field})
	}
	if m := r.Memory; m != nil {
		if m.Limit != nil && *m.Limit != 0 {
			add("memory.limit", "memory.max", maxOr(*m.Limit))
		}
		if m.Swap != nil && *m.Swap != 0 {
			v := "max"
			if *m.Swap > 0 {
				// v1 counts memory + swap, v2 swap alone.
				if m.Limit == nil || *m.Limit <= 0 || *m.Swap < *m.Limit {
					return nil, nil, fmt.Errorf("linux.resources.memory.swap %d: want at least memory.limit, which must be set: %w", *m.Swap, errdefs.ErrInvalidArgument)
				}
				v = num(*m.Swap - *m.Limit)
			}
			add("memory.swap", "memory.swap.max", v)
		}
		if m.Reservation != nil && *m.Reservation != 0 {
			add("memory.reservation", "memory.low", maxOr(*m.Reservation))
		}
		if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
			warnings = append(warnings, "linux.resources.memory.disableOOMKiller: not in cgroup v2")
		}
	}
	if c := r.CPU; c != nil {
		if c.Shares != nil && *c.Shares != 0 {
			add("cpu.shares", "cpu.weight", num(Weight(*c.Shares)))
		}
		quota, period := "", ""
		if c.Quota != nil && *c.Quota != 0 {
			quota = maxOr(*c.Quota)
		}
		if c.Period != nil && *c.Period != 0 {
			period = num(*c.Period)
		}
		switch {
		case quota != "" && period != "":
			add("cpu.quota", "cpu.max", quota+" "+period)
		case quota != "":
			add("cpu.quota", "cpu.max", quota)
		case period != "":
			add("cpu.period", "cpu.max", "max "+period)
		}
		if c.Burst != nil && *c.Burst != 0 {
			add("cpu.burst", "cpu.max.burst", num(*c.Burst))
		}
		if c.Idle != nil && *c.Idle != 0 {
			add("cpu.idle", "cpu.idle", num(*c.Idle))
		}
		if c.Cpus != "" {
			add("cpu.cpus", "cpuset.cpus", c.Cpus)
		}
		if c.Mems != "" {
			add("cpu.mems", "cpuset.mems", c.Mems)
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil && *p.Limit != 0 {
		add("pids.limit", "pids.max", maxOr(*p.Limit))
	}
	for _, l := range r.HugepageLimits {
		add("hugepageLimits", "hugetlb."+l.Pagesize+".max", num(l.Limit))
	}
	if b := r.BlockIO; b != nil {
		if b.Weight != nil && *b.Weight != 0 {
			// blkio weights are 10-1000, io.weight is 1-10000.
			add("blockIO.weight", "io.weight", num(1+(uint64(*b.Weight)-10)*9999/990))
		}
		throttles(b, func(field string, d specs.LinuxThrottleDevice, _, key string) {
			add("blockIO."+field, "io.max", fmt.Sprintf("%d:%d %s=%d", d.Major, d.Minor, key, d.Rate))
		})
	}
	for _, k := range slices.Sorted(maps.Keys(r.Unified)) {
		if strings.ContainsAny(k, "/\x00") || !strings.Contains(k, ".") || strings.HasPrefix(k, "cgroup.") {
			return nil, nil, fmt.Errorf("linux.resources.unified: %q is no limit of cgroup v2: %w", k, errdefs.ErrInvalidArgument)
		}
		add("unified", k, r.Unified[k])
	}
	return out, warnings, nil
}

func throttles(b *specs.LinuxBlockIO, add func(field string, d specs.LinuxThrottleDevice, v1, v2 string)) {
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
		for _, d := range t.devices {
			add(t.field, d, t.v1, t.v2)
		}
	}
}

// Weight converts cgroup v1 CPU shares (2-262144) to a v2 weight (1-10000).
func Weight(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

func num[T ~int64 | ~uint64 | ~uint16](v T) string { return fmt.Sprint(v) }

// maxOr writes -1, and anything negative, as "max".
func maxOr(v int64) string {
	if v < 0 {
		return "max"
	}
	return strconv.FormatInt(v, 10)
}

// hasFile asks the hierarchy's root, where memory.memsw and weights show as well.
func (h *Host) hasFile(controller, file string) bool {
	for _, c := range h.V1 {
		if c.Has(controller) {
			_, err := os.Stat(filepath.Join(c.Mount, file))
			return err == nil
		}
	}
	return false
}

// file returns the path of a setting's file.
func (c *Cgroup) file(s setting) (string, error) {
	if c.host.V2() {
		return filepath.Join(c.dirs[0].path, s.file), nil
	}
	for _, d := range c.dirs {
		if d.Has(s.controller) {
			return filepath.Join(d.path, s.file), nil
		}
	}
	return "", fmt.Errorf("%s: the %s controller is not mounted: %w", s.field, s.controller, errdefs.ErrFailedPrecondition)
}

// apply writes the settings to a new cgroup.
func (c *Cgroup) apply(sets []setting) error {
	for _, s := range sets {
		p, err := c.file(s)
		if err != nil {
			return err
		}
		if err := writeFile(p, s.value); err != nil {
			return fmt.Errorf("%s: %w", s.field, err)
		}
	}
	return nil
}

// Update changes limits in place; unset fields keep their value. When one write
// is refused the earlier ones are taken back. warnings are as in Create.
func (c *Cgroup) Update(r *specs.LinuxResources) (warnings []string, err error) {
	if len(r.Devices) > 0 {
		return nil, fmt.Errorf("linux.resources.devices: device rules can not be updated: %w", errdefs.ErrNotImplemented)
	}
	sets, warnings, err := c.host.settings(r)
	if err != nil {
		return nil, err
	}
	type old struct{ path, value string }
	var done []old
	for _, s := range c.ordered(sets) {
		p, err := c.file(s)
		if err == nil {
			var was string
			if was, err = readFile(p); err == nil {
				if err = writeFile(p, s.value); err == nil {
					done = append(done, old{p, was})
					continue
				}
			}
		}
		err = fmt.Errorf("%s: %w", s.field, err)
		for _, o := range slices.Backward(done) {
			err = errors.Join(err, writeFile(o.path, revertValue(o.path, o.value)))
		}
		return nil, err
	}
	return warnings, nil
}

// revertValue turns what a file shows into what it takes.
func revertValue(path, shown string) string {
	if filepath.Base(path) == "memory.oom_control" {
		for line := range strings.Lines(shown) {
			if v, ok := strings.CutPrefix(line, "oom_kill_disable "); ok {
				return strings.TrimSpace(v)
			}
		}
	}
	return shown
}

// ordered sorts updates that depend on each other: v1 keeps memory <= memory +
// swap at each moment, and quota against period of the parent, so a raised
// upper bound is written first.
func (c *Cgroup) ordered(sets []setting) []setting {
	lim := slices.IndexFunc(sets, func(s setting) bool { return s.file == "memory.limit_in_bytes" })
	swp := slices.IndexFunc(sets, func(s setting) bool { return s.file == "memory.memsw.limit_in_bytes" })
	if lim < 0 || swp < 0 {
		return sets
	}
	p, err := c.file(sets[swp])
	if err != nil {
		return sets
	}
	now, err := readFile(p)
	if err != nil {
		return sets
	}
	cur, err1 := strconv.ParseInt(now, 10, 64)
	want, err2 := strconv.ParseInt(sets[swp].value, 10, 64)
	if err1 != nil || err2 != nil || want >= 0 && want < cur {
		return sets
	}
	sets = slices.Clone(sets)
	sets[lim], sets[swp] = sets[swp], sets[lim]
	return sets
}
