package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const missingID = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

func TestMissingIDs(t *testing.T) {
	rt := node.Runtime
	for name, call := range map[string]func() error{
		"PodSandboxStatus": func() error {
			_, err := rt.PodSandboxStatus(ctx(t), &cri.PodSandboxStatusRequest{PodSandboxId: missingID})
			return err
		},
		"ContainerStatus": func() error {
			_, err := rt.ContainerStatus(ctx(t), &cri.ContainerStatusRequest{ContainerId: missingID})
			return err
		},
		"StartContainer": func() error {
			_, err := rt.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: missingID})
			return err
		},
		"ExecSync": func() error {
			_, err := rt.ExecSync(ctx(t), &cri.ExecSyncRequest{ContainerId: missingID, Cmd: []string{"true"}})
			return err
		},
		"Exec": func() error {
			_, err := rt.Exec(ctx(t), &cri.ExecRequest{ContainerId: missingID, Cmd: []string{"true"}, Stdout: true})
			return err
		},
		"Attach": func() error {
			_, err := rt.Attach(ctx(t), &cri.AttachRequest{ContainerId: missingID, Stdout: true})
			return err
		},
		"PortForward": func() error {
			_, err := rt.PortForward(ctx(t), &cri.PortForwardRequest{PodSandboxId: missingID, Port: []int32{80}})
			return err
		},
		"CreateContainer": func() error {
			_, err := rt.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: missingID, Config: containerConfig(nil), SandboxConfig: preparePod(t, nil).config})
			return err
		},
		"UpdateContainerResources": func() error {
			_, err := rt.UpdateContainerResources(ctx(t), &cri.UpdateContainerResourcesRequest{ContainerId: missingID, Linux: &cri.LinuxContainerResources{CpuShares: 10}})
			return err
		},
		"ReopenContainerLog": func() error {
			_, err := rt.ReopenContainerLog(ctx(t), &cri.ReopenContainerLogRequest{ContainerId: missingID})
			return err
		},
		"ContainerStats": func() error {
			_, err := rt.ContainerStats(ctx(t), &cri.ContainerStatsRequest{ContainerId: missingID})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) { wantCode(t, call(), codes.NotFound, missingID) })
	}
	for name, call := range map[string]func() error{
		"StopPodSandbox": func() error {
			_, err := rt.StopPodSandbox(ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: missingID})
			return err
		},
		"RemovePodSandbox": func() error {
			_, err := rt.RemovePodSandbox(ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: missingID})
			return err
		},
		"StopContainer": func() error {
			_, err := rt.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: missingID})
			return err
		},
		"RemoveContainer": func() error {
			_, err := rt.RemoveContainer(ctx(t), &cri.RemoveContainerRequest{ContainerId: missingID})
			return err
		},
		"RemoveImage": func() error {
			_, err := node.Images.RemoveImage(ctx(t), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: "example.com/no/such:image"}})
			return err
		},
		"ImageStatus": func() error {
			r, err := node.Images.ImageStatus(ctx(t), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: "example.com/no/such:image"}})
			if err == nil && r.Image != nil {
				t.Errorf("image = %v", r.Image)
			}
			return err
		},
	} {
		t.Run(name+" of a missing thing succeeds", func(t *testing.T) { wantCode(t, call(), codes.OK, "") })
	}
}

// TestBadContainerConfigs: each is refused at create or start with a message
// that names the field, and leaves no container behind.
func TestBadContainerConfigs(t *testing.T) {
	p := runPod(t, nil)
	for name, row := range map[string]struct {
		change func(*cri.ContainerConfig)
		code   codes.Code
		names  string
	}{
		"missing image":        {func(c *cri.ContainerConfig) { c.Image.Image = "example.com/no/such:image" }, codes.NotFound, "example.com/no/such:image"},
		"no image":             {func(c *cri.ContainerConfig) { c.Image = nil }, codes.InvalidArgument, "image"},
		"no metadata":          {func(c *cri.ContainerConfig) { c.Metadata = nil }, codes.InvalidArgument, "metadata"},
		"missing mount source": {func(c *cri.ContainerConfig) { c.Mounts = []*cri.Mount{{HostPath: "/no/such/dir", ContainerPath: "/x"}} }, codes.InvalidArgument, "/no/such/dir"},
		"rro without ro": {func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{HostPath: "/tmp", ContainerPath: "/x", RecursiveReadOnly: true}}
		}, codes.InvalidArgument, "recursive_read_only"},
		"unknown capability": {secure(func(s *cri.LinuxContainerSecurityContext) {
			s.Capabilities = &cri.Capability{AddCapabilities: []string{"CAP_FLY"}}
		}), codes.InvalidArgument, "CAP_FLY"},
		"negative uid":       {secure(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = &cri.Int64Value{Value: -1} }), codes.InvalidArgument, "run_as_user"},
		"uid beyond 32 bits": {secure(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = &cri.Int64Value{Value: 1 << 32} }), codes.InvalidArgument, "run_as_user"},
		"network ns other than the pod's": {secure(func(s *cri.LinuxContainerSecurityContext) {
			s.NamespaceOptions.Network = cri.NamespaceMode_NODE
		}), codes.InvalidArgument, "network"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := containerConfig([]string{"true"})
			row.change(cfg)
			r, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
			if err == nil {
				t.Fatalf("made container %s", r.ContainerId)
			}
			wantCode(t, err, row.code, row.names)
		})
	}
	l, err := node.Runtime.ListContainers(ctx(t), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.id}})
	if err != nil || len(l.Containers) != 0 {
		t.Fatalf("left behind: %v, %v", l, err)
	}
}

func TestLogDirectoryThatIsAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p := preparePod(t, func(c *cri.PodSandboxConfig) { c.LogDirectory = file })
	r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config})
	if err == nil {
		p.id = r.PodSandboxId
		c := create(t, p, nil)
		_, err = node.Runtime.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: c})
	}
	if err == nil || !strings.Contains(err.Error(), file) {
		t.Fatalf("err = %v", err)
	}
}

func TestATwentyMegabyteRequestIsRefusedAndTheDaemonLives(t *testing.T) {
	p := preparePod(t, func(c *cri.PodSandboxConfig) {
		c.Annotations = map[string]string{"big": strings.Repeat("x", 20<<20)}
	})
	_, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config}, grpc.MaxCallSendMsgSize(32<<20))
	wantCode(t, err, codes.ResourceExhausted, "")
	if _, err := node.Runtime.Version(ctx(t), &cri.VersionRequest{}); err != nil {
		t.Fatal(err)
	}
}

func TestEmptyRequestsAreAnsweredNotPanicked(t *testing.T) {
	rt := node.Runtime
	for name, call := range map[string]func() error{
		"RunPodSandbox":   func() error { _, err := rt.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{}); return err },
		"CreateContainer": func() error { _, err := rt.CreateContainer(ctx(t), &cri.CreateContainerRequest{}); return err },
		"ExecSync":        func() error { _, err := rt.ExecSync(ctx(t), &cri.ExecSyncRequest{}); return err },
		"PullImage":       func() error { _, err := node.Images.PullImage(ctx(t), &cri.PullImageRequest{}); return err },
		"RunPodSandbox without metadata": func() error {
			_, err := rt.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: &cri.PodSandboxConfig{}})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := call(); err == nil {
				t.Error("an empty request succeeded")
			}
		})
	}
	if _, err := rt.Version(ctx(t), &cri.VersionRequest{}); err != nil {
		t.Fatal(err)
	}
}

// TestAPodThatIsNotReady: everything that needs a ready pod says so.
func TestAPodThatIsNotReady(t *testing.T) {
	p := runPod(t, nil)
	c, created := run(t, p, "sleep", "1000"), create(t, p, nil)
	if _, err := node.Runtime.StopPodSandbox(ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Fatal(err)
	}
	rt := node.Runtime
	for name, call := range map[string]func() error{
		"PortForward": func() error {
			_, err := rt.PortForward(ctx(t), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{80}})
			return err
		},
		"StartContainer": func() error {
			_, err := rt.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: created})
			return err
		},
		"ExecSync": func() error {
			_, err := rt.ExecSync(ctx(t), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"true"}})
			return err
		},
		"Attach": func() error {
			_, err := rt.Attach(ctx(t), &cri.AttachRequest{ContainerId: c, Stdout: true})
			return err
		},
		"ReopenContainerLog": func() error {
			_, err := rt.ReopenContainerLog(ctx(t), &cri.ReopenContainerLogRequest{ContainerId: c})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) { wantCode(t, call(), codes.FailedPrecondition, "") })
	}
}

// TestBadPodConfigs: each is refused with a message that names the field, and
// leaves no pod behind.
func TestBadPodConfigs(t *testing.T) {
	for name, row := range map[string]struct {
		change func(*cri.PodSandboxConfig)
		names  string
	}{
		"no uid":                 {func(c *cri.PodSandboxConfig) { c.Metadata.Uid = "" }, "uid"},
		"host name too long":     {func(c *cri.PodSandboxConfig) { c.Hostname = strings.Repeat("x", 65) }, "hostname"},
		"host name with a line":  {func(c *cri.PodSandboxConfig) { c.Hostname = "a\nb" }, "hostname"},
		"relative log directory": {func(c *cri.PodSandboxConfig) { c.LogDirectory = "logs" }, "log_directory"},
		"port beyond 65535": {func(c *cri.PodSandboxConfig) {
			c.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 65536}}
		}, "host_port"},
		"host address": {func(c *cri.PodSandboxConfig) {
			c.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 8081, HostIp: "not-an-ip"}}
		}, "host_ip"},
		"protocol": {func(c *cri.PodSandboxConfig) {
			c.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 8081, Protocol: 9}}
		}, "protocol"},
		"cgroup parent that leads out": {func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = "/../../x" }, "cgroup_parent"},
		"pid mode TARGET":              {func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_TARGET }, "pid"},
		"ipc mode CONTAINER": {func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Ipc = cri.NamespaceMode_CONTAINER
		}, "ipc"},
		"group without user":   {func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: 5} }, "run_as_group"},
		"dns with a line feed": {func(c *cri.PodSandboxConfig) { c.DnsConfig.Searches = []string{"a\nnameserver 192.0.2.66"} }, "dns_config"},
	} {
		t.Run(name, func(t *testing.T) {
			p := preparePod(t, row.change)
			r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config})
			if err == nil {
				p.id = r.PodSandboxId
			}
			wantCode(t, err, codes.InvalidArgument, row.names)
		})
	}
}
