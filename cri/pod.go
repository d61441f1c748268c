package cri

import (
	"context"
	"encoding/json"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/cri/convert"
	"github.com/berth-runtime/berth/sandbox"
)

// RunPodSandbox makes a pod sandbox and returns when it is ready.
func (s *runtimeServer) RunPodSandbox(ctx context.Context, r *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	c, err := convert.PodConfig(r.Config, r.RuntimeHandler)
	if err != nil {
		return nil, err
	}
	id, err := s.engine.RunPod(ctx, c)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: string(id)}, nil
}

// StopPodSandbox stops the pod's containers and frees its network; a missing pod is success.
func (s *runtimeServer) StopPodSandbox(ctx context.Context, r *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	if r.PodSandboxId == "" {
		return nil, convert.Required("pod_sandbox_id")
	}
	if err := s.engine.StopPod(ctx, r.PodSandboxId); err != nil {
		return nil, err
	}
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

// RemovePodSandbox removes the pod with its containers; a missing pod is success.
func (s *runtimeServer) RemovePodSandbox(ctx context.Context, r *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	if r.PodSandboxId == "" {
		return nil, convert.Required("pod_sandbox_id")
	}
	if err := s.engine.RemovePod(ctx, r.PodSandboxId); err != nil {
		return nil, err
	}
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

// PodSandboxStatus describes one pod. The answer's timestamp stays 0: with one,
// kubelets take container statuses from this answer and lose track of init
// containers.
func (s *runtimeServer) PodSandboxStatus(_ context.Context, r *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	if r.PodSandboxId == "" {
		return nil, convert.Required("pod_sandbox_id")
	}
	p, err := s.engine.Pod(r.PodSandboxId)
	if err != nil {
		return nil, err
	}
	out := &runtimeapi.PodSandboxStatusResponse{Status: convert.PodStatus(p)}
	if r.Verbose {
		out.Info, err = info(podInfo{Config: p.Config, CgroupDir: p.CgroupDir, RuntimeHandler: p.Config.Handler, Reason: p.Reason})
	}
	return out, err
}

// podInfo is what a verbose PodSandboxStatus adds.
type podInfo struct {
	Config         *sandbox.PodConfig `json:"config"`
	CgroupDir      string             `json:"cgroupDir"`
	RuntimeHandler string             `json:"runtimeHandler"`
	Reason         string             `json:"reason,omitempty"`
}

// info is the verbose part of an answer in the form that crictl prints: one JSON
// document under the key "info".
func info(v any) (map[string]string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("verbose info: %w", err)
	}
	return map[string]string{"info": string(b)}, nil
}

// ListPodSandbox lists the pods that the filter selects, from memory.
func (s *runtimeServer) ListPodSandbox(_ context.Context, r *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	f, err := convert.PodFilter(r.Filter)
	if err != nil {
		return nil, err
	}
	pods := s.engine.ListPods(f)
	out := &runtimeapi.ListPodSandboxResponse{Items: make([]*runtimeapi.PodSandbox, len(pods))}
	for i, p := range pods {
		out.Items[i] = convert.PodItem(p)
	}
	return out, nil
}
