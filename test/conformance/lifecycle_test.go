package conformance

import (
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestVersionNamesTheRuntime(t *testing.T) {
	v, err := node.Runtime.Version(ctx(t), &cri.VersionRequest{Version: "anything"})
	if err != nil {
		t.Fatal(err)
	}
	if v.RuntimeName != "berth" || v.RuntimeApiVersion != "v1" || v.Version != "0.1.0" || v.RuntimeVersion == "" {
		t.Fatalf("version = %v", v)
	}
}

func TestStatusIsReadyAndListsTheDefaultHandler(t *testing.T) {
	s, err := node.Runtime.Status(ctx(t), &cri.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, c := range s.Status.Conditions {
		seen[c.Type] = c.Status
	}
	if !seen["RuntimeReady"] || !seen["NetworkReady"] {
		t.Fatalf("conditions = %v", s.Status.Conditions)
	}
	byName := map[string]bool{}
	for _, h := range s.RuntimeHandlers {
		byName[h.Name] = true
	}
	if !byName[""] {
		t.Fatalf("no entry for the default handler: %v", s.RuntimeHandlers)
	}
	if !strings.Contains(s.Info["config"], "stateDir") {
		t.Fatalf("verbose info has no config with stateDir: %v", s.Info)
	}
}

func TestPodLifecycle(t *testing.T) {
	p := runPod(t, func(c *cri.PodSandboxConfig) {
		c.Labels = map[string]string{"app": "life"}
		c.Annotations = map[string]string{"x.example/y": "kept Ünaltered\n"}
	})
	s := podStatus(t, p.id)
	if s.State != cri.PodSandboxState_SANDBOX_READY || s.Network.Ip == "" || s.CreatedAt <= 0 {
		t.Fatalf("status = %v", s)
	}
	if s.Annotations["x.example/y"] != "kept Ünaltered\n" || s.Labels["app"] != "life" || s.Metadata.Uid != p.config.Metadata.Uid {
		t.Fatalf("status does not echo the request: %v", s)
	}
	list, err := node.Runtime.ListPodSandbox(ctx(t), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{"app": "life"}}})
	if err != nil || len(list.Items) != 1 || list.Items[0].Id != p.id {
		t.Fatalf("list by label = %v, %v", list, err)
	}
	for range 2 { // the kubelet calls it many times
		if _, err := node.Runtime.StopPodSandbox(ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
			t.Fatal(err)
		}
	}
	if s := podStatus(t, p.id); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Fatalf("state after stop = %v", s.State)
	}
	for range 2 {
		if _, err := node.Runtime.RemovePodSandbox(ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
			t.Fatal(err)
		}
	}
	_, err = node.Runtime.PodSandboxStatus(ctx(t), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	wantCode(t, err, codes.NotFound, p.id)
}

func TestRetriedRunPodSandboxJoinsAndReturnsTheSameID(t *testing.T) {
	p := preparePod(t, nil)
	var wg sync.WaitGroup
	ids := make([]string, 8)
	for i := range ids {
		wg.Go(func() {
			r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config})
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = r.PodSandboxId
		})
	}
	wg.Wait()
	p.id = ids[0]
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("ids differ: %q", ids)
		}
	}
}

func TestRetryAfterADeadlineJoins(t *testing.T) {
	p := preparePod(t, nil)
	short, cancel := shortContext(t, 200*time.Microsecond)
	defer cancel()
	_, err := node.Runtime.RunPodSandbox(short, &cri.RunPodSandboxRequest{Config: p.config})
	if err == nil {
		t.Log("the call won against its 200 us deadline")
	}
	r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		t.Fatalf("retry: %v", err)
	}
	p.id = r.PodSandboxId
	list, err := node.Runtime.ListPodSandbox(ctx(t), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, i := range list.Items {
		if i.Metadata.Uid == p.config.Metadata.Uid {
			n++
		}
	}
	if n != 1 {
		t.Fatalf("%d pods for one uid", n)
	}
}

