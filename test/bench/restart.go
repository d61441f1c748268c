package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	restarts     = 5               // how often the daemon is killed
	restartLimit = 2 * time.Minute // for one to have everything again
	sample       = 10              // containers that are asked to run something afterwards
)

// restart kills the runtime's daemon with SIGKILL while b.o.pods pods run, and
// measures from there until it lists them all and until it can work with them.
// Who started the daemon must start it again (bench reap does).
func (b *bench) restart(ctx context.Context) error {
	if b.o.restart == "" {
		return errors.New("give --restart the name of the daemon's executable, and --match so that it is found")
	}
	s := b.result.series(fmt.Sprintf("restart with %d pods", b.o.pods))
	all := make([]*pod, b.o.pods)
	if _, err := b.spread(ctx, b.o.pods, func(ctx context.Context, i int) (err error) {
		all[i], err = b.up(ctx, fmt.Sprintf("stays-%d", i), nil)
		return err
	}); err != nil {
		return err
	}
	for range restarts {
		old, err := b.daemon()
		if err != nil {
			return err
		}
		if err := unix.Kill(old, unix.SIGKILL); err != nil {
			return err
		}
		killed := time.Now()
		if err := b.until(ctx, killed, func(ctx context.Context) error {
			if _, err := b.runtime.Version(ctx, &cri.VersionRequest{}); err != nil {
				return err
			}
			r, err := b.runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{"bench": b.run}}})
			if err == nil && len(r.Items) != len(all) {
				err = fmt.Errorf("%d of %d pods are listed", len(r.Items), len(all))
			}
			return err
		}); err != nil {
			return err
		}
		s.took("killed to Version and all pods listed", time.Since(killed))
		running := &cri.ContainerFilter{State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}, LabelSelector: map[string]string{"bench": b.run}}
		if err := b.until(ctx, killed, func(ctx context.Context) error {
			r, err := b.runtime.ListContainers(ctx, &cri.ListContainersRequest{Filter: running})
			if err == nil && len(r.Containers) != len(all) {
				err = fmt.Errorf("%d of %d containers run", len(r.Containers), len(all))
			}
			for i := 0; err == nil && i < min(sample, len(all)); i++ {
				_, err = b.execOnce(ctx, all[i*len(all)/min(sample, len(all))])
			}
			return err
		}); err != nil {
			return err
		}
		s.took(fmt.Sprintf("killed to all running and ExecSync in %d", min(sample, len(all))), time.Since(killed))
		if err := b.life(ctx, "after", nil); err != nil {
			return err
		}
	}
	_, err := b.spread(ctx, b.o.pods, func(ctx context.Context, i int) error { return b.down(ctx, all[i], nil) })
	return err
}

// until repeats f until it succeeds.
func (b *bench) until(ctx context.Context, since time.Time, f func(context.Context) error) error {
	for {
		b.conn.ResetConnectBackoff()
		err := f(ctx)
		if err == nil {
			return nil
		}
		if time.Since(since) > restartLimit {
			return fmt.Errorf("still %v after the daemon was killed: %w", restartLimit, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// daemon is the one process of the runtime with the name of --restart.
func (b *bench) daemon() (int, error) {
	var found []int
	for _, pid := range b.watched.find() {
		exe, err := os.Readlink(procFile(pid, "exe"))
		if err == nil && filepath.Base(strings.TrimSuffix(exe, " (deleted)")) == b.o.restart {
			found = append(found, pid)
		}
	}
	if len(found) != 1 {
		return 0, fmt.Errorf("--restart %s: %d processes of that name, want one; narrow --match with --within", b.o.restart, len(found))
	}
	return found[0], nil
}
