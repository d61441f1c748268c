package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

func TestPodLife(t *testing.T) {
	k := newKit(t)
	cfg := podConfig("a")
	cfg.Namespaces.PID = NamespacePod
	cfg.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 3000"}
	cfg.DNS = &DNS{Servers: []string{"10.0.0.10"}}
	p := must(k.RunPod(context.Background(), cfg))(t)
	s := must(k.Pod(string(p)))(t)
	if s.State != PodReady || len(s.IPs) != 1 || !strings.HasPrefix(s.IPs[0], "10.0.0.") {
		t.Errorf("%+v", s)
	}
	if h := k.w.holds(); h != "containers 1, descriptors 4, attachments 1, pins 0" {
		t.Errorf("held: %s", h)
	}
	for file, want := range map[string]string{"hosts": s.IPs[0], "hostname": "a\n", "resolv.conf": "nameserver 10.0.0.10"} {
		if b, err := os.ReadFile(filepath.Join(k.podDir(p), file)); err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %q, %v", file, b, err)
		}
	}
	checkNamespaces(t, k, p)
	ok(t, k.StopPod(context.Background(), string(p)))
	if s := must(k.Pod(string(p)))(t); s.State != PodNotReady || len(s.IPs) != 1 {
		t.Errorf("stopped: %+v", s)
	}
	if h := k.w.holds(); h != holdsNothing {
		t.Errorf("held: %s", h)
	}
	ok(t, k.StopPod(context.Background(), string(p)))
	if n := len(k.w.detaches); n != 1 {
		t.Errorf("%d detaches: a stopped pod is detached again", n)
	}
	ok(t, k.RemovePod(context.Background(), string(p)))
	ok(t, k.RemovePod(context.Background(), string(p)))
	ok(t, k.StopPod(context.Background(), string(p)))
	if _, err := k.Pod(string(p)); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	k.empty()
}

// checkNamespaces looks at the pod from inside its namespaces.
func checkNamespaces(t *testing.T, k *kit, ref id.Pod) {
	t.Helper()
	p := must(k.findPod(string(ref)))(t)
	uts, ipc, net := must(p.dup("uts"))(t), must(p.dup("ipc"))(t), must(p.dup("net"))(t)
	defer closeAll(uts, ipc, net)
	ok(t, kernel.OnThread(func() error {
		for f, flag := range map[*os.File]int{uts: unix.CLONE_NEWUTS, ipc: unix.CLONE_NEWIPC, net: unix.CLONE_NEWNET} {
			if err := unix.Setns(int(f.Fd()), flag); err != nil {
				return err
			}
		}
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return err
		}
		if name := unix.ByteSliceToString(u.Nodename[:]); name != "a" {
			return fmt.Errorf("host name %q", name)
		}
		for file, want := range map[string]string{"kernel/shm_rmid_forced": "1", "net/ipv4/ip_local_port_range": "2000\t3000", "net/ipv4/ip_unprivileged_port_start": "0"} {
			if b, err := os.ReadFile("/proc/sys/" + file); err != nil || strings.TrimSpace(string(b)) != want {
				return fmt.Errorf("%s: %q, %v", file, b, err)
			}
		}
		return nil
	}))
}

func TestRunPodJoins(t *testing.T) {
	k := newKit(t)
	reached, release := k.w.blocking("attach")
	ids := make([]id.Pod, 50)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() { ids[i], _ = k.RunPod(context.Background(), podConfig("a")) })
	}
	<-reached
	// A caller whose deadline ends leaves the work going on.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := k.RunPod(ctx, podConfig("a")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	if len(k.ListPods(PodFilter{})) != 0 {
		t.Error("a pod that is being made is listed")
	}
	release()
	wg.Wait()
	late := k.pod("a")
	for _, p := range ids {
		if p != late {
			t.Fatalf("%q and %q", p, late)
		}
	}
	if h := k.w.holds(); h != "containers 1, descriptors 4, attachments 1, pins 0" {
		t.Errorf("held: %s", h)
	}
}

func TestRunPodOfAStoppedOne(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	ok(t, k.StopPod(context.Background(), string(p)))
	if _, err := k.RunPod(context.Background(), podConfig("a")); !errdefs.IsAlreadyExists(err) {
		t.Errorf("%v", err)
	}
	next := podConfig("a")
	next.Meta.Attempt = 1
	if q := must(k.RunPod(context.Background(), next))(t); q == p {
		t.Error("same id")
	}
}

