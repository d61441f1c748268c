package cgroup

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// deviceKey names the devices of a v1 exception; -1 is any number.
type deviceKey struct {
	kind         byte // 'b', 'c'
	major, minor int64
}

// deviceSet is what the v1 devices controller keeps of a list of rules: a
// default, and the exceptions from it with their access bits.
type deviceSet struct {
	allow  bool
	except map[deviceKey]int32
}

// deviceSetOf reduces rules to what the v1 controller can hold. It knows no
// order of rules: an exception that is itself cut into is refused, because the
// kernel would ignore the cut and leave a device open.
func deviceSetOf(rs []rule) (deviceSet, error) {
	s := deviceSet{except: map[deviceKey]int32{}}
	for _, r := range rs {
		if r.kind == 'a' {
			s = deviceSet{allow: r.allow, except: map[deviceKey]int32{}}
			continue
		}
		k, bits := deviceKey{r.kind, r.major, r.minor}, accessBits(r.access)
		if r.allow != s.allow {
			s.except[k] |= bits
			continue
		}
		for e, have := range s.except {
			switch {
			case have&bits == 0 || !k.meets(e):
			case k.covers(e):
				if s.except[e] &^= bits; s.except[e] == 0 {
					delete(s.except, e)
				}
			default:
				return s, fmt.Errorf("linux.resources.devices: rule %q cuts into the wider %q before it, which cgroup v1 can not hold: list the devices one by one: %w",
					r.v1(), e.v1(have), errdefs.ErrInvalidArgument)
			}
		}
	}
	return s, nil
}

// meets reports whether some device is in both.
func (k deviceKey) meets(o deviceKey) bool {
	return k.kind == o.kind && (k.major < 0 || o.major < 0 || k.major == o.major) && (k.minor < 0 || o.minor < 0 || k.minor == o.minor)
}

// covers reports whether every device of o is in k.
func (k deviceKey) covers(o deviceKey) bool {
	return k.kind == o.kind && (k.major < 0 || k.major == o.major) && (k.minor < 0 || k.minor == o.minor)
}

// v1 is the exception as devices.allow and devices.deny take it.
func (k deviceKey) v1(bits int32) string {
	return rule{kind: k.kind, major: k.major, minor: k.minor, access: accessText(bits)}.v1()
}

// accessText is the way back of accessBits.
func accessText(bits int32) string {
	access := make([]byte, 0, 3)
	for i, bit := range [3]int32{unix.BPF_DEVCG_ACC_READ, unix.BPF_DEVCG_ACC_WRITE, unix.BPF_DEVCG_ACC_MKNOD} {
		if bits&bit != 0 {
			access = append(access, "rwm"[i])
		}
	}
	return string(access)
}

// AllowedDevice is one entry of a list of allowed devices; -1 is any number.
type AllowedDevice struct {
	Kind         byte // 'b', 'c'
	Major, Minor int64
	Access       string // of "rwm"
}

// AllowedDevices returns what linux.resources.devices allow beside nothing; all
// tells that it is everything. For rules that allow by default and deny some, the
// list is empty and all is false.
func AllowedDevices(in []specs.LinuxDeviceCgroup) (list []AllowedDevice, all bool, err error) {
	rs, err := rules(in)
	if err != nil {
		return nil, false, err
	}
	s, err := deviceSetOf(rs)
	if err != nil || s.allow {
		return nil, err == nil && len(s.except) == 0, err
	}
	for _, k := range s.keys() {
		list = append(list, AllowedDevice{k.kind, k.major, k.minor, accessText(s.except[k])})
	}
	return list, false, nil
}

// parseDeviceSet reads devices.list. A cgroup that allows by default does not
// show its exceptions.
func parseDeviceSet(text string) (deviceSet, error) {
	s := deviceSet{except: map[deviceKey]int32{}}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if f[0] == "a" {
			return deviceSet{allow: true}, nil
		}
		if len(f) != 3 || f[0] != "b" && f[0] != "c" {
			return s, fmt.Errorf("devices.list: line %q", line)
		}
		major, minor, _ := strings.Cut(f[1], ":")
		k := deviceKey{kind: f[0][0]}
		var err, merr error
		k.major, err = parseNumber(major)
		k.minor, merr = parseNumber(minor)
		if err := errors.Join(err, merr); err != nil {
			return s, fmt.Errorf("devices.list: line %q: %w", line, err)
		}
		s.except[k] |= accessBits(f[2])
	}
	return s, nil
}

