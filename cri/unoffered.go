package cri

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The RPCs below are not offered by this version. Unimplemented is part of the
// protocol: it makes a kubelet use cAdvisor for pod metrics, the plain lists for
// the streamed ones and polling for events. The text tells a person what to use.

func unoffered(rpc, instead string) error {
	return status.Errorf(codes.Unimplemented, "%s: not offered by this version of berth; %s", rpc, instead)
}

func (*runtimeServer) CheckpointContainer(context.Context, *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error) {
	return nil, unoffered("CheckpointContainer", "containers cannot be checkpointed")
}

func (*runtimeServer) CheckpointPod(context.Context, *runtimeapi.CheckpointPodRequest) (*runtimeapi.CheckpointPodResponse, error) {
	return nil, unoffered("CheckpointPod", "pods cannot be checkpointed")
}

func (*runtimeServer) RestorePod(context.Context, *runtimeapi.RestorePodRequest) (*runtimeapi.RestorePodResponse, error) {
	return nil, unoffered("RestorePod", "pods cannot be restored; use RunPodSandbox")
}

func (*runtimeServer) GetContainerEvents(*runtimeapi.GetEventsRequest, grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	return unoffered("GetContainerEvents", "poll ListPodSandbox and ListContainers")
}

func (*runtimeServer) PodSandboxStats(context.Context, *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	return nil, unoffered("PodSandboxStats", "use ListContainerStats and the pod's cgroup")
}

func (*runtimeServer) ListPodSandboxStats(context.Context, *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	return nil, unoffered("ListPodSandboxStats", "use ListContainerStats and the pods' cgroups")
}

func (*runtimeServer) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	return nil, unoffered("ListMetricDescriptors", "use ListContainerStats")
}

func (*runtimeServer) ListPodSandboxMetrics(context.Context, *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	return nil, unoffered("ListPodSandboxMetrics", "use ListContainerStats")
}

func (*runtimeServer) UpdatePodSandboxResources(context.Context, *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	return nil, unoffered("UpdatePodSandboxResources", "the kubelet resizes the pod's cgroup itself")
}

func (*runtimeServer) StreamPodSandboxes(*runtimeapi.StreamPodSandboxesRequest, grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxesResponse]) error {
	return unoffered("StreamPodSandboxes", "use ListPodSandbox")
}

func (*runtimeServer) StreamContainers(*runtimeapi.StreamContainersRequest, grpc.ServerStreamingServer[runtimeapi.StreamContainersResponse]) error {
	return unoffered("StreamContainers", "use ListContainers")
}

func (*runtimeServer) StreamContainerStats(*runtimeapi.StreamContainerStatsRequest, grpc.ServerStreamingServer[runtimeapi.StreamContainerStatsResponse]) error {
	return unoffered("StreamContainerStats", "use ListContainerStats")
}

func (*runtimeServer) StreamPodSandboxStats(*runtimeapi.StreamPodSandboxStatsRequest, grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxStatsResponse]) error {
	return unoffered("StreamPodSandboxStats", "use ListContainerStats")
}

func (*runtimeServer) StreamPodSandboxMetrics(*runtimeapi.StreamPodSandboxMetricsRequest, grpc.ServerStreamingServer[runtimeapi.StreamPodSandboxMetricsResponse]) error {
	return unoffered("StreamPodSandboxMetrics", "use ListContainerStats")
}

func (*imageServer) StreamImages(*runtimeapi.StreamImagesRequest, grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	return unoffered("StreamImages", "use ListImages")
}
