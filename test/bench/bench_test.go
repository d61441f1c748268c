package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestQuantileIsAMeasuredValue(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(i + 1)
	}
	for _, c := range []struct {
		values []float64
		q      float64
		want   float64
	}{
		{[]float64{7}, 0.5, 7}, {[]float64{7}, 0.99, 7},
		{[]float64{1, 2}, 0.5, 1}, {[]float64{1, 2, 3}, 0.5, 2},
		{hundred, 0.5, 50}, {hundred, 0.9, 90}, {hundred, 0.99, 99}, {hundred, 1, 100},
	} {
		if got := quantile(c.values, c.q); got != c.want {
			t.Errorf("quantile(%d values, %v) = %v, want %v", len(c.values), c.q, got, c.want)
		}
	}
}

func TestParseStatSkipsBracketsInTheName(t *testing.T) {
	st, err := parseStat([]byte("42 (a) b) S 7 42 42 0 -1 4194560 1 2 3 4 10 20 150 50 20 0 1 0 5\n"))
	if err != nil {
		t.Fatal(err)
	}
	if st.parent != 7 || st.children != 2*time.Second {
		t.Errorf("%+v", st)
	}
	for _, bad := range []string{"", "42 (x) S 1", "42 (x) S x 42 42 0 -1 4194560 1 2 3 4 10 20 150 50 20"} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestParsePSS(t *testing.T) {
	if n, err := parsePSS([]byte("00400000-7fff [rollup]\nRss:  9 kB\nPss:     123 kB\nPss_Anon: 7 kB\n")); err != nil || n != 123<<10 {
		t.Errorf("%d %v", n, err)
	}
	if _, err := parsePSS([]byte("Rss: 9 kB\n")); err == nil {
		t.Error("no Pss line, no error")
	}
}

func TestProcessesFindsThisTest(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p, err := newProcesses(exe, "", "")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(p.find(), os.Getpid()) {
		t.Errorf("%d not in %v", os.Getpid(), p.find())
	}
	m, err := p.memory()
	if err != nil || m.runtime < 1<<20 {
		t.Errorf("memory %+v, %v", m, err)
	}
	before := p.cpu()
	for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); {
	}
	if d := p.cpu().since(before).self; d < 10*time.Millisecond || d > 5*time.Second {
		t.Errorf("CPU of 50 ms of work: %v", d)
	}
	if p, _ := newProcesses(exe, "no such text in a command line", ""); len(p.find()) != 0 {
		t.Error("--within is not heeded")
	}
	if _, err := (&processes{names: []string{"no-such-runtime"}}).memory(); err == nil {
		t.Error("memory of nothing is a number")
	}
	if _, err := newProcesses("", "", "12,x"); err == nil {
		t.Error("--pids 12,x is taken")
	}
}

