package embedded

import (
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded/cgroup"
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
	cgroupPath string
	mounts     []mount
	propagate  uint64 // of the root mount: MS_SHARED ..., 0 to leave it private
	filter     *seccomp.Filter
	sysctls    []sysctl
	warnings   []string
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func unsupported(field string) error {
	return fmt.Errorf("%s: not supported by the embedded runtime; remove it: %w", field, errdefs.ErrNotImplemented)
}

// plan checks the spec: everything the runtime would have to leave out is an
// error that names the field.
func (r *Runtime) plan(req oci.CreateRequest) (*plan, error) {
	s := req.Spec
	if s == nil || s.Linux == nil {
		return nil, invalid("linux: missing")
	}
	p := &plan{spec: s, ns: map[specs.LinuxNamespaceType]nsPlan{}}
	if err := refuse(s); err != nil {
		return nil, err
	}
	if err := p.namespaces(req); err != nil {
		return nil, err
	}
	if s.Linux.CgroupsPath != "" {
		var err error
		if p.cgroupPath, err = cgroup.Clean(s.Linux.CgroupsPath); err != nil {
			return nil, err
		}
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
		p.propagate = f
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
		if p.filter.Listener { // without its listener every notified call would fail
			return nil, unsupported("linux.seccomp: action SCMP_ACT_NOTIFY")
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
	return r.Memory == nil && r.CPU == nil && r.Pids == nil && r.BlockIO == nil && len(r.HugepageLimits) == 0 && len(r.Unified) == 0
}

// refuse names the parts of a spec that this runtime does not do.
func refuse(s *specs.Spec) error {
	l := s.Linux
	switch {
	//lint:ignore SA1019 prestart is refused like the rest
	case s.Hooks != nil && (len(s.Hooks.Prestart)+len(s.Hooks.CreateRuntime)+len(s.Hooks.CreateContainer)+
		len(s.Hooks.StartContainer)+len(s.Hooks.Poststart)+len(s.Hooks.Poststop) > 0):
		return unsupported("hooks")
	case len(l.UIDMappings) > 0 || len(l.GIDMappings) > 0:
		return unsupported("linux.uidMappings, linux.gidMappings")
	case len(l.TimeOffsets) > 0:
		return unsupported("linux.timeOffsets")
	case len(l.NetDevices) > 0:
		return unsupported("linux.netDevices")
	case l.IntelRdt != nil:
		return unsupported("linux.intelRdt")
	case l.MemoryPolicy != nil:
		return unsupported("linux.memoryPolicy")
	case l.Personality != nil && (l.Personality.Domain != specs.PerLinux || len(l.Personality.Flags) > 0):
		return unsupported("linux.personality")
	case l.Resources != nil && len(l.Resources.Rdma) > 0:
		return unsupported("linux.resources.rdma")
	case l.MountLabel != "" && !selinuxEnabled():
		return fmt.Errorf("linux.mountLabel: SELinux is not enabled on this host: %w", errdefs.ErrFailedPrecondition)
	case l.MountLabel != "":
		// Without the label on its files a confined process is denied its own root:
		// better to say so than to start it.
		return unsupported("linux.mountLabel")
	}
	return nil
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
		case specs.PIDNamespace, specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.CgroupNamespace:
		case specs.MountNamespace:
			if n.Path != "" {
				return unsupported(field + ": joining a mount namespace")
			}
		case specs.UserNamespace, specs.TimeNamespace:
			return unsupported(fmt.Sprintf("linux.namespaces: type %s", n.Type))
		default:
			return invalid("%s.type %q: unknown", field, n.Type)
		}
		np := nsPlan{mode: nsNew}
		if n.Path != "" {
			np = nsPlan{mode: nsJoin, path: n.Path}
		}
		p.ns[n.Type] = np
	}
	for t := range req.Namespaces {
		if t == specs.UserNamespace || t == specs.TimeNamespace || t == specs.MountNamespace {
			return unsupported(fmt.Sprintf("linux.namespaces: joining type %s", t))
		}
		p.ns[t] = nsPlan{mode: nsJoin}
	}
	if p.ns[specs.MountNamespace].mode != nsNew && !req.PodInit {
		return invalid("linux.namespaces: a container needs a mount namespace of its own; add {\"type\": \"mount\"}")
	}
	if (p.spec.Hostname != "" || p.spec.Domainname != "") && p.ns[specs.UTSNamespace].mode == nsHost {
		return invalid("hostname: set, but linux.namespaces has no uts namespace")
	}
	return nil
}

// sysctl is one value below /proc/sys.
type sysctl struct{ key, path, value string }

// ipcSysctls are per IPC namespace.
var ipcSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall",
	"kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
}

