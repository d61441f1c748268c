package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

func TestSignals(t *testing.T) {
	for in, want := range map[string]struct {
		n    int
		name string
	}{
		"": {15, "SIGTERM"}, "SIGTERM": {15, "SIGTERM"}, "term": {15, "SIGTERM"}, "15": {15, "SIGTERM"}, "9": {9, "SIGKILL"},
		"SIGRTMIN": {34, "SIGRTMIN"}, "SIGRTMIN+3": {37, "SIGRTMIN+3"}, "rtmin+15": {49, "SIGRTMIN+15"},
		"SIGRTMAX": {64, "SIGRTMAX"}, "SIGRTMAX-14": {50, "SIGRTMAX-14"}, "64": {64, "SIGRTMAX"}, "37": {37, "SIGRTMIN+3"},
		"SIGUSR1": {10, "SIGUSR1"}, "SIGQUIT": {3, "SIGQUIT"}, "SIGIO": {29, ""}, "SIGPOLL": {29, ""}, "SIGCLD": {17, ""}, "SIGIOT": {6, ""},
	} {
		got, err := signalOf(in)
		if err != nil || int(got) != want.n {
			t.Errorf("%q: %d, %v", in, got, err)
		}
		if name := canonicalSignal(in); want.name != "" && name != want.name {
			t.Errorf("%q: %s", in, name)
		}
		if back, err := signalOf(canonicalSignal(in)); err != nil || back != got {
			t.Errorf("%q: its name %s is %d, %v", in, canonicalSignal(in), back, err)
		}
	}
	for _, in := range []string{"SIG", "0", "-1", "65", "SIGRTMIN+31", "SIGRTMIN+-1", "SIGRTMAX-31", "SIGRTMIN3x", "nonsense", " 9"} {
		if got, err := signalOf(in); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %d, %v", in, got, err)
		}
	}
}

func TestSysctlsOf(t *testing.T) {
	host := Namespaces{Network: NamespaceNode, IPC: NamespaceNode}
	for _, tc := range []struct {
		name string
		ns   Namespaces
		path string // "" is refused
	}{
		{"net.ipv4.ip_forward", Namespaces{}, "net/ipv4/ip_forward"},
		{"net/ipv4/ip_forward", Namespaces{}, "net/ipv4/ip_forward"},
		{"net.ipv4.conf.eth0/100.rp_filter", Namespaces{}, "net/ipv4/conf/eth0.100/rp_filter"},
		{"net/ipv4/conf/eth0.100/rp_filter", Namespaces{}, "net/ipv4/conf/eth0.100/rp_filter"},
		{"kernel.shmmax", Namespaces{}, "kernel/shmmax"},
		{"kernel.shm_rmid_forced", Namespaces{}, "kernel/shm_rmid_forced"},
		{"kernel.msgmax", Namespaces{}, "kernel/msgmax"},
		{"kernel.sem", Namespaces{}, "kernel/sem"},
		{"fs.mqueue.msg_max", Namespaces{}, "fs/mqueue/msg_max"},
		{"net.ipv4.ip_forward", host, ""},
		{"kernel.sem", host, ""},
		{"kernel.panic", Namespaces{}, ""},
		{"kernel.semaphore", Namespaces{}, ""},
		{"vm.swappiness", Namespaces{}, ""},
		{"fs.file-max", Namespaces{}, ""},
		{"netx.y", Namespaces{}, ""},
		{"net", Namespaces{}, ""},
		{"net..ipv4", Namespaces{}, ""},
		{"net/../kernel/panic", Namespaces{}, ""},
		{"net.ipv4./../kernel", Namespaces{}, ""},
		{"/net/ipv4/ip_forward", Namespaces{}, ""},
		{"net.ipv4.x\ny", Namespaces{}, ""},
		{"", Namespaces{}, ""},
	} {
		got, err := sysctlsOf(&PodConfig{Namespaces: tc.ns, Sysctls: map[string]string{tc.name: "v"}})
		switch {
		case tc.path == "" && !errdefs.IsInvalidArgument(err):
			t.Errorf("%q: %v, %v", tc.name, got, err)
		case tc.path != "" && (err != nil || got[tc.path] != "v"):
			t.Errorf("%q: %v, %v", tc.name, got, err)
		}
	}
	if got := must(sysctlsOf(&PodConfig{Namespaces: host}))(t); len(got) != 0 {
		t.Errorf("defaults on the host's network: %v", got)
	}
	own := must(sysctlsOf(&PodConfig{Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "1024"}}))(t)
	if own["net/ipv4/ip_unprivileged_port_start"] != "1024" || own["net/ipv4/ping_group_range"] == "" {
		t.Errorf("%v", own)
	}
}

