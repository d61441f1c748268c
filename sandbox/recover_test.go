package sandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

// life is a pod's life as the kubelet drives it. Each step may be repeated.
var life = []struct {
	name string
	do   func(ctx context.Context, e *Engine) error
}{
	{"run pod", func(ctx context.Context, e *Engine) error {
		cfg := podConfig("a")
		// As the kubelet does: the next attempt when the last one is listed.
		if pods := e.ListPods(PodFilter{}); len(pods) > 0 {
			cfg.Meta.Attempt = pods[0].Config.Meta.Attempt
			if pods[0].State != PodReady {
				cfg.Meta.Attempt++
			}
		}
		_, err := e.RunPod(ctx, cfg)
		return err
	}},
	{"create container", func(ctx context.Context, e *Engine) error {
		_, err := e.CreateContainer(ctx, string(e.ListPods(PodFilter{})[0].ID), ctrConfig("c"))
		return err
	}},
	{"start container", func(ctx context.Context, e *Engine) error {
		c := e.ListContainers(ContainerFilter{})[0]
		if c.State != ContainerCreated {
			return nil
		}
		return e.StartContainer(ctx, string(c.ID))
	}},
	{"stop container", func(ctx context.Context, e *Engine) error {
		return e.StopContainer(ctx, string(e.ListContainers(ContainerFilter{})[0].ID), time.Minute)
	}},
	{"remove container", func(ctx context.Context, e *Engine) error {
		for _, c := range e.ListContainers(ContainerFilter{}) {
			if err := e.RemoveContainer(ctx, string(c.ID)); err != nil {
				return err
			}
		}
		return nil
	}},
	{"container for the pod's removal", func(ctx context.Context, e *Engine) error {
		cfg := ctrConfig("d", "deaf")
		c, err := e.CreateContainer(ctx, string(e.ListPods(PodFilter{})[0].ID), cfg)
		if err != nil {
			return err
		}
		if s, err := e.Container(string(c)); err != nil || s.State != ContainerCreated {
			return err
		}
		return e.StartContainer(ctx, string(c))
	}},
	{"stop pod", func(ctx context.Context, e *Engine) error {
		for _, p := range e.ListPods(PodFilter{}) {
			if err := e.StopPod(ctx, string(p.ID)); err != nil {
				return err
			}
		}
		return nil
	}},
	{"remove pod", func(ctx context.Context, e *Engine) error {
		for _, p := range e.ListPods(PodFilter{}) {
			if err := e.RemovePod(ctx, string(p.ID)); err != nil {
				return err
			}
		}
		return nil
	}},
}

// TestKilledAtEveryCall kills the engine at the beginning and at the end of each
// call that it makes to the outside in a pod's life, opens a new one on what was
// on disk at that moment, and has the life go on.
func TestKilledAtEveryCall(t *testing.T) {
	needRoot(t)
	calls := 0
	for n := 1; ; n++ {
		crashed := t.Run(fmt.Sprintf("call %d", n), func(t *testing.T) {
			if !liveKilledAt(t, int32(n)) {
				calls = n - 1
			}
		})
		if calls > 0 || !crashed {
			break
		}
		if n > 500 {
			t.Fatal("no end")
		}
	}
	t.Logf("killed at %d places", calls)
	if calls < 36 {
		t.Errorf("only %d places", calls)
	}
}

func liveKilledAt(t *testing.T, n int32) (crashed bool) {
	k := newKit(t)
	w, old := k.w, k.l
	root, state := t.TempDir(), t.TempDir()
	var count atomic.Int32
	var where string
	at := make(chan struct{})
	w.set(func(op, _ string) error {
		if old.dead.Load() || count.Add(1) != n {
			return nil
		}
		old.dead.Store(true)
		copyDir(t, k.root, root)
		copyDir(t, k.state, state)
		ok(t, os.Remove(filepath.Join(state, rootFile))) // the copy belongs to the copy
		where = op
		close(at)
		runtime.Goexit()
		return nil
	})
	now, killed := k, at
	for _, step := range life {
		done := make(chan error, 1)
		e := now.Engine
		go func() { done <- step.do(context.Background(), e) }()
		select {
		case err := <-done:
			if !crashed && old.dead.Load() {
				<-at // killed behind the call's back
			} else if err != nil {
				t.Fatalf("%s: %v", step.name, err)
			}
		case <-killed:
		}
		if !crashed && isClosed(at) {
			crashed, killed = true, nil
			w.set(nil)
			now = openKit(t, w, root, state)
			until(t, "removals that were begun are finished", func() bool { return !now.removing() })
			now.consistent(fmt.Sprintf("killed at %q of %q", where, step.name))
			if step.name == "remove pod" && len(now.ListPods(PodFilter{})) == 0 {
				break
			}
			now.resume(step.name)
		}
	}
	now.empty()
	return crashed
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// resume repeats the life up to and with the interrupted step: the kubelet calls
// again what it has no answer to, and finds the rest done.
func (k *kit) resume(upTo string) {
	k.t.Helper()
	for _, step := range life {
		later := map[string]bool{"stop pod": true, "remove pod": true, "container for the pod's removal": true, "remove container": true}
		if step.name != upTo && later[upTo] {
			continue // what came before is undone by what follows
		}
		if err := step.do(context.Background(), k.Engine); err != nil {
			k.t.Fatalf("again %s: %v", step.name, err)
		}
		if step.name == upTo {
			return
		}
	}
}

func (k *kit) removing() bool {
	v := k.view.Load()
	for _, p := range v.pods {
		if p.record().State == lifecycle.Removing {
			return true
		}
	}
	for _, c := range v.containers {
		if c.record().State == lifecycle.Removing {
			return true
		}
	}
	return false
}

// consistent compares what the engine says with what there is, until they agree:
// leftovers go behind the first answers.
func (k *kit) consistent(when string) {
	k.t.Helper()
	var bad []string
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if bad = k.inconsistencies(); len(bad) == 0 {
			return
		}
	}
	k.t.Errorf("%s: %s", when, strings.Join(bad, "; "))
}

