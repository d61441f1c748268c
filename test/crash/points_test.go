package crash

import (
	"context"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/pace"
	"github.com/berth-runtime/berth/test/testimage"
)

// ownImage has two layers that no other image has.
func ownImage(name string) v1.Image {
	var layers []v1.Layer
	for _, file := range []string{"a", "b"} {
		l, err := testimage.Layer(testimage.Gzip, testimage.Entry{Name: file, Body: []byte(name + file)})
		if err != nil {
			panic(err) // bytes in memory
		}
		layers = append(layers, l)
	}
	img, err := testimage.Image("", v1.Config{Cmd: []string{"/none"}}, layers...)
	if err != nil {
		panic(err)
	}
	return img
}

// whole is the life that a kubelet gives a pod.
var whole = []stage{pull, runPod, createMain, startMain, exec, update, reopen, createShort, startShort, end,
	stopMain, removeMain, stopPod, removePod, removeImage}

// abrupt is a life whose containers are ended by the calls on their pod.
var abrupt = []stage{runPod, createMain, startMain, createShort, stopPod, removePod}

var kinds = []kind{
	{name: "own network, host port", stages: whole, port: true},
	{name: "shared PID namespace, default cgroup", stages: abrupt, pod: func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
		c.Linux.CgroupParent = ""
	}},
	{name: "host network", stages: []stage{runPod, createMain, startMain, killMain, removePod}, pod: func(c *cri.PodSandboxConfig) {
		o := c.Linux.SecurityContext.NamespaceOptions
		o.Network, o.Ipc, o.Pid = cri.NamespaceMode_NODE, cri.NamespaceMode_NODE, cri.NamespaceMode_NODE
		c.Hostname = ""
	}},
	{name: "user namespace", stages: abrupt, pod: inUserNamespace},
	{name: "records that are replaced", stages: []stage{runPod, stopPod, removePod}, pod: func(c *cri.PodSandboxConfig) {
		c.Annotations = map[string]string{"long": strings.Repeat("x", 40<<10)} // a record's file holds one line of this size
	}},
	{name: "calls that fail", stages: []stage{failPod, runPod, failCreate, failStart, removePod}},
	{name: "an exec that is cut off", stages: []stage{runPod, createMain, startMain, execTooLong, removePod}, only: "ExecSync timeout"},
}

func inUserNamespace(c *cri.PodSandboxConfig) {
	ids := func(host uint32) []*cri.IDMapping {
		return []*cri.IDMapping{{HostId: host, Length: 65536}}
	}
	c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: ids(1 << 20), Gids: ids(1 << 20)}
}

// TestTheDaemonDiesAtEachPoint lives a pod for each point of each of its calls,
// and kills the daemon there.
func TestTheDaemonDiesAtEachPoint(t *testing.T) {
	n := newNode(t, nil)
	points(t, n, newWitness(t, n), kinds, n.daemonDies(0))
}

// TestTheDaemonDiesWithPlugins is the same with pods on a network of CNI plugins.
func TestTheDaemonDiesWithPlugins(t *testing.T) {
	n := newNode(t, func(n *node) { usePlugins(t, n) })
	points(t, n, newWitness(t, n), []kind{
		{name: "CNI plugins", stages: []stage{runPod, createMain, stopPod, removePod}},
		{name: "CNI plugins, user namespace", stages: []stage{failPod, runPod, removePod}, pod: inUserNamespace},
	}, n.daemonDies(0))
}

// TestTheDaemonDiesAgainWhileItRecovers kills the daemon in a call, and then the
// next one at each point of its start.
func TestTheDaemonDiesAgainWhileItRecovers(t *testing.T) {
	n := newNode(t, nil)
	w := newWitness(t, n)
	for _, k := range kinds {
		if k.only != "" {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			counts := learn(t, n, k, n.daemonDies(0))
			before := n.standing(t)
			for i, s := range k.stages {
				var at []int
				for a := 1 + seed%3; a <= counts[i]; a += 3 {
					at = append(at, a)
				}
				if !long && len(at) > 0 { // one moment of each call
					at = at[seed%len(at):][:1]
				}
				kills, failed := 0, 0
				for _, a := range at {
					for again := 1 + seed%stride(11); ; again += stride(11) {
						v := n.daemonDies(again)
						died, err := n.die(k, i, a, v, before)
						if err != nil {
							failed++
							t.Errorf("%s, point %d, then %d: %v", s.name, a, again, err)
							before = n.standing(t) // what is left is reported once
						}
						if !died || *v.again == 0 {
							break
						}
						kills++
					}
				}
				t.Logf("%-30s %3d deaths while recovering from %d moments, %d passed", s.name, kills, len(at), kills-failed)
			}
			w.check(t)
		})
	}
}

