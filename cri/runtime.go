package cri

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/cri/convert"
	"github.com/berth-runtime/berth/internal/version"
)

// Version ignores the version that the client asks for: there is one.
func (s *runtimeServer) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version:           "0.1.0", // of the kubelet's runtime API, not ours
		RuntimeName:       version.Name,
		RuntimeVersion:    version.Version,
		RuntimeApiVersion: "v1",
	}, nil
}

// Status tells whether pods can run here and what can be asked for. A feature
// that is named is one that works: kubelets admit pods by it.
func (s *runtimeServer) Status(_ context.Context, r *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	out := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			condition("RuntimeReady", "RuntimeNotReady", s.node.RuntimeReady()),
			condition("NetworkReady", "NetworkNotReady", s.node.NetworkReady()),
		}},
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true},
	}
	for _, h := range s.node.Handlers() {
		if h.Name == "" {
			out.Features.UserNamespacesHostNetwork = h.UserNamespaces
		}
		out.RuntimeHandlers = append(out.RuntimeHandlers, &runtimeapi.RuntimeHandler{
			Name: h.Name,
			Features: &runtimeapi.RuntimeHandlerFeatures{
				RecursiveReadOnlyMounts: h.RecursiveReadOnlyMounts,
				UserNamespaces:          h.UserNamespaces,
			},
		})
	}
	if r.Verbose {
		config, err := json.Marshal(s.node.Info())
		if err != nil {
			return nil, fmt.Errorf("status info: %w", err)
		}
		out.Info = map[string]string{"config": string(config)}
	}
	return out, nil
}

func condition(kind, reason string, err error) *runtimeapi.RuntimeCondition {
	if err != nil {
		return &runtimeapi.RuntimeCondition{Type: kind, Reason: reason, Message: err.Error()}
	}
	return &runtimeapi.RuntimeCondition{Type: kind, Status: true}
}

// RuntimeConfig tells the kubelet which cgroup driver to name cgroups for.
func (s *runtimeServer) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	driver := runtimeapi.CgroupDriver_CGROUPFS
	if s.node.CgroupDriverSystemd() {
		driver = runtimeapi.CgroupDriver_SYSTEMD
	}
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

// UpdateRuntimeConfig hands the node's pod CIDR to the network; none is fine.
func (s *runtimeServer) UpdateRuntimeConfig(_ context.Context, r *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	if cidr := r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr(); cidr != "" {
		if err := s.node.SetPodCIDR(cidr); err != nil {
			return nil, fmt.Errorf("runtime_config.network_config.pod_cidr: %w", err)
		}
	}
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}

// UpdateContainerResources changes limits of a container; zero fields keep theirs.
func (s *runtimeServer) UpdateContainerResources(ctx context.Context, r *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	if r.ContainerId == "" {
		return nil, convert.Required("container_id")
	}
	limits, err := convert.Resources("linux", r.Linux)
	if err != nil {
		return nil, err
	}
	if limits == nil {
		return nil, convert.Required("linux")
	}
	if err := s.engine.UpdateContainer(ctx, r.ContainerId, limits); err != nil {
		return nil, err
	}
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}

// ContainerStats reads one container's use.
func (s *runtimeServer) ContainerStats(ctx context.Context, r *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	if r.ContainerId == "" {
		return nil, convert.Required("container_id")
	}
	st, err := s.engine.ContainerStats(ctx, r.ContainerId)
	if err != nil {
		return nil, err
	}
	if st == nil {
		return nil, fmt.Errorf("container %s has no cgroup to read: %w", r.ContainerId, errdefs.ErrFailedPrecondition)
	}
	return &runtimeapi.ContainerStatsResponse{Stats: convert.ContainerStats(st)}, nil
}

// ListContainerStats reads the use of the running containers that the filter selects.
func (s *runtimeServer) ListContainerStats(ctx context.Context, r *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	list, err := s.engine.ListContainerStats(ctx, convert.StatsFilter(r.Filter))
	if err != nil {
		return nil, err
	}
	out := &runtimeapi.ListContainerStatsResponse{Stats: make([]*runtimeapi.ContainerStats, len(list))}
	for i, st := range list {
		out.Stats[i] = convert.ContainerStats(st)
	}
	return out, nil
}