func TestRunPodUndoesEachStep(t *testing.T) {
	for _, op := range []string{"attach", "attach!", "put", "put!", "create", "create!", "start", "start!"} {
		t.Run(op, func(t *testing.T) {
			k := newKit(t)
			k.w.failing(op, 1)
			if _, err := k.RunPod(context.Background(), podConfig("a")); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "default/a") {
				t.Errorf("%v", err)
			}
			k.empty()
			k.pod("a")
		})
	}
	t.Run("files", func(t *testing.T) {
		k := newKit(t)
		cfg := podConfig("a")
		cfg.DNS = &DNS{Servers: []string{"10.0.0.1\nsearch evil"}}
		if _, err := k.RunPod(context.Background(), cfg); err == nil || !strings.Contains(err.Error(), "dns_config") {
			t.Error(err)
		}
		k.empty()
		k.pod("a")
	})
	t.Run("bad sysctl value", func(t *testing.T) {
		k := newKit(t)
		cfg := podConfig("a")
		cfg.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "nonsense"}
		if _, err := k.RunPod(context.Background(), cfg); err == nil || !strings.Contains(err.Error(), "ip_local_port_range") {
			t.Error(err)
		}
		k.empty()
	})
}

// TestRunPodThatCannotBeUndone stays listed and can be stopped and removed.
func TestRunPodThatCannotBeUndone(t *testing.T) {
	k := newKit(t)
	k.w.set(func(op, _ string) error {
		if op == "put" || op == "detach" {
			return errdefs.ErrUnavailable
		}
		return nil
	})
	if _, err := k.RunPod(context.Background(), podConfig("a")); err == nil {
		t.Fatal("no error")
	}
	l := k.ListPods(PodFilter{})
	if len(l) != 1 || l[0].State != PodNotReady || l[0].Reason == "" {
		t.Fatalf("%+v", l)
	}
	if err := k.StopPod(context.Background(), string(l[0].ID)); !errdefs.IsUnavailable(err) {
		t.Errorf("stop: %v", err)
	}
	k.w.set(nil)
	ok(t, k.StopPod(context.Background(), string(l[0].ID)))
	ok(t, k.RemovePod(context.Background(), string(l[0].ID)))
	k.empty()
}