// stride is how many points the short form passes by.
func stride(n int) int {
	if long {
		return 1
	}
	return n
}

// victim is a process that dies at points.
type victim struct {
	plan  plan
	gone  func() error // waits for its end and brings the node back
	again *int         // how often the next one died, too
}

// daemonDies is the daemon as a victim. When again is not 0 the next one dies at
// that point after its start, if it has so many.
func (n *node) daemonDies(again int) victim {
	deaths := 0
	return victim{plan: n.daemon, again: &deaths, gone: func() error {
		if !n.Ended(pace.Wait(10 * time.Second)) {
			return fmt.Errorf("the daemon does not die")
		}
		n.noteRecords()
		if again == 0 {
			return n.Start(context.Background())
		}
		if err := n.daemon.arm(again); err != nil {
			return err
		}
		err := n.Start(context.Background())
		if !n.daemon.disarm() {
			deaths++
			if err == nil && !n.Ended(pace.Wait(10*time.Second)) {
				return fmt.Errorf("the next daemon does not die")
			}
			err = n.Start(context.Background())
		}
		return err
	}}
}

// points kills v at each point of each stage of each kind of life.
func points(t *testing.T, n *node, w *witness, kinds []kind, v victim) {
	t.Logf("BERTH_CRASH_SEED=%d", seed)
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			counts := learn(t, n, k, v)
			before := n.standing(t)
			for i, s := range k.stages {
				if k.only != "" && k.only != s.name {
					continue
				}
				kills, failed := 0, 0
				for at := 1 + (seed+i)%stride(6); ; at += stride(6) {
					died, err := n.die(k, i, at, v, before)
					if !died && err == nil {
						break
					}
					kills++
					if err != nil {
						failed++
						t.Errorf("%s, point %d (%s): %v", s.name, at, strings.Join(v.plan.points(), " > "), err)
						before = n.standing(t) // what is left is reported once
					}
					if at > 3*counts[i]+20 {
						t.Fatalf("%s has no last point", s.name)
					}
				}
				t.Logf("%-30s %3d points, %3d deaths, %3d passed", s.name, counts[i], kills, kills-failed)
			}
			w.check(t)
		})
	}
}

// learn lives one life undisturbed and counts the points of its stages.
func learn(t *testing.T, n *node, k kind, v victim) []int {
	t.Helper()
	l, err := newLife(n, k)
	if err != nil {
		t.Fatal(err)
	}
	counts := make([]int, len(k.stages))
	for i, s := range k.stages {
		v.plan.points()
		if err := v.plan.arm(0); err != nil {
			t.Fatal(err)
		}
		err := l.insist(s)
		v.plan.disarm()
		if err != nil {
			t.Fatal(err)
		}
		counts[i] = len(v.plan.points())
	}
	return counts
}

// die lives a life in which v dies at a point of a stage. died is false when the
// stage has no such point.
func (n *node) die(k kind, stage, at int, v victim, before standing) (died bool, err error) {
	l, err := newLife(n, k)
	if err != nil {
		return false, err
	}
	for i, s := range k.stages {
		if i != stage {
			if err := l.insist(s); err != nil {
				return died, l.abandon(err)
			}
			continue
		}
		v.plan.points()
		if err := v.plan.arm(at); err != nil {
			return false, err
		}
		ctx, cancel := context.WithTimeout(context.Background(), pace.Wait(30*time.Second))
		err := s.call(l, ctx)
		cancel()
		if died = !v.plan.disarm(); died {
			if err := v.gone(); err != nil {
				return died, err
			}
			err = l.insist(s)
		}
		if err != nil {
			return died, l.abandon(fmt.Errorf("again: %w", err))
		}
	}
	return died, n.nothingBeyond(before)
}

// abandon removes a pod whose life went wrong.
func (l *life) abandon(err error) error {
	if l.podID != "" {
		_ = l.insist(removePod)
	}
	_ = l.insist(removeImage)
	return err
}

// standing is what a node holds while nothing is done on it.
type standing struct {
	traces      harness.Traces
	descriptors int // of the supervisor, its lanes apart
	children    int // of the supervisor
	links       int
}

