package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/journal"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

// stuckAt makes every call whose key begins with one of the given ids wait until
// free is called.
func (w *world) stuckAt(ops []string, keys ...string) (free func()) {
	block := make(chan struct{})
	w.set(func(op, key string) error {
		if slices.Contains(ops, op) && slices.ContainsFunc(keys, func(k string) bool { return strings.HasPrefix(key, k) }) {
			<-block
		}
		return nil
	})
	return sync.OnceFunc(func() { close(block) })
}

// rewind puts a record back to an earlier state, as a daemon leaves it that dies
// just then.
func (k *kit) rewindPod(p id.Pod, s lifecycle.State) {
	rec := must(k.findPod(string(p)))(k.t).record()
	rec.State = s
	ok(k.t, k.podBook.Write(string(p), &rec))
}

func (k *kit) rewindContainer(c id.Container, s lifecycle.State) {
	rec := must(k.findContainer(string(c)))(k.t).record()
	rec.State = s
	ok(k.t, k.ctrBook.Write(string(c), &rec))
}

// TestRestartWithManyPods: with 500 pods the engine is there soon, although one
// pod's network, one container's deletion and one container's kill hang for ever.
func TestRestartWithManyPods(t *testing.T) {
	const pods = 500
	k := newKit(t)
	var ps []id.Pod
	var cs []id.Container
	for i := range pods {
		cfg := podConfig(fmt.Sprint("p", i))
		cfg.Namespaces.PID = NamespaceContainer
		p := must(k.RunPod(context.Background(), cfg))(t)
		ps, cs = append(ps, p), append(cs, k.running(p, "c"))
	}
	k.drop()
	k.rewindPod(ps[0], lifecycle.Creating) // its container says that it was ready after all
	half := must(k.findPod(string(ps[1])))(t).record()
	k.rewindPod(ps[1], lifecycle.Creating)
	ok(t, k.ctrBook.Remove(string(cs[1])))
	k.rewindContainer(cs[2], lifecycle.Creating)
	k.rewindContainer(cs[3], lifecycle.Exited)
	k.rewindContainer(cs[4], lifecycle.Removing)
	stuck := []string{string(ps[1]), string(cs[2]), string(cs[3]), string(cs[4])}
	defer k.w.stuckAt([]string{"detach", "delete", "signal"}, stuck...)()
	began := time.Now()
	k2 := openKit(t, k.w, k.root, k.state)
	t.Logf("open after %v", time.Since(began).Round(time.Millisecond))
	if n := len(k2.ListPods(PodFilter{})); n != pods-1 {
		t.Errorf("%d pods are listed", n)
	}
	for _, s := range k2.ListPods(PodFilter{}) {
		if s.State != PodReady {
			t.Errorf("%+v", s)
		}
	}
	running := ContainerRunning
	if n := len(k2.ListContainers(ContainerFilter{State: &running})); n != pods-4 {
		t.Errorf("%d containers run", n)
	}
	// Everybody else lives on.
	for i := 5; i < 25; i++ {
		ok(t, k2.StopContainer(context.Background(), string(cs[i]), time.Minute))
		ok(t, k2.RemovePod(context.Background(), string(ps[i])))
		k2.running(k2.pod(fmt.Sprint("new", i)), "c")
	}
	// The identity of the half-made pod is not used twice, and nobody hangs.
	short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if p, err := k2.RunPod(short, half.Config); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("retry of a pod that is being taken down: %s, %v", p, err)
	}
}

