// Package spec turns a container's config, its image's config and the node's
// policy into an OCI runtime spec. Build is pure: what it must ask the node
// (where a path leads, which devices a directory holds, a seccomp profile's
// text) goes through the functions of Input.Node, and what the node can do is
// in Input.Host.
//
// Image labels, annotations and volumes never select anything here (invariant
// I10); pod annotations neither.
package spec

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/sandbox/model"
)

// Input is all that a spec is made from. Build reads it and keeps nothing of it.
type Input struct {
	ID    id.Container
	PodID id.Pod

	Pod       *model.PodConfig
	Container *model.ContainerConfig
	Image     ocispec.ImageConfig
	Identity  model.Identity // of the first process
	Home      string         // for HOME where neither image nor request sets it; "" is "/"

	// Namespaces are the modes in force. A pod's or target's namespace appears in
	// the spec without a path: the caller passes its descriptor to the runtime.
	Namespaces model.Namespaces
	CgroupPath string // OCI cgroupsPath
	Hostname   string // for HOSTNAME, and the UTS namespace unless that is the node's

	// Files of the pod on the host; "" leaves the mount out.
	HostsPath, HostnamePath, ResolvConfPath string
	// Shm is the source of /dev/shm: "fd:NAME" or a host path. With the node's IPC
	// namespace it is ignored and the host's /dev/shm is used.
	Shm string
	// ImageVolumes holds the source (host path or "fd:NAME") of each image volume
	// by its index in Container.Mounts, image_sub_path already resolved in its root.
	ImageVolumes map[int]string

	Policy Policy
	Host   Host
	Node   Node
}

// Policy is what the node's operator sets for all containers.
type Policy struct {
	// PidsLimit is the most processes of a container; 0 is no limit.
	PidsLimit int64
	// Rlimits are set on every container's process; those not named are inherited
	// from the daemon.
	Rlimits []specs.POSIXRlimit
	// TolerateMissingHugetlb ignores hugepage limits on a host that cannot set them.
	TolerateMissingHugetlb bool
}

// Build returns the OCI spec of a container. Errors name the field of the
// request and the remedy: errdefs.ErrInvalidArgument for a bad request,
// errdefs.ErrFailedPrecondition for one that this node cannot serve.
func Build(in Input) (*specs.Spec, error) {
	if in.Pod == nil || in.Container == nil {
		return nil, fmt.Errorf("spec: pod and container config are needed: %w", errdefs.ErrInvalidArgument)
	}
	if in.Container.Security.Privileged && !in.Pod.Privileged {
		return nil, fmt.Errorf("security_context.privileged: the container asks for it and its pod sandbox does not have it; set it on both: %w", errdefs.ErrInvalidArgument)
	}
	in.Node = in.Node.orReal()
	s := &specs.Spec{
		Version:     specs.Version,
		Root:        &specs.Root{Path: "rootfs", Readonly: in.Container.Security.ReadonlyRootfs},
		Annotations: annotations(in),
		Linux:       &specs.Linux{CgroupsPath: in.CgroupPath},
	}
	for _, step := range []func(Input, *specs.Spec) error{
		namespaces, process, resources, devices, mounts, security,
	} {
		if err := step(in, s); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// annotations are the keys by which sandboxed runtimes (gVisor, Kata) recognise
// a pod's containers. Nothing of the request's or the image's own annotations is
// passed on: runtimes act on some of them.
func annotations(in Input) map[string]string {
	return map[string]string{
		"io.kubernetes.cri.container-type":    "container",
		"io.kubernetes.cri.container-name":    in.Container.Meta.Name,
		"io.kubernetes.cri.image-name":        in.Container.Image.Image,
		"io.kubernetes.cri.sandbox-id":        string(in.PodID),
		"io.kubernetes.cri.sandbox-name":      in.Pod.Meta.Name,
		"io.kubernetes.cri.sandbox-namespace": in.Pod.Meta.Namespace,
		"io.kubernetes.cri.sandbox-uid":       in.Pod.Meta.UID,
	}
}

// namespaces lists the namespaces that are not the node's.
func namespaces(in Input, s *specs.Spec) error {
	ns := in.Namespaces
	add := func(t specs.LinuxNamespaceType) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: t})
	}
	add(specs.MountNamespace)
	for _, m := range []struct {
		field string
		mode  model.NamespaceMode
		kinds []specs.LinuxNamespaceType
	}{
		// The pod's host name belongs to its network: with the node's network the
		// UTS namespace is the node's too.
		{"network", ns.Network, []specs.LinuxNamespaceType{specs.NetworkNamespace, specs.UTSNamespace}},
		{"ipc", ns.IPC, []specs.LinuxNamespaceType{specs.IPCNamespace}},
	} {
		switch m.mode {
		case model.NamespacePod:
			for _, k := range m.kinds {
				add(k)
			}
		case model.NamespaceNode:
		default:
			return fmt.Errorf("namespace_options.%s: mode %d is not supported; use POD or NODE: %w", m.field, m.mode, errdefs.ErrInvalidArgument)
		}
	}
	switch ns.PID {
	case model.NamespacePod, model.NamespaceContainer, model.NamespaceTarget:
		add(specs.PIDNamespace)
	case model.NamespaceNode:
	default:
		return fmt.Errorf("namespace_options.pid: unknown mode %d: %w", ns.PID, errdefs.ErrInvalidArgument)
	}
	if ns.Network == model.NamespacePod {
		s.Hostname = in.Hostname
	}
	// On v1 a cgroup namespace would hide nothing that the read-only binds show,
	// and a privileged container is meant to see the host's tree.
	if in.Host.CgroupV2 && !in.Container.Security.Privileged {
		add(specs.CgroupNamespace)
	}
	if ns.User == nil {
		return nil
	}
	if ns.PID == model.NamespaceNode {
		// Nobody but the namespace's owner may mount its procfs.
		return fmt.Errorf("namespace_options.pid: NODE is not possible in a pod with a user namespace; use POD or CONTAINER: %w", errdefs.ErrInvalidArgument)
	}
	add(specs.UserNamespace)
	// The runtime compares them with those of the namespace that it is given.
	s.Linux.UIDMappings, s.Linux.GIDMappings = ociMappings(ns.User.UIDs), ociMappings(ns.User.GIDs)
	return nil
}

