package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// client makes the calls of a kubelet and remembers which pods and images it has
// to take away again.
type client struct {
	o         *options
	conn      *grpc.ClientConn
	runtime   cri.RuntimeServiceClient
	images    cri.ImageServiceClient
	version   *cri.VersionResponse
	run       string // label value on all pods of this run
	ownImages []string
	cgroups   *cgroups

	mu   sync.Mutex
	pods map[string]bool
}

func dial(ctx context.Context, o *options) (*client, error) {
	cg, err := newCgroups(o.cgroupParent)
	if err != nil {
		return nil, err
	}
	target := "unix://" + strings.TrimPrefix(o.endpoint, "unix://")
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return nil, err
	}
	c := &client{
		o: o, conn: conn, cgroups: cg, runtime: cri.NewRuntimeServiceClient(conn), images: cri.NewImageServiceClient(conn),
		run: fmt.Sprintf("bench-%d-%x", os.Getpid(), time.Now().UnixNano()), pods: map[string]bool{},
	}
	if err := c.ready(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("endpoint %s: %w", o.endpoint, err), conn.Close())
	}
	return c, nil
}

// ready waits, at most half a minute, until the runtime answers and says that it
// and its network are ready.
func (c *client) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var err error
	if c.version, err = c.runtime.Version(ctx, &cri.VersionRequest{Version: "v1"}, grpc.WaitForReady(true)); err != nil {
		return err
	}
	for {
		r, err := c.runtime.Status(ctx, &cri.StatusRequest{})
		if err != nil {
			return err
		}
		var missing []string
		for _, cond := range r.Status.GetConditions() {
			if (cond.Type == "RuntimeReady" || cond.Type == "NetworkReady") && !cond.Status {
				missing = append(missing, fmt.Sprintf("%s is false: %s: %s", cond.Type, cond.Reason, cond.Message))
			}
		}
		if len(missing) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.New(strings.Join(missing, "; "))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (c *client) close() error { return c.conn.Close() }

// call runs f under the deadline of one call and tells how long it took.
func (c *client) call(ctx context.Context, f func(context.Context) error) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, c.o.timeout)
	defer cancel()
	start := time.Now()
	err := f(ctx)
	return time.Since(start), err
}

func (c *client) podConfig(name string) (*cri.PodSandboxConfig, error) {
	dir := filepath.Join(c.o.scratch, c.run, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: c.run + "-" + name},
		Hostname:     name,
		LogDirectory: dir,
		DnsConfig:    &cri.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"bench.svc.cluster.local", "svc.cluster.local"}, Options: []string{"ndots:5"}},
		Labels:       map[string]string{"bench": c.run},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    c.cgroups.path(name),
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: namespaces()},
		},
	}, nil
}

func namespaces() *cri.NamespaceOption {
	return &cri.NamespaceOption{Network: cri.NamespaceMode_POD, Ipc: cri.NamespaceMode_POD, Pid: cri.NamespaceMode_CONTAINER}
}

// containerConfig has what a kubelet gives a small container: limits, a few
// variables, /etc/hosts and the termination log as mounts.
func (c *client) containerConfig(pod *cri.PodSandboxConfig, command ...string) (*cri.ContainerConfig, error) {
	hosts, message := filepath.Join(pod.LogDirectory, "hosts"), filepath.Join(pod.LogDirectory, "message")
	if err := os.WriteFile(hosts, []byte("127.0.0.1 localhost\n"), 0o644); err != nil {
		return nil, err
	}
	if err := os.WriteFile(message, nil, 0o666); err != nil {
		return nil, err
	}
	profile := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	if c.o.seccomp == "unconfined" {
		profile.ProfileType = cri.SecurityProfile_Unconfined
	}
	return &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "main"},
		Image:    &cri.ImageSpec{Image: c.o.image},
		Command:  command,
		Envs:     []*cri.KeyValue{{Key: "KUBERNETES_SERVICE_HOST", Value: []byte("10.96.0.1")}, {Key: "KUBERNETES_SERVICE_PORT", Value: []byte("443")}},
		Labels:   map[string]string{"bench": c.run},
		Mounts: []*cri.Mount{
			{HostPath: hosts, ContainerPath: "/etc/hosts"},
			{HostPath: message, ContainerPath: "/dev/termination-log"},
		},
		LogPath: "main.log",
		Linux: &cri.LinuxContainerConfig{
			Resources:       &cri.LinuxContainerResources{CpuShares: 102, MemoryLimitInBytes: 64 << 20},
			SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: namespaces(), Seccomp: profile},
		},
	}, nil
}

// pod is a running pod of one container.
type pod struct {
	config        *cri.PodSandboxConfig
	id, container string
}