func TestContainerLifecycle(t *testing.T) {
	p := runPod(t, nil)
	c := create(t, p, func(c *cri.ContainerConfig) {
		c.Args = []string{"sleep", "1000"}
		c.Labels = map[string]string{"k": "v"}
		c.Annotations = map[string]string{"io.kubernetes.container.hash": "cafe"}
	})
	s := containerStatus(t, c)
	if s.State != cri.ContainerState_CONTAINER_CREATED || s.CreatedAt == 0 || s.ImageRef == "" || s.ImageId != s.ImageRef {
		t.Fatalf("created status = %v", s)
	}
	start(t, c)
	s = containerStatus(t, c)
	if s.State != cri.ContainerState_CONTAINER_RUNNING || s.StartedAt < s.CreatedAt {
		t.Fatalf("running status = %v", s)
	}
	_, err := node.Runtime.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: c})
	wantCode(t, err, codes.FailedPrecondition, "running")
	stop(t, c, 0)
	s = containerStatus(t, c)
	if s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 || s.Reason != "Error" || s.FinishedAt < s.StartedAt {
		t.Fatalf("stopped status = %v", s)
	}
	stop(t, c, 0) // again: success
	for range 2 {
		if _, err := node.Runtime.RemoveContainer(ctx(t), &cri.RemoveContainerRequest{ContainerId: c}); err != nil {
			t.Fatal(err)
		}
	}
	_, err = node.Runtime.ContainerStatus(ctx(t), &cri.ContainerStatusRequest{ContainerId: c})
	wantCode(t, err, codes.NotFound, c)
}

func TestRetriedCreateContainerReturnsTheSameID(t *testing.T) {
	p := runPod(t, nil)
	cfg := containerConfig([]string{"sleep", "1000"})
	a, b := createConfig(t, p, cfg), createConfig(t, p, cfg)
	if a != b {
		t.Fatalf("retry made a second container: %s, %s", a, b)
	}
}

func TestExitCodesAndReasons(t *testing.T) {
	p := runPod(t, nil)
	for _, row := range []struct {
		args   []string
		code   int32
		reason string
	}{
		{[]string{"exit", "0"}, 0, "Completed"},
		{[]string{"exit", "3"}, 3, "Error"},
		{[]string{"exit", "255"}, 255, "Error"},
	} {
		c := run(t, p, row.args...)
		s := waitExit(t, c)
		if s.ExitCode != row.code || s.Reason != row.reason {
			t.Errorf("%v: code %d reason %q", row.args, s.ExitCode, s.Reason)
		}
	}
}

func TestStartOfAMissingProgramIsAStartError(t *testing.T) {
	p := runPod(t, nil)
	c := create(t, p, func(c *cri.ContainerConfig) { c.Command = []string{"/no/such/program"} })
	_, err := node.Runtime.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: c})
	if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Fatalf("err = %v", err)
	}
	s := containerStatus(t, c)
	if s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 128 || s.Reason != "StartError" || s.Message == "" || s.FinishedAt == 0 {
		t.Fatalf("status = %v", s)
	}
}

func TestStopHonoursTheGracePeriod(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "signal-ignore")
	waitLog(t, c, "ready")
	began := time.Now()
	stop(t, c, 1)
	if d := time.Since(began); d < 900*time.Millisecond || d > 4*time.Second {
		t.Fatalf("a container that ignores SIGTERM stopped after %v with 1 s of grace", d)
	}
	if s := containerStatus(t, c); s.ExitCode != 137 {
		t.Fatalf("exit code %d", s.ExitCode)
	}
}

func TestASecondStopWithAShorterTimeoutWins(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "signal-ignore")
	waitLog(t, c, "ready")
	done := make(chan error, 1)
	go func() {
		_, err := node.Runtime.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: c, Timeout: 60})
		done <- err
	}()
	time.Sleep(100 * time.Millisecond)
	stop(t, c, 0)
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the first stop still waits")
	}
}