func TestRunPodBadConfig(t *testing.T) {
	k := newKit(t)
	group := int64(1)
	for want, change := range map[string]func(*PodConfig){
		"metadata":        func(c *PodConfig) { c.Meta.UID = "" },
		"run_as_group":    func(c *PodConfig) { c.RunAsGroup = &group },
		"cgroup_parent":   func(c *PodConfig) { c.CgroupParent = "kubepods.slice" },
		"clean path":      func(c *PodConfig) { c.CgroupParent = "/a/../b" },
		"log_directory":   func(c *PodConfig) { c.LogDirectory = "logs" },
		"runtime_handler": func(c *PodConfig) { c.Handler = "gvisor" },
		"hostname":        func(c *PodConfig) { c.Hostname = "a b" },
		"sysctl":          func(c *PodConfig) { c.Sysctls = map[string]string{"kernel.panic": "1"} },
	} {
		cfg := podConfig("a")
		change(cfg)
		if _, err := k.RunPod(context.Background(), cfg); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	k.empty()
}

// TestStopPodRetriesDetach: the address is not lost, and the second DEL has the
// namespace and the result of the ADD.
func TestStopPodRetriesDetach(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.running(p, "c")
	k.w.failing("detach", 1)
	if err := k.StopPod(context.Background(), string(p)); !errdefs.IsUnavailable(err) {
		t.Fatal(err)
	}
	if s := must(k.Pod(string(p)))(t); s.State != PodNotReady || s.Reason == "" {
		t.Errorf("%+v", s)
	}
	if s := k.status(c); s.State != ContainerExited {
		t.Errorf("container %+v", s)
	}
	if q := must(k.findPod(string(p)))(t); q.files["net"] == nil {
		t.Error("the network namespace is gone before the network is")
	}
	ok(t, k.StopPod(context.Background(), string(p)))
	if d := k.w.detaches; len(d) != 1 || string(d[0].State) != "state" {
		t.Errorf("%+v", d)
	}
	if s := must(k.Pod(string(p)))(t); s.Reason != "" {
		t.Errorf("%+v", s)
	}
	ok(t, k.RemovePod(context.Background(), string(p)))
	k.empty()
}

func TestStopPodKillsInParallel(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	var cs []id.Container
	for i := range 5 {
		cs = append(cs, k.running(p, fmt.Sprint("c", i), "deaf"))
	}
	k.w.set(func(op, key string) error {
		if op == "signal" {
			time.Sleep(200 * time.Millisecond)
		}
		return nil
	})
	began := time.Now()
	ok(t, k.StopPod(context.Background(), string(p)))
	if d := time.Since(began); d > 800*time.Millisecond {
		t.Errorf("took %v", d)
	}
	for _, c := range cs {
		if s := k.status(c); s.State != ContainerExited || s.ExitCode != 137 || s.Reason != reasonError {
			t.Errorf("%+v", s)
		}
	}
}

// TestStartMeetsStopPod: no program runs in a pod that is stopped, whoever comes first.
func TestStartMeetsStopPod(t *testing.T) {
	k := newKit(t)
	for i := range 20 {
		p := k.pod(fmt.Sprint("p", i))
		c := k.ctr(p, "c")
		var wg sync.WaitGroup
		wg.Go(func() { _ = k.StartContainer(context.Background(), string(c)) })
		wg.Go(func() { ok(t, k.StopPod(context.Background(), string(p))) })
		wg.Wait()
		k.w.mu.Lock()
		state := k.w.containers[c].info.State
		k.w.mu.Unlock()
		if s := k.status(c); state == wire.Running || s.State == ContainerRunning {
			t.Fatalf("runs in a stopped pod: %s, %+v", state, s)
		}
		ok(t, k.RemovePod(context.Background(), string(p)))
	}
	k.empty()
}

func TestPodInitEnds(t *testing.T) {
	t.Run("while ready", func(t *testing.T) {
		k := newKit(t)
		p := k.pod("a")
		init := must(k.findPod(string(p)))(t).record().Init
		k.w.mu.Lock()
		k.w.end(k.w.containers[init], wire.Exit{Code: 137})
		k.w.mu.Unlock()
		until(t, "not ready", func() bool { return must(k.Pod(string(p)))(t).State == PodNotReady })
		ok(t, k.RemovePod(context.Background(), string(p)))
		k.empty()
	})
	t.Run("before ready", func(t *testing.T) {
		k := newKit(t)
		k.w.set(func(op, key string) error {
			if op == "start!" {
				k.w.mu.Lock()
				k.w.end(k.w.containers[id.Container(key)], wire.Exit{Code: 137})
				k.w.mu.Unlock()
				time.Sleep(50 * time.Millisecond) // the exit overtakes the answer
			}
			return nil
		})
		p := k.pod("a")
		until(t, "not ready", func() bool { return must(k.Pod(string(p)))(t).State == PodNotReady })
	})
}

func TestHostNetworkPod(t *testing.T) {
	k := newKit(t)
	cfg := podConfig("a")
	cfg.Namespaces = Namespaces{Network: NamespaceNode, IPC: NamespaceNode, PID: NamespaceContainer}
	p := must(k.RunPod(context.Background(), cfg))(t)
	if s := must(k.Pod(string(p)))(t); len(s.IPs) != 0 || s.State != PodReady {
		t.Errorf("%+v", s)
	}
	c := k.running(p, "c", "deaf")
	k2 := k.killed()
	ok(t, k2.StopPod(context.Background(), string(p)))
	if s := k2.status(c); s.State != ContainerExited {
		t.Errorf("%+v", s)
	}
	ok(t, k2.RemovePod(context.Background(), string(p)))
	k2.empty()
	if len(k.w.detaches) != 0 {
		t.Error("detached from a network it never had")
	}
}

func TestLists(t *testing.T) {
	k := newKit(t)
	a, b := k.pod("a"), k.pod("b")
	cfg := ctrConfig("labelled")
	cfg.Labels = map[string]string{"x": "1", "y": "2"}
	c := must(k.CreateContainer(context.Background(), string(a), cfg))(t)
	d := k.running(b, "d")
	created := ContainerCreated
	for name, tc := range map[string]struct {
		f    ContainerFilter
		want []id.Container
	}{
		"all, newest first":      {ContainerFilter{}, []id.Container{d, c}},
		"id":                     {ContainerFilter{ID: string(c)}, []id.Container{c}},
		"unique prefix":          {ContainerFilter{ID: string(c[:20])}, []id.Container{c}},
		"pod prefix":             {ContainerFilter{Pod: string(b[:20])}, []id.Container{d}},
		"unknown pod":            {ContainerFilter{Pod: "f00"}, nil},
		"state":                  {ContainerFilter{State: &created}, []id.Container{c}},
		"labels":                 {ContainerFilter{Labels: map[string]string{"x": "1"}}, []id.Container{c}},
		"one label differs":      {ContainerFilter{Labels: map[string]string{"x": "1", "y": "1"}}, nil},
		"id and a pod not its":   {ContainerFilter{ID: string(c), Pod: string(b)}, nil},
		"id of another's prefix": {ContainerFilter{ID: string(c) + "0"}, nil},
	} {
		var got []id.Container
		for _, s := range k.ListContainers(tc.f) {
			got = append(got, s.ID)
		}
		if fmt.Sprint(got) != fmt.Sprint(tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
	if l := k.ListPods(PodFilter{}); len(l) != 2 || l[0].ID != b {
		t.Errorf("%v", l)
	}
	// 17 pods: two ids begin with the same digit.
	for i := range 15 {
		k.pod(fmt.Sprint("p", i))
	}
	seen := map[byte]int{}
	for _, s := range k.ListPods(PodFilter{}) {
		seen[s.ID[0]]++
	}
	for digit, n := range seen {
		want := 0
		if n == 1 {
			want = 1
		}
		ready := PodReady
		if got := len(k.ListPods(PodFilter{ID: string(digit), State: &ready})); got != want {
			t.Errorf("prefix %c of %d pods: %d listed", digit, n, got)
		}
		if _, err := k.Pod(string(digit)); n > 1 && !errdefs.IsInvalidArgument(err) {
			t.Errorf("prefix of %d: %v", n, err)
		}
	}
}
