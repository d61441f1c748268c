package cri

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/cri/convert"
	"github.com/berth-runtime/berth/sandbox"
)

// maxExecOutput bounds stdout and stderr together. The API allows 16 MB for
// each, but a kubelet receives no message above 16 MiB in all.
const maxExecOutput = maxMessage - 64<<10

// ExecSync runs a command and returns its output; a non-zero exit code is no
// error. DeadlineExceeded means that the timeout killed it.
func (s *runtimeServer) ExecSync(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	if len(r.Cmd) == 0 {
		return nil, convert.Required("cmd")
	}
	c, err := s.running(r.ContainerId)
	if err != nil {
		return nil, err
	}
	res, err := s.engine.ExecSync(ctx, string(c.ID), r.Cmd, seconds(r.Timeout))
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			return nil, status.Errorf(codes.DeadlineExceeded, "command timed out after %d s and was killed", r.Timeout)
		}
		return nil, err
	}
	stdout, stderr := capOutput(res.Stdout, res.Stderr, maxExecOutput)
	return &runtimeapi.ExecSyncResponse{Stdout: stdout, Stderr: stderr, ExitCode: res.ExitCode}, nil
}

// capOutput cuts the ends off so that both fit into limit; the shorter stream
// keeps what it has, up to half.
func capOutput(stdout, stderr []byte, limit int) ([]byte, []byte) {
	if len(stdout)+len(stderr) <= limit {
		return stdout, stderr
	}
	half := limit / 2
	switch {
	case len(stderr) <= half:
		return stdout[:limit-len(stderr)], stderr
	case len(stdout) <= half:
		return stdout, stderr[:limit-len(stdout)]
	}
	return stdout[:half], stderr[:half]
}

// Exec prepares a command with streams and returns the URL to connect to.
func (s *runtimeServer) Exec(_ context.Context, r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	if len(r.Cmd) == 0 {
		return nil, convert.Required("cmd")
	}
	if err := checkStreams(r.Tty, r.Stdin, r.Stdout, r.Stderr); err != nil {
		return nil, err
	}
	c, err := s.running(r.ContainerId)
	if err != nil {
		return nil, err
	}
	return s.streams.Exec(c.ID, r)
}

// Attach prepares a connection to a container's own streams and returns the URL.
func (s *runtimeServer) Attach(_ context.Context, r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	if err := checkStreams(r.Tty, r.Stdin, r.Stdout, r.Stderr); err != nil {
		return nil, err
	}
	c, err := s.running(r.ContainerId)
	if err != nil {
		return nil, err
	}
	return s.streams.Attach(c.ID, r)
}

func checkStreams(tty, stdin, stdout, stderr bool) error {
	if tty && stderr {
		return &convert.FieldError{Field: "stderr", Text: "given together with tty; a terminal has one output stream, ask for stdout"}
	}
	if !stdin && !stdout && !stderr {
		return &convert.FieldError{Field: "stdin", Text: "none of stdin, stdout and stderr is set; set one"}
	}
	return nil
}

// PortForward prepares connections to ports of a ready pod and returns the URL.
func (s *runtimeServer) PortForward(_ context.Context, r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	if r.PodSandboxId == "" {
		return nil, convert.Required("pod_sandbox_id")
	}
	for i, p := range r.Port {
		if p < 1 || p > 65535 {
			return nil, &convert.FieldError{Field: fmt.Sprintf("port[%d]", i), Text: fmt.Sprintf("%d is not a port; use 1 to 65535", p)}
		}
	}
	p, err := s.engine.Pod(r.PodSandboxId)
	if err != nil {
		return nil, err
	}
	if p.State != sandbox.PodReady {
		return nil, fmt.Errorf("pod sandbox %s is not ready: %w", p.ID, errdefs.ErrFailedPrecondition)
	}
	return s.streams.PortForward(p.ID, r)
}
