package sandbox

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

// TestContainerThatDoesNotEnd: each call about it comes back with the reason, the
// pod keeps its network, the killing goes on, and once it ends all succeeds.
func TestContainerThatDoesNotEnd(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.running(p, "c", "undead")
	ctx := context.Background()
	for name, call := range map[string]func() error{
		"StopContainer":   func() error { return k.StopContainer(ctx, string(c), 50*time.Millisecond) },
		"again":           func() error { return k.StopContainer(ctx, string(c), time.Hour) },
		"RemoveContainer": func() error { return k.RemoveContainer(ctx, string(c)) },
		"StopPod":         func() error { return k.StopPod(ctx, string(p)) },
		"RemovePod":       func() error { return k.RemovePod(ctx, string(p)) },
	} {
		t.Run(name, func(t *testing.T) {
			if name == "again" { // the grace of a later call does not count once it is killed
				ok(t, ended(k.StopContainer(expired(t), string(c), 0)))
			}
			if err := call(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "was killed and has not ended") {
				t.Errorf("%v", err)
			}
		})
	}
	if s := k.status(c); s.State != ContainerRunning || !strings.Contains(s.Message, "has not ended") {
		t.Errorf("%+v", s)
	}
	if s := must(k.Pod(string(p)))(t); s.State != PodNotReady || !strings.Contains(s.Reason, "its containers have ended") {
		t.Errorf("%+v", s)
	}
	k.w.mu.Lock()
	if len(k.w.detaches) > 0 {
		t.Error("the address of a pod whose process goes on was given free")
	}
	k.w.mu.Unlock()
	kills := 0
	for _, s := range k.w.sent(c) {
		if s == 9 {
			kills++
		}
	}
	if kills < 2 {
		t.Errorf("it was killed %d times", kills)
	}
	k.w.mu.Lock()
	k.w.end(k.w.containers[c], wire.Exit{Code: 137, Signal: 9})
	k.w.mu.Unlock()
	if s := k.untilState(c, ContainerExited); s.ExitCode != 137 || s.Message != "" {
		t.Errorf("%+v", s)
	}
	ok(t, k.RemovePod(ctx, string(p)))
	k.empty()
}

// expired is a context whose caller has not waited.
func expired(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	cancel()
	return ctx
}

// TestUndoThatPanics: what comes after it is undone all the same, and the pod
// that is left can be stopped.
func TestUndoThatPanics(t *testing.T) {
	k := newKit(t)
	k.w.set(func(op, _ string) error {
		switch op {
		case "create": // of the pod's first process
			return fmt.Errorf("no room: %w", errdefs.ErrUnavailable)
		case "drop":
			panic("made to")
		}
		return nil
	})
	if _, err := k.RunPod(context.Background(), podConfig("a")); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	k.w.mu.Lock()
	if len(k.w.attached) > 0 {
		t.Error("the network's undo, after the one that panicked, was not called")
	}
	k.w.mu.Unlock()
	l := k.ListPods(PodFilter{})
	if len(l) != 1 || l[0].State != PodNotReady || !strings.Contains(l[0].Reason, "panicked") {
		t.Fatalf("%+v", l)
	}
	k.w.set(nil)
	ok(t, k.RemovePod(context.Background(), string(l[0].ID)))
	k.empty()
}

// TestPanicOutsideOfSteps: what an operation leaves half-made when it panics where
// nothing catches it is taken down by its retry.
func TestPanicOutsideOfSteps(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	q := must(k.findPod(string(p)))(t)
	q.mu.Lock()
	q.rec.State = lifecycle.Creating // as if nobody had come to the end
	q.status.Store(nil)
	q.mu.Unlock()
	again := k.pod("a")
	if again == p {
		t.Error("a half-made pod was handed out")
	}
	if _, err := k.findPod(string(p)); !errdefs.IsNotFound(err) {
		t.Errorf("the half-made pod is still there: %v", err)
	}
	ok(t, k.RemovePod(context.Background(), string(again)))
	k.empty()
}

// TestPanicInAStart: the container is exited with the error of a start, and not
// starting for ever.
func TestPanicInAStart(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.ctr(p, "c")
	k.w.set(func(op, _ string) error {
		if op == "start" {
			panic("made to")
		}
		return nil
	})
	if err := k.StartContainer(context.Background(), string(c)); !errdefs.IsInternal(err) {
		t.Error(err)
	}
	if s := k.status(c); s.State != ContainerExited || s.ExitCode != startErrorCode || s.Reason != reasonStartError {
		t.Errorf("%+v", s)
	}
	k.w.set(nil)
	ok(t, k.RemovePod(context.Background(), string(p)))
	k.empty()
}