// checkSysctls lets through only what belongs to a namespace that the container
// does not share with the host (invariant I12).
func (p *plan) checkSysctls(in map[string]string) ([]sysctl, error) {
	var out []sysctl
	for _, k := range slices.Sorted(maps.Keys(in)) {
		// "net/ipv4/conf/eth0.1/x" is the form for names with dots.
		file := k
		if i := strings.IndexAny(k, "./"); i >= 0 && k[i] == '.' {
			file = strings.Map(func(c rune) rune {
				switch c {
				case '.':
					return '/'
				case '/':
					return '.'
				}
				return c
			}, k)
		}
		dotted := strings.ReplaceAll(file, "/", ".")
		if path.Clean(file) != file || strings.HasPrefix(file, "/") || strings.HasPrefix(file, "..") || strings.ContainsAny(k, "\x00\n") {
			return nil, invalid("linux.sysctl %q: not a name below /proc/sys", k)
		}
		var kind specs.LinuxNamespaceType
		switch {
		case strings.HasPrefix(file, "net/"):
			kind = specs.NetworkNamespace
		case slices.Contains(ipcSysctls, dotted), strings.HasPrefix(file, "fs/mqueue/"):
			kind = specs.IPCNamespace
		case file == "kernel/hostname", file == "kernel/domainname":
			kind = specs.UTSNamespace
		default:
			return nil, invalid("linux.sysctl %q: not in a namespace; it would change the host", k)
		}
		if p.ns[kind].mode == nsHost {
			return nil, invalid("linux.sysctl %q: needs a %s namespace that is not the host's", k, kind)
		}
		out = append(out, sysctl{k, file, in[k]})
	}
	return out, nil
}

func checkProcess(p *specs.Process, args bool) error {
	switch {
	case args && (len(p.Args) == 0 || p.Args[0] == ""):
		return invalid("process.args: empty")
	case args && !path.IsAbs(p.Cwd):
		return invalid("process.cwd %q: want an absolute path", p.Cwd)
	case p.Scheduler != nil:
		return unsupported("process.scheduler")
	case p.IOPriority != nil:
		return unsupported("process.ioPriority")
	case p.ExecCPUAffinity != nil:
		return unsupported("process.execCPUAffinity")
	case p.User.UID == ^uint32(0) || p.User.GID == ^uint32(0):
		return invalid("process.user: 4294967295 is no id")
	case p.User.Umask != nil && *p.User.Umask > 0o777:
		return invalid("process.user.umask %#o: want at most 0777", *p.User.Umask)
	case p.OOMScoreAdj != nil && (*p.OOMScoreAdj < -1000 || *p.OOMScoreAdj > 1000):
		return invalid("process.oomScoreAdj %d: want -1000 to 1000", *p.OOMScoreAdj)
	}
	for _, list := range [][]string{p.Args, p.Env, {p.Cwd, p.ApparmorProfile, p.SelinuxLabel}} {
		for _, v := range list {
			if strings.ContainsRune(v, 0) {
				return invalid("process: a string holds a NUL byte: %q", v)
			}
		}
	}
	for i, l := range p.Rlimits {
		if _, ok := rlimits[l.Type]; !ok {
			return invalid("process.rlimits[%d].type %q: unknown", i, l.Type)
		}
		if l.Soft > l.Hard {
			return invalid("process.rlimits[%d]: soft %d is above hard %d", i, l.Soft, l.Hard)
		}
	}
	return nil
}

var rlimits = map[string]int{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU,
	"RLIMIT_DATA": unix.RLIMIT_DATA, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE,
	"RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
}
