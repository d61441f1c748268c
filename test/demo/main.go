// Command demo runs Berth's main job once, on real parts: the daemon with its
// embedded defaults, a pull from a registry on loopback, a pod with a container,
// its network, exec, log and port-forward, and the way back. It prints each step
// with its time and ends 0 only if every step held and nothing is left behind.
//
// Without -keep it works in a network namespace of its own, so that it disturbs
// no other runtime on the machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/leak"
	"github.com/berth-runtime/berth/test/testimage"
)

func main() {
	keep := flag.Bool("keep", false, "leave the daemon running and print how to use it")
	flag.Parse()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "demo: needs root: it makes namespaces, mounts and cgroups")
		os.Exit(1)
	}
	if !*keep {
		if err := harness.OwnNetwork(); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
	}
	began := time.Now()
	if err := demo(*keep); err != nil {
		fmt.Fprintf(os.Stderr, "\nFAILED: %v\n", err)
		os.Exit(1)
	}
	fmt.Printf("\nall steps held, %.1f s in all", time.Since(began).Seconds())
	if *keep {
		fmt.Println()
		return
	}
	fmt.Println(", nothing left behind")
}

// story is what the steps share.
type story struct {
	node      *harness.Daemon
	registry  *testimage.Registry
	image     string
	pod, ctr  string
	ip        string
	podConfig *cri.PodSandboxConfig
}

func demo(keep bool) (err error) {
	dir, err := os.MkdirTemp("", "berth-demo-")
	if err != nil {
		return err
	}
	before, err := leak.Take()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	s := &story{}
	if s.node, err = harness.New(dir); err != nil {
		return err
	}
	defer func() {
		if keep && err == nil {
			return
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "--- the daemon's log\n%s\n", s.node.LogTail(4096))
		}
		err = errors.Join(err, s.end(ctx, dir, before))
	}()
	for _, st := range []struct {
		name string
		do   func(context.Context) (string, error)
	}{
		{"start berthd", s.startDaemon},
		{"start a registry and make an image", s.serveImage},
		{"pull the image", s.pull},
		{"run a pod sandbox", s.runPod},
		{"create a container", s.create},
		{"start it", s.start},
		{"fetch from it over the pod network", s.fetch},
		{"exec in it", s.exec},
		{"read its log", s.log},
		{"port-forward to it", s.forward},
	} {
		if err := step(ctx, st.name, st.do); err != nil {
			return err
		}
	}
	if keep {
		s.advice()
		return nil
	}
	for _, st := range []struct {
		name string
		do   func(context.Context) (string, error)
	}{{"stop and remove the container", s.removeContainer}, {"stop and remove the pod", s.removePod}, {"remove the image", s.removeImage}} {
		if err := step(ctx, st.name, st.do); err != nil {
			return err
		}
	}
	return nil
}

func step(ctx context.Context, name string, do func(context.Context) (string, error)) error {
	began := time.Now()
	detail, err := do(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	fmt.Printf("%9.2f ms  %-36s %s\n", float64(time.Since(began).Microseconds())/1000, name, detail)
	return nil
}

func (s *story) startDaemon(ctx context.Context) (string, error) {
	if err := s.node.Start(ctx); err != nil {
		return "", err
	}
	v, err := s.node.Runtime.Version(ctx, &cri.VersionRequest{})
	return fmt.Sprintf("%s %s, CRI %s on %s", v.GetRuntimeName(), v.GetRuntimeVersion(), v.GetRuntimeApiVersion(), s.node.Socket), err
}

func (s *story) serveImage(ctx context.Context) (string, error) {
	img, err := testimage.Program(ctx, "", testimage.Gzip)
	if err != nil {
		return "", err
	}
	if s.registry, err = testimage.Serve("127.0.0.1:0", nil); err != nil {
		return "", err
	}
	s.image, err = s.registry.Push(ctx, "hello:1", img)
	return s.image, err
}

func (s *story) pull(ctx context.Context) (string, error) {
	r, err := s.node.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: s.image}})
	return r.GetImageRef(), err
}

func (s *story) runPod(ctx context.Context) (string, error) {
	s.podConfig = &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "hello", Namespace: "demo", Uid: "demo-uid"},
		Hostname:     "hello",
		LogDirectory: filepath.Join(s.node.Dir, "log", "hello"),
		Linux:        &cri.LinuxPodSandboxConfig{},
	}
	r, err := s.node.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: s.podConfig})
	if err != nil {
		return "", err
	}
	s.pod = r.PodSandboxId
	st, err := s.node.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: s.pod})
	if err != nil {
		return "", err
	}
	if s.ip = st.Status.GetNetwork().GetIp(); s.ip == "" {
		return "", errors.New("the pod has no address")
	}
	return s.pod[:13] + " has " + s.ip, nil
}

