// Package conformance drives the real berthd over its socket with the CRI
// client and checks what ../../docs/house.md promises of each call.
package conformance

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/leak"
	"github.com/berth-runtime/berth/test/pace"
)

var (
	node   *harness.Daemon // shared by the tests that do not restart or misconfigure it
	images *registry
	// handler runs the pods of all tests that name none: BERTH_TEST_HANDLER=runc
	// puts an external runtime through the whole suite.
	handler = os.Getenv("BERTH_TEST_HANDLER")
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Println("conformance: needs root")
		os.Exit(1)
	}
	if err := harness.OwnNetwork(); err != nil {
		fmt.Println("conformance:", err)
		os.Exit(1)
	}
	os.Exit(suite(m))
}

// suite runs the tests on one daemon and fails when they, or the daemon, leave
// anything behind.
func suite(m *testing.M) int {
	fail := func(what string, err error) int {
		fmt.Printf("conformance: %s: %v\n", what, err)
		return 1
	}
	dir, err := os.MkdirTemp("", "berth-e2e-")
	if err != nil {
		return fail("scratch folder", err)
	}
	defer os.RemoveAll(dir)
	before, err := leak.Take()
	if err != nil {
		return fail("leak check", err)
	}
	bg := context.Background()
	if images, err = serveImages(dir); err != nil {
		return fail("test images", err)
	}
	if node, err = harness.New(dir, "--log-level", "debug"); err != nil {
		return fail("daemon", err)
	}
	if err := configureExternals(); err != nil {
		return fail("daemon", err)
	}
	if err := node.Start(bg); err != nil {
		return fail("daemon", err)
	}
	if _, err := node.Images.PullImage(bg, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: images.prog}}); err != nil {
		fmt.Println(node.LogTail(4096))
		err = fmt.Errorf("%w (close: %v)", err, node.Close(bg))
		return fail("pull", err)
	}
	code := m.Run()
	if code != 0 {
		fmt.Println("--- end of the daemon's log\n" + node.LogTail(8192))
	}
	if err := node.Close(bg); err != nil {
		code = fail("close", err)
	}
	images.close()
	left, err := before.Since(pace.Wait(20 * time.Second))
	if err != nil || len(left) > 0 {
		code = fail("left behind: "+strings.Join(left, ", "), err)
	}
	return code
}

func ctx(t *testing.T) context.Context {
	c, cancel := context.WithTimeout(context.Background(), pace.Wait(60*time.Second))
	t.Cleanup(cancel)
	return c
}

func shortContext(t *testing.T, d time.Duration) (context.Context, context.CancelFunc) {
	t.Helper()
	return context.WithTimeout(context.Background(), d)
}

// pod is a pod sandbox of a test.
type pod struct {
	id     string
	config *cri.PodSandboxConfig
}

// preparePod makes a config with a fresh identity; the pod, if the test runs
// one with it, is removed at the end.
func preparePod(t *testing.T, change func(*cri.PodSandboxConfig)) *pod {
	t.Helper()
	p := &pod{config: node.PodConfig()}
	if change != nil {
		change(p.config)
	}
	t.Cleanup(func() {
		if p.id == "" {
			return
		}
		// As a kubelet does: processes of a killed supervisor's execs are reaped by the
		// machine's init, which may take its time, and keep their PID namespace until then.
		if err := harness.Insist(func(ctx context.Context) error {
			_, err := node.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id})
			return err
		}); err != nil {
			t.Errorf("stop pod: %v", err)
		}
		if _, err := node.Runtime.RemovePodSandbox(ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
			t.Errorf("remove pod: %v", err)
		}
	})
	return p
}

func runPod(t *testing.T, change func(*cri.PodSandboxConfig)) *pod {
	t.Helper()
	p := preparePod(t, change)
	r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config, RuntimeHandler: handler})
	if err != nil {
		t.Fatalf("run pod: %v", err)
	}
	p.id = r.PodSandboxId
	return p
}

func podStatus(t *testing.T, id string) *cri.PodSandboxStatus {
	t.Helper()
	r, err := node.Runtime.PodSandboxStatus(ctx(t), &cri.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status
}

func containerConfig(args []string) *cri.ContainerConfig {
	return harness.ContainerConfig(images.prog, args...)
}

func createConfig(t *testing.T, p *pod, c *cri.ContainerConfig) string {
	t.Helper()
	r, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: c, SandboxConfig: p.config})
	if err != nil {
		t.Fatalf("create container: %v", err)
	}
	return r.ContainerId
}

func create(t *testing.T, p *pod, change func(*cri.ContainerConfig)) string {
	t.Helper()
	c := containerConfig([]string{"sleep", "1000"})
	if change != nil {
		change(c)
	}
	return createConfig(t, p, c)
}

func start(t *testing.T, id string) {
	t.Helper()
	if _, err := node.Runtime.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatalf("start container: %v", err)
	}
}

// run creates and starts a container of the test program with args.
func run(t *testing.T, p *pod, args ...string) string {
	t.Helper()
	id := create(t, p, func(c *cri.ContainerConfig) { c.Args = args })
	start(t, id)
	return id
}

func stop(t *testing.T, id string, grace int64) {
	t.Helper()
	if _, err := node.Runtime.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: id, Timeout: grace}); err != nil {
		t.Fatalf("stop container: %v", err)
	}
}

func containerStatus(t *testing.T, id string) *cri.ContainerStatus {
	t.Helper()
	r, err := node.Runtime.ContainerStatus(ctx(t), &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status
}

func waitExit(t *testing.T, id string) *cri.ContainerStatus {
	t.Helper()
	for deadline := time.Now().Add(pace.Wait(20 * time.Second)); ; time.Sleep(5 * time.Millisecond) {
		s := containerStatus(t, id)
		if s.State == cri.ContainerState_CONTAINER_EXITED {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("container does not end: %v", s)
		}
	}
}

// execSync runs cmd in the container and returns its output and exit code.
func execSync(t *testing.T, id string, cmd ...string) (stdout, stderr string, code int32) {
	t.Helper()
	r, err := node.Runtime.ExecSync(ctx(t), &cri.ExecSyncRequest{ContainerId: id, Cmd: cmd})
	if err != nil {
		t.Fatalf("exec %q: %v", cmd, err)
	}
	return string(r.Stdout), string(r.Stderr), r.ExitCode
}

// record is one line of a CRI log.
type record struct {
	at          time.Time
	stream, tag string
	content     string
}

func readLog(t *testing.T, path string) []record {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []record
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 || !strings.HasSuffix(line, "\n") {
			t.Fatalf("torn record %q", line)
		}
		at, err := time.Parse("2006-01-02T15:04:05.000000000Z", f[0])
		if err != nil {
			t.Fatalf("record time: %v", err)
		}
		out = append(out, record{at, f[1], f[2], f[3]})
	}
	return out
}

// logs returns the records of a container's log.
func logs(t *testing.T, id string) []record {
	t.Helper()
	return readLog(t, containerStatus(t, id).LogPath)
}

func waitLog(t *testing.T, id, text string) {
	t.Helper()
	for deadline := time.Now().Add(pace.Wait(10 * time.Second)); ; time.Sleep(5 * time.Millisecond) {
		for _, r := range logs(t, id) {
			if strings.Contains(r.content, text) {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("log never says %q: %v", text, logs(t, id))
		}
	}
}

// wantCode checks a gRPC code and that the message names the thing.
func wantCode(t *testing.T, err error, code codes.Code, names string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(fmt.Sprint(err), names) {
		t.Errorf("err = %v, want %v naming %q", err, code, names)
	}
}
