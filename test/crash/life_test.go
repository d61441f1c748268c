package crash

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/pace"
)

// life is the life of one pod: a sequence of calls, each of which may be cut off
// by a crash and is then made again with the same metadata.
type life struct {
	n       *node
	kind    kind
	image   string // an image of its own, pulled at the start and removed at the end
	pod     *cri.PodSandboxConfig
	podID   string
	main    string // container that runs until it is stopped
	short   string // container that ends by itself
	mainPid int
}

// kind is what a pod is like, and what is done to it.
type kind struct {
	name   string
	pod    func(*cri.PodSandboxConfig)
	port   bool // one of the node's ports leads to it
	stages []stage
	only   string // the one stage to die in; all when empty
}

// stage is one call of a life. It must be right to make it again.
type stage struct {
	name string
	call func(*life, context.Context) error
}

func newLife(n *node, k kind) (*life, error) {
	number := serial.Add(1)
	name := fmt.Sprintf("life%d", number)
	l := &life{n: n, kind: k, pod: podConfig(n, name)}
	if k.port {
		l.pod.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: int32(20000 + number%10000)}}
	}
	if k.pod != nil {
		k.pod(l.pod)
	}
	var err error
	l.image, err = images.Push(context.Background(), name+":1", ownImage(name))
	return l, err
}

func podConfig(n *node, name string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "crash"},
		Hostname:     name,
		LogDirectory: filepath.Join(n.Dir, "log", name),
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: n.parent + "/" + name,
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{
				Pid: cri.NamespaceMode_CONTAINER}},
		},
	}
}

func (l *life) containerConfig(name string, args ...string) *cri.ContainerConfig {
	return &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: base}, LogPath: name + ".log", Args: args,
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: l.pod.Linux.SecurityContext.NamespaceOptions}},
	}
}

func (l *life) create(ctx context.Context, c *cri.ContainerConfig) (string, error) {
	r, err := l.n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: l.podID, Config: c, SandboxConfig: l.pod})
	return r.GetContainerId(), err
}

var (
	pull = stage{"PullImage", func(l *life, ctx context.Context) error {
		_, err := l.n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: l.image}})
		return err
	}}
	runPod = stage{"RunPodSandbox", func(l *life, ctx context.Context) error {
		r, err := l.n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: l.pod})
		l.podID = r.GetPodSandboxId()
		return err
	}}
	createMain = stage{"CreateContainer", func(l *life, ctx context.Context) (err error) {
		l.main, err = l.create(ctx, l.containerConfig("main", "sleep"))
		return err
	}}
	startMain = stage{"StartContainer", func(l *life, ctx context.Context) error {
		if err := l.n.StartContainer(ctx, l.main); err != nil {
			return err
		}
		return l.remember(ctx)
	}}
	exec = stage{"ExecSync", func(l *life, ctx context.Context) error {
		r, err := l.n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: l.main, Cmd: []string{"/bin/echo", "hello"}, Timeout: 10})
		if err == nil && (r.ExitCode != 0 || string(r.Stdout) != "hello\n") {
			err = fmt.Errorf("exec: code %d, output %q %q", r.ExitCode, r.Stdout, r.Stderr)
		}
		return err
	}}
	execTooLong = stage{"ExecSync timeout", func(l *life, ctx context.Context) error {
		_, err := l.n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: l.main, Cmd: []string{"/bin/prog", "sleep", "1000"}, Timeout: 1})
		if status.Code(err) == codes.DeadlineExceeded {
			return nil
		}
		if err == nil {
			err = fmt.Errorf("exec of a sleep: no timeout")
		}
		return err
	}}
	update = stage{"UpdateContainerResources", func(l *life, ctx context.Context) error {
		if _, err := l.n.Runtime.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: l.main,
			Linux: &cri.LinuxContainerResources{CpuShares: 333, MemoryLimitInBytes: 64 << 20}}); err != nil {
			return err
		}
		s, err := l.n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: l.main})
		if err != nil {
			return err
		}
		if r := s.Status.Resources.GetLinux(); r.GetCpuShares() != 333 || r.GetMemoryLimitInBytes() != 64<<20 {
			return fmt.Errorf("updated, but resources are %v", r)
		}
		return nil
	}}
	reopen = stage{"ReopenContainerLog", func(l *life, ctx context.Context) error {
		_, err := l.n.Runtime.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: l.main})
		return err
	}}
	createShort = stage{"CreateContainer (short)", func(l *life, ctx context.Context) (err error) {
		l.short, err = l.create(ctx, l.containerConfig("short", "count", "50", "1000"))
		return err
	}}
	startShort = stage{"StartContainer (short)", func(l *life, ctx context.Context) error { return l.n.StartContainer(ctx, l.short) }}
	// The container's own end: no call changes anything here.
	end = stage{"exit of a container", func(l *life, ctx context.Context) error {
		for {
			s, err := l.n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: l.short})
			if err != nil {
				return err
			}
			if s := s.Status; s.State == cri.ContainerState_CONTAINER_EXITED {
				if (s.ExitCode != 0 || s.Reason != "Completed") && !harness.CodeUnknown(s) {
					return fmt.Errorf("%w: %d, reason %s: %s", errCode, s.ExitCode, s.Reason, s.Message)
				}
				return gapless(s.LogPath, 50)
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("container does not end: %w", ctx.Err())
			case <-time.After(2 * time.Millisecond):
			}
		}
	}}
	stopMain = stage{"StopContainer", func(l *life, ctx context.Context) error {
		if _, err := l.n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: l.main, Timeout: 10}); err != nil {
			return err
		}
		return l.ended(ctx, 0) // its program obeys SIGTERM
	}}
	killMain = stage{"StopContainer (grace 0)", func(l *life, ctx context.Context) error {
		if _, err := l.n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: l.main}); err != nil {
			return err
		}
		return l.ended(ctx, 137)
	}}
	removeMain = stage{"RemoveContainer", func(l *life, ctx context.Context) error {
		_, err := l.n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: l.main})
		return err
	}}
	stopPod = stage{"StopPodSandbox", func(l *life, ctx context.Context) error {
		_, err := l.n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: l.podID})
		return err
	}}
	removePod = stage{"RemovePodSandbox", func(l *life, ctx context.Context) error {
		_, err := l.n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: l.podID})
		return err
	}}
	removeImage = stage{"RemoveImage", func(l *life, ctx context.Context) error {
		_, err := l.n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: l.image}})
		return err
	}}
	// A pod whose files cannot be written: its steps are undone.
	failPod = stage{"RunPodSandbox that fails", func(l *life, ctx context.Context) error {
		bad := podConfig(l.n, l.pod.Metadata.Name+"-bad")
		bad.DnsConfig = &cri.DNSConfig{Servers: []string{"no address"}}
		bad.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 18081}}
		bad.Linux.CgroupParent = ""
		return refused(l.n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: bad}))("dns_config")
	}}
	failCreate = stage{"CreateContainer that fails", func(l *life, ctx context.Context) error {
		bad := l.containerConfig("bad", "sleep")
		bad.Mounts = []*cri.Mount{{ContainerPath: "/bin/prog/below-a-file", HostPath: l.n.Dir}}
		_, err := l.create(ctx, bad)
		return refused(0, err)("below-a-file")
	}}
	failStart = stage{"StartContainer that fails", func(l *life, ctx context.Context) error {
		bad := l.containerConfig("nothing")
		bad.Command = []string{"/no/such/program"}
		id, err := l.create(ctx, bad)
		if err != nil {
			return err
		}
		_, err = l.n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
		if code := status.Code(err); code == codes.Unavailable || code == codes.Canceled {
			return err
		}
		if err == nil {
			return fmt.Errorf("a program that is not there was started")
		}
		s, err := l.n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
		if err != nil {
			return err
		}
		if s.Status.State != cri.ContainerState_CONTAINER_EXITED || s.Status.Reason != "StartError" || s.Status.ExitCode != 128 {
			return fmt.Errorf("after a start that failed: %v", s.Status)
		}
		return nil
	}}
)