// TestRetryWaitsForTheHalfMadePod: it gets a new pod when the old one is gone, and
// an error when that cannot be taken down and stays listed.
func TestRetryWaitsForTheHalfMadePod(t *testing.T) {
	for _, fails := range []bool{false, true} {
		t.Run(fmt.Sprint("fails ", fails), func(t *testing.T) {
			k := newKit(t)
			p := k.pod("a")
			k.drop()
			k.rewindPod(p, lifecycle.Creating)
			reached, free := make(chan struct{}), make(chan struct{})
			k.w.set(func(op, _ string) error {
				if op != "detach" {
					return nil
				}
				close(reached)
				<-free
				if fails {
					return fmt.Errorf("no DEL: %w", errdefs.ErrUnavailable)
				}
				return nil
			})
			k2 := openKit(t, k.w, k.root, k.state)
			<-reached
			if l := k2.ListPods(PodFilter{}); len(l) != 0 {
				t.Errorf("a pod of which nobody has the id: %+v", l)
			}
			type answer struct {
				p   id.Pod
				err error
			}
			answered := make(chan answer, 1)
			go func() {
				p, err := k2.RunPod(context.Background(), podConfig("a"))
				answered <- answer{p, err}
			}()
			select {
			case a := <-answered:
				t.Fatalf("a second pod beside the first: %+v", a)
			case <-time.After(50 * time.Millisecond):
			}
			k.w.set(nil)
			close(free)
			a := <-answered
			if fails {
				if !errdefs.IsAlreadyExists(a.err) {
					t.Errorf("%+v", a)
				}
				l := k2.ListPods(PodFilter{})
				if len(l) != 1 || l[0].ID != p || l[0].State != PodNotReady || l[0].Reason == "" {
					t.Errorf("%+v", l)
				}
				ok(t, k2.RemovePod(context.Background(), string(p)))
			} else {
				if a.err != nil || a.p == p {
					t.Errorf("%+v", a)
				}
				ok(t, k2.RemovePod(context.Background(), string(a.p)))
			}
			k2.empty()
		})
	}
}

// TestStartUnderWay: the daemon dies while the supervisor is about to run a
// program. The next one finds it created, and then it runs: the retry of the start
// succeeds, and without one the truth comes out all the same.
func TestStartUnderWay(t *testing.T) {
	for _, tc := range []struct{ retried, ended bool }{{true, false}, {true, true}, {false, false}, {false, true}} {
		t.Run(fmt.Sprintf("%+v", tc), func(t *testing.T) {
			k := newKit(t)
			p := k.pod("a")
			c := k.ctr(p, "c")
			k.drop()
			k.rewindContainer(c, lifecycle.Starting)
			k2 := openKit(t, k.w, k.root, k.state)
			if s := k2.status(c); s.State != ContainerCreated {
				t.Errorf("%+v", s)
			}
			k.w.mu.Lock()
			f := k.w.containers[c]
			f.info.State, f.info.Pid, f.info.StartedAt = wire.Running, 4242, time.Now()
			if tc.ended {
				k.w.end(f, wire.Exit{Code: 5})
			}
			k.w.mu.Unlock()
			if tc.retried {
				if err := k2.StartContainer(context.Background(), string(c)); err != nil && !(tc.ended && errdefs.IsFailedPrecondition(err)) {
					t.Error(err)
				}
			}
			if tc.ended {
				if s := k2.untilState(c, ContainerExited); s.ExitCode != 5 || s.Reason != reasonError {
					t.Errorf("%+v", s)
				}
			} else if s := k2.untilState(c, ContainerRunning); s.Pid != 4242 {
				t.Errorf("%+v", s)
			}
			ok(t, k2.RemovePod(context.Background(), string(p)))
			k2.empty()
		})
	}
}