func TestUsageWalk(t *testing.T) {
	k := newKit(t)
	c := k.running(k.pod("a"), "c")
	upper := filepath.Join(k.containerDir(c), "upper")
	ok(t, os.MkdirAll(filepath.Join(upper, "a", "b"), 0o755))
	ok(t, os.WriteFile(filepath.Join(upper, "a", "file"), make([]byte, 100<<10), 0o600))
	ok(t, os.Symlink("/etc", filepath.Join(upper, "link"))) // not followed
	l := k.measure(c)
	if l.inodes != 5 || l.bytes < 100<<10 || l.bytes > 200<<10 {
		t.Errorf("%+v", l)
	}
	if l := k.measure("gone"); l.bytes != 0 || l.inodes != 0 {
		t.Errorf("gone: %+v", l)
	}
	until(t, "first round", func() bool { k.usage.mu.Lock(); defer k.usage.mu.Unlock(); return !k.usage.total.at.IsZero() })
	if u := k.WritableUsage(); u.Mountpoint == "" || u.At.IsZero() {
		t.Errorf("%+v", u)
	}
	k.usage.set(c, l)
	ok(t, k.RemoveContainer(context.Background(), string(c)))
	if got := k.usage.get(c); got.inodes != 0 {
		t.Errorf("a removed layer still counts: %+v", got)
	}
}

// stream is a client's end of a forwarded port.
type stream struct {
	io.Reader
	io.WriteCloser
}

func TestPortForward(t *testing.T) {
	k := newKit(t)
	ref := k.pod("a")
	p := must(k.findPod(string(ref)))(t)
	ns := must(p.dup("net"))(t)
	defer ns.Close()
	var l net.Listener
	ok(t, kernel.In(kernel.NetNS, ns, func() (err error) {
		if err := loopbackUp(); err != nil {
			return err
		}
		l, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	}))
	defer l.Close()
	port := int32(l.Addr().(*net.TCPAddr).Port)
	go func() { // answers after the end of the request: needs the half-close
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			b, _ := io.ReadAll(conn)
			_, _ = fmt.Fprintf(conn, "got %d", len(b))
			conn.Close()
		}
	}()
	out := &sink{}
	ok(t, k.PortForward(context.Background(), string(ref), port, stream{strings.NewReader("12345"), out}))
	if out.String() != "got 5" || !out.ended {
		t.Errorf("%q %v", out, out.ended)
	}
	// A client that never ends goes with its context.
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	r, w := io.Pipe()
	context.AfterFunc(ctx, func() { w.Close() })
	_ = k.PortForward(ctx, string(ref), port, stream{r, &sink{}})
	for name, tc := range map[string]struct {
		ref  string
		port int32
		is   func(error) bool
	}{
		"no pod":    {"nope", port, errdefs.IsNotFound},
		"port 0":    {string(ref), 0, errdefs.IsInvalidArgument},
		"port high": {string(ref), 65536, errdefs.IsInvalidArgument},
		"refused":   {string(ref), 1, func(err error) bool { return err != nil && strings.Contains(err.Error(), "refused") }},
	} {
		if err := k.PortForward(context.Background(), tc.ref, tc.port, stream{strings.NewReader(""), &sink{}}); !tc.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ok(t, k.StopPod(context.Background(), string(ref)))
	if err := k.PortForward(context.Background(), string(ref), port, stream{strings.NewReader(""), &sink{}}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("stopped: %v", err)
	}
}

// loopbackUp switches "lo" of the calling thread's network namespace on.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