func (k *kit) inconsistencies() (bad []string) {
	say := func(format string, args ...any) { bad = append(bad, fmt.Sprintf(format, args...)) }
	k.w.mu.Lock()
	defer k.w.mu.Unlock()
	known := map[id.Container]bool{}
	keys := map[string]bool{}
	ready := map[id.Pod]bool{}
	for _, s := range k.ListPods(PodFilter{}) {
		p, _ := k.findPod(string(s.ID))
		rec := p.record()
		known[rec.Init] = true
		held, _ := p.held()
		for _, key := range held {
			keys[key] = true
		}
		if s.State != PodReady {
			continue
		}
		ready[s.ID] = true
		if f := k.w.containers[rec.Init]; f == nil || f.info.State != wire.Running || !k.w.attached[s.ID] || len(held) != 4 {
			say("a ready pod lacks something: %d descriptors, attached %v", len(held), k.w.attached[s.ID])
		}
	}
	for _, s := range k.ListContainers(ContainerFilter{}) {
		known[s.ID] = true
		f := k.w.containers[s.ID]
		if s.State != ContainerExited && (f == nil || (s.State == ContainerRunning) != (f.info.State == wire.Running)) {
			say("container is %v, supervisor has %+v", s.State, f)
		}
		if s.State == ContainerExited && f != nil && f.info.State == wire.Running {
			say("an ended container runs")
		}
		if !k.w.pins[string(s.ID)] {
			say("the image of a container is not pinned")
		}
	}
	for c := range k.w.containers {
		if !known[c] {
			say("the supervisor has a container that nobody knows")
		}
	}
	for key := range k.w.fds {
		if !keys[key] {
			say("descriptor %s is kept for nobody", key)
		}
	}
	for p := range k.w.attached {
		if q, err := k.findPod(string(p)); err != nil || !q.holds() {
			say("attachment of nobody")
		}
	}
	for owner := range k.w.pins {
		if !known[id.Container(owner)] {
			delete(k.w.pins, owner) // the image service keeps pins in memory: they died with it
		}
	}
	return bad
}

func copyDir(t testing.TB, from, to string) {
	for range 5 { // a file may vanish meanwhile
		if err := os.RemoveAll(to); err != nil {
			t.Error(err)
		}
		if os.CopyFS(to, os.DirFS(from)) == nil {
			return
		}
	}
	t.Errorf("%s cannot be copied", from)
}

