package sandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

// offline looks at the kit's folders as fsck does.
func (k *kit) offline() (out []string) {
	k.t.Helper()
	found, err := Offline{
		Root: k.root, State: k.state,
		Supervisor: struct {
			Runtime
			RuntimeFDs
		}{k.l, k.l},
		Network: func(use cni.InUse) ([]leftover.Finding, error) { return k.l.Leftovers(context.Background(), use) },
		Images:  func(func(string) bool) ([]leftover.Finding, error) { return nil, nil },
	}.Leftovers(context.Background())
	ok(k.t, err)
	for _, f := range found {
		if !strings.HasPrefix(f.Name, "/berth/") { // what other engines of this machine have
			out = append(out, string(f.Kind)+" "+f.Name)
		}
	}
	slices.Sort(out)
	return out
}

// counted are a round's counts of some kinds as text.
func counted(m map[leftover.Kind]int) string {
	var out []string
	for k, n := range m {
		if k != leftover.Cgroup || n > 0 {
			out = append(out, fmt.Sprintf("%s %d", k, n))
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// TestReconcile plants one of everything beside a live pod: the first look counts
// nothing, the second removes it, and the pod goes on. Offline the same is found.
func TestReconcile(t *testing.T) {
	k := newKit(t)
	<-k.looked
	p := k.pod("a")
	live, exited := k.running(p, "c"), k.running(p, "d")
	ok(t, k.StopContainer(context.Background(), string(exited), time.Minute))
	if found := k.offline(); len(found) > 0 {
		t.Errorf("nothing is planted, and found: %q", found)
	}
	if r := k.reconciled(); len(r.Found)+len(r.Removed)+len(r.Failed) > 0 || r.Err != nil {
		t.Errorf("nothing is planted, and found: %+v", r)
	}

	pod, unreadable, ctr := id.NewPod(), id.NewPod(), id.NewContainer()
	layer := filepath.Join(k.containersDir(), string(ctr[:1]), string(ctr))
	files := filepath.Join(k.podsDir(), string(pod))
	ok(t, os.MkdirAll(filepath.Join(layer, "upper"), 0o755))
	ok(t, os.MkdirAll(files, 0o755))
	bad := filepath.Join(recordsDir(k.root), "pods", string(unreadable)+".json.bad")
	ok(t, os.WriteFile(bad, nil, 0o600))
	null := must(os.Open(os.DevNull))(t)
	defer null.Close()
	k.w.mu.Lock()
	k.w.containers[ctr] = &fakeContainer{info: wire.Info{ID: ctr, State: wire.Created}}
	k.w.fds[fdKey(pod, "net")], k.w.fds["lane/1"] = dupFile(null), dupFile(null)
	k.w.attached[pod], k.w.attached[unreadable] = true, true
	delete(k.w.containers, live) // its exit was lost on the way
	k.w.mu.Unlock()

	want := []string{"address " + string(pod), "container " + string(ctr), "descriptor " + fdKey(pod, "net"), "layer " + layer, "lost " + string(live), "pod-files " + files, "record " + bad}
	if found := k.offline(); !slices.Equal(found, want) { // what the unreadable pod may have is left alone
		t.Errorf("offline found\n%q, want\n%q", found, want)
	}
	var seen rounds
	var r Round
	k.cfg.Reconciled = func(got Round) { r = got }
	if fresh := k.round(&seen); !fresh || len(r.Found)+len(r.Removed) > 0 || k.w.containers[ctr] == nil || k.status(live).State != ContainerRunning {
		t.Fatalf("one look is enough: %+v", r)
	}
	k.round(&seen)
	all := "address 2, container 1, descriptor 1, layer 1, lost 1, pod-files 1"
	if counted(r.Found) != all+", record 1" || counted(r.Removed) != all || len(r.Failed) > 0 {
		t.Errorf("found %s; removed %s; failed %s", counted(r.Found), counted(r.Removed), counted(r.Failed))
	}
	if s := k.status(live); s.State != ContainerExited || s.Reason != reasonUnknown {
		t.Errorf("a lost container is %+v", s)
	}
	k.round(&seen)
	if len(r.Found)+len(r.Removed)+len(r.Failed) > 0 {
		t.Errorf("counted again: %+v", r)
	}
	k.w.mu.Lock()
	if f := k.w.fds["lane/1"]; f == nil {
		t.Error("a descriptor that is no pod's was dropped")
	} else {
		f.Close()
		delete(k.w.fds, "lane/1")
	}
	k.w.mu.Unlock()
	if s := must(k.Pod(string(p)))(t); s.State != PodReady {
		t.Errorf("the live pod: %+v", s)
	}
	ok(t, os.Remove(bad))
	ok(t, k.RemovePod(context.Background(), string(p)))
	k.empty()
}

// TestReconcileFails: what cannot be removed counts as failed each time and as found
// once; where one part cannot look the others do.
func TestReconcileFails(t *testing.T) {
	k := newKit(t)
	<-k.looked
	pod, ctr := id.NewPod(), id.NewContainer()
	k.w.mu.Lock()
	k.w.containers[ctr] = &fakeContainer{info: wire.Info{ID: ctr, State: wire.Exited}}
	k.w.attached[pod] = true
	k.w.mu.Unlock()
	k.w.failing("delete", 2)
	var seen rounds
	var r Round
	k.cfg.Reconciled = func(got Round) { r = got }
	k.round(&seen)
	for i, want := range []string{"found address 1, container 1; removed address 1; failed container 1", "found ; removed ; failed container 1", "found ; removed container 1; failed "} {
		k.round(&seen)
		if got := fmt.Sprintf("found %s; removed %s; failed %s", counted(r.Found), counted(r.Removed), counted(r.Failed)); got != want {
			t.Errorf("round %d: %s, want %s", i, got, want)
		}
	}
	k.w.failing("list", 1)
	k.w.mu.Lock()
	k.w.attached[pod] = true
	k.w.mu.Unlock()
	k.round(&seen)
	if r.Err == nil {
		t.Error("a look without the supervisor counts as one")
	}
	if k.round(&seen); r.Err != nil || counted(r.Removed) != "address 1" {
		t.Errorf("%+v", r)
	}
	k.empty()
}

// TestACgroupThatStays: its removal failed unseen, the daemon was killed, and the next
// one still knows that it is Berth's.
func TestACgroupThatStays(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c, live := k.ctr(p, "c"), k.ctr(p, "live")
	cgroup, other := k.status(c).CgroupDir, k.status(live).CgroupDir
	root := k.cgroups[0]
	dirs := []string{filepath.Join(root, cgroup, "below"), filepath.Join(root, other), filepath.Join(root, filepath.Dir(cgroup), string(id.NewContainer()))}
	for _, d := range dirs {
		ok(t, os.MkdirAll(d, 0o755))
		t.Cleanup(func() { _ = unix.Rmdir(d); _ = unix.Rmdir(filepath.Dir(d)) })
	}
	ok(t, k.RemoveContainer(context.Background(), string(c)))
	k = k.killed()
	<-k.looked
	if _, err := os.Stat(dirs[0]); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	for _, d := range dirs[1:] {
		if _, err := os.Stat(d); err != nil {
			t.Errorf("another's cgroup: %v", err)
		}
	}
	ok(t, k.RemovePod(context.Background(), string(p)))
	k.reconciled()
	k.reconciled() // that the last one is gone is seen by the look after its removal
	if left := k.past.List(); len(left) > 0 {
		t.Errorf("remembered for ever: %v", left)
	}
	k.empty()
}

// TestReconcilerLeavesOperationsAlone looks and removes as fast as it can, with
// hardly a pause between two looks, while pods live: none loses anything.
func TestReconcilerLeavesOperationsAlone(t *testing.T) {
	k := newKit(t)
	<-k.looked
	k.cfg.Reconcile = 2 * time.Millisecond
	var mu sync.Mutex
	rounds, found := 0, map[leftover.Kind]int{}
	k.cfg.Reconciled = func(r Round) {
		mu.Lock()
		defer mu.Unlock()
		rounds++
		for kind, n := range r.Found {
			found[kind] += n
		}
		if r.Err != nil {
			t.Error(r.Err)
		}
	}
	k.owned.Go(k.reconcile)
	var wg sync.WaitGroup
	ctx := context.Background()
	for w := range 3 {
		wg.Go(func() {
			for n := range 25 {
				p, err := k.RunPod(ctx, podConfig(fmt.Sprintf("w%d-%d", w, n)))
				if err != nil {
					t.Error(err)
					return
				}
				c, err := k.CreateContainer(ctx, string(p), ctrConfig("c"))
				if err != nil {
					t.Error(err)
					return
				}
				if err := k.StartContainer(ctx, string(c)); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Duration(n%4) * time.Millisecond)
				if s, err := k.Container(string(c)); err != nil || s.State != ContainerRunning {
					t.Errorf("a running container is %+v, %v", s, err)
				}
				q, err := k.findPod(string(p))
				if err != nil || q.record().State != lifecycle.Ready {
					t.Errorf("a ready pod: %v", err)
				}
				keys, _ := q.held()
				k.w.mu.Lock()
				for _, key := range keys {
					if k.w.fds[key] == nil {
						t.Errorf("descriptor %s of a live pod was dropped", key)
					}
				}
				if !k.w.attached[p] {
					t.Error("a live pod was detached")
				}
				k.w.mu.Unlock()
				if err := k.RemovePod(ctx, string(p)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	mu.Lock()
	t.Logf("%d rounds, found %s", rounds, counted(found))
	if rounds == 0 {
		t.Error("no round")
	}
	mu.Unlock()
	k.empty()
}

// TestOfflineLeavesAnUnreadablePodAlone: its init too, of which no other record tells.
func TestOfflineLeavesAnUnreadablePodAlone(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	init := must(k.findPod(string(p)))(t).record().Init
	k.running(p, "c")
	k.drop()
	ok(t, os.WriteFile(filepath.Join(recordsDir(k.root), "pods", string(p)+".json"), []byte("{}"), 0o600))
	l := k.w.connect()
	found, err := Offline{
		Root: k.root, State: k.state,
		Supervisor: struct {
			Runtime
			RuntimeFDs
		}{l, l},
		Network: func(use cni.InUse) ([]leftover.Finding, error) { return l.Leftovers(context.Background(), use) },
		Images:  func(func(string) bool) ([]leftover.Finding, error) { return nil, nil },
	}.Leftovers(context.Background())
	ok(t, err)
	seen := false
	for _, f := range found {
		seen = seen || f.Name == string(init)
		if f.Remove != nil {
			t.Errorf("%s %s would be removed: %s", f.Kind, f.Name, f.Detail)
		}
	}
	if init == "" || !seen {
		t.Errorf("the init %q is not reported: %+v", init, found)
	}
}
