package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/sandbox"
)

type testClient struct {
	runtimeapi.RuntimeServiceClient
	runtimeapi.ImageServiceClient
	conn *grpc.ClientConn
	stop func()
}

// serve starts a server over e on a unix socket and returns a client of it.
func serve(t testing.TB, e *fake) testClient {
	t.Helper()
	s, err := New(Config{}, e, e, e)
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		conn.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		s.Stop(ctx)
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(stop)
	return testClient{runtimeapi.NewRuntimeServiceClient(conn), runtimeapi.NewImageServiceClient(conn), conn, stop}
}

func podConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata:    &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "u-" + name},
		Annotations: map[string]string{"io.example/raw": "kept\x01 as is"},
	}
}

func containerConfig(name string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: "sha256:1"},
	}
}

func mustRun(t testing.TB, c testClient) string {
	t.Helper()
	r, err := c.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig("web")})
	if err != nil {
		t.Fatal(err)
	}
	return r.PodSandboxId
}

func mustStart(t testing.TB, c testClient, pod string) string {
	t.Helper()
	r, err := c.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: containerConfig("c")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: r.ContainerId}); err != nil {
		t.Fatal(err)
	}
	return r.ContainerId
}

func wantCode(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("got %v, want code %v", err, code)
	}
	for _, w := range words {
		if !strings.Contains(status.Convert(err).Message(), w) {
			t.Errorf("message %q does not name %q", status.Convert(err).Message(), w)
		}
	}
}

func TestStartUpProbes(t *testing.T) {
	c := serve(t, newFake())
	v, err := c.Version(t.Context(), &runtimeapi.VersionRequest{Version: "anything"})
	if err != nil {
		t.Fatal(err)
	}
	if v.Version != "0.1.0" || v.RuntimeName != "berth" || v.RuntimeVersion == "" || v.RuntimeApiVersion != "v1" {
		t.Errorf("version %v", v)
	}
	fs, err := c.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(fs.ImageFilesystems) != 1 || fs.ImageFilesystems[0].UsedBytes == nil || fs.ImageFilesystems[0].Timestamp == 0 {
		t.Errorf("image filesystems %v", fs.ImageFilesystems)
	}
	rc, err := c.RuntimeConfig(t.Context(), &runtimeapi.RuntimeConfigRequest{})
	if err != nil || rc.Linux.GetCgroupDriver() != runtimeapi.CgroupDriver_CGROUPFS {
		t.Errorf("runtime config %v, %v", rc, err)
	}
}

func TestStatus(t *testing.T) {
	f := newFake()
	f.networkErr = errors.New("no configuration in /etc/cni/net.d")
	c := serve(t, f)
	s, err := c.RuntimeServiceClient.Status(t.Context(), &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]*runtimeapi.RuntimeCondition{}
	for _, cond := range s.Status.Conditions {
		got[cond.Type] = cond
	}
	if !got["RuntimeReady"].GetStatus() || got["NetworkReady"].GetStatus() || !strings.Contains(got["NetworkReady"].Message, "net.d") {
		t.Errorf("conditions %v", s.Status.Conditions)
	}
	if s.RuntimeHandlers[0].Name != "" || !s.Features.SupplementalGroupsPolicy || s.Features.MountOptions {
		t.Errorf("handlers %v, features %v", s.RuntimeHandlers, s.Features)
	}
	var info map[string]any
	if err := json.Unmarshal([]byte(s.Info["config"]), &info); err != nil || info["stateDir"] != "/run/berth" {
		t.Errorf("info %v, %v", s.Info, err)
	}
}

func TestPodAndContainerShapes(t *testing.T) {
	c := serve(t, newFake())
	pod := mustRun(t, c)
	ps, err := c.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	if ps.Timestamp != 0 || len(ps.ContainersStatuses) != 0 {
		t.Error("timestamp and containers_statuses must stay unset")
	}
	if ps.Status.Network.Ip != "10.0.0.2" || len(ps.Status.Network.AdditionalIps) != 1 {
		t.Errorf("network %v", ps.Status.Network)
	}
	if ps.Status.Linux.GetNamespaces().GetOptions() == nil || ps.Status.Annotations["io.example/raw"] != "kept\x01 as is" {
		t.Errorf("status %v", ps.Status)
	}
	if !json.Valid([]byte(ps.Info["info"])) {
		t.Errorf("info %q", ps.Info["info"])
	}
	ctr := mustStart(t, c, pod)
	cs, err := c.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: ctr, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	st := cs.Status
	if st.ImageRef != "sha256:1" || st.ImageId != "sha256:1" || st.Image.GetImage() == "" || st.CreatedAt == 0 || st.FinishedAt != 0 ||
		st.User.GetLinux() == nil || st.Resources.GetLinux() == nil || st.StopSignal != runtimeapi.Signal_SIGNAL_SIGTERM || len(st.Mounts) != 0 {
		t.Errorf("status %v", st)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(cs.Info["info"]), &info); err != nil || info.Pid != 42 {
		t.Errorf("info %q", cs.Info["info"])
	}
	stats, err := c.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{})
	if err != nil || len(stats.Stats) != 1 || stats.Stats[0].Attributes.Metadata == nil || stats.Stats[0].Cpu.Timestamp == 0 {
		t.Errorf("stats %v, %v", stats, err)
	}
}

