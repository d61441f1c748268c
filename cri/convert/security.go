package convert

import (
	"math"
	"path/filepath"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/sandbox"
)

// namespaces reads the namespace modes. A nil message is what the kubelet sends
// for a pod without a security context and means POD throughout. allowTarget is
// true for containers: only they can join another one's PID namespace.
func namespaces(field string, o *runtimeapi.NamespaceOption, allowTarget bool) (sandbox.Namespaces, error) {
	var n sandbox.Namespaces
	if o == nil {
		return n, nil
	}
	const shared = "use POD or NODE"
	for _, m := range []struct {
		name string
		mode runtimeapi.NamespaceMode
	}{{"network", o.Network}, {"ipc", o.Ipc}} {
		if m.mode != runtimeapi.NamespaceMode_POD && m.mode != runtimeapi.NamespaceMode_NODE {
			return n, invalid(field+"."+m.name, "mode %s is not possible; %s", m.mode, shared)
		}
	}
	switch o.Pid {
	case runtimeapi.NamespaceMode_POD, runtimeapi.NamespaceMode_CONTAINER, runtimeapi.NamespaceMode_NODE:
	case runtimeapi.NamespaceMode_TARGET:
		if !allowTarget {
			return n, invalid(field+".pid", "mode TARGET is for containers only; use POD, CONTAINER or NODE")
		}
		if o.TargetId == "" {
			return n, invalid(field+".target_id", "missing; pid mode TARGET needs the id of a running container of the same pod sandbox")
		}
		n.TargetID = id.Container(o.TargetId)
	default:
		return n, invalid(field+".pid", "unknown mode %d; use POD, CONTAINER, NODE or TARGET", int32(o.Pid))
	}
	var err error
	if n.User, err = userns(field+".userns_options", o.UsernsOptions); err != nil {
		return n, err
	}
	n.Network = sandbox.NamespaceMode(o.Network)
	n.PID = sandbox.NamespaceMode(o.Pid)
	n.IPC = sandbox.NamespaceMode(o.Ipc)
	return n, nil
}

// userns reads the user namespace; nil is the node's. So is a nil message: the API
// text says POD, but the kubelet sends nil for pods without user namespaces.
func userns(field string, u *runtimeapi.UserNamespace) (*sandbox.UserNamespace, error) {
	if u == nil {
		return nil, nil
	}
	switch u.Mode {
	case runtimeapi.NamespaceMode_NODE:
		if len(u.Uids) > 0 || len(u.Gids) > 0 {
			return nil, invalid(field, "mode NODE takes no id mappings; drop uids and gids")
		}
		return nil, nil
	case runtimeapi.NamespaceMode_POD:
	default:
		return nil, invalid(field+".mode", "%s is not possible; use POD or NODE", u.Mode)
	}
	var out sandbox.UserNamespace
	for _, x := range []struct {
		field string
		lines []*runtimeapi.IDMapping
		to    *sandbox.IDMapping
	}{{field + ".uids", u.Uids, &out.UIDs}, {field + ".gids", u.Gids, &out.GIDs}} {
		if len(x.lines) != 1 {
			return nil, invalid(x.field, "%d mappings; mode POD takes exactly one", len(x.lines))
		}
		lines, err := idMappings(x.field, x.lines)
		if err != nil {
			return nil, err
		}
		if *x.to = lines[0]; x.to.Container != 0 {
			return nil, invalid(x.field+"[0].container_id", "%d; the mapping must begin with 0, the pod's root", x.to.Container)
		}
	}
	return &out, nil
}

// idMappings reads ranges of ids.
func idMappings(field string, in []*runtimeapi.IDMapping) ([]sandbox.IDMapping, error) {
	var out []sandbox.IDMapping
	for i, m := range in {
		v := sandbox.IDMapping{Container: m.GetContainerId(), Host: m.GetHostId(), Length: m.GetLength()}
		at := field + "[" + itoa(i) + "]"
		if v.Length == 0 {
			return nil, invalid(at+".length", "0; give the number of ids")
		}
		// The last id stands for "none".
		if uint64(v.Container)+uint64(v.Length) > math.MaxUint32 || uint64(v.Host)+uint64(v.Length) > math.MaxUint32 {
			return nil, invalid(at, "goes beyond the last id, %d", uint32(math.MaxUint32-1))
		}
		out = append(out, v)
	}
	return out, nil
}

func idMappingsProto(in ...sandbox.IDMapping) []*runtimeapi.IDMapping {
	var out []*runtimeapi.IDMapping
	for _, m := range in {
		out = append(out, &runtimeapi.IDMapping{ContainerId: m.Container, HostId: m.Host, Length: m.Length})
	}
	return out
}

// usernsProto gives a user namespace back; nothing for the node's, as clients
// without user namespaces know it.
func usernsProto(u *sandbox.UserNamespace) *runtimeapi.UserNamespace {
	if u == nil {
		return nil
	}
	return &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: idMappingsProto(u.UIDs), Gids: idMappingsProto(u.GIDs)}
}

