package sandbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

func TestContainerLife(t *testing.T) {
	k := newKit(t)
	ctx := context.Background()
	cfg := podConfig("a")
	cfg.LogDirectory = t.TempDir()
	p := must(k.RunPod(ctx, cfg))(t)
	cc := ctrConfig("c")
	cc.LogPath = "sub/0.log"
	c := must(k.CreateContainer(ctx, string(p), cc))(t)
	if s := k.status(c); s.State != ContainerCreated || s.Pid != 0 || s.CreatedAt.IsZero() || s.StopSignal != "SIGTERM" ||
		s.LogPath != cfg.LogDirectory+"/sub/0.log" || s.ImageID == "" || s.ImageID != s.ImageRef || s.ImageName != "example/image:1" {
		t.Errorf("%+v", s)
	}
	if again := must(k.CreateContainer(ctx, string(p), cc))(t); again != c {
		t.Error("a retry made another container")
	}
	if err := k.ReopenLog(ctx, string(c)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("log of a created container: %v", err)
	}
	ok(t, k.StopContainer(ctx, string(c), time.Second)) // created: success, and it stays
	ok(t, k.StartContainer(ctx, string(c)))
	if s := k.status(c); s.State != ContainerRunning || s.Pid != 4242 || s.StartedAt.IsZero() {
		t.Errorf("%+v", s)
	}
	if err := k.StartContainer(ctx, string(c)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second start: %v", err)
	}
	ok(t, k.ReopenLog(ctx, string(c)))
	ok(t, k.StopContainer(ctx, string(c), time.Minute))
	if s := k.status(c); s.State != ContainerExited || s.ExitCode != 143 || s.Reason != reasonError || s.FinishedAt.IsZero() || s.Pid != 0 {
		t.Errorf("%+v", s)
	}
	if got := fmt.Sprint(k.w.sent(c)); got != "[15]" {
		t.Errorf("signals %s", got)
	}
	for range 2 {
		ok(t, k.StopContainer(ctx, string(c), time.Second))
	}
	for range 2 {
		ok(t, k.RemoveContainer(ctx, string(c)))
	}
	ok(t, k.StopContainer(ctx, string(c), time.Second))
	if _, err := k.Container(string(c)); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	ok(t, k.RemovePod(ctx, string(p)))
	k.empty()
}

func TestCreateContainerJoins(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	reached, release := k.w.blocking("create")
	ids := make([]id.Container, 50)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() { ids[i], _ = k.CreateContainer(context.Background(), string(p), ctrConfig("c")) })
	}
	<-reached
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := k.CreateContainer(ctx, string(p), ctrConfig("c")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	release()
	wg.Wait()
	c := k.ctr(p, "c")
	for _, got := range ids {
		if got != c {
			t.Fatalf("%q and %q", got, c)
		}
	}
	if n := len(k.ListContainers(ContainerFilter{})); n != 1 {
		t.Errorf("%d containers", n)
	}
}

func TestCreateContainerUndoesEachStep(t *testing.T) {
	for _, op := range []string{"acquire", "create", "create!"} {
		t.Run(op, func(t *testing.T) {
			k := newKit(t)
			p := k.pod("a")
			before := k.w.holds()
			k.w.failing(op, 1)
			if _, err := k.CreateContainer(context.Background(), string(p), ctrConfig("c")); !errdefs.IsUnavailable(err) {
				t.Errorf("%v", err)
			}
			if op == "acquire" { // the fake pins before it fails
				clear(k.w.pins)
			}
			if h := k.w.holds(); h != before {
				t.Errorf("left behind: %s", h)
			}
			k.running(p, "c")
			ok(t, k.RemovePod(context.Background(), string(p)))
			k.empty()
		})
	}
	t.Run("cannot be undone", func(t *testing.T) {
		k := newKit(t)
		p := k.pod("a")
		k.w.set(func(op, _ string) error {
			if op == "create!" || op == "delete" {
				return errdefs.ErrUnavailable
			}
			return nil
		})
		if _, err := k.CreateContainer(context.Background(), string(p), ctrConfig("c")); err == nil {
			t.Error("no error")
		}
		if l := k.ListContainers(ContainerFilter{}); len(l) != 0 {
			t.Errorf("listed: %+v", l[0])
		}
		k.w.set(nil)
		k.running(p, "c")
		ok(t, k.RemovePod(context.Background(), string(p)))
		k.empty()
	})
}

