package conformance

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/testimage"
)

func update(t *testing.T, c string, r *cri.LinuxContainerResources) error {
	t.Helper()
	_, err := node.Runtime.UpdateContainerResources(ctx(t), &cri.UpdateContainerResourcesRequest{ContainerId: c, Linux: r})
	return err
}

// limit reads a file of the container's own cgroup, of cgroup v1 or v2.
func limit(t *testing.T, c, v1, v2 string) string {
	t.Helper()
	for _, f := range []string{v1, v2} {
		if out, _, code := execSync(t, c, "/bin/cat", "/sys/fs/cgroup/"+f); code == 0 {
			return strings.TrimSpace(out)
		}
	}
	return ""
}

// TestUpdateOfEveryState: what an update sets holds in a running container at
// once and in a created one from its start; what it leaves out stays; replayed
// it is no error; an exited one is refused.
func TestUpdateOfEveryState(t *testing.T) {
	p := runPod(t, nil)
	withLimits := func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 512, OomScoreAdj: 500, CpusetCpus: "0"}
	}
	running, created := started(t, p, withLimits), create(t, p, withLimits)
	for range 2 {
		for _, c := range []string{running, created} {
			if err := update(t, c, &cri.LinuxContainerResources{MemoryLimitInBytes: 96 << 20}); err != nil {
				t.Fatal(err)
			}
			if err := update(t, c, &cri.LinuxContainerResources{CpuQuota: 30000, CpuPeriod: 100000}); err != nil {
				t.Fatal(err)
			}
			if err := update(t, c, &cri.LinuxContainerResources{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	start(t, created)
	for _, c := range []string{running, created} {
		if got := limit(t, c, "memory/memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(96<<20) {
			t.Errorf("memory limit %s", got)
		}
		if got := limit(t, c, "cpu/cpu.cfs_quota_us", "cpu.max"); got != "30000" && got != "30000 100000" {
			t.Errorf("cpu quota %s", got)
		}
		if got := limit(t, c, "cpuset/cpuset.cpus", "cpuset.cpus"); got != "0" {
			t.Errorf("cpuset %s", got)
		}
		r := containerStatus(t, c).Resources.Linux
		if r.MemoryLimitInBytes != 96<<20 || r.CpuQuota != 30000 || r.CpuShares != 512 || r.OomScoreAdj != 500 || r.CpusetCpus != "0" {
			t.Errorf("status: %v", r)
		}
		if out := execOut(t, c, "/bin/cat", "/proc/1/oom_score_adj", "/proc/self/oom_score_adj"); out != "500\n500\n" {
			t.Errorf("oom_score_adj of the first process and of an exec: %q", out)
		}
	}
	if err := update(t, running, &cri.LinuxContainerResources{CpusetCpus: "9999"}); err == nil {
		t.Error("cpu 9999 was taken")
	}
	if r := containerStatus(t, running).Resources.Linux; r.CpusetCpus != "0" {
		t.Errorf("a failed update shows in the status: %v", r)
	}
	wantCode(t, update(t, running, &cri.LinuxContainerResources{CpuQuota: -5}), codes.InvalidArgument, "cpu_quota")
	restart(t, nil)
	if r := containerStatus(t, running).Resources.Linux; r.MemoryLimitInBytes != 96<<20 || r.CpuQuota != 30000 {
		t.Errorf("status after a restart: %v", r)
	}
	stop(t, running, 0)
	wantCode(t, update(t, running, &cri.LinuxContainerResources{CpuShares: 100}), codes.FailedPrecondition, "running")
}

// TestOOMScoreIsClamped: a score that the daemon may not give is raised to its own.
func TestOOMScoreIsClamped(t *testing.T) {
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) { c.Linux.Resources = &cri.LinuxContainerResources{OomScoreAdj: -998} })
	out := strings.TrimSpace(execOut(t, c, "/bin/cat", "/proc/1/oom_score_adj"))
	own, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	if out != "-998" && out != strings.TrimSpace(string(own)) {
		t.Errorf("oom_score_adj %s, want -998 or the daemon's %s", out, own)
	}
	cfg := containerConfig([]string{"true"})
	cfg.Linux.Resources = &cri.LinuxContainerResources{OomScoreAdj: 1001}
	_, err = node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
	wantCode(t, err, codes.InvalidArgument, "oom_score_adj")
}

// TestHugepageLimitsAsKubeletsSendThem: a zero for every size, known or not.
func TestHugepageLimitsAsKubeletsSendThem(t *testing.T) {
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}, {PageSize: "1GB"}, {PageSize: "64KB"}}}
	})
	if got := limit(t, c, "hugetlb/hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"); got != "" && got != fmt.Sprint(4<<20) {
		t.Errorf("hugetlb limit %s", got)
	}
	if r := containerStatus(t, c).Resources.Linux; len(r.HugepageLimits) != 3 {
		t.Errorf("status: %v", r.HugepageLimits)
	}
}