func TestRestartAdopts(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	stays, ends, created := k.running(p, "stays"), k.running(p, "ends"), k.ctr(p, "created")
	before := *must(k.Pod(string(p)))(t)
	k.drop()
	k.w.mu.Lock()
	k.w.end(k.w.containers[ends], wire.Exit{Code: 3})
	k.w.mu.Unlock()
	k2 := openKit(t, k.w, k.root, k.state)
	if s := must(k2.Pod(string(p)))(t); s.State != PodReady || fmt.Sprint(s.IPs) != fmt.Sprint(before.IPs) || !s.CreatedAt.Equal(before.CreatedAt) {
		t.Errorf("%+v", s)
	}
	if s := k2.status(stays); s.State != ContainerRunning || s.Pid != 4242 {
		t.Errorf("%+v", s)
	}
	if s := k2.status(ends); s.State != ContainerExited || s.ExitCode != 3 || s.Reason != reasonError {
		t.Errorf("%+v", s)
	}
	if s := k2.status(created); s.State != ContainerCreated {
		t.Errorf("%+v", s)
	}
	if again := k2.pod("a"); again != p {
		t.Error("the retry of an adopted pod made another")
	}
	ok(t, k2.StartContainer(context.Background(), string(created)))
	ok(t, k2.StopContainer(context.Background(), string(stays), time.Minute))
	newer := k2.ctr(p, "newer")
	if l := k2.ListContainers(ContainerFilter{}); l[0].ID != newer {
		t.Error("made after a restart, and not the newest")
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.empty()
}

// rewrite changes the boot id of all records.
func rewrite(t *testing.T, k *kit) {
	for _, p := range k.view.Load().pods {
		rec := p.record()
		rec.BootID = "another-boot"
		ok(t, k.podBook.Write(string(p.id), &rec))
	}
	for _, c := range k.view.Load().containers {
		rec := c.record()
		rec.BootID = "another-boot"
		ok(t, k.ctrBook.Write(string(c.id), &rec))
	}
}

func TestReboot(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	running, created, exited := k.running(p, "running"), k.ctr(p, "created"), k.running(p, "exited")
	ok(t, k.StopContainer(context.Background(), string(exited), time.Minute))
	k.drop()
	rewrite(t, k)
	w := newWorld(t) // nothing of the kernel's survives
	w.attached[p] = true
	k2 := openKit(t, w, k.root, t.TempDir())
	if s := must(k2.Pod(string(p)))(t); s.State != PodNotReady || s.Reason == "" {
		t.Errorf("%+v", s)
	}
	for _, c := range []id.Container{running, created} {
		if s := k2.status(c); s.State != ContainerExited || s.ExitCode != 255 || s.Reason != reasonUnknown || s.Message == "" || s.FinishedAt.IsZero() {
			t.Errorf("%+v", s)
		}
	}
	if s := k2.status(exited); s.ExitCode != 143 {
		t.Errorf("%+v", s)
	}
	if !w.attached[p] {
		t.Error("the address was freed without a DEL")
	}
	ok(t, k2.StopPod(context.Background(), string(p)))
	if d := w.detaches; len(d) != 1 || string(d[0].State) != "state" {
		t.Errorf("detaches %+v", d)
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.empty()
}

// TestSupervisorLost: the same boot, and nobody holds the containers any more.
func TestSupervisorLost(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.running(p, "c")
	k.drop()
	w := newWorld(t)
	w.attached[p] = true
	k2 := openKit(t, w, k.root, k.state)
	if s := k2.status(c); s.State != ContainerExited || s.ExitCode != 255 || s.Reason != reasonUnknown {
		t.Errorf("%+v", s)
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.empty()
}

func TestPodInitEndsWhileTheDaemonIsAway(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	init := must(k.findPod(string(p)))(t).record().Init
	k.drop()
	k.w.mu.Lock()
	k.w.end(k.w.containers[init], wire.Exit{Code: 137})
	k.w.mu.Unlock()
	k2 := openKit(t, k.w, k.root, k.state)
	if s := must(k2.Pod(string(p)))(t); s.State != PodNotReady || s.Reason == "" {
		t.Errorf("%+v", s)
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.empty()
}

// TestPowerLossCutsRecords: the newest lines of records were never on disk.
func TestPowerLossCutsRecords(t *testing.T) {
	k := newKit(t)
	p, empty := k.pod("a"), k.pod("empty")
	c := k.running(p, "c")
	k.drop()
	for _, f := range []string{"pods/" + string(p), "pods/" + string(empty)} {
		file := filepath.Join(k.root, "sandboxes", f+".json")
		lines := strings.SplitAfter(string(must(os.ReadFile(file))(t)), "\n")
		ok(t, os.WriteFile(file, []byte(lines[0]+lines[1]), 0o600))
	}
	w := newWorld(t)
	w.attached[p], w.attached[empty] = true, true
	k2 := openKit(t, w, k.root, t.TempDir())
	if l := k2.ListPods(PodFilter{}); len(l) != 1 || l[0].ID != p || l[0].State != PodNotReady {
		t.Errorf("%+v", l)
	}
	if s := k2.status(c); s.State != ContainerExited || s.Reason != reasonUnknown {
		t.Errorf("%+v", s)
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.torn = true
	k2.empty()
}

func TestDamagedRecords(t *testing.T) {
	k := newKit(t)
	good, bad := k.pod("good"), k.pod("bad")
	c, orphan := k.running(good, "c"), k.running(bad, "orphan")
	k.drop()
	file := filepath.Join(k.root, "sandboxes", "pods", string(bad)+".json")
	whole := must(os.ReadFile(file))(t)
	ok(t, os.WriteFile(file, []byte(strings.ReplaceAll(string(whole), `"version"`, `version"`)), 0o600))
	k2 := openKit(t, k.w, k.root, k.state)
	if l := k2.ListPods(PodFilter{}); len(l) != 1 || l[0].ID != good || l[0].State != PodReady {
		t.Errorf("%+v", l)
	}
	if s := k2.status(c); s.State != ContainerRunning {
		t.Errorf("%+v", s)
	}
	if _, err := k2.Container(string(orphan)); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	k2.consistent("torn")
	if _, err := os.Stat(file + ".bad"); err != nil {
		t.Error(err)
	}
	ok(t, os.Remove(file+".bad"))
	ok(t, k2.RemovePod(context.Background(), string(good)))
	k2.empty()
}
