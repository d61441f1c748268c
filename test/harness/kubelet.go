package harness

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/pace"
)

// Insist repeats call as a kubelet does until it succeeds. Only errors of a
// daemon that is away, or was interrupted, may come between; any other one is
// returned, and so is the last after 30 s.
func Insist(call func(context.Context) error) error {
	for deadline := time.Now().Add(pace.Wait(30 * time.Second)); ; time.Sleep(3 * time.Millisecond) {
		c, cancel := context.WithTimeout(context.Background(), pace.Wait(20*time.Second))
		err := call(c)
		cancel()
		if err == nil {
			return nil
		}
		if code := status.Code(err); code != codes.Unavailable && code != codes.Canceled {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after 30 s still: %w", err)
		}
	}
}

// StartContainer starts a container as a kubelet sees it: when the answer to an
// earlier call was lost, a container that runs, or has run, was started.
func (d *Daemon) StartContainer(ctx context.Context, id string) error {
	_, err := d.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
	if status.Code(err) != codes.FailedPrecondition {
		return err
	}
	s, serr := d.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
	if serr != nil {
		return serr
	}
	if s.Status.State == cri.ContainerState_CONTAINER_RUNNING ||
		s.Status.State == cri.ContainerState_CONTAINER_EXITED && s.Status.Reason != "StartError" && s.Status.Reason != "Unknown" {
		return nil
	}
	return fmt.Errorf("%w; state %v %s: %s", err, s.Status.State, s.Status.Reason, s.Status.Message)
}
