package spec

import (
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// runtimeNodes are made by every OCI runtime by itself (runtime-spec, default
// devices); a second node of the name would be in its way. ptmx must lead to the
// container's own devpts, not to the host's.
var runtimeNodes = []string{
	"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/console", "/dev/ptmx",
}

// devices sets the device nodes beyond the runtime's default ones, and the
// device cgroup's rules: everything is denied, mknod included (invariant I16),
// but the default nodes, pseudo terminals and what the request names.
func devices(in Input, s *specs.Spec) error {
	privileged := in.Container.Security.Privileged
	s.Linux.Resources.Devices = deviceRules(privileged)
	at := map[string]int{} // container path -> index in s.Linux.Devices
	put := func(target string, d HostDevice) {
		mode, uid, gid := d.Mode, d.UID, d.GID
		n := specs.LinuxDevice{Path: target, Type: d.Type, Major: d.Major, Minor: d.Minor, FileMode: &mode, UID: &uid, GID: &gid}
		if i, ok := at[target]; ok {
			s.Linux.Devices[i] = n
			return
		}
		at[target] = len(s.Linux.Devices)
		s.Linux.Devices = append(s.Linux.Devices, n)
	}
	if privileged {
		all, err := in.Node.Devices("/dev")
		if err != nil {
			return fmt.Errorf("devices of the node: %w", err)
		}
		for _, d := range all {
			if !slices.Contains(runtimeNodes, d.Path) {
				put(d.Path, d)
			}
		}
	}
	for i, want := range in.Container.Devices {
		field := fmt.Sprintf("devices[%d]", i)
		if want.Permissions == "" || strings.Trim(want.Permissions, "rwm") != "" || repeats(want.Permissions) {
			return fmt.Errorf("%s.permissions %q: not one or more of r, w and m: %w", field, want.Permissions, errdefs.ErrInvalidArgument)
		}
		if !path.IsAbs(want.HostPath) {
			return fmt.Errorf("%s.host_path %q: not an absolute path: %w", field, want.HostPath, errdefs.ErrInvalidArgument)
		}
		target := want.ContainerPath
		if target == "" {
			target = want.HostPath
		}
		if !path.IsAbs(target) || strings.IndexByte(target, 0) >= 0 {
			return fmt.Errorf("%s.container_path %q: not an absolute path: %w", field, target, errdefs.ErrInvalidArgument)
		}
		found, err := in.Node.Devices(want.HostPath)
		if err != nil {
			return fmt.Errorf("%s.host_path %q: %w; name a device of the node, or a directory with some: %w", field, want.HostPath, err, errdefs.ErrInvalidArgument)
		}
		if len(found) == 0 {
			return fmt.Errorf("%s.host_path %q: a directory without devices; name one with some: %w", field, want.HostPath, errdefs.ErrInvalidArgument)
		}
		for _, d := range found {
			below, err := filepath.Rel(want.HostPath, d.Path)
			if err != nil {
				return fmt.Errorf("%s: %w", field, err)
			}
			put(path.Join(target, below), d)
			if !privileged { // everything is allowed already
				major, minor := d.Major, d.Minor
				s.Linux.Resources.Devices = append(s.Linux.Resources.Devices,
					specs.LinuxDeviceCgroup{Allow: true, Type: d.Type, Major: &major, Minor: &minor, Access: want.Permissions})
			}
		}
	}
	return nil
}

func repeats(s string) bool {
	b := []byte(s)
	slices.Sort(b)
	return len(slices.Compact(b)) != len(s)
}

func deviceRules(privileged bool) []specs.LinuxDeviceCgroup {
	if privileged {
		return []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	rules := []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	allow := func(major int64, minors ...int64) {
		if len(minors) == 0 {
			rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &major, Access: "rwm"})
		}
		for _, minor := range minors {
			rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &major, Minor: &minor, Access: "rwm"})
		}
	}
	allow(1, 3, 5, 7, 8, 9) // null, zero, full, random, urandom
	allow(5, 0, 1, 2)       // tty, console, ptmx
	allow(136)              // pseudo terminals
	return rules
}