func ociMappings(in ...model.IDMapping) []specs.LinuxIDMapping {
	var out []specs.LinuxIDMapping
	for _, m := range in {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.Container, HostID: m.Host, Size: m.Length})
	}
	return out
}

// checkIdentity refuses users and groups that the pod's user namespace lacks.
func checkIdentity(u *model.UserNamespace, who model.Identity) error {
	if u == nil {
		return nil
	}
	if !u.UIDs.Has(who.UID) {
		return fmt.Errorf("security_context.run_as_user: user %d (of the request or the image) is not in the pod's user namespace, which has %d users: %w", who.UID, u.UIDs.Length, errdefs.ErrInvalidArgument)
	}
	for _, g := range withPrimary(who) {
		if !u.GIDs.Has(g) {
			return fmt.Errorf("security_context.run_as_group, supplemental_groups: group %d (of the request or the image) is not in the pod's user namespace, which has %d groups: %w", g, u.GIDs.Length, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func process(in Input, s *specs.Spec) error {
	c, who := in.Container, in.Identity
	if err := checkIdentity(in.Namespaces.User, who); err != nil {
		return err
	}
	args, err := arguments(in)
	if err != nil {
		return err
	}
	env, err := environment(in)
	if err != nil {
		return err
	}
	cwd, err := workingDir(in)
	if err != nil {
		return err
	}
	oom, err := oomScoreAdj(c.Resources.OOMScoreAdj, in.Host)
	if err != nil {
		return err
	}
	s.Process = &specs.Process{
		Terminal:        c.TTY,
		User:            specs.User{UID: who.UID, GID: who.GID, AdditionalGids: withPrimary(who)},
		Args:            args,
		Env:             env,
		Cwd:             cwd,
		NoNewPrivileges: c.Security.NoNewPrivs,
		OOMScoreAdj:     &oom,
		Rlimits:         append([]specs.POSIXRlimit(nil), in.Policy.Rlimits...),
	}
	s.Process.Capabilities, err = capabilities(c.Security, in.Host.Capabilities)
	return err
}

// withPrimary lists all groups, the primary one first: a process without its
// primary group in the list escapes permissions that deny that group (CVE-2022-2989).
func withPrimary(id model.Identity) []uint32 {
	out := []uint32{id.GID}
	for _, g := range id.Groups {
		if g != id.GID {
			out = append(out, g)
		}
	}
	return out
}

// arguments merges command and args with the image's entrypoint and cmd: a
// command replaces both of the image's, args alone replace cmd.
func arguments(in Input) ([]string, error) {
	c, img := in.Container, in.Image
	var out []string
	switch {
	case len(c.Command) > 0:
		out = append(append(out, c.Command...), c.Args...)
	case len(c.Args) > 0:
		out = append(append(out, img.Entrypoint...), c.Args...)
	default:
		out = append(append(out, img.Entrypoint...), img.Cmd...)
	}
	if len(out) == 0 || out[0] == "" {
		return nil, fmt.Errorf("command: neither the request nor the image names a program; set command: %w", errdefs.ErrInvalidArgument)
	}
	for i, a := range out {
		if strings.IndexByte(a, 0) >= 0 {
			return nil, fmt.Errorf("command: argument %d holds a NUL byte; remove it: %w", i, errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}

func workingDir(in Input) (string, error) {
	d := in.Container.WorkingDir
	if d == "" {
		d = in.Image.WorkingDir
	}
	if strings.IndexByte(d, 0) >= 0 {
		return "", fmt.Errorf("working_dir: holds a NUL byte; remove it: %w", errdefs.ErrInvalidArgument)
	}
	return path.Clean("/" + d), nil
}

func oomScoreAdj(v int64, h Host) (int, error) {
	if v < -1000 || v > 1000 {
		return 0, fmt.Errorf("resources.oom_score_adj %d: not between -1000 and 1000: %w", v, errdefs.ErrInvalidArgument)
	}
	// Lowering it below the daemon's own takes CAP_SYS_RESOURCE.
	return max(int(v), h.MinOOMScoreAdj), nil
}
