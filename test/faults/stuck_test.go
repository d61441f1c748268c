package faults

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/pace"
)

// times measures f, n times.
type times []time.Duration

func measure(n int, f func()) times {
	out := make(times, n)
	for i := range out {
		began := time.Now()
		f()
		out[i] = time.Since(began)
	}
	slices.Sort(out)
	return out
}

func (t times) String() string {
	return fmt.Sprintf("p50 %v p99 %v", t[len(t)/2].Round(10*time.Microsecond), t[len(t)*99/100].Round(10*time.Microsecond))
}

// TestStuckLogDisk: the disk of one container's log stops answering. No other
// container notices, and the stuck one can be stopped and removed.
func TestStuckLogDisk(t *testing.T) {
	n := started(t)
	f := mountStuck(t, filepath.Join(t.TempDir(), "fs"))
	c := n.PodConfig()
	c.LogDirectory = f.dir
	p := &pod{config: c}
	var err error
	if p.id, err = n.tryPod(c); err != nil {
		t.Fatal(err)
	}
	logged := func(p *pod, log string, args ...string) string {
		t.Helper()
		cfg := harness.ContainerConfig(prog, args...)
		cfg.LogPath = log
		c, err := n.tryCreate(p, cfg)
		if err == nil {
			err = n.tryStart(c)
		}
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	other := n.pod()
	noisy := logged(p, "stuck.log", "print", "0", "100")
	same := logged(p, "well.log", "count", "1000000", "2000")
	beside := logged(other, "beside.log", "count", "1000000", "2000")
	n.eventually("the noisy one is logged", func() bool { return len(n.logOf(noisy)) > 1<<20 })

	calls := map[string]func(){
		"status":     func() { n.container(noisy) },
		"list":       func() { n.containers() },
		"exec":       func() { n.alive(beside) },
		"exec stuck": func() { n.alive(noisy) },
		"life": func() {
			c := n.run(other, "sleep", "1000")
			if err := n.tryStop(c, 0); err != nil {
				t.Error(err)
			}
			if err := n.tryRemove(c); err != nil {
				t.Error(err)
			}
		},
	}
	figures := func(when string) {
		for _, name := range []string{"status", "list", "exec", "exec stuck", "life"} {
			got := measure(30, calls[name])
			t.Logf("%-12s %-10s %v", when, name, got)
			if worst := got[len(got)-1]; worst > pace.Wait(5*time.Second) {
				t.Errorf("%s, %s: took %v", when, name, worst)
			}
		}
	}
	figures("well")
	f.stick("stuck.log")
	n.eventually("a write waits", func() bool { return f.waiting() > 0 })
	size := func(c string) int { return strings.Count(n.logOf(c), "\n") }
	sameSize, besideSize := size(same), size(beside)
	figures("stuck")
	if a, b := size(same)-sameSize, size(beside)-besideSize; a < 20 || b < 20 {
		t.Errorf("others logged %d and %d lines meanwhile", a, b)
	}
	within := func(what string, limit time.Duration, f func(context.Context) error) error {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), pace.Wait(20*time.Second))
		defer cancel()
		began := time.Now()
		err := f(ctx)
		took := time.Since(began)
		t.Logf("%s: %v after %v", what, err, took.Round(time.Millisecond))
		if took > pace.Wait(limit)+time.Second { // of a busy machine
			t.Errorf("%s took %v, want at most %v", what, took, limit)
		}
		return err
	}
	_ = within("reopen", 2*time.Second, func(ctx context.Context) error { // either answer may be the truth
		_, err := n.Runtime.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: noisy})
		return err
	})
	if err := within("reopen of the other one", 2*time.Second, func(ctx context.Context) error {
		_, err := n.Runtime.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: same})
		return err
	}); err != nil {
		t.Error(err)
	}
	if err := within("stop", 3*time.Second, func(ctx context.Context) error { // grace and 2 s
		_, err := n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: noisy, Timeout: 1})
		return err
	}); err != nil {
		t.Errorf("stop: %v", err)
	}
	if s := n.container(noisy); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode == 0 {
		t.Errorf("after the stop: %v, code %d", s.State, s.ExitCode)
	}
	if err := within("remove", 2*time.Second, func(ctx context.Context) error {
		_, err := n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: noisy})
		return err
	}); err != nil {
		t.Errorf("remove: %v", err)
	}
	n.alive(same)
	n.alive(beside)
	f.abort()
	n.alive(beside)
	n.alive(n.run(other, "sleep", "1000"))
	n.removePod(p.id)
	n.removePod(other.id)
	n.ready()
}
