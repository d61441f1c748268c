package sandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/internal/ranked"
)

func init() { ranked.Check() }

// kit is an engine in a world.
type kit struct {
	*Engine
	t           testing.TB
	w           *world
	l           *link
	root, state string
	looked      chan struct{} // closed when leftovers were looked for twice
	torn        bool          // records were lost: what they named is the reconciler's
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("skipped: needs root: the engine and its pods have real namespaces")
	}
}

func newKit(t testing.TB) *kit {
	t.Helper()
	return openKit(t, newWorld(t), t.TempDir(), t.TempDir())
}

func openKit(t testing.TB, w *world, root, state string) *kit {
	t.Helper()
	needRoot(t)
	k := &kit{t: t, w: w, l: w.connect(), root: root, state: state, looked: make(chan struct{})}
	e, err := Open(context.Background(), Config{Root: root, State: state, Images: k.l, Network: k.l, Runtime: k.l, Streams: &streams{link: k.l}, FDs: k.l, Reconcile: -1})
	if err != nil {
		t.Fatal(err)
	}
	k.Engine = e
	t.Cleanup(func() {
		k.drop()
		_ = k.Engine.empty.Close()
		_ = k.Engine.past.Close()
	})
	// As the engine would do by itself, at times of its own.
	k.owned.Go(func() {
		defer close(k.looked)
		var seen rounds
		k.round(&seen)
		k.round(&seen)
	})
	return k
}

// reconciled looks twice for leftovers and returns the second outcome.
func (k *kit) reconciled() (r Round) {
	<-k.looked
	var seen rounds
	k.cfg.Reconciled = func(got Round) { r = got }
	k.round(&seen)
	k.round(&seen)
	return r
}

// drop ends the engine as a kill would: no operation is waited for. (Close would
// also remove the cgroup parent, which another engine of this machine may use.)
func (k *kit) drop() {
	k.l.dead.Store(true)
	k.cancel()
	done := make(chan struct{})
	go func() { k.owned.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		buf := make([]byte, 1<<20)
		k.t.Errorf("goroutines of the engine do not end:\n%s", buf[:runtime.Stack(buf, true)])
	}
	for _, p := range k.view.Load().pods {
		p.closeFiles()
	}
}

// killed is the engine killed by SIGKILL and a new one on the same folders.
func (k *kit) killed() *kit {
	k.t.Helper()
	k.drop()
	return openKit(k.t, k.w, k.root, k.state)
}

func podConfig(name string) *PodConfig {
	return &PodConfig{Meta: PodMeta{Name: name, Namespace: "default", UID: "uid-" + name}, Hostname: name, CgroupParent: "/berth-engine-test"}
}

func ctrConfig(name string, args ...string) *ContainerConfig {
	if len(args) == 0 {
		args = []string{"run"}
	}
	return &ContainerConfig{Meta: ContainerMeta{Name: name}, Image: ImageSpec{Image: "image"}, Command: args}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (k *kit) pod(name string) id.Pod {
	k.t.Helper()
	return must(k.RunPod(context.Background(), podConfig(name)))(k.t)
}

func (k *kit) ctr(p id.Pod, name string, args ...string) id.Container {
	k.t.Helper()
	return must(k.CreateContainer(context.Background(), string(p), ctrConfig(name, args...)))(k.t)
}

func (k *kit) running(p id.Pod, name string, args ...string) id.Container {
	k.t.Helper()
	c := k.ctr(p, name, args...)
	ok(k.t, k.StartContainer(context.Background(), string(c)))
	return c
}

func (k *kit) status(c id.Container) *ContainerStatus {
	k.t.Helper()
	return must(k.Container(string(c)))(k.t)
}

// until waits for a condition.
func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("not within 10 s: %s", what)
}

func (k *kit) untilState(c id.Container, s ContainerState) *ContainerStatus {
	k.t.Helper()
	until(k.t, fmt.Sprintf("state %d", s), func() bool { return k.status(c).State == s })
	return k.status(c)
}

// leftovers lists what the engine left in its folders.
func (k *kit) leftovers() (out []string) {
	dirs := []string{filepath.Join(k.root, "sandboxes", "pods"), filepath.Join(k.root, "sandboxes", "containers"), k.podsDir()}
	for _, s := range shards {
		dirs = append(dirs, filepath.Join(k.containersDir(), string(s)))
	}
	for _, d := range dirs {
		entries, err := os.ReadDir(d)
		ok(k.t, err)
		for _, e := range entries {
			out = append(out, filepath.Join(filepath.Base(d), e.Name()))
		}
	}
	return out
}

func (k *kit) empty() {
	k.t.Helper()
	done := make(chan struct{})
	go func() { // a test may kill the engine in it
		defer close(done)
		r := k.reconciled() // what was on its way out at the first looks
		for kind, n := range r.Removed {
			// An exit may be on its way. Anything else an operation has left behind.
			if kind != leftover.Lost && !k.torn {
				k.t.Errorf("left to the reconciler: %d of kind %s", n, kind)
			}
		}
	}()
	<-done
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if k.w.holds() == holdsNothing && len(k.leftovers()) == 0 {
			break
		}
	}
	if h := k.w.holds(); h != holdsNothing {
		k.t.Errorf("left behind: %s", h)
	}
	if l := k.leftovers(); len(l) > 0 {
		k.t.Errorf("left behind: %s", strings.Join(l, ", "))
	}
	if n := len(k.view.Load().pods) + len(k.view.Load().containers); n > 0 {
		k.t.Errorf("%d pods and containers in the indexes", n)
	}
}