// profile reads a seccomp or AppArmor profile: the message, or else the
// deprecated string, which kubelets still send along with it. Neither gives nil.
// files is true where a Localhost reference is a file (seccomp).
func profile(field string, p *runtimeapi.SecurityProfile, legacy string, files bool) (*sandbox.Profile, error) {
	if p == nil {
		return legacyProfile(field, legacy, files)
	}
	out := &sandbox.Profile{Type: sandbox.ProfileType(p.ProfileType)}
	switch p.ProfileType {
	case runtimeapi.SecurityProfile_RuntimeDefault, runtimeapi.SecurityProfile_Unconfined:
		if p.LocalhostRef != "" {
			return nil, invalid(field+".localhost_ref", "given with profile_type %s; it belongs to Localhost only", p.ProfileType)
		}
		return out, nil
	case runtimeapi.SecurityProfile_Localhost:
		out.Ref = p.LocalhostRef
		return out, checkRef(field+".localhost_ref", out, files)
	}
	return nil, invalid(field+".profile_type", "unknown type %d; use RuntimeDefault, Unconfined or Localhost", int32(p.ProfileType))
}

func legacyProfile(field, s string, files bool) (*sandbox.Profile, error) {
	switch {
	case s == "":
		return nil, nil
	case s == "unconfined":
		return &sandbox.Profile{Type: sandbox.ProfileUnconfined}, nil
	case s == "runtime/default", s == "docker/default":
		return &sandbox.Profile{Type: sandbox.ProfileRuntimeDefault}, nil
	}
	ref, ok := strings.CutPrefix(s, "localhost/")
	if !ok {
		return nil, invalid(field, "unknown profile %q; use runtime/default, unconfined or localhost/<profile>", s)
	}
	out := &sandbox.Profile{Type: sandbox.ProfileLocalhost, Ref: ref}
	return out, checkRef(field, out, files)
}

func checkRef(field string, p *sandbox.Profile, files bool) error {
	switch {
	case p.Ref == "":
		return invalid(field, "missing; profile type Localhost needs it")
	case files && !filepath.IsAbs(p.Ref):
		return invalid(field, "%q is not an absolute path of a seccomp profile on the node", p.Ref)
	}
	return nil
}

func selinux(o *runtimeapi.SELinuxOption) *sandbox.SELinux {
	if o == nil || (o.User == "" && o.Role == "" && o.Type == "" && o.Level == "") {
		return nil
	}
	return &sandbox.SELinux{User: o.User, Role: o.Role, Type: o.Type, Level: o.Level}
}

// userID reads an optional uid or gid. The kernel's ids are 32 bits wide and
// the last one means "no id".
func userID(field string, v *runtimeapi.Int64Value) (*int64, error) {
	if v == nil {
		return nil, nil
	}
	if v.Value < 0 || v.Value >= math.MaxUint32 {
		return nil, invalid(field, "%d is not an id; use 0 to %d", v.Value, uint32(math.MaxUint32-1))
	}
	n := v.Value
	return &n, nil
}

func groups(field string, gs []int64) ([]int64, error) {
	for _, g := range gs {
		if _, err := userID(field, &runtimeapi.Int64Value{Value: g}); err != nil {
			return nil, err
		}
	}
	return append([]int64(nil), gs...), nil
}

// Security reads a container's security context; nil is an empty one.
func Security(field string, c *runtimeapi.LinuxContainerSecurityContext) (sandbox.Security, error) {
	var out sandbox.Security
	if c == nil {
		return out, nil
	}
	var err error
	if out.RunAsUser, err = userID(field+".run_as_user", c.RunAsUser); err != nil {
		return out, err
	}
	if out.RunAsGroup, err = userID(field+".run_as_group", c.RunAsGroup); err != nil {
		return out, err
	}
	switch {
	case c.RunAsUser != nil && c.RunAsUsername != "":
		return out, invalid(field+".run_as_username", "given together with run_as_user; give one of them")
	case c.RunAsGroup != nil && c.RunAsUser == nil && c.RunAsUsername == "":
		return out, invalid(field+".run_as_group", "given without a user; set run_as_user or run_as_username too")
	}
	if out.SupplementalGroups, err = groups(field+".supplemental_groups", c.SupplementalGroups); err != nil {
		return out, err
	}
	switch c.SupplementalGroupsPolicy {
	case runtimeapi.SupplementalGroupsPolicy_Merge, runtimeapi.SupplementalGroupsPolicy_Strict:
		out.StrictGroups = c.SupplementalGroupsPolicy == runtimeapi.SupplementalGroupsPolicy_Strict
	default:
		return out, invalid(field+".supplemental_groups_policy", "unknown policy %d; use Merge or Strict", int32(c.SupplementalGroupsPolicy))
	}
	if out.Namespaces, err = namespaces(field+".namespace_options", c.NamespaceOptions, true); err != nil {
		return out, err
	}
	//lint:ignore SA1019 older clients send only this one
	if out.Seccomp, err = profile(field+".seccomp", c.Seccomp, c.SeccompProfilePath, true); err != nil {
		return out, err
	}
	//lint:ignore SA1019 older clients send only this one
	if out.AppArmor, err = profile(field+".apparmor", c.Apparmor, c.ApparmorProfile, false); err != nil {
		return out, err
	}
	if p := c.Capabilities; p != nil {
		out.Capabilities = sandbox.Capabilities{Add: p.AddCapabilities, Drop: p.DropCapabilities, AddAmbient: p.AddAmbientCapabilities}
	}
	out.Privileged = c.Privileged
	out.SELinux = selinux(c.SelinuxOptions)
	out.RunAsUsername = c.RunAsUsername
	out.ReadonlyRootfs = c.ReadonlyRootfs
	out.NoNewPrivs = c.NoNewPrivs
	// Verbatim: an empty list means that nothing is masked (procMount Unmasked).
	out.MaskedPaths = c.MaskedPaths
	out.ReadonlyPaths = c.ReadonlyPaths
	return out, nil
}
