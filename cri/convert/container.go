package convert

import (
	"path/filepath"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/sandbox"
)

// ContainerConfig reads the config of CreateContainer. Windows fields are
// ignored; of the request's sandbox_config nothing is used, because the engine
// keeps the one that the pod sandbox was made with.
func ContainerConfig(c *runtimeapi.ContainerConfig) (*sandbox.ContainerConfig, error) {
	switch {
	case c == nil:
		return nil, Required("config")
	case c.Metadata.GetName() == "":
		return nil, Required("config.metadata.name")
	case c.Image.GetImage() == "":
		return nil, Required("config.image.image")
	}
	if err := logPath(c.LogPath); err != nil {
		return nil, err
	}
	if c.WorkingDir != "" && !strings.HasPrefix(c.WorkingDir, "/") {
		return nil, invalid("config.working_dir", "%q is not an absolute path", c.WorkingDir)
	}
	out := &sandbox.ContainerConfig{
		Meta:        sandbox.ContainerMeta{Name: c.Metadata.Name, Attempt: c.Metadata.Attempt},
		Image:       imageSpec(c.Image),
		Command:     c.Command,
		Args:        c.Args,
		WorkingDir:  c.WorkingDir,
		Labels:      c.Labels,
		Annotations: c.Annotations,
		LogPath:     c.LogPath,
		Stdin:       c.Stdin,
		StdinOnce:   c.StdinOnce,
		TTY:         c.Tty,
	}
	var err error
	if out.Env, err = environment(c.Envs); err != nil {
		return nil, err
	}
	for i, m := range c.Mounts {
		v, err := mount("config.mounts["+itoa(i)+"]", m)
		if err != nil {
			return nil, err
		}
		out.Mounts = append(out.Mounts, v)
	}
	for i, d := range c.Devices {
		v, err := device("config.devices["+itoa(i)+"]", d)
		if err != nil {
			return nil, err
		}
		out.Devices = append(out.Devices, v)
	}
	for i, d := range c.CDIDevices {
		if d.GetName() == "" {
			return nil, Required("config.CDI_devices[" + itoa(i) + "].name")
		}
		out.CDIDevices = append(out.CDIDevices, d.Name)
	}
	if out.StopSignal, err = signalName("config.stop_signal", c.StopSignal); err != nil {
		return nil, err
	}
	r, err := Resources("config.linux.resources", c.Linux.GetResources())
	if err != nil {
		return nil, err
	}
	if r != nil {
		out.Resources = *r
	}
	out.Security, err = Security("config.linux.security_context", c.Linux.GetSecurityContext())
	return out, err
}

// logPath must stay below the pod's log directory: the file is made by root.
func logPath(p string) error {
	if p != "" && !filepath.IsLocal(p) {
		return invalid("config.log_path", "%q leaves the pod's log_directory; give a path relative to it", p)
	}
	return nil
}

func environment(in []*runtimeapi.KeyValue) ([]sandbox.KeyValue, error) {
	var out []sandbox.KeyValue
	for i, e := range in {
		if e.GetKey() == "" || strings.ContainsAny(e.Key, "=\x00") {
			return nil, invalid("config.envs["+itoa(i)+"].key", "%q is not a variable name; it must not be empty and have no '=' or NUL", e.GetKey())
		}
		for _, b := range e.Value {
			if b == 0 {
				return nil, invalid("config.envs["+itoa(i)+"].value", "the value of %s has a NUL byte, which no process can be given", e.Key)
			}
		}
		out = append(out, sandbox.KeyValue{Key: e.Key, Value: e.Value})
	}
	return out, nil
}

func imageSpec(s *runtimeapi.ImageSpec) sandbox.ImageSpec {
	return sandbox.ImageSpec{
		Image:          s.GetImage(),
		UserSpecified:  s.GetUserSpecifiedImage(),
		RuntimeHandler: s.GetRuntimeHandler(),
		Annotations:    s.GetAnnotations(),
	}
}