func TestImages(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	none, err := c.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: "missing"}})
	if err != nil || none.Image != nil {
		t.Errorf("a missing image is no image and no error, got %v, %v", none, err)
	}
	img, err := c.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: "busybox"}, Verbose: true})
	if err != nil || img.Image.Uid.GetValue() != 1000 || img.Image.Username != "" || !strings.Contains(img.Info["info"], "imageSpec") {
		t.Errorf("image %v, %v", img, err)
	}
	p, err := c.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "busybox"},
		Auth: &runtimeapi.AuthConfig{RegistryToken: "t"}})
	if err != nil || p.ImageRef != img.Image.Id || f.auth.RegistryToken != "t" {
		t.Errorf("pull %v, %v", p, err)
	}
	f.pullErr = fmt.Errorf("registry example.org: dial tcp: connection refused: %w", errdefs.ErrUnavailable)
	_, err = c.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "busybox"}})
	wantCode(t, err, codes.Unknown, "connection refused")
	if !strings.HasPrefix(status.Convert(err).Message(), "RegistryUnavailable: ") {
		t.Errorf("the kubelet recognises the error by its prefix, got %v", err)
	}
}

func TestBadInput(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	pod := mustRun(t, c)
	ctr := mustStart(t, c, pod)
	created, err := c.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: containerConfig("created")})
	if err != nil {
		t.Fatal(err)
	}
	stopped := mustRun(t, c)
	if _, err := c.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: stopped}); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	for _, tt := range []struct {
		name  string
		call  func() error
		code  codes.Code
		words []string
	}{
		{"no config", func() error { _, err := c.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{}); return err }, codes.InvalidArgument, []string{"config"}},
		{"unknown handler", func() error {
			_, err := c.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig("h"), RuntimeHandler: "nope"})
			return err
		}, codes.InvalidArgument, []string{"runtime_handler", "nope"}},
		{"missing pod", func() error {
			_, err := c.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: "x"})
			return err
		}, codes.NotFound, []string{"x"}},
		{"missing container", func() error {
			_, err := c.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: "x"})
			return err
		}, codes.NotFound, nil},
		{"container in a missing pod", func() error {
			_, err := c.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: "x", Config: containerConfig("c")})
			return err
		}, codes.NotFound, nil},
		{"empty id", func() error { _, err := c.StopContainer(ctx, &runtimeapi.StopContainerRequest{}); return err }, codes.InvalidArgument, []string{"container_id"}},
		{"no image", func() error { _, err := c.PullImage(ctx, &runtimeapi.PullImageRequest{}); return err }, codes.InvalidArgument, []string{"image.image"}},
		{"privileged in an unprivileged pod", func() error {
			cc := containerConfig("p")
			cc.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{Privileged: true}}
			_, err := c.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: cc})
			return err
		}, codes.InvalidArgument, []string{"privileged"}},
		{"host network in a pod without", func() error {
			cc := containerConfig("n")
			cc.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}}}
			_, err := c.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: cc})
			return err
		}, codes.InvalidArgument, []string{"network"}},
		{"exec not running", func() error {
			_, err := c.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: created.ContainerId, Cmd: []string{"ls"}})
			return err
		}, codes.FailedPrecondition, []string{"not running"}},
		{"exec without command", func() error {
			_, err := c.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: ctr})
			return err
		}, codes.InvalidArgument, []string{"cmd"}},
		{"exec timeout", func() error {
			_, err := c.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"sleep"}, Timeout: 1})
			return err
		}, codes.DeadlineExceeded, []string{"1 s"}},
		{"tty and stderr", func() error {
			_, err := c.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: ctr, Cmd: []string{"sh"}, Tty: true, Stdout: true, Stderr: true})
			return err
		}, codes.InvalidArgument, []string{"tty"}},
		{"no stream", func() error {
			_, err := c.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: ctr})
			return err
		}, codes.InvalidArgument, []string{"stdin"}},
		{"attach to a created one", func() error {
			_, err := c.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: created.ContainerId, Stdout: true})
			return err
		}, codes.FailedPrecondition, nil},
		{"exec missing", func() error {
			_, err := c.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: "x", Cmd: []string{"sh"}, Stdout: true})
			return err
		}, codes.NotFound, nil},
		{"forward to a stopped pod", func() error {
			_, err := c.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: stopped, Port: []int32{80}})
			return err
		}, codes.FailedPrecondition, []string{"not ready"}},
		{"forward to port 0", func() error {
			_, err := c.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: pod, Port: []int32{0}})
			return err
		}, codes.InvalidArgument, []string{"port[0]"}},
		{"bad cidr", func() error {
			_, err := c.UpdateRuntimeConfig(ctx, &runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{
				NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: "ten"}}})
			return err
		}, codes.InvalidArgument, []string{"pod_cidr"}},
		{"update of nothing", func() error {
			_, err := c.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: ctr})
			return err
		}, codes.InvalidArgument, []string{"linux"}},
		{"20 MB request", func() error {
			p := podConfig("big")
			p.Annotations["big"] = strings.Repeat("x", 20<<20)
			_, err := c.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p})
			return err
		}, codes.ResourceExhausted, []string{"16777216"}},
		{"stats of the pod", func() error {
			_, err := c.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{})
			return err
		}, codes.Unimplemented, []string{"PodSandboxStats", "not offered"}},
	} {
		t.Run(tt.name, func(t *testing.T) { wantCode(t, tt.call(), tt.code, tt.words...) })
	}
}