// TestWebSocketExec: `crictl --transport websocket` and critest speak this.
func TestWebSocketExec(t *testing.T) {
	c := run(t, runPod(t, nil), "sleep", "1000")
	url := execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/cat"}, Stdin: true, Stdout: true})
	cfg, err := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), "http://localhost/")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Protocol = []string{"v4.channel.k8s.io"}
	conn, err := cfg.DialContext(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.PayloadType = websocket.BinaryFrame
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write([]byte("\x00through a socket\n")); err != nil {
		t.Fatal(err)
	}
	for {
		var frame []byte
		if err := websocket.Message.Receive(conn, &frame); err != nil {
			t.Fatal(err)
		}
		if len(frame) > 1 && frame[0] == 1 {
			if string(frame[1:]) != "through a socket\n" {
				t.Errorf("%q", frame)
			}
			return
		}
	}
}

// TestAttachOfATerminal: size before and during, two clients at once, stdin
// stays open for the next when it is not stdin_once.
func TestAttachOfATerminal(t *testing.T) {
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) { c.Args, c.Stdin, c.Tty = []string{"tty", "wait"}, true, true })
	attach := func() *session {
		r, err := node.Runtime.Attach(ctx(t), &cri.AttachRequest{ContainerId: c, Stdin: true, Stdout: true, Tty: true})
		if err != nil {
			t.Fatal(err)
		}
		return open(t, r.Url, true, true, false, true)
	}
	first := attach()
	_ = first.conn.Close() // stdin is not once: the program does not see the end
	second := attach()
	if err := json.NewEncoder(second.resizeOut).Encode(map[string]int{"Width": 91, "Height": 17}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	if s := containerStatus(t, c); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("the end of the first client's input ended the program: %v", s)
	}
	if _, err := second.in.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	waitExit(t, c)
	var all string
	for _, r := range logs(t, c) {
		if r.stream != "stdout" {
			t.Errorf("a terminal's output on %s", r.stream)
		}
		all += r.content + "\n"
	}
	if !strings.Contains(all, "rows=17 cols=91") {
		t.Errorf("log %q", all)
	}
}

// TestLogPathStaysInThePodsFolder: the file is made by root.
func TestLogPathStaysInThePodsFolder(t *testing.T) {
	p := runPod(t, nil)
	for _, bad := range []string{"../x.log", "/etc/x.log", "a/../../x.log", ".."} {
		cfg := containerConfig([]string{"true"})
		cfg.LogPath = bad
		_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
		wantCode(t, err, codes.InvalidArgument, "log_path")
	}
	// no log at all is possible
	c := started(t, p, func(c *cri.ContainerConfig) { c.Args, c.LogPath = []string{"print", "100000", "99"}, "" })
	if s := waitExit(t, c); s.ExitCode != 0 || s.LogPath != "" {
		t.Errorf("without a log: %v", s)
	}
}

// TestMirrorOfHostsToml: containerd's format; the mirror serves, the real
// registry is not asked.
func TestMirrorOfHostsToml(t *testing.T) {
	repo := "mirrored"
	ref := push(t, repo, testimage.Gzip)
	dir := filepath.Join(node.Dir, "certs.d", "registry.example")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	text := fmt.Sprintf("server = \"https://registry.example\"\n[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n  [host.\"http://%s\".header]\n    x-berth-test = [\"mirror\"]\n", images.Addr(), images.Addr())
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	headers := make(chan string, 1000)
	defer images.fault(repo, func(w http.ResponseWriter, q *http.Request, next http.Handler) {
		headers <- q.Header.Get("x-berth-test")
		next.ServeHTTP(w, q)
	})()
	id := pullID(t, "registry.example/"+repo+":1")
	if got := <-headers; got != "mirror" {
		t.Errorf("the mirror's header is %q", got)
	}
	img := imageStatus(t, id)
	if len(img.RepoTags) != 1 || img.RepoTags[0] != "registry.example/"+repo+":1" {
		t.Errorf("tags %v: the mirror's name must not show", img.RepoTags)
	}
	if again := pullID(t, ref); again != id {
		t.Errorf("the same image from the registry itself has id %s", again)
	}
}

// TestUpdateRuntimeConfig: whatever a kubelet sends is accepted.
func TestUpdateRuntimeConfig(t *testing.T) {
	for _, cidr := range []string{"", "10.164.0.0/16", "10.164.0.0/16"} {
		if _, err := node.Runtime.UpdateRuntimeConfig(ctx(t), &cri.UpdateRuntimeConfigRequest{RuntimeConfig: &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{PodCidr: cidr}}}); err != nil {
			t.Errorf("%q: %v", cidr, err)
		}
	}
	if _, err := node.Runtime.UpdateRuntimeConfig(ctx(t), &cri.UpdateRuntimeConfigRequest{}); err != nil {
		t.Errorf("empty: %v", err)
	}
	p := runPod(t, nil)
	if podStatus(t, p.id).Network.GetIp() == "" {
		t.Error("no address after it")
	}
}