func parseNumber(text string) (int64, error) {
	if text == "*" {
		return -1, nil
	}
	return strconv.ParseInt(text, 10, 64)
}

// deviceWrite is one write to devices.allow or devices.deny.
type deviceWrite struct {
	allow bool
	value string
}

// writes lists what takes a cgroup that has just been reset to the set's default
// to the set, in a fixed order.
func (s deviceSet) writes() []deviceWrite {
	out := []deviceWrite{{s.allow, "a"}}
	for _, k := range s.keys() {
		out = append(out, deviceWrite{!s.allow, k.v1(s.except[k])})
	}
	return out
}

func (s deviceSet) keys() []deviceKey {
	return slices.SortedFunc(maps.Keys(s.except), func(a, b deviceKey) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.major, b.major), cmp.Compare(a.minor, b.minor))
	})
}

// difference lists what takes a set that denies by default to another: first
// what is allowed anew, then what is denied, so that what both allow always is.
func (s deviceSet) difference(to deviceSet) []deviceWrite {
	var out []deviceWrite
	for _, k := range to.keys() {
		if more := to.except[k] &^ s.except[k]; more != 0 {
			out = append(out, deviceWrite{true, k.v1(more)})
		}
	}
	for _, k := range s.keys() {
		if less := s.except[k] &^ to.except[k]; less != 0 {
			out = append(out, deviceWrite{false, k.v1(less)})
		}
	}
	return out
}

// setDevices puts the device rules on a new cgroup.
func (c *Cgroup) setDevices(p *plan) error {
	if c.host.V2() {
		return attachDeviceFilter(c.dirs[0].path, p.rules)
	}
	return c.writeDevices(p.devices.writes(), nil)
}

// replaceDevices replaces the device rules of a running container.
func (c *Cgroup) replaceDevices(p *plan) error {
	if c.host.V2() {
		return replaceDeviceFilter(c.dirs[0].path, p.rules)
	}
	to := p.devices
	at, err := c.devicesDir()
	if err != nil {
		return err
	}
	text, err := readFile(filepath.Join(at, "devices.list"))
	if err != nil {
		return fmt.Errorf("linux.resources.devices: %w", err)
	}
	now, err := parseDeviceSet(text)
	if err != nil {
		return fmt.Errorf("linux.resources.devices: %s: %w", at, err)
	}
	if !now.allow && !to.allow {
		return c.writeDevices(now.difference(to), to.difference(now))
	}
	// A change of the default wipes the exceptions: for a moment everything is
	// denied, or allowed, so the container stands still meanwhile. Exceptions of a
	// default that allows can not be read, so they can not be put back either; the
	// container then has fewer devices, never more.
	back := now.writes()
	if now.allow {
		back = nil
	}
	return c.whileFrozen(func() error { return c.writeDevices(to.writes(), back) })
}

func (c *Cgroup) devicesDir() (string, error) {
	for _, d := range c.v1() {
		if d.Has("devices") {
			return d.path, nil
		}
	}
	return "", fmt.Errorf("linux.resources.devices: the devices controller of cgroup v1 is not mounted: %w", errdefs.ErrFailedPrecondition)
}

// writeDevices writes rules, which the kernel takes one by one, with the files
// opened once; back is written when one is refused.
func (c *Cgroup) writeDevices(writes, back []deviceWrite) error {
	at, err := c.devicesDir()
	if err != nil {
		return err
	}
	allow, err := openControl(at + "/devices.allow")
	if err != nil {
		return fmt.Errorf("linux.resources.devices: %w", err)
	}
	defer allow.close()
	deny, err := openControl(at + "/devices.deny")
	if err != nil {
		return fmt.Errorf("linux.resources.devices: %w", err)
	}
	defer deny.close()
	put := func(w deviceWrite) error {
		if w.allow {
			return allow.write(w.value)
		}
		return deny.write(w.value)
	}
	for i, w := range writes {
		err := put(w)
		if err == nil {
			continue
		}
		err = fmt.Errorf("linux.resources.devices: %w", err)
		if errors.Is(err, errdefs.ErrPermissionDenied) {
			err = fmt.Errorf("%w (or the parent cgroup does not allow the device)", err)
		}
		if w.value == "a" && errors.Is(err, errdefs.ErrInvalidArgument) {
			err = fmt.Errorf("%w (the kernel changes the default only while the cgroup has no child cgroups: remove them first)", err)
		}
		if i > 0 {
			for _, b := range back {
				err = errors.Join(err, put(b))
			}
		}
		return err
	}
	return nil
}
