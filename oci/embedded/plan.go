package embedded

import (
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded/seccomp"
)

// nsMode says where a container's namespace of one kind comes from.
type nsMode int

const (
	nsHost nsMode = iota // the runtime's own
	nsNew
	nsJoin
)

// nsPlan is one namespace.
type nsPlan struct {
	mode nsMode
	path string // nsJoin by path
}

// plan is a checked spec.
type plan struct {
	spec       *specs.Spec
	ns         map[specs.LinuxNamespaceType]nsPlan
	maps       idMaps // of the container's user namespace; of one that is joined known after Create
	cgroupPath string
	mounts     []mount
	propagate  unix.MountAttr // of the root mount; empty to leave it private
	recursive  bool           // propagate, below it too
	filter     *seccomp.Filter
	sysctls    []sysctl
	warnings   []string
	refused    error // of a container that was found again: why its spec is not taken any more
}

// user tells whether the container has a user namespace that is not ours.
func (p *plan) user() bool { return p.ns[specs.UserNamespace].mode != nsHost }

// ownMounts tells whether the container has a mount namespace of its own.
func (p *plan) ownMounts() bool { return p.ns[specs.MountNamespace].mode == nsNew }

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// plan checks the spec: everything the runtime would have to leave out is an
// error that names the field.
func (r *Runtime) plan(req oci.CreateRequest) (*plan, error) {
	s := req.Spec
	if s == nil || s.Linux == nil {
		return nil, invalid("linux: missing")
	}
	p := &plan{spec: s, ns: map[specs.LinuxNamespaceType]nsPlan{}}
	if err := p.namespaces(req); err != nil {
		return nil, err
	}
	if err := p.checkLinux(); err != nil {
		return nil, err
	}
	if s.Linux.CgroupsPath != "" {
		if err := r.cgroups.Check(s.Linux.CgroupsPath); err != nil {
			return nil, err
		}
		p.cgroupPath = s.Linux.CgroupsPath
	} else if s.Linux.Resources != nil && !emptyResources(s.Linux.Resources) {
		return nil, invalid("linux.cgroupsPath: missing, but linux.resources asks for limits")
	}
	if s.Process == nil && !req.PodInit {
		return nil, invalid("process: missing")
	}
	if s.Process != nil {
		if err := checkProcess(s.Process, !req.PodInit); err != nil {
			return nil, err
		}
		if _, _, err := capsOf(s.Process.Capabilities, r.caps); err != nil {
			return nil, err
		}
		if p.ns[specs.UserNamespace].mode == nsNew {
			if err := p.checkIDs(&s.Process.User); err != nil {
				return nil, err
			}
		}
	}
	for i, m := range s.Mounts {
		pm, err := parseMount(fmt.Sprintf("mounts[%d]", i), m)
		if err != nil {
			return nil, err
		}
		p.mounts = append(p.mounts, pm)
	}
	if v := s.Linux.RootfsPropagation; v != "" {
		f, ok := propagations[strings.TrimPrefix(v, "r")]
		if !ok {
			return nil, invalid("linux.rootfsPropagation %q: want shared, slave, private or unbindable, with an r for recursive", v)
		}
		p.propagate.Propagation, p.recursive = f, strings.HasPrefix(v, "r")
	}
	for _, set := range [][]string{s.Linux.MaskedPaths, s.Linux.ReadonlyPaths} {
		for _, x := range set {
			if !path.IsAbs(x) {
				return nil, invalid("linux.maskedPaths/readonlyPaths: %q: want an absolute path", x)
			}
		}
	}
	var err error
	if p.sysctls, err = p.checkSysctls(s.Linux.Sysctl); err != nil {
		return nil, err
	}
	if s.Linux.Seccomp != nil {
		if p.filter, err = r.filters.get(s.Linux.Seccomp, req.SeccompDigest); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func emptyResources(r *specs.LinuxResources) bool {
	for _, d := range r.Devices {
		if d.Allow {
			return false
		}
	}
	return r.Memory == nil && r.CPU == nil && r.Pids == nil && r.BlockIO == nil && r.Network == nil &&
		len(r.HugepageLimits) == 0 && len(r.Rdma) == 0 && len(r.Unified) == 0
}

// checkLinux checks the fields that are used long after Create.
func (p *plan) checkLinux() error {
	l := p.spec.Linux
	if l.MountLabel != "" && !selinuxEnabled() {
		return fmt.Errorf("linux.mountLabel: SELinux is not enabled on this host: %w", errdefs.ErrFailedPrecondition)
	}
	if l.Personality != nil {
		if _, err := personalityOf(l.Personality); err != nil {
			return err
		}
	}
	if l.MemoryPolicy != nil {
		if _, _, _, err := memoryPolicy(l.MemoryPolicy); err != nil {
			return err
		}
	}
	if err := checkNetDevices(l.NetDevices); err != nil {
		return err
	}
	if len(l.NetDevices) > 0 && p.ns[specs.NetworkNamespace].mode == nsHost {
		return invalid("linux.netDevices: set, but linux.namespaces has no network namespace")
	}
	if len(l.TimeOffsets) > 0 {
		if p.ns[specs.TimeNamespace].mode != nsNew {
			return invalid("linux.timeOffsets: set, but linux.namespaces has no new time namespace")
		}
		for clock := range l.TimeOffsets {
			if clock != "monotonic" && clock != "boottime" {
				return invalid("linux.timeOffsets: clock %q: want monotonic or boottime", clock)
			}
		}
	}
	return p.checkHooks()
}

func selinuxEnabled() bool {
	_, err := os.Stat("/sys/fs/selinux/enforce")
	return err == nil
}

func (p *plan) namespaces(req oci.CreateRequest) error {
	for i, n := range p.spec.Linux.Namespaces {
		field := fmt.Sprintf("linux.namespaces[%d]", i)
		if _, twice := p.ns[n.Type]; twice {
			return invalid("%s: %s is listed twice", field, n.Type)
		}
		switch n.Type {
		case specs.PIDNamespace, specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.CgroupNamespace,
			specs.MountNamespace, specs.UserNamespace, specs.TimeNamespace:
		default:
			return invalid("%s.type %q: unknown", field, n.Type)
		}
		np := nsPlan{mode: nsNew}
		if n.Path != "" {
			if !path.IsAbs(n.Path) {
				return invalid("%s.path %q: want an absolute path", field, n.Path)
			}
			np = nsPlan{mode: nsJoin, path: n.Path}
		}
		p.ns[n.Type] = np
	}
	for t := range req.Namespaces {
		p.ns[t] = nsPlan{mode: nsJoin}
	}
	if err := p.sharedMounts(req); err != nil {
		return err
	}
	if err := p.userNamespace(); err != nil {
		return err
	}
	if (p.spec.Hostname != "" || p.spec.Domainname != "") && p.ns[specs.UTSNamespace].mode == nsHost {
		return invalid("hostname: set, but linux.namespaces has no uts namespace")
	}
	return nil
}

// sharedMounts checks a container without a mount namespace of its own: what it
// mounted or masked, the namespace's other processes would find.
func (p *plan) sharedMounts(req oci.CreateRequest) error {
	if p.ownMounts() || req.PodInit {
		return nil
	}
	l := p.spec.Linux
	field := ""
	switch {
	case len(p.spec.Mounts) > 0:
		field = "mounts"
	case len(l.MaskedPaths) > 0:
		field = "linux.maskedPaths"
	case len(l.ReadonlyPaths) > 0:
		field = "linux.readonlyPaths"
	case len(l.Devices) > 0:
		field = "linux.devices"
	case l.RootfsPropagation != "":
		field = "linux.rootfsPropagation"
	case p.spec.Root != nil && p.spec.Root.Readonly:
		field = "root.readonly"
	case len(req.Rootfs.Lowers) > 0:
		field = "root: an overlay"
	case p.user():
		field = "linux.namespaces: a user namespace"
	default:
		return nil
	}
	return invalid("%s: needs a mount namespace of its own; add {\"type\": \"mount\"} to linux.namespaces", field)
}

// userNamespace checks the mappings.
func (p *plan) userNamespace() error {
	l := p.spec.Linux
	given := idMaps{l.UIDMappings, l.GIDMappings}
	if !p.user() && !given.empty() {
		return invalid("linux.uidMappings, linux.gidMappings: set, but linux.namespaces has no user namespace")
	}
	if p.ns[specs.UserNamespace].mode != nsNew {
		return nil
	}
	if err := checkRanges("linux.uidMappings", l.UIDMappings); err != nil {
		return err
	}
	if err := checkRanges("linux.gidMappings", l.GIDMappings); err != nil {
		return err
	}
	p.maps = given
	return nil
}

// checkIDs checks that a process's ids exist in the user namespace.
func (p *plan) checkIDs(u *specs.User) error {
	if _, ok := p.maps.uid(u.UID); !ok {
		return invalid("process.user.uid %d: not in linux.uidMappings", u.UID)
	}
	for i, g := range append([]uint32{u.GID}, u.AdditionalGids...) {
		if _, ok := p.maps.gid(g); ok {
			continue
		}
		if i == 0 {
			return invalid("process.user.gid %d: not in linux.gidMappings", g)
		}
		return invalid("process.user.additionalGids: %d is not in linux.gidMappings", g)
	}
	return nil
}
