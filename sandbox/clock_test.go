package sandbox

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/berth-runtime/berth/internal/id"
)

// TestTimesWhenTheClockIsSetBackAndForth: whatever the wall clock does, what is
// made later is created later, and within a container times never go back. The
// supervisor's clock (the fake's is the real one) need not agree.
func TestTimesWhenTheClockIsSetBackAndForth(t *testing.T) {
	k := newKit(t)
	ctx := context.Background()
	var last time.Time
	later := func(what string, at time.Time) {
		t.Helper()
		if !at.After(last) {
			t.Errorf("%s at %v, the one before at %v", what, at, last)
		}
		last = at
	}
	ordered := func(c id.Container) *ContainerStatus {
		t.Helper()
		s := must(k.Container(string(c)))(t)
		if s.StartedAt.Before(s.CreatedAt) || s.FinishedAt.Before(s.StartedAt) || s.CreatedAt.UnixNano() <= 0 {
			t.Errorf("created %v, started %v, finished %v", s.CreatedAt, s.StartedAt, s.FinishedAt)
		}
		return s
	}
	for i, step := range []time.Duration{0, time.Hour, -time.Hour, 24 * time.Hour, -48 * time.Hour, time.Minute} {
		k.cfg.Now = func() time.Time { return time.Now().Add(step) }
		name := string(rune('a' + i))
		p := k.pod(name)
		later("pod", must(k.Pod(string(p)))(t).CreatedAt)
		ended, lost, failed := k.running(p, "ended"), k.running(p, "lost"), k.ctr(p, "failed")
		for _, c := range []id.Container{ended, lost, failed} {
			later("container", must(k.Container(string(c)))(t).CreatedAt)
		}
		began := time.Now()
		ok(t, k.StopContainer(ctx, string(ended), time.Minute)) // its end is not a matter of the clock
		if took := time.Since(began); took > 30*time.Second {
			t.Errorf("stop took %v", took)
		}
		k.lose(must(k.findContainer(string(lost)))(t), "test")
		k.w.set(func(op, _ string) error {
			if op == "start" {
				return errors.New("test")
			}
			return nil
		})
		if k.StartContainer(ctx, string(failed)) == nil {
			t.Error("start succeeded")
		}
		k.w.set(nil)
		for _, c := range []id.Container{ended, lost, failed} {
			if s := ordered(c); s.State != ContainerExited {
				t.Errorf("state %v", s.State)
			}
		}
		if newest := k.ListPods(PodFilter{})[0]; newest.ID != p {
			t.Errorf("the newest pod is %s, want %s", newest.Config.Meta.Name, name)
		}
	}
	k = k.killed() // with a clock that is far behind the records
	later("pod after a restart", must(k.Pod(string(k.pod("z"))))(t).CreatedAt)
}