func TestMissingIsSuccess(t *testing.T) {
	c := serve(t, newFake())
	ctx := t.Context()
	for name, err := range map[string]error{
		"StopPodSandbox":   second(c.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: "x"})),
		"RemovePodSandbox": second(c.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: "x"})),
		"StopContainer":    second(c.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: "x"})),
		"RemoveContainer":  second(c.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: "x"})),
		"RemoveImage":      second(c.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: "missing"}})),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestPanicIsInternalAndTheServerLives(t *testing.T) {
	f := newFake()
	f.panicOn = "web"
	c := serve(t, f)
	_, err := c.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig("web")})
	wantCode(t, err, codes.Internal, "RunPodSandbox")
	if strings.Contains(err.Error(), "out of range") {
		t.Errorf("the panic's text belongs into the log only: %v", err)
	}
	if _, err := c.Version(t.Context(), &runtimeapi.VersionRequest{}); err != nil {
		t.Fatalf("after a panic: %v", err)
	}
}

// The kubelet receives at most 16 MiB; more output must be cut, not fail.
func TestExecSyncOutputFitsOneMessage(t *testing.T) {
	c := serve(t, newFake())
	ctr := mustStart(t, c, mustRun(t, c))
	r, err := c.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"big"}})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(r.Stdout) + len(r.Stderr); n != maxExecOutput {
		t.Errorf("got %d bytes, want %d", n, maxExecOutput)
	}
	r, err = c.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"false"}})
	if err != nil || r.ExitCode != 1 {
		t.Errorf("a non-zero exit is a normal answer, got %v, %v", r, err)
	}
}

func TestCapOutput(t *testing.T) {
	for _, tt := range []struct{ out, err, wantOut, wantErr int }{
		{3, 4, 3, 4}, {100, 2, 8, 2}, {2, 100, 2, 8}, {100, 100, 5, 5}, {5, 5, 5, 5},
	} {
		o, e := capOutput(make([]byte, tt.out), make([]byte, tt.err), 10)
		if len(o) != tt.wantOut || len(e) != tt.wantErr {
			t.Errorf("%d+%d: got %d+%d, want %d+%d", tt.out, tt.err, len(o), len(e), tt.wantOut, tt.wantErr)
		}
	}
}

// Every method of CRI v1 answers: with a value, with an error of its own or with
// the text that says that it is not offered; never with gRPC's own text.
func TestEveryMethodIsServed(t *testing.T) {
	c := serve(t, newFake())
	n := 0
	for _, d := range []grpc.ServiceDesc{runtimeapi.RuntimeService_ServiceDesc, runtimeapi.ImageService_ServiceDesc} {
		for _, m := range d.Methods {
			n++
			err := c.conn.Invoke(t.Context(), "/"+d.ServiceName+"/"+m.MethodName, &runtimeapi.VersionRequest{}, &runtimeapi.StopContainerResponse{})
			if strings.Contains(fmt.Sprint(err), "not implemented") {
				t.Errorf("%s: %v", m.MethodName, err)
			}
		}
		for _, m := range d.Streams {
			n++
			s, err := c.conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, "/"+d.ServiceName+"/"+m.StreamName)
			if err != nil {
				t.Fatal(err)
			}
			err = errors.Join(s.SendMsg(&runtimeapi.VersionRequest{}), s.CloseSend(), s.RecvMsg(&runtimeapi.StopContainerResponse{}))
			if !strings.Contains(err.Error(), m.StreamName+": not offered") {
				t.Errorf("%s: %v", m.StreamName, err)
			}
		}
	}
	if n != 43 {
		t.Errorf("%d methods, want 43", n)
	}
}

