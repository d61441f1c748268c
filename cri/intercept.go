package cri

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
)

// Verbosity of the log per request. Kubelets poll several times a second, so
// reads are quieter than changes.
const (
	logChange = klog.Level(2)
	logRead   = klog.Level(5)
)

// reads are the RPCs that change nothing.
var reads = map[string]bool{
	runtimeapi.RuntimeService_Version_FullMethodName:            true,
	runtimeapi.RuntimeService_Status_FullMethodName:             true,
	runtimeapi.RuntimeService_RuntimeConfig_FullMethodName:      true,
	runtimeapi.RuntimeService_PodSandboxStatus_FullMethodName:   true,
	runtimeapi.RuntimeService_ListPodSandbox_FullMethodName:     true,
	runtimeapi.RuntimeService_ContainerStatus_FullMethodName:    true,
	runtimeapi.RuntimeService_ListContainers_FullMethodName:     true,
	runtimeapi.RuntimeService_ContainerStats_FullMethodName:     true,
	runtimeapi.RuntimeService_ListContainerStats_FullMethodName: true,
	runtimeapi.RuntimeService_ExecSync_FullMethodName:           true,
	runtimeapi.ImageService_ListImages_FullMethodName:           true,
	runtimeapi.ImageService_ImageStatus_FullMethodName:          true,
	runtimeapi.ImageService_ImageFsInfo_FullMethodName:          true,
}

// intercept is around every unary request: it maps errors to codes, keeps the
// daemon alive when a handler panics, observes and logs. Of a request it logs
// ids only; request texts may hold secrets (registry passwords, environment).
func (s *Server) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, s.panicked(info.FullMethod, p)
		}
		d := time.Since(start)
		if s.cfg.Observe != nil {
			s.cfg.Observe(info.FullMethod, status.Code(err), d)
		}
		level := logChange
		if reads[info.FullMethod] {
			level = logRead
		}
		if status.Code(err) == codes.ResourceExhausted {
			level = 0 // the node, not the caller, is to be helped
		}
		if v := klog.V(level); v.Enabled() {
			logRequest(v, info.FullMethod, req, resp, d, err)
		}
	}()
	resp, err = next(ctx, req)
	return resp, toStatus(err)
}

func (s *Server) interceptStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			err = s.panicked(info.FullMethod, p)
		}
		if s.cfg.Observe != nil {
			s.cfg.Observe(info.FullMethod, status.Code(err), time.Since(start))
		}
	}()
	return toStatus(next(srv, stream))
}

func (s *Server) panicked(method string, p any) error {
	klog.ErrorS(nil, "request panicked", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	return status.Errorf(codes.Internal, "%s: internal error, see the daemon's log", shortMethod(method))
}

func logRequest(v klog.Verbose, method string, req, resp any, d time.Duration, err error) {
	kv := make([]any, 0, 14)
	kv = append(kv, "method", shortMethod(method), "duration", d, "code", status.Code(err).String())
	kv = appendID(kv, req)
	kv = appendID(kv, resp)
	if err != nil {
		v.InfoS("request", append(kv, "err", status.Convert(err).Message())...)
		return
	}
	v.InfoS("request", kv...)
}

// appendID adds the ids that a message names, by the getters that CRI's messages share.
func appendID(kv []any, m any) []any {
	if m, ok := m.(interface{ GetPodSandboxId() string }); ok && m.GetPodSandboxId() != "" {
		kv = append(kv, "pod", m.GetPodSandboxId())
	}
	if m, ok := m.(interface{ GetContainerId() string }); ok && m.GetContainerId() != "" {
		kv = append(kv, "container", m.GetContainerId())
	}
	if m, ok := m.(interface{ GetImage() *runtimeapi.ImageSpec }); ok && m.GetImage() != nil {
		kv = append(kv, "image", m.GetImage().Image)
	}
	return kv
}

// shortMethod is the RPC's name without package and service.
func shortMethod(full string) string {
	for i := len(full) - 1; i >= 0; i-- {
		if full[i] == '/' {
			return full[i+1:]
		}
	}
	return full
}