func TestCreateContainerRefuses(t *testing.T) {
	k := newKit(t)
	ctx := context.Background()
	pc := podConfig("a")
	pc.LogDirectory = t.TempDir()
	p := must(k.RunPod(ctx, pc))(t)
	other := k.running(k.pod("b"), "other")
	for want, change := range map[string]func(*ContainerConfig){
		"metadata.name": func(c *ContainerConfig) { c.Meta.Name = "" },
		"log_path":      func(c *ContainerConfig) { c.LogPath = "../x" },
		"target_id": func(c *ContainerConfig) {
			c.Security.Namespaces = Namespaces{PID: NamespaceTarget, TargetID: other}
		},
		"stop_signal": func(c *ContainerConfig) { c.StopSignal = "SIGNOT" },
		"privileged":  func(c *ContainerConfig) { c.Security.Privileged = true },
	} {
		cfg := ctrConfig("c")
		change(cfg)
		if _, err := k.CreateContainer(ctx, string(p), cfg); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	cfg := ctrConfig("c")
	cfg.Image.Image = "missing"
	if _, err := k.CreateContainer(ctx, string(p), cfg); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "config.image") {
		t.Errorf("image: %v", err)
	}
	if _, err := k.CreateContainer(ctx, "nope", ctrConfig("c")); !errdefs.IsNotFound(err) {
		t.Errorf("no pod: %v", err)
	}
	ok(t, k.StopPod(ctx, string(p)))
	if _, err := k.CreateContainer(ctx, string(p), ctrConfig("c")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("stopped pod: %v", err)
	}
	if n := len(k.w.pins); n != 1 {
		t.Errorf("%d pins", n)
	}
}

