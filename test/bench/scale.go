package main

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// scale brings b.o.pods idle pods up and measures what they cost: memory of the
// runtime's processes per pod, its CPU under a kubelet's polling, the lists and
// stats over them, and one more pod life among them.
func (b *bench) scale(ctx context.Context) error {
	s := b.result.series(fmt.Sprintf("at %d pods", b.o.pods))
	zero, err := b.settled(ctx)
	if err != nil {
		return err
	}
	all := make([]*pod, b.o.pods)
	if _, err := b.spread(ctx, b.o.pods, func(ctx context.Context, i int) (err error) {
		all[i], err = b.up(ctx, fmt.Sprintf("idle-%d", i), nil)
		return err
	}); err != nil {
		return err
	}
	if b.watched.given() && b.o.pods > 0 {
		full, err := b.settled(ctx)
		if err != nil {
			return err
		}
		per := float64(b.o.pods) * 1024
		s.value("PSS of the runtime at 0 pods", "MiB", float64(zero.runtime)/(1<<20))
		s.value("PSS of the runtime", "MiB", float64(full.runtime)/(1<<20))
		s.value("PSS per idle pod, runtime's processes", "KiB", float64(full.runtime-zero.runtime)/per)
		s.value("PSS per idle pod, pause included", "KiB", float64(full.runtime+full.pause-zero.runtime-zero.pause)/per)
	}
	if err := b.idle(ctx, s); err != nil {
		return err
	}
	if err := b.reads(ctx, s, all); err != nil {
		return err
	}
	for i := range min(b.o.n, 20) {
		if err := b.life(ctx, fmt.Sprintf("among-%d", i), s.took); err != nil {
			return err
		}
	}
	_, err = b.spread(ctx, b.o.pods, func(ctx context.Context, i int) error { return b.down(ctx, all[i], nil) })
	return err
}

// settled waits two seconds, so that what a start leaves running is over, and
// takes the memory then.
func (b *bench) settled(ctx context.Context) (memory, error) {
	if !b.watched.given() {
		return memory{}, nil
	}
	select {
	case <-ctx.Done():
		return memory{}, ctx.Err()
	case <-time.After(2 * time.Second):
	}
	return b.watched.memory()
}

// idle measures the runtime's CPU while it is polled as a kubelet does: lists
// each second, stats every ten.
func (b *bench) idle(ctx context.Context, s *series) error {
	if !b.watched.given() || b.o.window <= 0 {
		return nil
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	start, before := time.Now(), b.watched.cpu()
	for i := 0; time.Since(start) < b.o.window; i++ {
		if err := b.poll(ctx, i%10 == 0); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	used := b.watched.cpu().since(before)
	s.value("idle CPU with a kubelet's polling", "% of a core", 100*used.self.Seconds()/time.Since(start).Seconds())
	return nil
}

func (b *bench) poll(ctx context.Context, stats bool) error {
	ctx, cancel := context.WithTimeout(ctx, b.o.timeout)
	defer cancel()
	if _, err := b.runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}); err != nil {
		return err
	}
	if _, err := b.runtime.ListContainers(ctx, &cri.ListContainersRequest{}); err != nil {
		return err
	}
	if !stats {
		return nil
	}
	if _, err := b.runtime.ListContainerStats(ctx, &cri.ListContainerStatsRequest{}); err != nil {
		return err
	}
	if _, err := b.runtime.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{}); err != nil && status.Code(err) != codes.Unimplemented {
		return err
	}
	_, err := b.images.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
	return err
}

// reads measures the calls that only look, over all pods and at one of them. A
// call that the runtime does not offer is left out of the results.
func (b *bench) reads(ctx context.Context, s *series, all []*pod) error {
	if len(all) == 0 {
		return nil
	}
	p := all[len(all)/2]
	calls := []step{
		{"ListPodSandbox", func(ctx context.Context) error {
			_, err := b.runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
			return err
		}},
		{"ListContainers", func(ctx context.Context) error {
			_, err := b.runtime.ListContainers(ctx, &cri.ListContainersRequest{})
			return err
		}},
		{"ListContainerStats", func(ctx context.Context) error {
			_, err := b.runtime.ListContainerStats(ctx, &cri.ListContainerStatsRequest{})
			return err
		}},
		{"ListPodSandboxStats", func(ctx context.Context) error {
			_, err := b.runtime.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{})
			return err
		}},
		{"PodSandboxStatus", func(ctx context.Context) error {
			_, err := b.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
			return err
		}},
		{"ContainerStatus", func(ctx context.Context) error {
			_, err := b.runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: p.container})
			return err
		}},
	}
	for _, c := range calls {
		for range 50 {
			d, err := b.call(ctx, c.do)
			if status.Code(err) == codes.Unimplemented {
				break
			}
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			s.took(c.name, d)
		}
	}
	return nil
}
