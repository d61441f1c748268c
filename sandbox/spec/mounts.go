package spec

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/sandbox/model"
)

// RROUnsupported starts the text of the error for a recursively read-only mount
// that this node cannot make: the kubelet matches on it (ErrRROUnsupported).
const RROUnsupported = "RROUnsupported"

// mounts sets the runtime's own mounts, each left out when the request mounts
// the same path, and the requested ones, parents before what is below them.
func mounts(in Input, s *specs.Spec) error {
	var requested []specs.Mount
	taken := map[string]bool{}
	for i, m := range in.Container.Mounts {
		field := fmt.Sprintf("mounts[%d]", i)
		target, err := target(field, m.ContainerPath)
		if err != nil {
			return err
		}
		taken[canonical(target)] = true
		var out specs.Mount
		if m.Image != "" {
			out, err = imageVolume(in, i, m)
		} else {
			out, err = bind(in, field, m, s.Linux)
		}
		if err != nil {
			return err
		}
		out.Destination = target
		requested = append(requested, out)
	}
	for _, m := range ownMounts(in) {
		if !taken[canonical(m.Destination)] {
			s.Mounts = append(s.Mounts, m)
		}
	}
	s.Mounts = append(s.Mounts, requested...)
	slices.SortStableFunc(s.Mounts, func(a, b specs.Mount) int { return depth(a.Destination) - depth(b.Destination) })
	return nil
}

func target(field, p string) (string, error) {
	t := path.Clean("/" + p)
	if p == "" || t == "/" || strings.IndexByte(p, 0) >= 0 {
		return "", fmt.Errorf("%s.container_path %q: must be a path below the root: %w", field, p, errdefs.ErrInvalidArgument)
	}
	return t, nil
}

// canonical makes /var/run and /run one: images link the former to the latter.
func canonical(p string) string {
	if rest, ok := strings.CutPrefix(p, "/var/run"); ok && (rest == "" || rest[0] == '/') {
		return "/run" + rest
	}
	return p
}

func depth(p string) int { return strings.Count(p, "/") }

// ownMounts are what every container gets.
func ownMounts(in Input) []specs.Mount {
	sec := in.Container.Security
	access := "ro"
	if sec.Privileged {
		access = "rw"
	}
	out := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", access}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: ptsOptions(in)},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", access}},
	}
	shm := in.Shm
	if in.Namespaces.IPC == model.NamespaceNode {
		shm = "/dev/shm"
	}
	if shm != "" {
		out = append(out, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: shm, Options: []string{"rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"}})
	}
	access = "rw"
	if sec.ReadonlyRootfs {
		access = "ro"
	}
	for _, f := range [][2]string{{"/etc/hosts", in.HostsPath}, {"/etc/hostname", in.HostnamePath}, {"/etc/resolv.conf", in.ResolvConfPath}} {
		if f[1] != "" {
			out = append(out, specs.Mount{Destination: f[0], Type: "bind", Source: f[1], Options: []string{"rbind", "rprivate", access, "nosuid", "nodev"}})
		}
	}
	return out
}

// ptsOptions give terminals to group 5, the tty group of every distribution, where
// the pod's user namespace has it.
func ptsOptions(in Input) []string {
	out := []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}
	if u := in.Namespaces.User; u == nil || u.GIDs.Has(ttyGroup) {
		out = append(out, fmt.Sprintf("gid=%d", ttyGroup))
	}
	return out
}

const ttyGroup = 5