// refused checks an error of a call that cannot succeed. That of a daemon that
// died is passed on.
func refused[T any](_ T, err error) func(names string) error {
	return func(names string) error {
		switch code := status.Code(err); {
		case err == nil:
			return fmt.Errorf("succeeded although %s is wrong", names)
		case code == codes.Unavailable || code == codes.Canceled:
			return err
		case !strings.Contains(err.Error(), names):
			return fmt.Errorf("failed for another reason than %s: %w", names, err)
		}
		return nil
	}
}

// ended checks that the main container has ended with code.
func (l *life) ended(ctx context.Context, code int32) error {
	s, err := l.n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: l.main})
	if err != nil {
		return err
	}
	if (s.Status.State != cri.ContainerState_CONTAINER_EXITED || s.Status.ExitCode != code) && !harness.CodeUnknown(s.Status) {
		return fmt.Errorf("%w: stopped, but is %v with code %d, want %d (%s: %s)", errCode, s.Status.State, s.Status.ExitCode, code, s.Status.Reason, s.Status.Message)
	}
	return nil
}

// remember notes the main container's process, or checks that it is still that one.
func (l *life) remember(ctx context.Context) error {
	pid, err := l.n.pidOf(ctx, l.main)
	if err != nil {
		return err
	}
	if l.mainPid == 0 {
		l.mainPid = pid
	}
	if pid == 0 || pid != l.mainPid {
		return fmt.Errorf("container's process is %d, was %d", pid, l.mainPid)
	}
	return nil
}

// pidOf is the process of a running container.
func (n *node) pidOf(ctx context.Context, container string) (int, error) {
	r, err := n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: container, Verbose: true})
	if err != nil {
		return 0, err
	}
	if r.Status.State != cri.ContainerState_CONTAINER_RUNNING {
		return 0, fmt.Errorf("container is %v, code %d, %s: %s", r.Status.State, r.Status.ExitCode, r.Status.Reason, r.Status.Message)
	}
	var info struct{ Pid int }
	err = json.Unmarshal([]byte(r.Info["info"]), &info)
	return info.Pid, err
}

// What may be lost, told apart for the summaries.
var (
	errCode  = errors.New("wrong exit code")
	errLines = errors.New("wrong log")
)

// gapless checks that a log holds the numbers from 0 on, each once and in order:
// want of them, or as many as there are when want is negative.
func gapless(file string, want int) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	n := 0
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 || !strings.HasSuffix(line, "\n") && want >= 0 {
			return fmt.Errorf("%w: %s: torn record %q", errLines, file, line)
		}
		if f[3] != fmt.Sprint(n) {
			return fmt.Errorf("%w: %s: %q where %d was due", errLines, file, f[3], n)
		}
		n++
	}
	if want >= 0 && n != want {
		return fmt.Errorf("%w: %s: %d of %d lines", errLines, file, n, want)
	}
	return nil
}

// insist makes a stage's call until it succeeds.
func (l *life) insist(s stage) error {
	if err := harness.Insist(func(ctx context.Context) error { return s.call(l, ctx) }); err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	return nil
}

// settle waits until probe returns nothing, which says what is too much.
func settle(probe func() ([]string, error)) error {
	for deadline := time.Now().Add(pace.Wait(15 * time.Second)); ; time.Sleep(20 * time.Millisecond) {
		left, err := probe()
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("left behind:\n\t%s", strings.Join(left, "\n\t"))
		}
	}
}