// standing waits until the pool of the network is full and nothing changes.
func (n *node) standing(t *testing.T) standing {
	t.Helper()
	n.noteRecords()
	time.Sleep(pace.Wait(300 * time.Millisecond))
	s, err := n.holds()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (n *node) holds() (s standing, err error) {
	s.traces = n.Traces()
	leases, _ := filepath.Glob(filepath.Join(n.Dir, "leases", "*"))
	for _, l := range leases {
		s.traces["lease "+l] = true
	}
	own, err := harness.Cgroups(n.parent)
	if err != nil {
		return s, err
	}
	maps.Copy(s.traces, own)
	all, err := harness.Cgroups("/berth") // other tests' are there, too
	if err != nil {
		return s, err
	}
	for c := range all {
		_, below, _ := strings.Cut(c, "/berth/")
		if pod, _, _ := strings.Cut(below, "/"); n.ids[pod] {
			s.traces[c] = true
		}
	}
	d, err := harness.Descriptors(n.SupervisorPid())
	if err != nil {
		return s, err
	}
	// Lanes, a memfd and a pipe each, stay: there are as many as streams that were
	// ever busy at one moment.
	s.descriptors = -3 * d["/memfd:berth-lane (deleted)"]
	for _, c := range d {
		s.descriptors += c
	}
	maps.DeleteFunc(s.traces, func(what string, _ bool) bool { return strings.HasPrefix(what, "supervisor fd pipe:") })
	children, err := harness.Children(n.SupervisorPid())
	if err != nil {
		return s, err
	}
	s.children = len(children)
	links, err := net.Interfaces()
	s.links = len(links)
	return s, err
}

// noteRecords remembers the ids of the pods on record: the cgroups of those that
// never got an answer can be looked for by them.
func (n *node) noteRecords() {
	files, _ := filepath.Glob(filepath.Join(n.Dir, "root", "sandboxes", "pods", "*.json"))
	for _, f := range files {
		n.ids[strings.TrimSuffix(filepath.Base(f), ".json")] = true
	}
}

// nothingBeyond waits until a node holds no more than before.
func (n *node) nothingBeyond(before standing) error {
	return settle(func() ([]string, error) {
		n.removeCgroups()
		return n.beyond(before)
	})
}

// beyond is what a node holds more than before.
func (n *node) beyond(before standing) ([]string, error) {
	now, err := n.holds()
	if err != nil {
		return nil, err
	}
	left := now.traces.Beyond(before.traces)
	for what, c := range map[string][2]int{"descriptors of the supervisor": {now.descriptors, before.descriptors},
		"children of the supervisor": {now.children, before.children}, "links": {now.links, before.links}} {
		if c[0] > c[1] {
			left = append(left, fmt.Sprintf("%s: %d, were %d", what, c[0], c[1]))
		}
	}
	return left, nil
}

// witness is a pod that lives through everything that happens to others.
type witness struct {
	n         *node
	life      *life
	log       string
	startedAt int64
}

func newWitness(t *testing.T, n *node) *witness {
	t.Helper()
	l, err := newLife(n, kind{name: "witness"})
	if err != nil {
		t.Fatal(err)
	}
	// One line each 2 ms for as long as any test takes.
	counting := stage{"CreateContainer", func(l *life, ctx context.Context) (err error) {
		l.main, err = l.create(ctx, l.containerConfig("counter", "count", "1000000000", "2000"))
		return err
	}}
	for _, s := range []stage{runPod, counting, startMain} {
		if err := l.insist(s); err != nil {
			t.Fatal(err)
		}
	}
	w := &witness{n: n, life: l}
	s, err := n.Runtime.ContainerStatus(context.Background(), &cri.ContainerStatusRequest{ContainerId: l.main})
	if err != nil {
		t.Fatal(err)
	}
	w.log, w.startedAt = s.Status.LogPath, s.Status.StartedAt
	return w
}

// check fails the test unless the witness has noticed nothing.
func (w *witness) check(t *testing.T) {
	t.Helper()
	ctx := context.Background()
	if err := w.life.remember(ctx); err != nil {
		t.Errorf("witness: %v", err)
	}
	s, err := w.n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: w.life.main})
	if err != nil || s.Status.StartedAt != w.startedAt {
		t.Errorf("witness: started at %d: %v, %v", w.startedAt, s, err)
	}
	if err := gapless(w.log, -1); err != nil {
		t.Errorf("witness: %v", err)
	}
	p, err := w.n.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: w.life.podID})
	if err != nil || p.Status.State != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("witness: pod is %v, %v", p, err)
	}
}