// TestRemovalsAreFinished: a removal that the last daemon began, and the undo of a
// half-made container, go on until they succeed, although nobody asks.
func TestRemovalsAreFinished(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	going, half := k.ctr(p, "going"), k.ctr(p, "half")
	k.drop()
	k.rewindContainer(going, lifecycle.Removing)
	k.rewindContainer(half, lifecycle.Creating)
	left := k.w.failing("delete", 3)
	k2 := openKit(t, k.w, k.root, k.state)
	until(t, "both are gone", func() bool { return len(k2.view.Load().containers) == 0 })
	if left.Load() > 0 {
		t.Errorf("%d deletions were not made to fail", left.Load())
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.empty()
}

// TestMountedImagesAreFoundByTheirIDs: the name may have been removed, or given to
// another image, while the container runs on.
func TestMountedImagesAreFoundByTheirIDs(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	cfg := ctrConfig("c")
	cfg.Mounts = []Mount{{ContainerPath: "/volume", Image: "volume:1", Readonly: true}}
	c := must(k.CreateContainer(context.Background(), string(p), cfg))(t)
	ok(t, k.StartContainer(context.Background(), string(c)))
	ref := k.status(c).Config.Mounts[0].ImageRef
	k.w.acquired = nil
	k2 := k.killed()
	k.w.mu.Lock()
	got := slices.Clone(k.w.acquired)
	k.w.mu.Unlock()
	if ref == "" || len(got) != 2 || slices.Contains(got, "volume:1") || !slices.Contains(got, ref) {
		t.Errorf("the images were asked for as %q, and the volume is %q", got, ref)
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.empty()
}

// TestACreatedContainerOutlivesTwoSupervisors: the second one dies while the container
// is made again in it, or the daemon is stopped then. It is made by the next.
func TestACreatedContainerOutlivesTwoSupervisors(t *testing.T) {
	for _, stopped := range []bool{false, true} {
		t.Run(fmt.Sprint("daemon stopped ", stopped), func(t *testing.T) {
			k := newKit(t)
			p := k.pod("a")
			c := k.ctr(p, "c")
			lost := func() {
				k.w.mu.Lock()
				defer k.w.mu.Unlock()
				delete(k.w.containers, c)
			}
			lost()
			reached, free := make(chan struct{}), make(chan struct{})
			var once sync.Once
			k.w.set(func(op, _ string) (err error) {
				if op == "create" {
					once.Do(func() {
						close(reached)
						<-free
						if err = wire.ErrBroken; stopped {
							err = context.Canceled
						}
					})
				}
				return err
			})
			k.l.resync <- struct{}{}
			<-reached
			if stopped {
				k.cancel()
			}
			close(free)
			if stopped {
				k.owned.Wait()
				k = k.killed()
			} else {
				x := must(k.findContainer(string(c)))(t)
				release, err := x.slot.take(context.Background()) // the first try is over
				ok(t, err)
				release()
				k.l.resync <- struct{}{}
			}
			until(t, "the container is made again", func() bool {
				k.w.mu.Lock()
				defer k.w.mu.Unlock()
				return k.w.containers[c] != nil || k.status(c).State == ContainerExited
			})
			if s := k.status(c); s.State != ContainerCreated {
				t.Fatalf("%+v", s)
			}
			ok(t, k.StartContainer(context.Background(), string(c)))
			ok(t, k.RemovePod(context.Background(), string(p)))
			k.empty()
		})
	}
}

// TestAStartWhileTheDaemonStops: what the supervisor has begun is not taken for a
// failure. The next daemon asks what became of it.
func TestAStartWhileTheDaemonStops(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.ctr(p, "c")
	reached, free := make(chan struct{}), make(chan struct{})
	k.w.set(func(op, _ string) error {
		if op == "start!" { // it runs, and the answer is on its way
			close(reached)
			<-free
			return context.Canceled
		}
		return nil
	})
	go func() { _ = k.StartContainer(context.Background(), string(c)) }()
	<-reached
	k.cancel()
	close(free)
	k.owned.Wait()
	k.w.set(nil)
	k2 := k.killed()
	if s := k2.status(c); s.State != ContainerRunning {
		t.Errorf("%+v", s)
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.empty()
}

// TestAComparisonLeavesANewStartAlone: one that began after the supervisor had said
// that the container is created, and not running.
func TestAComparisonLeavesANewStartAlone(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.ctr(p, "c")
	x := must(k.findContainer(string(c)))(t)
	was := x.record()
	reached, free := k.w.blocking("start!")
	started := make(chan error, 1)
	go func() { started <- k.StartContainer(context.Background(), string(c)) }()
	<-reached
	k.compare(x, was, &wire.Info{ID: c, State: wire.Created})
	free()
	ok(t, <-started)
	if s := k.status(c); s.State != ContainerRunning {
		t.Errorf("%+v", s)
	}
	ok(t, k.RemovePod(context.Background(), string(p)))
	k.empty()
}

// TestAWantOfDescriptorsCostsNoContainer: a daemon that cannot read its records does
// not start, and takes no container for one without a pod.
func TestAWantOfDescriptorsCostsNoContainer(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.running(p, "c")
	k.drop()
	var was unix.Rlimit
	ok(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	limit := func(n uint64) { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: was.Max}) }
	defer limit(was.Cur)
	k.w.set(func(op, _ string) error {
		if op == "list!" {
			limit(0)
		}
		return nil
	})
	l := k.w.connect()
	_, err := Open(context.Background(), Config{Root: k.root, State: k.state, Images: l, Network: l, Runtime: l, Streams: &streams{link: l}, FDs: l, Reconcile: -1})
	limit(was.Cur)
	if !errors.Is(err, journal.ErrUnread) {
		t.Fatal(err)
	}
	k.w.set(nil)
	k2 := openKit(t, k.w, k.root, k.state)
	if s := k2.status(c); s.State != ContainerRunning {
		t.Errorf("%+v", s)
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.empty()
}

// forgetful is a network that has lost its records.
type forgetful struct {
	*link
	err       error // of making them again
	collected atomic.Int32
}

func (f *forgetful) Restore(context.Context, cni.Pod, cni.Attachment) error { return f.err }
func (f *forgetful) Collect(context.Context) error                          { f.collected.Add(1); return nil }

// TestPluginsCollectWhatIsOnTheirRecord: when the record of a pod that runs could not
// be made again, they are not told to free all that is on none.
func TestPluginsCollectWhatIsOnTheirRecord(t *testing.T) {
	for _, err := range []error{nil, unix.ENOSPC} {
		k := newKit(t)
		k.running(k.pod("a"), "c")
		k.drop()
		l := k.w.connect()
		n := &forgetful{link: l, err: err}
		e := must(Open(context.Background(), Config{Root: k.root, State: k.state, Images: l, Network: n, Runtime: l, Streams: &streams{link: l}, FDs: l, Reconcile: -1}))(t)
		e.cancel()
		e.owned.Wait()
		ok(t, errors.Join(e.empty.Close(), e.past.Close()))
		for _, p := range e.view.Load().pods {
			p.closeFiles()
		}
		if got := n.collected.Load() == 1; got != (err == nil) {
			t.Errorf("records made again: %v; collected: %v", err, got)
		}
	}
}

// TestALostPodOfTheNodesNetwork: without a network and an init of its own it has
// nothing to stop once its supervisor is gone. Its files go with it all the same.
func TestALostPodOfTheNodesNetwork(t *testing.T) {
	k := newKit(t)
	cfg := podConfig("a")
	cfg.Namespaces.Network, cfg.Namespaces.PID = NamespaceNode, NamespaceContainer
	p := must(k.RunPod(context.Background(), cfg))(t)
	k.drop()
	ok(t, k.l.w.forget())
	k2 := openKit(t, k.w, k.root, k.state)
	<-k2.looked
	if s := must(k2.Pod(string(p)))(t); s.State != PodNotReady {
		t.Errorf("%+v", s)
	}
	ok(t, k2.StopPod(context.Background(), string(p)))
	ok(t, k2.RemovePod(context.Background(), string(p)))
	if l := k2.leftovers(); len(l) > 0 {
		t.Errorf("left behind: %q", l)
	}
	k2.empty()
}

// forget is the end of a supervisor with all that it kept.
func (w *world) forget() (err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, f := range w.fds {
		err = errors.Join(err, f.Close())
		delete(w.fds, name)
	}
	return err
}

// TestTheStateOfAnotherRoot: with the wrong root folder all that runs would be on no
// record. Neither a daemon nor fsck takes it for left over; a symbolic link is no
// other folder.
func TestTheStateOfAnotherRoot(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.running(p, "c")
	k.drop()
	wrong := t.TempDir()
	l := k.w.connect()
	e, err := Open(context.Background(), Config{Root: wrong, State: k.state, Images: l, Network: l, Runtime: l, Streams: &streams{link: l}, FDs: l, Reconcile: -1})
	if err == nil || !strings.Contains(err.Error(), k.root) {
		t.Errorf("a daemon opened: %v, %v", e, err)
	}
	if found, err := (Offline{Root: wrong, State: k.state}).Leftovers(context.Background()); err == nil || len(found) > 0 {
		t.Errorf("fsck found %+v, %v", found, err)
	}
	link := filepath.Join(t.TempDir(), "link")
	ok(t, os.Symlink(k.root, link))
	k2 := openKit(t, k.w, link, k.state)
	if s := k2.status(c); s.State != ContainerRunning {
		t.Errorf("%+v", s)
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.empty()
	k2.drop()
	openKit(t, k.w, wrong, k.state) // nothing runs: it is the new one's
	ok(t, checkRoot(wrong, k.state))
}
