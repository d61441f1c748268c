package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/sandbox"
)

// fake is an engine that keeps records and runs nothing: an exec echoes.
type fake struct {
	mu         sync.Mutex
	pods       map[string]*sandbox.PodStatus
	containers map[string]*sandbox.ContainerStatus
	updates    []*sandbox.Resources
	auth       *imageservice.Auth
	pullErr    error
	panicOn    string
	started    sync.WaitGroup // of Exec "size"
	networkErr error
}

func newFake() *fake {
	f := &fake{pods: map[string]*sandbox.PodStatus{}, containers: map[string]*sandbox.ContainerStatus{}}
	f.started.Add(1)
	return f
}

func (f *fake) RunPod(_ context.Context, c *sandbox.PodConfig) (id.Pod, error) {
	if c.Meta.Name == f.panicOn && f.panicOn != "" {
		panic("out of range")
	}
	if c.Handler != "" {
		return "", fmt.Errorf("runtime_handler %q is not configured: %w", c.Handler, errdefs.ErrInvalidArgument)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := id.NewPod()
	f.pods[string(p)] = &sandbox.PodStatus{ID: p, Config: c, CreatedAt: time.Now(), IPs: []string{"10.0.0.2", "fd00::2"}}
	return p, nil
}

func (f *fake) StopPod(_ context.Context, p string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.pods[p]; s != nil {
		c := *s
		c.State = sandbox.PodNotReady
		f.pods[p] = &c
	}
	return nil
}

func (f *fake) RemovePod(_ context.Context, p string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.pods, p)
	return nil
}

func (f *fake) Pod(p string) (*sandbox.PodStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.pods[p]; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("pod sandbox %s: %w", p, errdefs.ErrNotFound)
}

func (f *fake) ListPods(sandbox.PodFilter) []*sandbox.PodStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*sandbox.PodStatus
	for _, p := range f.pods {
		out = append(out, p)
	}
	return out
}

func (f *fake) CreateContainer(_ context.Context, pod string, c *sandbox.ContainerConfig) (id.Container, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := id.NewContainer()
	f.containers[string(n)] = &sandbox.ContainerStatus{ID: n, Pod: id.Pod(pod), Config: c, CreatedAt: time.Now(),
		ImageID: c.Image.Image, ImageRef: c.Image.Image, Resources: c.Resources, StopSignal: "SIGTERM"}
	return n, nil
}

func (f *fake) StartContainer(_ context.Context, c string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.containers[c]
	if s == nil {
		return fmt.Errorf("container %s: %w", c, errdefs.ErrNotFound)
	}
	n := *s
	n.State, n.StartedAt, n.Pid = sandbox.ContainerRunning, time.Now(), 42
	f.containers[c] = &n
	return nil
}

func (f *fake) StopContainer(context.Context, string, time.Duration) error { return nil }
func (f *fake) RemoveContainer(context.Context, string) error              { return nil }
func (f *fake) ReopenLog(_ context.Context, c string) error {
	_, err := f.Container(c)
	return err
}

func (f *fake) Container(c string) (*sandbox.ContainerStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.containers[c]; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("container %s: %w", c, errdefs.ErrNotFound)
}

func (f *fake) ListContainers(sandbox.ContainerFilter) []*sandbox.ContainerStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*sandbox.ContainerStatus
	for _, c := range f.containers {
		out = append(out, c)
	}
	return out
}

func (f *fake) UpdateContainer(_ context.Context, c string, r *sandbox.Resources) error {
	if _, err := f.Container(c); err != nil {
		return err
	}
	f.updates = append(f.updates, r)
	return nil
}

func (f *fake) ContainerStats(_ context.Context, c string) (*sandbox.ContainerStats, error) {
	s, err := f.Container(c)
	if err != nil {
		return nil, err
	}
	return &sandbox.ContainerStats{Container: s, Stats: sandbox.Stats{At: time.Now(), MemoryUsage: 1}, WritableAt: time.Now()}, nil
}

