package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// setting is one value to write. controller is looked up among the v1
// hierarchies; v2 has one directory.
type setting struct {
	controller string
	file       string
	value      string
	field      string // of the spec, for errors

	alt, altValue string // where the kernel has no file

	// lacking says, as a warning, what is left out where the kernel has no file; it
	// is for limits that only refine others. quiet leaves it out without a word.
	lacking string
	quiet   bool

	// key is the first word of the setting's line in a file with one line for each
	// device, and unset the value of a device that has no line.
	key, unset string

	done *bool // of an update: written, so that it must be taken back

	// merge makes the value of an update from what the file shows.
	merge func(now string) string
}

// plan is what the resources of a spec come to on this host.
type plan struct {
	settings []setting
	rules    []rule    // for v2
	devices  deviceSet // for v1
	warnings []string
}

// plan checks all of r before anything is made or changed.
func (c *Cgroup) plan(r *specs.LinuxResources) (*plan, error) {
	p := &plan{}
	var err error
	if p.rules, err = rules(r.Devices); err != nil {
		return nil, err
	}
	if c.host.V2() {
		p.settings, p.warnings, err = settingsV2(r)
		return p, err
	}
	if p.devices, err = deviceSetOf(p.rules); err != nil {
		return nil, err
	}
	if p.settings, p.warnings, err = c.host.settingsV1(r); err != nil {
		return nil, err
	}
	for _, s := range p.settings {
		if _, err := c.dirOf(s); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// dirOf returns the directory of a setting's file.
func (c *Cgroup) dirOf(s setting) (dir, error) {
	if c.host.V2() {
		return c.dirs[0], nil
	}
	for _, d := range c.dirs {
		if d.Has(s.controller) {
			return d, nil
		}
	}
	return dir{}, fmt.Errorf("%s: the %s controller of cgroup v1 is not mounted: %w", s.field, s.controller, errdefs.ErrFailedPrecondition)
}

// apply writes the settings. Some depend on each other (memory <= memory + swap,
// burst <= quota, quota / period <= the parent's), and which must go first
// depends on the values there are; one that is refused is written again after
// the others.
func (c *Cgroup) apply(sets []setting, warnings *[]string) error {
	for len(sets) > 0 {
		var again []setting
		var refused error
		for _, s := range sets {
			err := c.write(s, warnings)
			switch {
			case err == nil:
				if s.done != nil {
					*s.done = true
				}
			case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EBUSY):
				again = append(again, s)
				if refused == nil {
					refused = err
				}
			default:
				return err
			}
		}
		if len(again) == len(sets) {
			return refused
		}
		sets = again
	}
	return nil
}

func (c *Cgroup) write(s setting, warnings *[]string) error {
	d, err := c.dirOf(s)
	if err != nil {
		return err
	}
	err = writeFile(filepath.Join(d.path, s.file), s.value)
	if s.alt != "" && errors.Is(err, fs.ErrNotExist) {
		err = writeFile(filepath.Join(d.path, s.alt), s.altValue)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		if c.host.V2() {
			// A controller that the parent withholds is an error, whatever its file is for.
			if why := c.host.missing(d, s.file); why != nil && !s.quiet && !tolerated(s) {
				return fmt.Errorf("%s: %w", s.field, why)
			}
		}
		if s.lacking != "" {
			*warnings = append(*warnings, s.field+": "+s.lacking)
		}
		if s.lacking != "" || s.quiet {
			return nil
		}
		return fmt.Errorf("%s: this kernel has no file %s: %w: %w", s.field, s.file, err, errdefs.ErrFailedPrecondition)
	case s.lacking != "" && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, errNotSupp)):
		*warnings = append(*warnings, s.field+": "+s.lacking)
		return nil
	case s.file == "memory.limit_in_bytes" && errors.Is(err, unix.EBUSY):
		usage, _ := readFile(filepath.Join(d.path, "memory.usage_in_bytes"))
		return fmt.Errorf("%s: %w (bytes in use that can not be reclaimed: %s)", s.field, err, usage)
	}
	return fmt.Errorf("%s: %w", s.field, err)
}

// errNotSupp is the kernel's ENOTSUPP, which is not for user space but gets there.
const errNotSupp = unix.Errno(524)

// tolerated reports a setting that changes nothing where its controller is
// missing: no limit.
func tolerated(s setting) bool { return s.value == "max" }

// Update changes limits and device rules in place; unset fields keep their
// value, and device rules, when there are any, replace all those before. When one
// write is refused the earlier ones are taken back. warnings are as in Create.
func (c *Cgroup) Update(r *specs.LinuxResources) (warnings []string, err error) {
	if c.pending != nil {
		return nil, fmt.Errorf("cgroup %s: update: it is not made before Adopt: %w", c.path, errdefs.ErrFailedPrecondition)
	}
	p, err := c.plan(r)
	if err != nil {
		return nil, err
	}
	if err := c.checkUsage(r.Memory); err != nil {
		return nil, err
	}
	back, err := c.snapshot(p.settings)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			back = slices.DeleteFunc(back, func(s setting) bool { return !*s.done })
			err = errors.Join(err, c.apply(back, new([]string)))
		}
	}()
	if err := c.apply(p.settings, &p.warnings); err != nil {
		return nil, err
	}
	if c.unit != nil {
		// systemd writes what it was told by its own rounding; ours, which the kernel
		// has just taken, is written over it.
		if err := c.tellUnit(r); err != nil {
			return nil, err
		}
		if err := c.apply(p.settings, new([]string)); err != nil {
			return nil, err
		}
	}
	if len(r.Devices) > 0 {
		if err := c.replaceDevices(p); err != nil {
			return nil, err
		}
	}
	return p.warnings, nil
}