// TestClose: a pod stays, operations are waited for, and afterwards all is refused.
func TestClose(t *testing.T) {
	k := newKit(t)
	p := k.pod("a")
	c := k.running(p, "c", "deaf")
	reached, release := k.w.blocking("create")
	created := make(chan error, 1)
	go func() {
		_, err := k.CreateContainer(context.Background(), string(p), ctrConfig("d"))
		created <- err
	}()
	<-reached
	stopped := make(chan error, 1)
	go func() { stopped <- k.StopContainer(context.Background(), string(c), time.Hour) }()
	until(t, "stop signal", func() bool { return len(k.w.sent(c)) == 1 })
	time.AfterFunc(100*time.Millisecond, release)
	ok(t, k.Close())
	ok(t, <-created)
	if err := <-stopped; !errdefs.IsUnavailable(err) {
		t.Errorf("stop that was cut short: %v", err)
	}
	for name, err := range map[string]error{
		"run pod":        func() error { _, err := k.RunPod(context.Background(), podConfig("b")); return err }(),
		"stop container": k.StopContainer(context.Background(), string(c), 0),
		"stop pod":       k.StopPod(context.Background(), string(p)),
	} {
		if !errdefs.IsUnavailable(err) {
			t.Errorf("%s after close: %v", name, err)
		}
	}
	if s := k.status(c); s.State != ContainerRunning {
		t.Errorf("%+v", s)
	}
}

func TestPanicInAnOperation(t *testing.T) {
	k := newKit(t)
	k.w.set(func(op, _ string) error {
		if op == "attach" {
			panic("made to")
		}
		return nil
	})
	if _, err := k.RunPod(context.Background(), podConfig("a")); !errdefs.IsInternal(err) {
		t.Errorf("%v", err)
	}
	k.empty()
	k.w.set(nil)
	k.pod("a")
}

func TestCreatedAtNeverRepeats(t *testing.T) {
	e := &Engine{cfg: Config{Now: time.Now}}
	seen := map[time.Time]bool{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1000 {
				at := e.created()
				mu.Lock()
				if seen[at] {
					t.Error("twice the same time")
				}
				seen[at] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

func TestViewIsNewestFirst(t *testing.T) {
	var v []*pod
	for _, at := range []int64{5, 1, 9, 3, 7, 2, 8, 6, 4} {
		p := &pod{created: at}
		old := len(v)
		v = inserted(v, p, at, func(q *pod) int64 { return q.created })
		if len(v) != old+1 || !slices.IsSortedFunc(v, func(a, b *pod) int { return cmp.Compare(b.created, a.created) }) {
			t.Fatalf("after %d: not sorted", at)
		}
	}
	third := v[2]
	if w := without(v, third); len(w) != 8 || slices.Contains(w, third) || len(v) != 9 || v[2] != third {
		t.Error("the old view changed, or the new one is wrong")
	}
}

// crowd is an engine with many rows and nothing behind them.
func crowd(rows int) *Engine {
	e := &Engine{}
	e.view.Store(&view{})
	for i := range rows {
		p := &pod{id: id.NewPod(), created: int64(i), rec: podRecord{Config: &PodConfig{Labels: map[string]string{"app": "x", "n": fmt.Sprint(i % 10)}}, State: lifecycle.Ready}}
		p.rec.ID = p.id
		p.status.Store(p.rec.status())
		c := &container{id: id.NewContainer(), pod: p, created: int64(i), rec: containerRecord{Config: &ContainerConfig{Labels: p.rec.Config.Labels}, State: lifecycle.Running}}
		c.rec.ID, c.rec.Pod = c.id, p.id
		c.status.Store(c.rec.status())
		e.insertPod(p)
		e.insertContainer(c)
	}
	return e
}

func BenchmarkList2000(b *testing.B) {
	e := crowd(2000)
	for name, f := range map[string]ContainerFilter{"all": {}, "labels": {Labels: map[string]string{"n": "3"}}} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if len(e.ListContainers(f)) == 0 {
					b.Fatal("none")
				}
			}
		})
	}
	b.Run("status", func(b *testing.B) {
		ref := string(e.view.Load().containers[1000].id)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := e.Container(ref); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("insert and drop", func(b *testing.B) {
		p := &pod{id: id.NewPod(), created: 1 << 40}
		for b.Loop() {
			e.insertPod(p)
			e.dropPod(p)
		}
	})
}
