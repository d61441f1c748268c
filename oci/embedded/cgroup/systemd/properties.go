package systemd

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	sd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

func property(name string, value any) sd.Property {
	return sd.Property{Name: name, Value: dbus.MakeVariant(value)}
}

const infinity = uint64(math.MaxUint64)

// Versions of systemd from which a property can be set.
const (
	hasQuotaPeriod = 242
	hasAllowedCPUs = 244
	hasIdle        = 252 // CPUWeight=idle, which is 0 on the bus
	hasOOMPolicy   = 253 // of scopes
)

// properties are the limits that systemd knows, so that it does not undo them
// when it next writes the unit's files. The others are the file system's alone.
func (d *Driver) properties(r *specs.LinuxResources) (out []sd.Property, err error) {
	add := func(name string, value any) { out = append(out, property(name, value)) }
	if m := r.Memory; m != nil && !d.host.V2() {
		if set(m.Limit) {
			add("MemoryLimit", uint64(*m.Limit))
		}
	} else if m != nil {
		if set(m.Limit) {
			add("MemoryMax", uint64(*m.Limit)) // -1 is infinity
		}
		if set(m.Reservation) {
			add("MemoryLow", uint64(*m.Reservation))
		}
		swap, ok, err := cgroup.SwapV2(m)
		if err != nil {
			return nil, err
		}
		if ok {
			add("MemorySwapMax", uint64(swap))
		}
	}
	if c := r.CPU; c != nil {
		cpu, err := d.cpu(c)
		if err != nil {
			return nil, err
		}
		out = append(out, cpu...)
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		add("TasksMax", tasks(*p.Limit))
	}
	if b := r.BlockIO; b != nil && set(b.Weight) {
		if d.host.V2() {
			add("IOWeight", cgroup.IOWeight(*b.Weight))
		} else {
			add("BlockIOWeight", uint64(*b.Weight))
		}
	}
	unified, err := d.unified(r.Unified)
	if err != nil {
		return nil, err
	}
	return merge(out, unified), nil
}

// merge puts later properties in the place of earlier ones of the same name: the
// files of cgroup v2 by name win over the other fields.
func merge(base, over []sd.Property) []sd.Property {
	for _, p := range over {
		base = slices.DeleteFunc(base, func(b sd.Property) bool { return b.Name == p.Name })
		base = append(base, p)
	}
	return base
}

func (d *Driver) cpu(c *specs.LinuxCPU) (out []sd.Property, err error) {
	idle := false
	if d.host.V2() && set(c.Idle) {
		if idle, err = d.atLeast(hasIdle); err != nil {
			return nil, err
		}
	}
	switch {
	case idle:
		out = append(out, property("CPUWeight", uint64(0)))
	case set(c.Shares) && d.host.V2():
		out = append(out, property("CPUWeight", cgroup.Weight(*c.Shares)))
	case set(c.Shares):
		out = append(out, property("CPUShares", *c.Shares))
	}
	var quota int64
	var period uint64
	if c.Quota != nil {
		quota = *c.Quota
	}
	if c.Period != nil {
		period = *c.Period
	}
	bandwidth, err := d.bandwidth(quota, period)
	if err != nil {
		return nil, err
	}
	out = append(out, bandwidth...)
	for _, set := range []struct{ field, property, list string }{{"cpus", "AllowedCPUs", c.Cpus}, {"mems", "AllowedMemoryNodes", c.Mems}} {
		more, err := d.cpuset("linux.resources.cpu."+set.field, set.property, set.list)
		if err != nil {
			return nil, err
		}
		out = append(out, more...)
	}
	return out, nil
}

// bandwidth converts quota and period (microseconds; 0 is not set) to time for
// each second, which systemd keeps in whole percents: it is rounded up, so that a
// limit in the file system fits below it.
func (d *Driver) bandwidth(quota int64, period uint64) (out []sd.Property, err error) {
	if quota == 0 && period == 0 {
		return nil, nil
	}
	if period != 0 {
		ok, err := d.atLeast(hasQuotaPeriod)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, property("CPUQuotaPeriodUSec", period))
		}
	} else {
		period = 100_000 // the kernel's default
	}
	perSecond := infinity
	if quota > 0 {
		const percent = 10_000
		perSecond = (uint64(quota)*1_000_000/period + percent - 1) / percent * percent
	}
	return append(out, property("CPUQuotaPerSecUSec", perSecond)), nil
}

func (d *Driver) cpuset(field, name, list string) ([]sd.Property, error) {
	if list == "" {
		return nil, nil
	}
	bits, err := bitmap(list)
	if err != nil {
		return nil, fmt.Errorf("%s %q: %w: %w", field, list, err, errdefs.ErrInvalidArgument)
	}
	ok, err := d.atLeast(hasAllowedCPUs)
	if err != nil || !ok {
		return nil, err
	}
	return []sd.Property{property(name, bits)}, nil
}

