package convert

import (
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/sandbox"
)

func itoa(i int) string { return strconv.Itoa(i) }

// mount reads one mount. Sources are looked at by the engine when the container
// is created, not here.
func mount(field string, m *runtimeapi.Mount) (sandbox.Mount, error) {
	var out sandbox.Mount
	switch {
	case m == nil:
		return out, Required(field)
	case m.ContainerPath == "":
		return out, Required(field + ".container_path")
	case m.Image.GetImage() != "" && m.HostPath != "":
		return out, invalid(field+".host_path", "given together with image; give one of them")
	case m.Image.GetImage() == "" && m.HostPath == "":
		return out, invalid(field+".host_path", "missing; a mount needs host_path or image")
	case m.Image.GetImage() == "" && m.ImageSubPath != "":
		return out, invalid(field+".image_sub_path", "given without image")
	case m.HostPath != "" && !strings.HasPrefix(m.HostPath, "/"):
		return out, invalid(field+".host_path", "%q is not an absolute path", m.HostPath)
	case strings.ContainsRune(m.ContainerPath, 0) || strings.ContainsRune(m.HostPath, 0):
		return out, invalid(field, "a path has a NUL byte")
	case (len(m.UidMappings) > 0) != (len(m.GidMappings) > 0):
		return out, invalid(field+".uidMappings", "%d uidMappings and %d gidMappings; give both or none", len(m.UidMappings), len(m.GidMappings))
	case len(m.MountOptions) > 0:
		return out, invalid(field+".mount_options", "not offered by this version (features.mount_options is false); drop them")
	case m.Image.GetImage() != "" && !m.Readonly:
		return out, invalid(field+".readonly", "false; image mounts are always read-only, set it")
	}
	switch m.Propagation {
	case runtimeapi.MountPropagation_PROPAGATION_PRIVATE, runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
	default:
		return out, invalid(field+".propagation", "unknown propagation %d", int32(m.Propagation))
	}
	if m.RecursiveReadOnly {
		if !m.Readonly {
			return out, invalid(field+".recursive_read_only", "needs readonly: true")
		}
		if m.Propagation != runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
			return out, invalid(field+".recursive_read_only", "needs propagation PROPAGATION_PRIVATE, got %s", m.Propagation)
		}
	}
	uids, err := idMappings(field+".uidMappings", m.UidMappings)
	if err != nil {
		return out, err
	}
	gids, err := idMappings(field+".gidMappings", m.GidMappings)
	if err != nil {
		return out, err
	}
	return sandbox.Mount{
		ContainerPath:     m.ContainerPath,
		HostPath:          m.HostPath,
		Readonly:          m.Readonly,
		RecursiveReadonly: m.RecursiveReadOnly,
		SELinuxRelabel:    m.SelinuxRelabel,
		Propagation:       sandbox.Propagation(m.Propagation),
		Image:             m.Image.GetImage(),
		ImageRef:          m.Image.GetImageRef(),
		ImageUser:         m.Image.GetUserSpecifiedImage(),
		ImageSubPath:      m.ImageSubPath,
		UIDMappings:       uids,
		GIDMappings:       gids,
	}, nil
}

// mountProto gives a mount back as it was asked for: the kubelet finds the
// termination message through the original host_path, and counts images in use
// by image.image.
func mountProto(m *sandbox.Mount) *runtimeapi.Mount {
	out := &runtimeapi.Mount{
		ContainerPath:     m.ContainerPath,
		HostPath:          m.HostPath,
		Readonly:          m.Readonly,
		RecursiveReadOnly: m.RecursiveReadonly,
		SelinuxRelabel:    m.SELinuxRelabel,
		Propagation:       runtimeapi.MountPropagation(m.Propagation),
		ImageSubPath:      m.ImageSubPath,
		UidMappings:       idMappingsProto(m.UIDMappings...),
		GidMappings:       idMappingsProto(m.GIDMappings...),
	}
	if m.Image != "" {
		out.Image = &runtimeapi.ImageSpec{Image: m.Image, ImageRef: m.ImageRef, UserSpecifiedImage: m.ImageUser}
	}
	return out
}

func device(field string, d *runtimeapi.Device) (sandbox.Device, error) {
	var out sandbox.Device
	switch {
	case d.GetHostPath() == "":
		return out, Required(field + ".host_path")
	case !strings.HasPrefix(d.HostPath, "/"):
		return out, invalid(field+".host_path", "%q is not an absolute path", d.HostPath)
	case d.Permissions == "" || strings.Trim(d.Permissions, "rwm") != "":
		return out, invalid(field+".permissions", "%q; use a combination of r, w and m", d.Permissions)
	}
	out = sandbox.Device{ContainerPath: d.ContainerPath, HostPath: d.HostPath, Permissions: d.Permissions}
	if out.ContainerPath == "" {
		out.ContainerPath = d.HostPath
	}
	return out, nil
}