// tellUnit updates the unit. On v1 systemd writes device rules by denying
// everything first: the container stands still meanwhile.
func (c *Cgroup) tellUnit(r *specs.LinuxResources) error {
	r, err := c.withBandwidth(r)
	if err != nil {
		return err
	}
	if len(r.Devices) == 0 || c.host.V2() {
		return c.unit.Update(r)
	}
	return c.whileFrozen(func() error { return c.unit.Update(r) })
}

// withBandwidth completes quota and period by each other as the kernel has them:
// systemd knows only the share that both make.
func (c *Cgroup) withBandwidth(r *specs.LinuxResources) (*specs.LinuxResources, error) {
	if r.CPU == nil || set(r.CPU.Quota) == set(r.CPU.Period) {
		return r, nil
	}
	dir, err := c.controllerDir("cpu")
	if err != nil {
		return nil, err
	}
	var text string
	if c.host.V2() {
		text, err = readFile(filepath.Join(dir, "cpu.max"))
	} else {
		var period string
		text, err = readFile(filepath.Join(dir, "cpu.cfs_quota_us"))
		if err == nil {
			period, err = readFile(filepath.Join(dir, "cpu.cfs_period_us"))
			text += " " + period
		}
	}
	if err != nil {
		return nil, err
	}
	now := strings.Fields(strings.Replace(text, "max", "-1", 1))
	if len(now) != 2 {
		return nil, fmt.Errorf("cgroup %s: quota and period %q: %w", dir, text, errdefs.ErrUnavailable)
	}
	quota, qerr := strconv.ParseInt(now[0], 10, 64)
	period, perr := strconv.ParseUint(now[1], 10, 64)
	if err := errors.Join(qerr, perr); err != nil {
		return nil, fmt.Errorf("cgroup %s: quota and period: %w", dir, err)
	}
	full, cpu := *r, *r.CPU
	cpu.Quota, cpu.Period = &quota, &period
	full.CPU = &cpu
	return &full, nil
}

// snapshot returns the settings that undo sets once they are done, and completes those of sets that
// depend on what is there.
func (c *Cgroup) snapshot(sets []setting) ([]setting, error) {
	var back []setting
	for i := range sets {
		s := &sets[i]
		d, err := c.dirOf(*s)
		if err != nil {
			return nil, err
		}
		file := s.file
		was, err := readFile(filepath.Join(d.path, file))
		if s.alt != "" && errors.Is(err, fs.ErrNotExist) {
			file = s.alt
			was, err = readFile(filepath.Join(d.path, file))
		}
		if errors.Is(err, fs.ErrNotExist) && c.Exists() {
			continue // the write says whether that matters
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.field, err)
		}
		if s.merge != nil {
			s.value = s.merge(was)
		}
		if v, ok := s.revert(was); ok {
			s.done = new(bool)
			back = append(back, setting{controller: s.controller, file: file, value: v, field: s.field, done: s.done})
		}
	}
	slices.Reverse(back)
	return back, nil
}

// revert turns what a file shows into what it takes to have it so again.
func (s setting) revert(shown string) (string, bool) {
	if s.key != "" {
		for line := range strings.Lines(shown) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == s.key {
				return strings.TrimSpace(line), true
			}
		}
		return s.key + " " + s.unset, s.unset != ""
	}
	if s.file == "memory.oom_control" {
		for line := range strings.Lines(shown) {
			if v, ok := strings.CutPrefix(line, "oom_kill_disable "); ok {
				return strings.TrimSpace(v), true
			}
		}
	}
	return shown, true
}

// checkUsage refuses a limit below what is in use, for an update that asks for
// this check: the kernel would kill for it on v2.
func (c *Cgroup) checkUsage(m *specs.LinuxMemory) error {
	if m == nil || m.CheckBeforeUpdate == nil || !*m.CheckBeforeUpdate {
		return nil
	}
	d, err := c.controllerDir("memory")
	if err != nil {
		return err
	}
	file := "memory.usage_in_bytes"
	if c.host.V2() {
		file = "memory.current"
	}
	text, err := readFile(filepath.Join(d, file))
	if err != nil {
		return fmt.Errorf("linux.resources.memory.checkBeforeUpdate: %w", err)
	}
	usage, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return fmt.Errorf("linux.resources.memory.checkBeforeUpdate: %s: %w", file, err)
	}
	for field, limit := range map[string]*int64{"limit": m.Limit, "swap": m.Swap} {
		if limit != nil && *limit > 0 && *limit <= usage {
			return fmt.Errorf("linux.resources.memory.%s %d: not above the %d bytes in use (checkBeforeUpdate): %w", field, *limit, usage, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// hasFile asks the hierarchy's root, where memory.memsw shows as well.
func (h *Host) hasFile(controller, file string) bool {
	for _, c := range h.V1 {
		if c.Has(controller) {
			var st unix.Stat_t
			return unix.Stat(filepath.Join(c.Mount, file), &st) == nil
		}
	}
	return false
}
