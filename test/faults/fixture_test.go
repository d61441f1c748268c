// Package faults breaks what Berth stands on (network plugins, disks, limits,
// records, its state folder) while the real daemon works, and checks that it
// says so, leaves nothing half-made, and works again when the fault is over.
package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/leak"
	"github.com/berth-runtime/berth/test/pace"
	"github.com/berth-runtime/berth/test/testimage"
)

var (
	registry *testimage.Registry
	program  v1.Image
	prog     string // reference of the test program's image
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Println("faults: needs root")
		os.Exit(1)
	}
	if err := harness.OwnNetwork(); err != nil {
		fmt.Println("faults:", err)
		os.Exit(1)
	}
	os.Exit(suite(m))
}

// suite runs the tests, each on a daemon of its own, and fails when they leave
// anything behind.
func suite(m *testing.M) int {
	fail := func(what string, err error) int {
		fmt.Printf("faults: %s: %v\n", what, err)
		return 1
	}
	before, err := leak.Take()
	if err != nil {
		return fail("leak check", err)
	}
	if registry, err = testimage.Serve("127.0.0.1:0", nil); err != nil {
		return fail("registry", err)
	}
	bg := context.Background()
	if program, err = testimage.Program(bg, "", testimage.Gzip); err == nil {
		prog, err = registry.Push(bg, "prog:1", program)
	}
	if err != nil {
		return fail("test image", err)
	}
	code := m.Run()
	_ = registry.Close()
	left, err := before.Since(pace.Wait(20 * time.Second))
	if err != nil || len(left) > 0 {
		code = fail("left behind: "+strings.Join(left, ", "), err)
	}
	return code
}

// node is a daemon of one test, with the test program's image.
type node struct {
	*harness.Daemon
	t      *testing.T
	mounts []string // taken away after the daemon
}

