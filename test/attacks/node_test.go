package attacks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/leak"
	"github.com/berth-runtime/berth/test/pace"
	"github.com/berth-runtime/berth/test/testimage"
)

var runtimeDefault = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}

// node is a real daemon with a registry of hostile images, started by the first
// test that needs it.
type node struct {
	*harness.Daemon
	dir      string
	before   leak.Snapshot
	registry *testimage.Registry
	image    v1.Image // the test program's
	plain    string   // its reference
}

var theNode *node

func needNode(t *testing.T) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if theNode == nil {
		n, err := startNode()
		if err != nil {
			t.Fatal(err)
		}
		theNode = n
	}
	return theNode
}

func startNode() (n *node, err error) {
	n = &node{}
	if n.dir, err = os.MkdirTemp("", "berth-attacks-node-"); err != nil {
		return nil, err
	}
	if err := os.Chmod(n.dir, 0o755); err != nil {
		return nil, err
	}
	if n.before, err = leak.Take(); err != nil {
		return nil, err
	}
	if n.registry, err = testimage.Serve("127.0.0.1:0", nil); err != nil {
		return nil, err
	}
	bg := context.Background()
	if n.image, err = testimage.Program(bg, "", testimage.Gzip); err != nil {
		return nil, err
	}
	if n.Daemon, err = harness.New(n.dir); err != nil {
		return nil, err
	}
	if err := n.Start(bg); err != nil {
		return nil, err
	}
	n.plain, err = n.push("plain", nil)
	return n, err
}

// closeNode ends the daemon, if there is one; nothing may be left of it.
func closeNode(ctx context.Context) error {
	n := theNode
	if n == nil {
		return nil
	}
	err := errors.Join(n.Close(ctx), n.registry.Close())
	left, lerr := n.before.Since(pace.Wait(20 * time.Second))
	if len(left) > 0 {
		lerr = errors.Join(lerr, fmt.Errorf("left behind: %s", strings.Join(left, ", ")))
	}
	return errors.Join(err, lerr, os.RemoveAll(n.dir))
}

func context60(t *testing.T) context.Context {
	c, cancel := context.WithTimeout(context.Background(), pace.Wait(60*time.Second))
	t.Cleanup(cancel)
	return c
}

// push pushes and pulls the test image with entries over it.
func (n *node) push(name string, change func(*v1.Config), entries ...testimage.Entry) (string, error) {
	cf, err := n.image.ConfigFile()
	if err != nil {
		return "", err
	}
	config := *cf.Config.DeepCopy()
	config.Labels = map[string]string{"name": name}
	config.Entrypoint, config.Cmd = nil, nil
	if change != nil {
		change(&config)
	}
	layers, err := n.image.Layers()
	if err != nil {
		return "", err
	}
	if len(entries) > 0 {
		l, err := testimage.Layer(testimage.Gzip, entries...)
		if err != nil {
			return "", err
		}
		layers = append(layers, l)
	}
	img, err := testimage.Image("", config, layers...)
	if err != nil {
		return "", err
	}
	bg := context.Background()
	ref, err := n.registry.Push(bg, name+":1", img)
	if err != nil {
		return "", err
	}
	_, err = n.Images.PullImage(bg, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	return ref, err
}

func (n *node) mustPush(t *testing.T, name string, change func(*v1.Config), entries ...testimage.Entry) string {
	t.Helper()
	ref, err := n.push(name, change, entries...)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

type pod struct {
	id     string
	config *cri.PodSandboxConfig
}

func (n *node) runPod(t *testing.T) *pod {
	t.Helper()
	k := serial.Add(1)
	p := &pod{config: &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: fmt.Sprintf("pod%d", k), Uid: fmt.Sprintf("attack-%d-%d", os.Getpid(), k), Namespace: "test"},
		LogDirectory: filepath.Join(n.dir, "log", fmt.Sprintf("pod%d", k)),
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}}
	r, err := n.Runtime.RunPodSandbox(context60(t), &cri.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		t.Fatal(err)
	}
	p.id = r.PodSandboxId
	t.Cleanup(func() {
		_, err1 := n.Runtime.StopPodSandbox(context60(t), &cri.StopPodSandboxRequest{PodSandboxId: p.id})
		_, err2 := n.Runtime.RemovePodSandbox(context60(t), &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
		if err := errors.Join(err1, err2); err != nil {
			t.Error(err)
		}
	})
	return p
}

// config is a container of the plain image whose program is the attacker.
func (n *node) config(args ...string) *cri.ContainerConfig {
	k := serial.Add(1)
	return &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: fmt.Sprintf("c%d", k)},
		Image:    &cri.ImageSpec{Image: n.plain, UserSpecifiedImage: n.plain},
		Command:  append([]string{"/bin/" + attackerName}, args...),
		LogPath:  fmt.Sprintf("c%d.log", k),
		Envs:     []*cri.KeyValue{{Key: "GODEBUG", Value: []byte("containermaxprocs=0,updatemaxprocs=0")}},
		Mounts:   []*cri.Mount{{HostPath: self, ContainerPath: "/bin/" + attackerName, Readonly: true}},
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
			MaskedPaths:      []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"},
			ReadonlyPaths:    []string{"/proc/sys", "/proc/sysrq-trigger", "/proc/bus", "/proc/irq"},
		}},
	}
}

func (n *node) create(t *testing.T, p *pod, c *cri.ContainerConfig) (string, error) {
	r, err := n.Runtime.CreateContainer(context60(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: c, SandboxConfig: p.config})
	if err != nil {
		return "", err
	}
	return r.ContainerId, nil
}

// tryStart creates and starts a container; the pod's end removes it.
func (n *node) tryStart(t *testing.T, p *pod, c *cri.ContainerConfig) error {
	id, err := n.create(t, p, c)
	if err == nil {
		_, err = n.Runtime.StartContainer(context60(t), &cri.StartContainerRequest{ContainerId: id})
	}
	return err
}

func (n *node) start(t *testing.T, p *pod, c *cri.ContainerConfig) string {
	t.Helper()
	id, err := n.create(t, p, c)
	if err == nil {
		_, err = n.Runtime.StartContainer(context60(t), &cri.StartContainerRequest{ContainerId: id})
	}
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// exec asks the attacker in a container.
func (n *node) exec(t *testing.T, id string, args ...string) result {
	t.Helper()
	r, err := n.Runtime.ExecSync(context60(t), &cri.ExecSyncRequest{ContainerId: id, Cmd: append([]string{"/bin/" + attackerName}, args...)})
	if err != nil {
		t.Fatal(err)
	}
	return result{t: t, args: args, out: string(r.Stdout), err: string(r.Stderr), code: int(r.ExitCode)}
}