func (f *fake) ListContainerStats(ctx context.Context, _ sandbox.ContainerFilter) ([]*sandbox.ContainerStats, error) {
	var out []*sandbox.ContainerStats
	for _, c := range f.ListContainers(sandbox.ContainerFilter{}) {
		s, err := f.ContainerStats(ctx, string(c.ID))
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

func (f *fake) WritableUsage() imageservice.FsUsage { return f.FsUsage() }

func (f *fake) ExecSync(_ context.Context, _ string, cmd []string, timeout time.Duration) (*sandbox.ExecResult, error) {
	switch cmd[0] {
	case "sleep":
		return nil, fmt.Errorf("exec: %w", context.DeadlineExceeded)
	case "big":
		return &sandbox.ExecResult{Stdout: make([]byte, 16<<20), Stderr: make([]byte, 16<<20)}, nil
	case "false":
		return &sandbox.ExecResult{ExitCode: 1}, nil
	}
	return &sandbox.ExecResult{Stdout: []byte(strings.Join(cmd, " "))}, nil
}

// Exec echoes stdin to stdout until it ends; "exit7" exits so, "size" waits for
// a terminal size.
func (f *fake) Exec(ctx context.Context, _ string, cmd []string, s sandbox.StreamIO) (int32, error) {
	switch cmd[0] {
	case "exit7":
		fmt.Fprint(s.Stderr, "no")
		return 7, nil
	case "size":
		f.started.Done()
		select {
		case size := <-s.Resize:
			fmt.Fprintf(s.Stdout, "%dx%d", size.Width, size.Height)
		case <-ctx.Done():
		}
		return 0, nil
	case "broken":
		return 0, errors.New("supervisor is gone")
	case "streams":
		fmt.Fprintf(s.Stdout, "%t %t %t", s.Stdin != nil, s.Stdout != nil, s.Stderr != nil)
		return 0, nil
	}
	if _, err := io.Copy(s.Stdout, s.Stdin); err != nil {
		return 0, err
	}
	return 0, nil
}

func (f *fake) Attach(ctx context.Context, c string, s sandbox.StreamIO) error {
	_, err := f.Exec(ctx, c, []string{"cat"}, s)
	return err
}

// PortForward answers with all that it was sent, in capitals, once the client's
// half is closed: data after the half-close must still arrive.
func (f *fake) PortForward(_ context.Context, _ string, port int32, s io.ReadWriteCloser) error {
	if port == 1 {
		return errors.New("connection refused")
	}
	b, err := io.ReadAll(s)
	if err != nil {
		return err
	}
	_, err = s.Write([]byte(strings.ToUpper(string(b))))
	return err
}

func (f *fake) Pull(_ context.Context, r imageservice.PullRequest) (*imageservice.Image, error) {
	f.auth = r.Auth
	if f.pullErr != nil {
		return nil, f.pullErr
	}
	return f.Status(r.Ref)
}

func (f *fake) Status(ref string) (*imageservice.Image, error) {
	if ref == "missing" {
		return nil, nil
	}
	img := &imageservice.Image{ID: digest.FromString(ref), Tags: []string{ref}, Size: 10}
	img.Config = ocispec.Image{Config: ocispec.ImageConfig{User: "1000:50"}}
	return img, nil
}

func (f *fake) List(filter string) []*imageservice.Image {
	if filter == "missing" {
		return nil
	}
	i, _ := f.Status("busybox")
	return []*imageservice.Image{i}
}

func (f *fake) Remove(context.Context, string) error { return nil }

func (f *fake) FsUsage() imageservice.FsUsage {
	return imageservice.FsUsage{Mountpoint: "/", Bytes: 1, Inodes: 1, At: time.Now()}
}

func (f *fake) RuntimeReady() error { return nil }
func (f *fake) NetworkReady() error { return f.networkErr }
func (f *fake) SetPodCIDR(cidr string) error {
	if !strings.Contains(cidr, "/") {
		return fmt.Errorf("%q is not a CIDR: %w", cidr, errdefs.ErrInvalidArgument)
	}
	return nil
}
func (f *fake) CgroupDriverSystemd() bool { return false }
func (f *fake) Handlers() []Handler {
	return []Handler{{Name: "", RecursiveReadOnlyMounts: true}, {Name: "berth", RecursiveReadOnlyMounts: true}}
}
func (f *fake) Info() map[string]any { return map[string]any{"stateDir": "/run/berth"} }