// fresh is a daemon that is not started yet, on an empty folder.
func fresh(t *testing.T) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "berth-faults-")
	if err != nil {
		t.Fatal(err)
	}
	d, err := harness.New(dir, "--log-level", "info")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Daemon: d, t: t}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of the daemon's log:\n%s", n.LogTail(6000))
		}
		if err := n.Close(context.Background()); err != nil {
			t.Errorf("close: %v", err)
		}
		for _, m := range n.mounts {
			if err := unix.Unmount(m, 0); err != nil {
				t.Errorf("unmount %s: %v", m, errors.Join(err, unix.Unmount(m, unix.MNT_DETACH)))
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return n
}

// started is fresh, running and with the image.
func started(t *testing.T) *node { return configured(t, "") }

// configured is started with a configuration.
func configured(t *testing.T, toml string) *node {
	t.Helper()
	n := fresh(t)
	if err := n.Config(toml); err != nil {
		t.Fatal(err)
	}
	n.up()
	n.pull(prog)
	return n
}

func (n *node) up() {
	n.t.Helper()
	if err := n.Start(context.Background()); err != nil {
		n.t.Fatal(err)
	}
}

// restart kills the daemon with -9 and starts it again.
func (n *node) restart() {
	n.t.Helper()
	if err := n.Kill(syscall.SIGKILL); err != nil {
		n.t.Fatal(err)
	}
	n.up()
}

func (n *node) pull(ref string) {
	n.t.Helper()
	if _, err := n.Images.PullImage(n.ctx(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		n.t.Fatal(err)
	}
}

// ctx is for one call that nothing should hold up.
func (n *node) ctx() context.Context {
	c, cancel := context.WithTimeout(context.Background(), pace.Wait(60*time.Second))
	n.t.Cleanup(cancel)
	return c
}

// pod is a pod sandbox of a test.
type pod struct {
	id     string
	config *cri.PodSandboxConfig
}

func (n *node) tryPod(c *cri.PodSandboxConfig) (string, error) {
	r, err := n.Runtime.RunPodSandbox(n.ctx(), &cri.RunPodSandboxRequest{Config: c})
	return r.GetPodSandboxId(), err
}

func (n *node) pod() *pod {
	n.t.Helper()
	p := &pod{config: n.PodConfig()}
	var err error
	if p.id, err = n.tryPod(p.config); err != nil {
		n.t.Fatalf("run pod: %v", err)
	}
	return p
}

func (n *node) tryCreate(p *pod, c *cri.ContainerConfig) (string, error) {
	r, err := n.Runtime.CreateContainer(n.ctx(), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: c, SandboxConfig: p.config})
	return r.GetContainerId(), err
}

func (n *node) create(p *pod, args ...string) string {
	n.t.Helper()
	c, err := n.tryCreate(p, harness.ContainerConfig(prog, args...))
	if err != nil {
		n.t.Fatalf("create container: %v", err)
	}
	return c
}

func (n *node) tryStart(c string) error {
	_, err := n.Runtime.StartContainer(n.ctx(), &cri.StartContainerRequest{ContainerId: c})
	return err
}

// run creates and starts a container of the test program.
func (n *node) run(p *pod, args ...string) string {
	n.t.Helper()
	c := n.create(p, args...)
	if err := n.tryStart(c); err != nil {
		n.t.Fatalf("start container: %v", err)
	}
	return c
}

func (n *node) tryStop(c string, grace int64) error {
	_, err := n.Runtime.StopContainer(n.ctx(), &cri.StopContainerRequest{ContainerId: c, Timeout: grace})
	return err
}

func (n *node) tryRemove(c string) error {
	_, err := n.Runtime.RemoveContainer(n.ctx(), &cri.RemoveContainerRequest{ContainerId: c})
	return err
}

func (n *node) tryStopPod(p string) error {
	_, err := n.Runtime.StopPodSandbox(n.ctx(), &cri.StopPodSandboxRequest{PodSandboxId: p})
	return err
}

func (n *node) tryRemovePod(p string) error {
	_, err := n.Runtime.RemovePodSandbox(n.ctx(), &cri.RemovePodSandboxRequest{PodSandboxId: p})
	return err
}

func (n *node) removePod(p string) {
	n.t.Helper()
	if err := n.tryStopPod(p); err != nil {
		n.t.Errorf("stop pod: %v", err)
	}
	if err := n.tryRemovePod(p); err != nil {
		n.t.Errorf("remove pod: %v", err)
	}
}

func (n *node) exec(c string, cmd ...string) (string, error) {
	r, err := n.Runtime.ExecSync(n.ctx(), &cri.ExecSyncRequest{ContainerId: c, Cmd: cmd})
	return string(r.GetStdout()), err
}

// alive checks that the container runs and can be entered.
func (n *node) alive(c string) {
	n.t.Helper()
	if s := n.container(c); s.State != cri.ContainerState_CONTAINER_RUNNING {
		n.t.Errorf("container %.12s is %v %s %s, want running", c, s.State, s.Reason, s.Message)
	}
	if out, err := n.exec(c, "/bin/echo", "here"); err != nil || out != "here\n" {
		n.t.Errorf("exec: %q, %v", out, err)
	}
}

func (n *node) container(c string) *cri.ContainerStatus {
	n.t.Helper()
	r, err := n.Runtime.ContainerStatus(n.ctx(), &cri.ContainerStatusRequest{ContainerId: c})
	if err != nil {
		n.t.Fatal(err)
	}
	return r.Status
}

// pods lists the pod sandboxes: state by id.
func (n *node) pods() map[string]cri.PodSandboxState {
	n.t.Helper()
	r, err := n.Runtime.ListPodSandbox(n.ctx(), &cri.ListPodSandboxRequest{})
	if err != nil {
		n.t.Fatal(err)
	}
	out := map[string]cri.PodSandboxState{}
	for _, p := range r.Items {
		out[p.Id] = p.State
	}
	return out
}

func (n *node) containers() map[string]cri.ContainerState {
	n.t.Helper()
	r, err := n.Runtime.ListContainers(n.ctx(), &cri.ListContainersRequest{})
	if err != nil {
		n.t.Fatal(err)
	}
	out := map[string]cri.ContainerState{}
	for _, c := range r.Containers {
		out[c.Id] = c.State
	}
	return out
}

// condition is nil when the node's condition is true, else what it says.
func (n *node) condition(kind string) error {
	n.t.Helper()
	r, err := n.Runtime.Status(n.ctx(), &cri.StatusRequest{})
	if err != nil {
		n.t.Fatal(err)
	}
	for _, c := range r.Status.Conditions {
		if c.Type == kind && c.Status {
			return nil
		} else if c.Type == kind {
			return fmt.Errorf("%s: %s", c.Reason, c.Message)
		}
	}
	return fmt.Errorf("no condition %s", kind)
}

func (n *node) ready() {
	n.t.Helper()
	for _, kind := range []string{"RuntimeReady", "NetworkReady"} {
		if err := n.condition(kind); err != nil {
			n.t.Errorf("%s: %v", kind, err)
		}
	}
}

func (n *node) logOf(c string) string {
	n.t.Helper()
	b, err := os.ReadFile(n.container(c).LogPath)
	if err != nil {
		n.t.Fatal(err)
	}
	return string(b)
}

// eventually waits until ok, for at most 20 s.
func (n *node) eventually(what string, ok func() bool) {
	n.t.Helper()
	for deadline := time.Now().Add(pace.Wait(20 * time.Second)); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: not within 20 s", what)
		}
	}
}

// says checks that the daemon's log has text.
func (n *node) says(text string) {
	n.t.Helper()
	n.eventually(fmt.Sprintf("log says %q", text), func() bool { return strings.Contains(n.LogTail(1<<20), text) })
}

// wantErr checks that err says all of texts, and not at boundless length.
func wantErr(t *testing.T, what string, err error, texts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: succeeded", what)
		return
	}
	for _, s := range texts {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%s: %.2000v: want it to say %q", what, err, s)
		}
	}
	if len(err.Error()) > 4000 {
		t.Errorf("%s: error of %d bytes", what, len(err.Error()))
	}
}

// files are the paths below dir, relative to it.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) { // just being removed
			return nil
		}
		if err == nil && !d.IsDir() {
			rel, rerr := filepath.Rel(dir, p)
			out, err = append(out, rel), rerr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (n *node) ip(p *pod) string {
	n.t.Helper()
	r, err := n.Runtime.PodSandboxStatus(n.ctx(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		n.t.Fatal(err)
	}
	return r.Status.Network.GetIp()
}

// answers is nil when somebody serves at address.
func answers(address string) error {
	c, err := net.DialTimeout("tcp", address, pace.Wait(5*time.Second))
	if err != nil {
		return err
	}
	return c.Close()
}
