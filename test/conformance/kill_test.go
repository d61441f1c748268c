package conformance

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/testimage"
)

// kills is how often TestKilledAtRandomMoments kills the daemon: it looks after
// external handlers (BERTH_TEST_HANDLER), test/crash does the rest. More in a soak
// run: BERTH_TEST_KILLS=100.
func kills(t *testing.T) int {
	if v := os.Getenv("BERTH_TEST_KILLS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatalf("BERTH_TEST_KILLS: %v", err)
		}
		return n
	}
	return 5
}

// insist repeats call as a kubelet does until it succeeds.
func insist(t *testing.T, what string, call func(context.Context) error) bool {
	t.Helper()
	if err := harness.Insist(call); err != nil {
		t.Errorf("%s: %v", what, err)
		return false
	}
	return true
}

// churn lives pods, one after the other, and repeats each call until it
// succeeds. Pulls of an image of its own are among them.
func churn(t *testing.T, worker int, image string, stop *atomic.Bool) (lives int) {
	rt := node.Runtime
	for n := 0; !stop.Load(); n++ {
		name := fmt.Sprintf("churn-%d-%d", worker, n)
		config := &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "churn"}, Hostname: name,
			LogDirectory: filepath.Join(node.Dir, "log", name), Linux: &cri.LinuxPodSandboxConfig{},
			PortMappings: []*cri.PortMapping{{ContainerPort: 80, HostPort: int32(20000 + worker)}},
		}
		if n%2 == 0 {
			config.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}
		}
		var pod, ctr string
		if !insist(t, "PullImage", func(c context.Context) error {
			_, err := node.Images.PullImage(c, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}})
			return err
		}) || !insist(t, "RunPodSandbox", func(c context.Context) error {
			r, err := rt.RunPodSandbox(c, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
			pod = r.GetPodSandboxId()
			return err
		}) {
			return lives
		}
		cfg := &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: image}, LogPath: "c.log",
			Args: []string{"sleep", "1000"}, Linux: &cri.LinuxContainerConfig{},
		}
		ok := insist(t, "CreateContainer", func(c context.Context) error {
			r, err := rt.CreateContainer(c, &cri.CreateContainerRequest{PodSandboxId: pod, Config: cfg, SandboxConfig: config})
			ctr = r.GetContainerId()
			return err
		}) && insist(t, "StartContainer", func(c context.Context) error {
			return node.StartContainer(c, ctr)
		}) && insist(t, "ExecSync", func(c context.Context) error {
			r, err := rt.ExecSync(c, &cri.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"/bin/true"}, Timeout: 10})
			if err == nil && r.ExitCode != 0 {
				return fmt.Errorf("exit code %d: %s", r.ExitCode, r.Stderr)
			}
			return err
		})
		ok = insist(t, "StopContainer", func(c context.Context) error {
			_, err := rt.StopContainer(c, &cri.StopContainerRequest{ContainerId: ctr, Timeout: 5})
			return err
		}) && ok
		if n%2 == 0 {
			ok = insist(t, "RemoveContainer", func(c context.Context) error {
				_, err := rt.RemoveContainer(c, &cri.RemoveContainerRequest{ContainerId: ctr})
				return err
			}) && ok
		}
		if n%3 == 0 {
			ok = insist(t, "StopPodSandbox", func(c context.Context) error {
				_, err := rt.StopPodSandbox(c, &cri.StopPodSandboxRequest{PodSandboxId: pod})
				return err
			}) && ok
		}
		ok = insist(t, "RemovePodSandbox", func(c context.Context) error {
			_, err := rt.RemovePodSandbox(c, &cri.RemovePodSandboxRequest{PodSandboxId: pod})
			return err
		}) && ok
		if !insist(t, "RemoveImage", func(c context.Context) error {
			_, err := node.Images.RemoveImage(c, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: image}})
			return err
		}) || !ok {
			return lives
		}
		lives++
	}
	return lives
}

// TestKilledAtRandomMoments kills the daemon with -9 again and again while
// clients pull, run, exec and remove. Their retries succeed, and in the end
// nothing of theirs is left in Berth's folders or among the cgroups.
func TestKilledAtRandomMoments(t *testing.T) {
	const workers = 2
	before := traces(t)
	var refs []string
	for w := range workers {
		refs = append(refs, push(t, fmt.Sprintf("killed-%d", w), testimage.Gzip))
	}
	var stop atomic.Bool
	var lives atomic.Int64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() { lives.Add(int64(churn(t, w, refs[w], &stop))) })
	}
	n := kills(t)
	for range n {
		time.Sleep(time.Duration(20+rand.IntN(280)) * time.Millisecond)
		if err := node.Kill(syscall.SIGKILL); err != nil {
			t.Error(err)
			break
		}
		if err := node.Start(context.Background()); err != nil {
			t.Error(err)
			break
		}
	}
	stop.Store(true)
	wg.Wait()
	t.Logf("%d kills, %d pod lives", n, lives.Load())
	if lives.Load() == 0 {
		t.Error("no pod lived through all calls")
	}
	restart(t, nil) // the last start sweeps what kills left
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		left := traces(t).Beyond(before)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind:\n%s", strings.Join(left, "\n"))
		}
	}
}

// traces are what Berth keeps for pods, containers and images, and their cgroups.
func traces(t *testing.T) harness.Traces {
	t.Helper()
	out, err := harness.Cgroups("/berth") // the parent itself stays
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(out, node.Traces())
	return out
}