func TestCgroupMounts(t *testing.T) {
	got := cgroupMounts(`25 20 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
26 25 0:23 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
27 25 0:24 /part /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
28 25 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
`)
	if want := []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestCgroupParentIsChecked(t *testing.T) {
	for _, bad := range []string{"/", "relative", "/a/.."} {
		if _, err := newCgroups(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	c, err := newCgroups("kubepods.slice")
	if err != nil || c.path("p") != "kubepods.slice" {
		t.Errorf("%v %v", c, err)
	}
}

func TestPartsRunInTheirOrder(t *testing.T) {
	got, err := parseParts("pull, scale")
	if err != nil || len(got) != 2 || got[0].name != "scale" || got[1].name != "pull" {
		t.Errorf("%v %v", got, err)
	}
	if _, err := parseParts("scale,speed"); err == nil || !strings.Contains(err.Error(), "lifecycle") {
		t.Errorf("unknown part: %v", err)
	}
}

func TestTableComparesMedians(t *testing.T) {
	dir := t.TempDir()
	var files []string
	for i, v := range []struct {
		name string
		up   time.Duration
	}{{"a", 2}, {"b", 30}, {"a", 4}, {"b", 10}, {"a", 90}, {"b", 20}} {
		r := &result{Name: v.name, Runtime: v.name + " 1", Kernel: "k", CPUs: 2, samples: map[*metric][]float64{}}
		r.series("one at a time").took("pod up", v.up*time.Millisecond)
		if v.name == "b" {
			r.series("other").value("only here", "MiB", 5)
		}
		f := filepath.Join(dir, fmt.Sprint(i, ".json"))
		if err := r.save(f); err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	var out strings.Builder
	if err := table(&out, files); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"- a: a 1, 3 runs\n", "| part | what | unit | a | b | b / a |\n|---|---|---|---:|---:|---:|\n",
		"| one at a time | pod up | ms | 4.00 | 20.0 | 5.00× |\n", "| other | only here | MiB | – | 5.00 | – |\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if err := table(&out, nil); err == nil {
		t.Error("a table of nothing")
	}
}

// sickRuntime answers like a runtime whose n-th StartContainer fails.
type sickRuntime struct {
	cri.UnimplementedRuntimeServiceServer
	cri.UnimplementedImageServiceServer

	mu     sync.Mutex
	pods   map[string]bool
	made   int
	starts int
	failAt int
	images map[string]bool
}

var errSick = errors.New("runtime: sick")

func (s *sickRuntime) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{RuntimeName: "sick", RuntimeVersion: "1"}, nil
}

func (s *sickRuntime) Status(context.Context, *cri.StatusRequest) (*cri.StatusResponse, error) {
	return &cri.StatusResponse{Status: &cri.RuntimeStatus{}}, nil
}

func (s *sickRuntime) RunPodSandbox(context.Context, *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.made++
	id := fmt.Sprint("pod", s.made)
	s.pods[id] = true
	return &cri.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func (s *sickRuntime) CreateContainer(_ context.Context, r *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	return &cri.CreateContainerResponse{ContainerId: "c-" + r.PodSandboxId}, nil
}

func (s *sickRuntime) StartContainer(context.Context, *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.starts++; s.starts == s.failAt {
		return nil, errSick
	}
	return &cri.StartContainerResponse{}, nil
}

func (s *sickRuntime) ExecSync(context.Context, *cri.ExecSyncRequest) (*cri.ExecSyncResponse, error) {
	return &cri.ExecSyncResponse{}, nil
}

func (s *sickRuntime) StopContainer(context.Context, *cri.StopContainerRequest) (*cri.StopContainerResponse, error) {
	return &cri.StopContainerResponse{}, nil
}

func (s *sickRuntime) RemoveContainer(context.Context, *cri.RemoveContainerRequest) (*cri.RemoveContainerResponse, error) {
	return &cri.RemoveContainerResponse{}, nil
}

func (s *sickRuntime) StopPodSandbox(context.Context, *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	return &cri.StopPodSandboxResponse{}, nil
}

func (s *sickRuntime) RemovePodSandbox(_ context.Context, r *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pods, r.PodSandboxId)
	return &cri.RemovePodSandboxResponse{}, nil
}

func (s *sickRuntime) ListPodSandbox(context.Context, *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &cri.ListPodSandboxResponse{}
	for id := range s.pods {
		r.Items = append(r.Items, &cri.PodSandbox{Id: id})
	}
	return r, nil
}

func (s *sickRuntime) PullImage(_ context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images[r.Image.Image] = true
	return &cri.PullImageResponse{ImageRef: r.Image.Image}, nil
}

func (s *sickRuntime) RemoveImage(_ context.Context, r *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.images, r.Image.Image)
	return &cri.RemoveImageResponse{}, nil
}

func TestFailureLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "cri.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := &sickRuntime{pods: map[string]bool{}, images: map[string]bool{}, failAt: 9}
	g := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(g, s)
	cri.RegisterImageServiceServer(g, s)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	defer func() { g.Stop(); <-served }()

	o, err := flags([]string{"--endpoint", l.Addr().String(), "--n", "20", "--pods", "0", "--only", "lifecycle,parallel,exec",
		"--cgroup-parent", "", "--scratch", filepath.Join(dir, "scratch")})
	if err != nil {
		t.Fatal(err)
	}
	err = run(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "part lifecycle: StartContainer") {
		t.Fatalf("run: %v", err)
	}
	if len(s.pods)+len(s.images) != 0 || s.made != 9 {
		t.Errorf("%d pods made; left behind: pods %v, images %v", s.made, s.pods, s.images)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "scratch")); len(left) != 0 {
		t.Errorf("left in scratch: %v", left)
	}

	s.made, s.failAt = 0, 0
	o.json = filepath.Join(dir, "out.json")
	if err := run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := table(&out, []string{o.json}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| one at a time | pod up p99 | ms |", "| 4 at a time | pods up per second | 1/s |", "| exec | ExecSync true | ms |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

// TestReapEndsWhatTheCommandLeaves runs this test binary as the reaper of a shell
// that leaves a child behind which ignores SIGTERM.
func TestReapEndsWhatTheCommandLeaves(t *testing.T) {
	if os.Getenv("BENCH_REAP") != "" {
		if err := reap([]string{"sh", "-c", "(trap '' TERM; exec sleep 321) & echo $!; exec sleep 322"}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	c := exec.Command(os.Args[0], "-test.run", "^TestReapEndsWhatTheCommandLeaves$")
	c.Env = append(os.Environ(), "BENCH_REAP=1")
	var stderr strings.Builder
	c.Stderr = &stderr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Process.Kill()
	var left int
	if _, err := fmt.Fscan(out, &left); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	c.Process.Signal(syscall.SIGTERM)
	// The command died of the signal, which is what reap says.
	if err := c.Wait(); err == nil || !strings.Contains(stderr.String(), "sh: ended by signal terminated") {
		t.Errorf("reap: %v, %q", err, stderr.String())
	}
	if d := time.Since(start); d > 8*time.Second {
		t.Errorf("took %v", d)
	}
	if st, err := readStat(left); err == nil {
		t.Errorf("the child %d is still there: %+v", left, st)
	}
}

func TestFlagsAreChecked(t *testing.T) {
	for _, bad := range [][]string{{"extra"}, {"--n", "0"}, {"--seccomp", "none"}, {"--pods", "-1"}} {
		if _, err := flags(bad); err == nil {
			t.Errorf("%v is taken", bad)
		}
	}
}
