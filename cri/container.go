package cri

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/cri/convert"
	"github.com/berth-runtime/berth/sandbox"
)

// CreateContainer makes a container in a ready pod sandbox; nothing runs yet.
func (s *runtimeServer) CreateContainer(ctx context.Context, r *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	if r.PodSandboxId == "" {
		return nil, convert.Required("pod_sandbox_id")
	}
	c, err := convert.ContainerConfig(r.Config)
	if err != nil {
		return nil, err
	}
	pod, err := s.engine.Pod(r.PodSandboxId)
	if err != nil {
		return nil, err
	}
	if err := fitPod(c, pod.Config); err != nil {
		return nil, err
	}
	id, err := s.engine.CreateContainer(ctx, string(pod.ID), c)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: string(id)}, nil
}

// fitPod checks a container against its pod. A mode that is left out reads as
// POD and means the pod's own mode, whatever that is. Network and IPC are always
// the pod's; a PID namespace may also be the container's or another one's.
// Asking for the host's in a pod that is not on the host is an error.
func fitPod(c *sandbox.ContainerConfig, pod *sandbox.PodConfig) error {
	n := &c.Security.Namespaces
	const field = "config.linux.security_context"
	for _, m := range []struct {
		name string
		own  *sandbox.NamespaceMode
		pod  sandbox.NamespaceMode
	}{{"network", &n.Network, pod.Namespaces.Network}, {"ipc", &n.IPC, pod.Namespaces.IPC}, {"pid", &n.PID, pod.Namespaces.PID}} {
		if *m.own == sandbox.NamespaceNode && m.pod != sandbox.NamespaceNode {
			return &convert.FieldError{Field: field + ".namespace_options." + m.name,
				Text: "NODE, but the pod sandbox is not on the host's; run the sandbox with NODE or use POD"}
		}
		if *m.own == sandbox.NamespacePod {
			*m.own = m.pod
		}
	}
	if c.Security.Privileged && !pod.Privileged {
		return &convert.FieldError{Field: field + ".privileged",
			Text: "true, but the pod sandbox is not privileged; run the sandbox with linux.security_context.privileged"}
	}
	return nil
}

// StartContainer runs the container's process.
func (s *runtimeServer) StartContainer(ctx context.Context, r *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	if r.ContainerId == "" {
		return nil, convert.Required("container_id")
	}
	if err := s.engine.StartContainer(ctx, r.ContainerId); err != nil {
		return nil, err
	}
	return &runtimeapi.StartContainerResponse{}, nil
}

// StopContainer sends the stop signal, and kills after the timeout in seconds.
func (s *runtimeServer) StopContainer(ctx context.Context, r *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	if r.ContainerId == "" {
		return nil, convert.Required("container_id")
	}
	if err := s.engine.StopContainer(ctx, r.ContainerId, seconds(r.Timeout)); err != nil {
		return nil, err
	}
	return &runtimeapi.StopContainerResponse{}, nil
}

// seconds clamps a request's whole seconds to what a duration can hold.
func seconds(n int64) time.Duration {
	const most = math.MaxInt64 / int64(time.Second)
	return time.Duration(min(max(n, 0), most)) * time.Second
}

// RemoveContainer removes a container, by force if it runs; missing is success.
func (s *runtimeServer) RemoveContainer(ctx context.Context, r *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	if r.ContainerId == "" {
		return nil, convert.Required("container_id")
	}
	if err := s.engine.RemoveContainer(ctx, r.ContainerId); err != nil {
		return nil, err
	}
	return &runtimeapi.RemoveContainerResponse{}, nil
}

// ListContainers lists the containers that the filter selects, from memory.
func (s *runtimeServer) ListContainers(_ context.Context, r *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	f, err := convert.ContainerFilter(r.Filter)
	if err != nil {
		return nil, err
	}
	list := s.engine.ListContainers(f)
	out := &runtimeapi.ListContainersResponse{Containers: make([]*runtimeapi.Container, len(list))}
	for i, c := range list {
		out.Containers[i] = convert.ContainerItem(c)
	}
	return out, nil
}

// ContainerStatus describes one container.
func (s *runtimeServer) ContainerStatus(_ context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	if r.ContainerId == "" {
		return nil, convert.Required("container_id")
	}
	c, err := s.engine.Container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	out := &runtimeapi.ContainerStatusResponse{Status: convert.ContainerStatus(c)}
	if r.Verbose {
		out.Info, err = info(containerInfo{SandboxID: string(c.Pod), Pid: c.Pid, CgroupDir: c.CgroupDir, Config: c.Config, Identity: c.Identity})
	}
	return out, err
}

// containerInfo is what a verbose ContainerStatus adds.
type containerInfo struct {
	SandboxID string                   `json:"sandboxID"`
	Pid       int                      `json:"pid"`
	CgroupDir string                   `json:"cgroupDir"`
	Config    *sandbox.ContainerConfig `json:"config"`
	Identity  sandbox.Identity         `json:"user"`
}

// ReopenContainerLog makes a running container's log anew after a rotation.
func (s *runtimeServer) ReopenContainerLog(ctx context.Context, r *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	if r.ContainerId == "" {
		return nil, convert.Required("container_id")
	}
	if err := s.engine.ReopenLog(ctx, r.ContainerId); err != nil {
		return nil, err
	}
	return &runtimeapi.ReopenContainerLogResponse{}, nil
}

// running finds a running container.
func (s *runtimeServer) running(ref string) (*sandbox.ContainerStatus, error) {
	if ref == "" {
		return nil, convert.Required("container_id")
	}
	c, err := s.engine.Container(ref)
	if err != nil {
		return nil, err
	}
	if c.State != sandbox.ContainerRunning {
		return nil, fmt.Errorf("container %s is not running: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	return c, nil
}