// unified translates files of cgroup v2 by name; what systemd has no property for
// is the file system's alone.
func (d *Driver) unified(files map[string]string) (out []sd.Property, err error) {
	simple := map[string]string{
		"memory.high": "MemoryHigh", "memory.low": "MemoryLow", "memory.min": "MemoryMin", "memory.max": "MemoryMax",
		"memory.swap.max": "MemorySwapMax", "pids.max": "TasksMax", "cpu.weight": "CPUWeight",
	}
	for file, value := range files {
		field := fmt.Sprintf("linux.resources.unified[%s]", file)
		value = strings.TrimSpace(value)
		var more []sd.Property
		switch {
		case file == "cpu.weight" && strings.TrimSpace(files["cpu.idle"]) == "1":
			// without effect: see cpu.idle
		case simple[file] != "":
			v := infinity
			if value != "max" {
				if v, err = strconv.ParseUint(value, 10, 64); err != nil {
					return nil, fmt.Errorf("%s: %w: %w", field, err, errdefs.ErrInvalidArgument)
				}
			}
			if file == "pids.max" {
				v = max(v, 1)
			}
			more = []sd.Property{property(simple[file], v)}
		case file == "cpu.idle" && value == "1":
			ok, err := d.atLeast(hasIdle)
			if err != nil {
				return nil, err
			}
			if ok {
				more = []sd.Property{property("CPUWeight", uint64(0))}
			}
		case file == "cpu.max":
			f := strings.Fields(value)
			quota, period := int64(-1), uint64(100_000)
			if len(f) > 0 && f[0] != "max" {
				quota, err = strconv.ParseInt(f[0], 10, 64)
			}
			if err == nil && len(f) == 2 {
				period, err = strconv.ParseUint(f[1], 10, 64)
			}
			if err != nil || len(f) < 1 || len(f) > 2 || period == 0 {
				return nil, fmt.Errorf("%s: %q: want \"QUOTA PERIOD\": %w", field, value, errdefs.ErrInvalidArgument)
			}
			more, err = d.bandwidth(quota, period)
		case file == "cpuset.cpus":
			more, err = d.cpuset(field, "AllowedCPUs", value)
		case file == "cpuset.mems":
			more, err = d.cpuset(field, "AllowedMemoryNodes", value)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, more...)
	}
	return out, nil
}

// oomPolicy tells systemd what memory.oom.group says, which it takes only when a
// scope is made.
func (d *Driver) oomPolicy(r *specs.LinuxResources) ([]sd.Property, error) {
	policy := map[string]string{"0": "continue", "1": "kill"}[strings.TrimSpace(r.Unified["memory.oom.group"])]
	if policy == "" {
		return nil, nil
	}
	ok, err := d.atLeast(hasOOMPolicy)
	if err != nil || !ok {
		return nil, err
	}
	return []sd.Property{property("OOMPolicy", policy)}, nil
}

// deviceProperties has systemd's own rules of cgroup v1, which it writes again
// now and then, agree with ours. It knows lists of what is allowed only, and no
// minor number of every major one: where ours are others it denies more than
// they do until ours are written over its own.
func deviceProperties(in []specs.LinuxDeviceCgroup) ([]sd.Property, error) {
	type entry struct{ Path, Access string }
	devices, all, err := cgroup.AllowedDevices(in)
	if err != nil {
		return nil, err
	}
	if all {
		return []sd.Property{property("DeviceAllow", []entry{}), property("DevicePolicy", "auto")}, nil
	}
	allow := []entry{}
	for _, d := range devices {
		kind := map[byte]string{'b': "block", 'c': "char"}[d.Kind]
		switch {
		case d.Major < 0 && d.Minor < 0:
			allow = append(allow, entry{kind + "-*", d.Access})
		case d.Major < 0:
		case d.Minor < 0:
			allow = append(allow, entry{fmt.Sprintf("%s-%d", kind, d.Major), d.Access}) // systemd 240
		default:
			allow = append(allow, entry{fmt.Sprintf("/dev/%s/%d:%d", kind, d.Major, d.Minor), d.Access})
		}
	}
	// An empty list clears what was there; a list adds to it.
	return []sd.Property{property("DeviceAllow", []entry{}), property("DevicePolicy", "strict"), property("DeviceAllow", allow)}, nil
}

// tasks is TasksMax: systemd takes no 0.
func tasks(limit int64) uint64 {
	switch {
	case limit < 0:
		return infinity
	case limit == 0:
		return 1
	}
	return uint64(limit)
}

// bitmap converts a list such as "0-2,7" to systemd's bits, lowest first.
func bitmap(list string) ([]byte, error) {
	var out []byte
	numbers, err := cgroup.ParseList(list)
	if err != nil {
		return nil, err
	}
	for _, n := range numbers {
		for len(out) <= int(n/8) {
			out = append(out, 0)
		}
		out[n/8] |= 1 << (n % 8)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no number in it")
	}
	return out, nil
}

// set returns whether an optional number is there; zero is "not set".
func set[T comparable](p *T) bool {
	var zero T
	return p != nil && *p != zero
}
