package sandbox

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

func TestResync(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	ended, lives, lost := k.running(p, "ended"), k.running(p, "lives"), k.running(p, "lost")
	// While the connection was away one ended, one was lost, and the descriptors are gone.
	k.w.mu.Lock()
	k.w.containers[ended].info.State = wire.Exited
	k.w.containers[ended].info.Exit = &wire.Exit{ID: ended, Code: 4, FinishedAt: time.Now()}
	delete(k.w.containers, lost)
	for key, f := range k.w.fds {
		f.Close()
		delete(k.w.fds, key)
	}
	k.w.mu.Unlock()
	// Containers that are made and started after the list was taken are none of its business.
	var fresh id.Container
	k.w.set(func(op, _ string) error {
		if op == "list!" {
			k.w.set(nil)
			k.w.mu.Lock()
			for _, n := range []string{"net", "ipc", "uts", "shm"} {
				k.w.fds[fdKey(p, n)], _ = os.Open(os.DevNull)
			}
			k.w.mu.Unlock()
			fresh = k.running(p, "fresh")
		}
		return nil
	})
	ok(t, k.resync(context.Background()))
	if s := k.status(ended); s.State != ContainerExited || s.ExitCode != 4 {
		t.Errorf("%+v", s)
	}
	if s := k.status(lost); s.State != ContainerExited || s.Reason != reasonUnknown {
		t.Errorf("%+v", s)
	}
	for _, c := range []id.Container{lives, fresh} {
		if s := k.status(c); s.State != ContainerRunning {
			t.Errorf("%+v", s)
		}
	}
	until(t, "descriptors are kept again", func() bool {
		k.w.mu.Lock()
		defer k.w.mu.Unlock()
		f := k.w.fds[fdKey(p, "net")]
		return f != nil && f.Name() != os.DevNull
	})
	if s := must(k.Pod(string(p)))(t); s.State != PodReady {
		t.Errorf("%+v", s)
	}
}

// TestFullDisk: what is asked for is refused, and stopping and removing work.
func TestFullDisk(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.running(p, "c")
	created := k.ctr(p, "created")
	dir := filepath.Join(k.root, "sandboxes")
	ok(t, os.Rename(dir, dir+".away"))
	ok(t, os.WriteFile(dir, nil, 0o600))
	if _, err := k.RunPod(context.Background(), podConfig("b")); err == nil {
		t.Error("a pod without a record")
	}
	if err := k.StartContainer(context.Background(), string(created)); err == nil {
		t.Error("a start without a record")
	}
	if s := k.status(created); s.State != ContainerCreated {
		t.Errorf("%+v", s)
	}
	ok(t, k.StopContainer(context.Background(), string(c), time.Minute))
	ok(t, k.RemovePod(context.Background(), string(p)))
	if h := k.w.holds(); h != holdsNothing {
		t.Error(h)
	}
	ok(t, os.Remove(dir))
	ok(t, os.Rename(dir+".away", dir))
	k2 := k.killed() // the records say that all runs: they are compared and go
	k2.consistent("full disk")
	for _, s := range k2.ListPods(PodFilter{}) {
		ok(t, k2.RemovePod(context.Background(), string(s.ID)))
	}
	k2.empty()
}

// TestStorm lets everything happen to everything at once.
func TestStorm(t *testing.T) {
	k := newKit(t)
	ctx := context.Background()
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			name := fmt.Sprint("p", i)
			for round := range 4 {
				cfg := podConfig(name)
				cfg.Meta.Attempt = uint32(round)
				var wg sync.WaitGroup
				for range 2 {
					wg.Go(func() {
						p, err := k.RunPod(ctx, cfg)
						if err != nil {
							return
						}
						var in sync.WaitGroup
						for j := range 4 {
							in.Go(func() {
								c, err := k.CreateContainer(ctx, string(p), ctrConfig(fmt.Sprint("c", j/2), "deaf"))
								if err != nil {
									return
								}
								in.Go(func() { _ = k.StartContainer(ctx, string(c)) })
								in.Go(func() { _ = k.StopContainer(ctx, string(c), time.Millisecond) })
								in.Go(func() { _ = k.UpdateContainer(ctx, string(c), &Resources{CPUShares: 7}) })
								in.Go(func() { _ = k.RemoveContainer(ctx, string(c)) })
							})
						}
						in.Go(func() { _ = k.StopPod(ctx, string(p)) })
						in.Go(func() { _ = k.resync(ctx) })
						in.Wait()
						if err := k.RemovePod(ctx, string(p)); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
			}
		})
	}
	stop := make(chan struct{})
	var readers sync.WaitGroup
	readers.Go(func() {
		for !isClosed(stop) {
			for _, s := range k.ListContainers(ContainerFilter{}) {
				_, _ = json.Marshal(s)
				_, _ = k.Container(string(s.ID))
			}
			_ = k.ListPods(PodFilter{})
			_ = k.WritableUsage()
			time.Sleep(time.Millisecond)
		}
	})
	all.Wait()
	close(stop)
	readers.Wait()
	for _, s := range k.ListPods(PodFilter{}) { // a joined retry may have made one more
		ok(t, k.RemovePod(ctx, string(s.ID)))
	}
	k.empty()
}