func TestEndsAndTheirReasons(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	for _, tc := range []struct {
		args   []string
		code   int32
		reason string
	}{
		{[]string{"exit", "0"}, 0, reasonCompleted},
		{[]string{"exit", "3"}, 3, reasonError},
		{[]string{"exit", "137", "oom"}, 137, reasonOOMKilled},
		{[]string{"exit", "137"}, 137, reasonError},
	} {
		name := strings.Join(tc.args, "-")
		c := k.running(p, name, tc.args...)
		s := k.untilState(c, ContainerExited)
		if s.ExitCode != tc.code || s.Reason != tc.reason || s.FinishedAt.Before(s.StartedAt) || s.StartedAt.IsZero() {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// TestExitBeforeTheAnswer: the exit record is applied while the start still waits.
func TestExitBeforeTheAnswer(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.ctr(p, "c", "exit", "5")
	reached, release := k.w.blocking("start!")
	done := make(chan error, 1)
	go func() { done <- k.StartContainer(context.Background(), string(c)) }()
	<-reached
	k.untilState(c, ContainerExited)
	release()
	ok(t, <-done)
	if s := k.status(c); s.State != ContainerExited || s.ExitCode != 5 {
		t.Errorf("%+v", s)
	}
	// The record arrives once more, also after the removal.
	k.l.exits <- wire.Exit{ID: c, Code: 9}
	ok(t, k.RemoveContainer(context.Background(), string(c)))
	k.l.exits <- wire.Exit{ID: c, Code: 9}
	until(t, "taken", func() bool { return len(k.l.exits) == 0 })
}

func TestStartFails(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.ctr(p, "c", "broken")
	if err := k.StartContainer(context.Background(), string(c)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("%v", err)
	}
	if s := k.status(c); s.State != ContainerExited || s.ExitCode != 128 || s.Reason != reasonStartError || !strings.Contains(s.Message, "no such file") || s.FinishedAt.IsZero() {
		t.Errorf("%+v", s)
	}
	// The answer is lost: what runs is killed, and stays StartError.
	d := k.ctr(p, "d", "deaf")
	k.w.failing("start!", 1)
	if err := k.StartContainer(context.Background(), string(d)); err == nil {
		t.Error("no error")
	}
	if s := k.status(d); s.State != ContainerExited || s.Reason != reasonStartError {
		t.Errorf("%+v", s)
	}
	k.w.mu.Lock()
	defer k.w.mu.Unlock()
	if s := k.w.containers[d].info.State; s != wire.Exited {
		t.Errorf("still %s", s)
	}
}

func TestStopGraces(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	t.Run("grace over", func(t *testing.T) {
		c := k.running(p, "one", "deaf")
		began := time.Now()
		ok(t, k.StopContainer(context.Background(), string(c), 100*time.Millisecond))
		if d := time.Since(began); d < 100*time.Millisecond || fmt.Sprint(k.w.sent(c)) != "[15 9]" {
			t.Errorf("after %v: %v", d, k.w.sent(c))
		}
	})
	t.Run("shorter second grace wins, the signal is sent once", func(t *testing.T) {
		c := k.running(p, "two", "deaf")
		first := make(chan error, 1)
		go func() { first <- k.StopContainer(context.Background(), string(c), time.Hour) }()
		until(t, "stop signal", func() bool { return len(k.w.sent(c)) == 1 })
		ok(t, k.StopContainer(context.Background(), string(c), 50*time.Millisecond))
		ok(t, <-first)
		if got := fmt.Sprint(k.w.sent(c)); got != "[15 9]" {
			t.Errorf("signals %s", got)
		}
	})
	t.Run("longer second grace does not lose", func(t *testing.T) {
		c := k.running(p, "three", "deaf")
		first := make(chan error, 1)
		go func() { first <- k.StopContainer(context.Background(), string(c), 100*time.Millisecond) }()
		until(t, "stop signal", func() bool { return len(k.w.sent(c)) == 1 })
		ok(t, k.StopContainer(context.Background(), string(c), time.Hour))
		ok(t, <-first)
	})
	t.Run("no grace", func(t *testing.T) {
		c := k.running(p, "four")
		ok(t, k.StopContainer(context.Background(), string(c), 0))
		if got := fmt.Sprint(k.w.sent(c)); got != "[9]" {
			t.Errorf("signals %s", got)
		}
	})
	t.Run("goes on without the caller", func(t *testing.T) {
		c := k.running(p, "five", "deaf")
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
		defer cancel()
		if err := k.StopContainer(ctx, string(c), 100*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		k.untilState(c, ContainerExited)
	})
	t.Run("asked during the start", func(t *testing.T) {
		c := k.ctr(p, "six")
		reached, release := k.w.blocking("start")
		started := make(chan error, 1)
		go func() { started <- k.StartContainer(context.Background(), string(c)) }()
		<-reached
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
		defer cancel()
		if err := k.StopContainer(ctx, string(c), time.Second); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		release()
		ok(t, <-started)
		k.untilState(c, ContainerExited) // although its caller is long gone
		if got := fmt.Sprint(k.w.sent(c)); got != "[15]" {
			t.Errorf("signals %s", got)
		}
	})
	t.Run("a killed one that stays is killed again", func(t *testing.T) {
		c := k.running(p, "seven")
		k.w.failing("signal", 1)
		began := time.Now()
		ok(t, k.StopContainer(context.Background(), string(c), 0))
		if d := time.Since(began); d < killAgain {
			t.Errorf("after %v", d)
		}
	})
}

func TestRemoveWhileRunning(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.running(p, "c", "deaf")
	k.w.failing("delete", 1)
	if err := k.RemoveContainer(context.Background(), string(c)); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	if s := k.status(c); s.State != ContainerExited {
		t.Errorf("%+v", s)
	}
	if _, err := k.CreateContainer(context.Background(), string(p), ctrConfig("c")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("create under the name of one that is going: %v", err)
	}
	ok(t, k.RemoveContainer(context.Background(), string(c)))
	if next := k.ctr(p, "c"); next == c {
		t.Error("same id")
	}
}

func TestUpdateContainer(t *testing.T) {
	k := newKit(t)
	ctx := context.Background()
	cfg := ctrConfig("c")
	cfg.Resources = Resources{CPUShares: 512, MemoryLimit: 64 << 20, CpusetCpus: "0", OOMScoreAdj: 5}
	c := must(k.CreateContainer(ctx, string(k.pod("a")), cfg))(t)
	for range 2 { // replaying is no error
		ok(t, k.UpdateContainer(ctx, string(c), &Resources{CPUShares: 1024}))
	}
	if r := k.status(c).Resources; r.CPUShares != 1024 || r.MemoryLimit != 64<<20 || r.CpusetCpus != "0" || r.OOMScoreAdj != 5 {
		t.Errorf("%+v", r)
	}
	k.w.failing("update", 1)
	if err := k.UpdateContainer(ctx, string(c), &Resources{MemoryLimit: 128 << 20}); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	if r := k.status(c).Resources; r.MemoryLimit != 64<<20 {
		t.Errorf("a failed update shows: %+v", r)
	}
	k2 := k.killed()
	if r := k2.status(c).Resources; r.CPUShares != 1024 {
		t.Errorf("after a restart: %+v", r)
	}
	ok(t, k2.StartContainer(ctx, string(c)))
	ok(t, k2.StopContainer(ctx, string(c), 0))
	if err := k2.UpdateContainer(ctx, string(c), &Resources{CPUShares: 2}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exited: %v", err)
	}
	if err := k2.UpdateContainer(ctx, "nope", &Resources{}); !errdefs.IsNotFound(err) {
		t.Errorf("missing: %v", err)
	}
}

func TestMerge(t *testing.T) {
	old := Resources{CPUPeriod: 1, CPUQuota: 2, MemoryLimit: 3, CpusetMems: "0",
		Hugepages: []HugepageLimit{{PageSize: "2MB", Limit: 1}}, Unified: map[string]string{"a": "1", "b": "2"}}
	got := merge(old, Resources{CPUQuota: -1, CpusetCpus: "1", Hugepages: []HugepageLimit{{PageSize: "2MB", Limit: 0}, {PageSize: "1GB", Limit: 7}}, Unified: map[string]string{"b": "3"}})
	want := Resources{CPUPeriod: 1, CPUQuota: -1, MemoryLimit: 3, CpusetMems: "0", CpusetCpus: "1",
		Hugepages: []HugepageLimit{{PageSize: "2MB", Limit: 0}, {PageSize: "1GB", Limit: 7}}, Unified: map[string]string{"a": "1", "b": "3"}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%+v", got)
	}
	if old.Hugepages[0].Limit != 1 || old.Unified["b"] != "2" {
		t.Error("the published value was changed in place")
	}
}