// bind makes a requested bind mount. Its propagation is checked against the
// source's mount and raises the rootfs's.
func bind(in Input, field string, m model.Mount, l *specs.Linux) (specs.Mount, error) {
	if m.ImageSubPath != "" {
		return specs.Mount{}, fmt.Errorf("%s.image_sub_path: set without an image; clear it: %w", field, errdefs.ErrInvalidArgument)
	}
	if !path.IsAbs(m.HostPath) || strings.IndexByte(m.HostPath, 0) >= 0 {
		return specs.Mount{}, fmt.Errorf("%s.host_path %q: not an absolute path: %w", field, m.HostPath, errdefs.ErrInvalidArgument)
	}
	source, err := in.Node.Resolve(m.HostPath)
	if errors.Is(err, fs.ErrNotExist) {
		return specs.Mount{}, fmt.Errorf("%s.host_path %q: no such file or directory; create it on the node first: %w", field, m.HostPath, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return specs.Mount{}, fmt.Errorf("%s.host_path %q: %w: %w", field, m.HostPath, err, errdefs.ErrInvalidArgument)
	}
	prop, err := propagation(in.Node, field, m.Propagation, source, l)
	if err != nil {
		return specs.Mount{}, err
	}
	out := specs.Mount{Type: "bind", Source: source, Options: []string{"rbind", prop}}
	if len(m.UIDMappings) > 0 {
		// What is mounted below is mapped too, or it is an error: nothing may keep the
		// host's owners by oversight.
		out.Options = append(out.Options, "ridmap")
		out.UIDMappings, out.GIDMappings = ociMappings(m.UIDMappings...), ociMappings(m.GIDMappings...)
	}
	if m.RecursiveReadonly {
		switch {
		case !m.Readonly:
			return specs.Mount{}, fmt.Errorf("%s.recursive_read_only: needs readonly; set both: %w", field, errdefs.ErrInvalidArgument)
		case m.Propagation != model.PropagationPrivate:
			return specs.Mount{}, fmt.Errorf("%s.recursive_read_only: needs propagation PRIVATE: %w", field, errdefs.ErrInvalidArgument)
		case !in.Host.RecursiveReadonly:
			return specs.Mount{}, fmt.Errorf(RROUnsupported+": %s.recursive_read_only: needs Linux 5.12 or newer: %w", field, errdefs.ErrFailedPrecondition)
		}
		out.Options = append(out.Options, "ro", "rro")
		return out, nil
	}
	out.Options = append(out.Options, map[bool]string{true: "ro", false: "rw"}[m.Readonly])
	return out, nil
}

func propagation(n Node, field string, p model.Propagation, source string, l *specs.Linux) (string, error) {
	var option string
	switch p {
	case model.PropagationPrivate:
		return "rprivate", nil
	case model.PropagationHostToContainer:
		option = "rslave"
	case model.PropagationBidirectional:
		option = "rshared"
	default:
		return "", fmt.Errorf("%s.propagation %d: unknown: %w", field, p, errdefs.ErrInvalidArgument)
	}
	shared, slave, err := n.Propagation(source)
	if err != nil {
		return "", fmt.Errorf("%s.propagation: mount of %q: %w", field, source, err)
	}
	if !shared && (option == "rshared" || !slave) {
		return "", fmt.Errorf("%s.propagation: host_path %q is on a private mount of the node, nothing can propagate; make that mount shared (mount --make-rshared): %w", field, source, errdefs.ErrFailedPrecondition)
	}
	if option == "rshared" || l.RootfsPropagation == "" {
		l.RootfsPropagation = option
	}
	return option, nil
}

// podMappings reports whether a mount's mappings are those of the pod.
func podMappings(u *model.UserNamespace, m model.Mount) bool {
	return u != nil && len(m.UIDMappings) == 1 && m.UIDMappings[0] == u.UIDs && len(m.GIDMappings) == 1 && m.GIDMappings[0] == u.GIDs
}

// imageVolume mounts an image, always read-only.
func imageVolume(in Input, i int, m model.Mount) (specs.Mount, error) {
	field := fmt.Sprintf("mounts[%d]", i)
	switch {
	case m.HostPath != "":
		return specs.Mount{}, fmt.Errorf("%s: has both an image and host_path; give one: %w", field, errdefs.ErrInvalidArgument)
	case !m.Readonly:
		return specs.Mount{}, fmt.Errorf("%s.readonly: an image volume cannot be written; set readonly: %w", field, errdefs.ErrInvalidArgument)
	case m.Propagation != model.PropagationPrivate:
		return specs.Mount{}, fmt.Errorf("%s.propagation: an image volume has none; use PRIVATE: %w", field, errdefs.ErrInvalidArgument)
	case len(m.UIDMappings) > 0 && !podMappings(in.Namespaces.User, m):
		return specs.Mount{}, fmt.Errorf("%s.uidMappings, gidMappings: differ from the pod's user namespace, whose ids an image volume has; leave them out: %w", field, errdefs.ErrInvalidArgument)
	}
	source := in.ImageVolumes[i]
	if source == "" {
		return specs.Mount{}, fmt.Errorf("ImageVolumeMountFailed: %s: image %q is not mounted: %w", field, m.Image, errdefs.ErrFailedPrecondition)
	}
	return specs.Mount{Type: "bind", Source: source, Options: []string{"rbind", "rprivate", "ro", "nosuid", "nodev"}}, nil
}