// up takes a pod from nothing to a started container, telling took each call's
// name and time.
func (c *client) up(ctx context.Context, name string, took func(string, time.Duration), command ...string) (*pod, error) {
	cfg, err := c.podConfig(name)
	if err != nil {
		return nil, err
	}
	if len(command) == 0 {
		command = strings.Fields(c.o.command)
	}
	ctr, err := c.containerConfig(cfg, command...)
	if err != nil {
		return nil, err
	}
	if err := c.cgroups.make(name); err != nil {
		return nil, err
	}
	p := &pod{config: cfg}
	steps := []step{
		{"RunPodSandbox", func(ctx context.Context) error {
			r, err := c.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: cfg})
			if err == nil {
				p.id = r.PodSandboxId
				c.keep(p.id)
			}
			return err
		}},
		{"CreateContainer", func(ctx context.Context) error {
			r, err := c.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.id, Config: ctr, SandboxConfig: cfg})
			if err == nil {
				p.container = r.ContainerId
			}
			return err
		}},
		{"StartContainer", func(ctx context.Context) error {
			_, err := c.runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: p.container})
			return err
		}},
	}
	return p, c.walk(ctx, "pod up", steps, took)
}

// down takes a pod away again.
func (c *client) down(ctx context.Context, p *pod, took func(string, time.Duration)) error {
	err := c.walk(ctx, "pod down", []step{
		{"StopContainer", func(ctx context.Context) error {
			_, err := c.runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: p.container})
			return err
		}},
		{"RemoveContainer", func(ctx context.Context) error {
			_, err := c.runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: p.container})
			return err
		}},
		{"StopPodSandbox", func(ctx context.Context) error {
			_, err := c.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id})
			return err
		}},
		{"RemovePodSandbox", func(ctx context.Context) error {
			_, err := c.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
			return err
		}},
	}, took)
	if err == nil {
		c.forget(p.id)
		c.cgroups.remove(p.config.Metadata.Name)
	}
	return err
}

type step struct {
	name string
	do   func(context.Context) error
}

func (c *client) walk(ctx context.Context, sum string, steps []step, took func(string, time.Duration)) error {
	var total time.Duration
	for _, s := range steps {
		d, err := c.call(ctx, s.do)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		total += d
		if took != nil {
			took(s.name, d)
		}
	}
	if took != nil {
		took(sum, total)
	}
	return nil
}

func (c *client) execOnce(ctx context.Context, p *pod) (time.Duration, error) {
	return c.call(ctx, func(ctx context.Context) error {
		r, err := c.runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: strings.Fields(c.o.exec), Timeout: 10})
		if err == nil && r.ExitCode != 0 {
			err = fmt.Errorf("%s in the container: exit status %d: %s", c.o.exec, r.ExitCode, r.Stderr)
		}
		return err
	})
}

func (c *client) pullImage(ctx context.Context, ref string) (time.Duration, error) {
	return c.call(ctx, func(ctx context.Context) error {
		_, err := c.images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
		return err
	})
}

func (c *client) removeImage(ctx context.Context, ref string) error {
	_, err := c.call(ctx, func(ctx context.Context) error {
		_, err := c.images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
		return err
	})
	return err
}

func (c *client) keep(pod string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pods[pod] = true
}

func (c *client) forget(pod string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pods, pod)
}

// cleanUp removes what this run made and has not yet removed. It works on a
// context of its own: it also runs after an interrupt. Pods whose RunPodSandbox
// failed half way are found by their label.
func (c *client) cleanUp() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	c.mu.Lock()
	pods := make(map[string]bool, len(c.pods))
	for id := range c.pods {
		pods[id] = true
	}
	c.mu.Unlock()
	var errs []error
	if r, err := c.runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{"bench": c.run}}}); err != nil {
		errs = append(errs, fmt.Errorf("clean up: %w", err))
	} else {
		for _, p := range r.Items {
			pods[p.Id] = true
		}
	}
	for id := range pods {
		if _, err := c.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
			errs = append(errs, fmt.Errorf("clean up: stop pod %s: %w", id, err))
			continue
		}
		if _, err := c.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
			errs = append(errs, fmt.Errorf("clean up: remove pod %s: %w", id, err))
		}
	}
	for _, ref := range c.ownImages {
		if err := c.removeImage(ctx, ref); err != nil {
			errs = append(errs, fmt.Errorf("clean up: remove image %s: %w", ref, err))
		}
	}
	errs = append(errs, c.cgroups.removeAll())
	return errors.Join(append(errs, os.RemoveAll(filepath.Join(c.o.scratch, c.run)))...)
}