func TestStopPodSandboxKillsItsContainers(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "sleep", "1000")
	if _, err := node.Runtime.StopPodSandbox(ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Fatal(err)
	}
	if s := containerStatus(t, c); s.State != cri.ContainerState_CONTAINER_EXITED {
		t.Fatalf("state = %v", s.State)
	}
	_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: containerConfig([]string{"true"}), SandboxConfig: p.config})
	wantCode(t, err, codes.FailedPrecondition, "not ready")
}

func TestOOMKilled(t *testing.T) {
	p := runPod(t, nil)
	c := create(t, p, func(c *cri.ContainerConfig) {
		c.Args = []string{"alloc", "256"}
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 32 << 20}
	})
	start(t, c)
	s := waitExit(t, c)
	if s.ExitCode != 137 || s.Reason != "OOMKilled" {
		t.Fatalf("code %d reason %q", s.ExitCode, s.Reason)
	}
}

func TestExecSync(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "sleep", "1000")
	out, _, code := execSync(t, c, "/bin/echo", "hello", "there")
	if out != "hello there\n" || code != 0 {
		t.Fatalf("echo: %q, %d", out, code)
	}
	if _, _, code := execSync(t, c, "/bin/prog", "exit", "7"); code != 7 {
		t.Fatalf("exit 7: %d", code)
	}
	began := time.Now()
	_, err := node.Runtime.ExecSync(ctx(t), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"/bin/prog", "fork"}, Timeout: 1})
	wantCode(t, err, codes.DeadlineExceeded, "")
	if d := time.Since(began); d > 4*time.Second {
		t.Fatalf("timeout of 1 s took %v", d)
	}
	out, _, _ = execSync(t, c, "/bin/prog", "ps")
	if strings.Contains(out, "fork") {
		t.Fatalf("processes of a timed out exec are left: %s", out)
	}
	_, err = node.Runtime.ExecSync(ctx(t), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"/no/such"}})
	if err == nil || !strings.Contains(err.Error(), "/no/such") {
		t.Fatalf("missing program: %v", err)
	}
}

func TestExecSyncOutputIsCapped(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "sleep", "1000")
	r, err := node.Runtime.ExecSync(ctx(t), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"/bin/prog", "print", "400000", "99"}})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(r.Stdout); n < 15<<20 || n > 16<<20 {
		t.Fatalf("40 MB of output came back as %d bytes", n)
	}
}

func TestUpdateContainerResources(t *testing.T) {
	p := runPod(t, nil)
	c := create(t, p, func(c *cri.ContainerConfig) {
		c.Args = []string{"sleep", "1000"}
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 512}
	})
	start(t, c)
	_, err := node.Runtime.UpdateContainerResources(ctx(t), &cri.UpdateContainerResourcesRequest{ContainerId: c,
		Linux: &cri.LinuxContainerResources{CpuQuota: 50000, CpuPeriod: 100000}})
	if err != nil {
		t.Fatal(err)
	}
	r := containerStatus(t, c).Resources.Linux
	if r.CpuQuota != 50000 || r.CpuShares != 512 || r.MemoryLimitInBytes != 64<<20 {
		t.Fatalf("a partial update lost fields: %v", r)
	}
}

func TestContainerStats(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "sleep", "1000")
	s, err := node.Runtime.ContainerStats(ctx(t), &cri.ContainerStatsRequest{ContainerId: c})
	if err != nil {
		t.Fatal(err)
	}
	if s.Stats.Cpu.Timestamp == 0 || s.Stats.Cpu.UsageCoreNanoSeconds.Value == 0 || s.Stats.Memory.WorkingSetBytes.Value == 0 ||
		s.Stats.Memory.UsageBytes.Value == 0 || s.Stats.Attributes.Id != c || s.Stats.WritableLayer.Timestamp == 0 {
		t.Fatalf("stats = %v", s.Stats)
	}
	l, err := node.Runtime.ListContainerStats(ctx(t), &cri.ListContainerStatsRequest{Filter: &cri.ContainerStatsFilter{PodSandboxId: p.id}})
	if err != nil || len(l.Stats) != 1 {
		t.Fatalf("list = %v, %v", l, err)
	}
}
