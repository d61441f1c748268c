package conformance

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// restart kills the shared daemon with -9 and starts it again.
func restart(t *testing.T, whileDown func()) {
	t.Helper()
	if err := node.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if whileDown != nil {
		whileDown()
	}
	if err := node.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestContainersOutliveTheDaemon(t *testing.T) {
	p := runPod(t, nil)
	counter := run(t, p, "count", "3000", "1000")
	sleeper := run(t, p, "sleep", "1000")
	short := run(t, p, "exit-after", "300", "42") // milliseconds, code
	created := create(t, p, nil)
	before := containerStatus(t, sleeper)
	restart(t, func() { time.Sleep(700 * time.Millisecond) })
	s := containerStatus(t, sleeper)
	if s.State != cri.ContainerState_CONTAINER_RUNNING || s.StartedAt != before.StartedAt || s.CreatedAt != before.CreatedAt {
		t.Errorf("sleeper: %v", s)
	}
	if s := containerStatus(t, short); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 42 {
		t.Errorf("exit while the daemon was down: %v code %d", s.State, s.ExitCode)
	}
	if s := podStatus(t, p.id); s.State != cri.PodSandboxState_SANDBOX_READY || s.Network.Ip == "" {
		t.Errorf("pod: %v", s)
	}
	start(t, created)
	if out, _, code := execSync(t, sleeper, "/bin/echo", "still here"); code != 0 || out != "still here\n" {
		t.Errorf("exec after restart: %q %d", out, code)
	}
	restart(t, nil)
	waitExit(t, counter)
	for i, r := range logs(t, counter) {
		if r.content != fmt.Sprint(i) {
			t.Fatalf("log has %q where %d was due", r.content, i)
		}
	}
	if n := len(logs(t, counter)); n != 3000 {
		t.Errorf("%d of 3000 lines", n)
	}
	stop(t, sleeper, 0)
	if s := containerStatus(t, sleeper); s.ExitCode != 137 {
		t.Errorf("stop after restart: code %d", s.ExitCode)
	}
}

func TestPodNetworkOutlivesTheDaemon(t *testing.T) {
	p := runPod(t, func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{ContainerPort: 8080, HostPort: 18099}}
	})
	run(t, p, "serve", ":8080")
	ip := podStatus(t, p.id).Network.Ip
	want := fetch(t, "http://127.0.0.1:18099/")
	restart(t, func() {
		if got := fetch(t, "http://"+ip+":8080/"); got != want {
			t.Errorf("while the daemon is down: %q", got)
		}
	})
	if got := fetch(t, "http://127.0.0.1:18099/"); got != want {
		t.Errorf("host port after restart: %q", got)
	}
	q := runPod(t, nil)
	if other := podStatus(t, q.id).Network.Ip; other == ip {
		t.Fatalf("the address %s of a live pod was given out again", ip)
	}
	// a pod without a running container keeps its namespaces too
	c := run(t, q, "sleep", "1000")
	restart(t, nil)
	if ip := podStatus(t, q.id).Network.Ip; !strings.Contains(execOut(t, c, "/bin/cat", "/etc/hosts"), ip) {
		t.Errorf("pod address changed")
	}
}

func execOut(t *testing.T, c string, cmd ...string) string {
	t.Helper()
	out, _, _ := execSync(t, c, cmd...)
	return out
}

func TestSIGTERMLeavesContainersRunning(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "sleep", "1000")
	if err := node.Kill(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := node.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s := containerStatus(t, c); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("state %v", s.State)
	}
}

// TestKillInTheMiddle kills the daemon while pods come and go; then every
// retry succeeds and nothing but the asked-for pods is there.
func TestKillInTheMiddle(t *testing.T) {
	for round := range 6 {
		p := preparePod(t, nil)
		done := make(chan struct{})
		go func() {
			defer close(done)
			r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config})
			if err != nil {
				return
			}
			c := containerConfig([]string{"sleep", "1000"})
			cr, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: c, SandboxConfig: p.config})
			if err != nil {
				return
			}
			_, _ = node.Runtime.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: cr.ContainerId})
		}()
		time.Sleep(time.Duration(round) * 1500 * time.Microsecond)
		restart(t, nil)
		<-done
		r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config})
		if err != nil {
			t.Fatalf("round %d: retried RunPodSandbox: %v", round, err)
		}
		p.id = r.PodSandboxId
		c := run(t, p, "sleep", "1000")
		stop(t, c, 0)
		if _, err := os.Stat("/proc/" + fmt.Sprint(node.Pid())); err != nil {
			t.Fatal(err)
		}
	}
}