// ContainerFilter reads the filter of ListContainers; nil selects all.
func ContainerFilter(f *runtimeapi.ContainerFilter) (sandbox.ContainerFilter, error) {
	out := sandbox.ContainerFilter{ID: f.GetId(), Pod: f.GetPodSandboxId(), Labels: f.GetLabelSelector()}
	if f.GetState() != nil {
		if _, ok := runtimeapi.ContainerState_name[int32(f.State.State)]; !ok {
			return out, invalid("filter.state", "unknown state %d", int32(f.State.State))
		}
		s := sandbox.ContainerState(f.State.State)
		out.State = &s
	}
	return out, nil
}

// StatsFilter reads the filter of ListContainerStats; nil selects all.
func StatsFilter(f *runtimeapi.ContainerStatsFilter) sandbox.ContainerFilter {
	return sandbox.ContainerFilter{ID: f.GetId(), Pod: f.GetPodSandboxId(), Labels: f.GetLabelSelector()}
}

// imageOf is the image as the kubelet knows it. It asks for containers by image
// id; people want to see a name, and the kubelet shows this one.
func imageOf(c *sandbox.ContainerStatus) *runtimeapi.ImageSpec {
	s := c.Config.Image
	out := &runtimeapi.ImageSpec{
		Image:              s.Image,
		UserSpecifiedImage: s.UserSpecified,
		RuntimeHandler:     s.RuntimeHandler,
		Annotations:        s.Annotations,
	}
	if c.ImageName != "" && (s.Image == c.ImageID || "sha256:"+s.Image == c.ImageID) {
		out.Image = c.ImageName
	}
	return out
}

func containerMetadata(m sandbox.ContainerMeta) *runtimeapi.ContainerMetadata {
	return &runtimeapi.ContainerMetadata{Name: m.Name, Attempt: m.Attempt}
}

// ContainerItem is one row of ListContainers.
func ContainerItem(c *sandbox.ContainerStatus) *runtimeapi.Container {
	return &runtimeapi.Container{
		Id:           string(c.ID),
		PodSandboxId: string(c.Pod),
		Metadata:     containerMetadata(c.Config.Meta),
		Image:        imageOf(c),
		ImageRef:     c.ImageRef,
		ImageId:      c.ImageID,
		State:        runtimeapi.ContainerState(c.State),
		CreatedAt:    c.CreatedAt.UnixNano(),
		Labels:       c.Config.Labels,
		Annotations:  c.Config.Annotations,
	}
}

// ContainerStatus is the answer of ContainerStatus. Its mounts are the requested
// ones only, in their original form.
func ContainerStatus(c *sandbox.ContainerStatus) *runtimeapi.ContainerStatus {
	out := &runtimeapi.ContainerStatus{
		Id:          string(c.ID),
		Metadata:    containerMetadata(c.Config.Meta),
		State:       runtimeapi.ContainerState(c.State),
		CreatedAt:   nano(c.CreatedAt),
		StartedAt:   nano(c.StartedAt),
		FinishedAt:  nano(c.FinishedAt),
		ExitCode:    c.ExitCode,
		Image:       imageOf(c),
		ImageRef:    c.ImageRef,
		ImageId:     c.ImageID,
		Reason:      c.Reason,
		Message:     c.Message,
		Labels:      c.Config.Labels,
		Annotations: c.Config.Annotations,
		LogPath:     c.LogPath,
		Resources:   &runtimeapi.ContainerResources{Linux: ResourcesProto(&c.Resources)},
		StopSignal:  signalEnum(c.StopSignal),
	}
	for i := range c.Config.Mounts {
		out.Mounts = append(out.Mounts, mountProto(&c.Config.Mounts[i]))
	}
	user := &runtimeapi.LinuxContainerUser{Uid: int64(c.Identity.UID), Gid: int64(c.Identity.GID)}
	for _, g := range c.Identity.Groups {
		user.SupplementalGroups = append(user.SupplementalGroups, int64(g))
	}
	out.User = &runtimeapi.ContainerUser{Linux: user}
	return out
}

// nano is CRI's time: nanoseconds, and 0 for what has not happened.
func nano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}