func (s *story) create(ctx context.Context) (string, error) {
	r, err := s.node.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: s.pod, SandboxConfig: s.podConfig, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "web"},
		Image:    &cri.ImageSpec{Image: s.image},
		Args:     []string{"serve", ":8080"},
		LogPath:  "web/0.log",
		Linux: &cri.LinuxContainerConfig{
			Resources: &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 256},
			SecurityContext: &cri.LinuxContainerSecurityContext{
				NoNewPrivs: true,
				Seccomp:    &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
			},
		},
	}})
	s.ctr = r.GetContainerId()
	return fmt.Sprintf("%.13s", s.ctr), err
}

func (s *story) start(ctx context.Context) (string, error) {
	_, err := s.node.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: s.ctr})
	return "", err
}

func (s *story) fetch(context.Context) (string, error) {
	var last error
	for range 200 { // the server needs a moment to listen
		r, err := http.Get("http://" + net.JoinHostPort(s.ip, "8080") + "/demo")
		if err != nil {
			last = err
			time.Sleep(5 * time.Millisecond)
			continue
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err == nil && !strings.Contains(string(b), "hello from hello") {
			err = fmt.Errorf("page is %q", b)
		}
		return strings.TrimSpace(string(b)), err
	}
	return "", last
}

func (s *story) exec(ctx context.Context) (string, error) {
	r, err := s.node.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: s.ctr, Cmd: []string{"/bin/echo", "greetings", "from", "inside"}, Timeout: 10})
	if err != nil {
		return "", err
	}
	if r.ExitCode != 0 || string(r.Stdout) != "greetings from inside\n" {
		return "", fmt.Errorf("exit code %d, output %q, %q", r.ExitCode, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout)), nil
}

func (s *story) log(context.Context) (string, error) {
	path := filepath.Join(s.podConfig.LogDirectory, "web", "0.log")
	var last string
	for range 200 {
		b, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		if last = lines[len(lines)-1]; strings.Contains(last, "stdout F GET /demo") {
			return last, nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return "", fmt.Errorf("%s ends with %q", path, last)
}

func (s *story) forward(ctx context.Context) (string, error) {
	r, err := s.node.Runtime.PortForward(ctx, &cri.PortForwardRequest{PodSandboxId: s.pod, Port: []int32{8080}})
	if err != nil {
		return "", err
	}
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		return "", err
	}
	q, err := http.NewRequestWithContext(ctx, http.MethodPost, r.Url, nil)
	if err != nil {
		return "", err
	}
	q.Header.Set(httpstream.HeaderProtocolVersion, "portforward.k8s.io")
	answer, err := rt.RoundTrip(q)
	if err != nil {
		return "", err
	}
	conn, err := rt.NewConnection(answer)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	open := func(kind string) (httpstream.Stream, error) {
		return conn.CreateStream(http.Header{"Streamtype": {kind}, "Port": {"8080"}, "Requestid": {"0"}})
	}
	if _, err := open("error"); err != nil {
		return "", err
	}
	data, err := open("data")
	if err != nil {
		return "", err
	}
	if _, err := io.WriteString(data, "GET /forwarded HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	b, err := io.ReadAll(data)
	if err == nil && !strings.Contains(string(b), "/forwarded") {
		err = fmt.Errorf("answer is %q", b)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1], err
}

func (s *story) removeContainer(ctx context.Context) (string, error) {
	if _, err := s.node.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: s.ctr, Timeout: 5}); err != nil {
		return "", err
	}
	st, err := s.node.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: s.ctr})
	if err != nil {
		return "", err
	}
	_, err = s.node.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: s.ctr})
	return fmt.Sprintf("it ended with code %d, %s", st.Status.ExitCode, st.Status.Reason), err
}

func (s *story) removePod(ctx context.Context) (string, error) {
	if _, err := s.node.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: s.pod}); err != nil {
		return "", err
	}
	_, err := s.node.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: s.pod})
	return "", err
}

func (s *story) removeImage(ctx context.Context) (string, error) {
	_, err := s.node.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: s.image}})
	return "", err
}

// end takes everything down and looks for what is left.
func (s *story) end(ctx context.Context, dir string, before leak.Snapshot) error {
	err := step(ctx, "end berthd and its supervisor", func(ctx context.Context) (string, error) {
		err := s.node.Close(ctx)
		if s.registry != nil {
			err = errors.Join(err, s.registry.Close())
		}
		return "", err
	})
	left, lerr := before.Since(15 * time.Second)
	if len(left) > 0 {
		lerr = errors.Join(lerr, fmt.Errorf("left behind: %s", strings.Join(left, ", ")))
	}
	return errors.Join(err, lerr, os.RemoveAll(dir))
}

// advice prints how to use the daemon that stays.
func (s *story) advice() {
	fmt.Printf(`
berthd (pid %d) stays up on %s with its folders in %s.

  crictl:   crictl --runtime-endpoint unix://%s ps
  berth:    bin/berth --socket %s ps
  kubelet:  --container-runtime-endpoint=unix://%s

To end it: remove its pods (crictl rmp -af), then kill %d; the supervisor ends by itself.
`, s.node.Pid(), s.node.Socket, s.node.Dir, s.node.Socket, s.node.Socket, s.node.Socket, s.node.Pid())
}