func TestErrorCodes(t *testing.T) {
	for _, tt := range []struct {
		err  error
		code codes.Code
		text string
	}{
		{fmt.Errorf("container x: %w", errdefs.ErrNotFound), codes.NotFound, "container x"},
		{errdefs.ErrNotFound, codes.NotFound, "not found"},
		{fmt.Errorf("a: %w", errdefs.ErrInvalidArgument), codes.InvalidArgument, "a"},
		{fmt.Errorf("a: %w", errdefs.ErrAlreadyExists), codes.AlreadyExists, "a"},
		{fmt.Errorf("a: %w", errdefs.ErrFailedPrecondition), codes.FailedPrecondition, "a"},
		{fmt.Errorf("a: %w", errdefs.ErrUnavailable), codes.Unavailable, "a"},
		{fmt.Errorf("a: %w", errdefs.ErrUnauthenticated), codes.Unauthenticated, "a"},
		{fmt.Errorf("a: %w", errdefs.ErrResourceExhausted), codes.ResourceExhausted, "a"},
		{fmt.Errorf("a: %w", context.DeadlineExceeded), codes.DeadlineExceeded, "a"},
		{fmt.Errorf("a: %w", context.Canceled), codes.Canceled, "a"},
		{fmt.Errorf("a: %w: more", errdefs.ErrNotFound), codes.NotFound, "a: not found: more"},
		{errors.New("a"), codes.Unknown, "a"},
		{status.Error(codes.ResourceExhausted, "a"), codes.ResourceExhausted, "a"},
	} {
		s := status.Convert(toStatus(tt.err))
		if s.Code() != tt.code || s.Message() != tt.text {
			t.Errorf("%v: got %v %q, want %v %q", tt.err, s.Code(), s.Message(), tt.code, tt.text)
		}
	}
	if toStatus(nil) != nil {
		t.Error("nil must stay nil")
	}
}

// BenchmarkVersion is what gRPC itself costs per call; p50 is reported in µs.
func BenchmarkVersion(b *testing.B) {
	c := serve(b, newFake())
	took := make([]time.Duration, 0, b.N)
	for b.Loop() {
		start := time.Now()
		if _, err := c.Version(b.Context(), &runtimeapi.VersionRequest{}); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// BenchmarkListContainers has the 2,000 rows that the promise names.
func BenchmarkListContainers(b *testing.B) {
	f := newFake()
	c := serve(b, f)
	pod := mustRun(b, c)
	for range 2000 {
		if _, err := c.CreateContainer(b.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: containerConfig("c")}); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		r, err := c.ListContainers(b.Context(), &runtimeapi.ListContainersRequest{})
		if err != nil || len(r.Containers) != 2000 {
			b.Fatal(len(r.GetContainers()), err)
		}
	}
}

func TestFitPod(t *testing.T) {
	const pod, own, node, target = sandbox.NamespacePod, sandbox.NamespaceContainer, sandbox.NamespaceNode, sandbox.NamespaceTarget
	for _, tt := range []struct {
		name            string
		pod, asked, got sandbox.Namespaces
		fails           bool
	}{
		{name: "nothing asked", pod: sandbox.Namespaces{Network: node, PID: node, IPC: node}, got: sandbox.Namespaces{Network: node, PID: node, IPC: node}},
		{name: "shared pid", pod: sandbox.Namespaces{PID: pod}, got: sandbox.Namespaces{}},
		{name: "own pid on the host", pod: sandbox.Namespaces{PID: node}, asked: sandbox.Namespaces{PID: own}, got: sandbox.Namespaces{PID: own}},
		{name: "pod without a shared pid", pod: sandbox.Namespaces{PID: own}, got: sandbox.Namespaces{PID: own}},
		{name: "target", pod: sandbox.Namespaces{PID: own}, asked: sandbox.Namespaces{PID: target, TargetID: "x"}, got: sandbox.Namespaces{PID: target, TargetID: "x"}},
		{name: "host pid", asked: sandbox.Namespaces{PID: node}, fails: true},
		{name: "host ipc", asked: sandbox.Namespaces{IPC: node}, fails: true},
	} {
		c := &sandbox.ContainerConfig{Security: sandbox.Security{Namespaces: tt.asked}}
		err := fitPod(c, &sandbox.PodConfig{Namespaces: tt.pod})
		if tt.fails {
			wantCode(t, toStatus(err), codes.InvalidArgument)
			continue
		}
		if err != nil || c.Security.Namespaces != tt.got {
			t.Errorf("%s: %+v, %v, want %+v", tt.name, c.Security.Namespaces, err, tt.got)
		}
	}
}
