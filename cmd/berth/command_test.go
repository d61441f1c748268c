package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// node is a CRI server with one pod, two containers and one image.
type node struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	log string
}

func (n *node) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: "berth", RuntimeVersion: "9.9.9", RuntimeApiVersion: "v1"}, nil
}

func (n *node) ListPodSandbox(context.Context, *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: []*runtimeapi.PodSandbox{{
		Id: id1, Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u"}, CreatedAt: time.Now().Add(-time.Hour).UnixNano()}}}, nil
}

func (n *node) PodSandboxStatus(context.Context, *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	return &runtimeapi.PodSandboxStatusResponse{
		Status: &runtimeapi.PodSandboxStatus{Id: id1, Network: &runtimeapi.PodSandboxNetworkStatus{Ip: "10.0.0.2"}},
		Info:   map[string]string{"info": `{"cgroupDir":"/x"}`, "note": "plain text"},
	}, nil
}

func (n *node) ListContainers(context.Context, *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	at := time.Now().Add(-time.Minute).UnixNano()
	image := &runtimeapi.ImageSpec{Image: "docker.io/library/nginx:1"}
	return &runtimeapi.ListContainersResponse{Containers: []*runtimeapi.Container{
		{Id: id2, PodSandboxId: id1, Metadata: &runtimeapi.ContainerMetadata{Name: "nginx"}, Image: image, State: runtimeapi.ContainerState_CONTAINER_RUNNING, CreatedAt: at},
		{Id: strings.Repeat("3", 64), PodSandboxId: id1, Metadata: &runtimeapi.ContainerMetadata{Name: "init"}, Image: image, State: runtimeapi.ContainerState_CONTAINER_EXITED, CreatedAt: at},
	}}, nil
}

func (n *node) ContainerStatus(context.Context, *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Id: id2, LogPath: n.log, State: runtimeapi.ContainerState_CONTAINER_EXITED}}, nil
}

func (n *node) ExecSync(_ context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	if r.ContainerId != id2 {
		return nil, status.Error(codes.FailedPrecondition, "container is not running")
	}
	return &runtimeapi.ExecSyncResponse{Stdout: []byte(strings.Join(r.Cmd, " ")), Stderr: []byte("warned"), ExitCode: 3}, nil
}

func (n *node) ListImages(context.Context, *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	return &runtimeapi.ListImagesResponse{Images: []*runtimeapi.Image{{Id: "sha256:" + id2, RepoTags: []string{"docker.io/library/nginx:1"}, Size: 2048}}}, nil
}

func (n *node) PullImage(context.Context, *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	return &runtimeapi.PullImageResponse{ImageRef: "sha256:" + id2}, nil
}

// berth runs the program against n and returns what it wrote.
func (n *node) berth(t *testing.T, args ...string) (out, errOut string, err error) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(s, n)
	runtimeapi.RegisterImageServiceServer(s, n)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	defer func() { s.Stop(); <-done }()
	var o, e bytes.Buffer
	cmd := command()
	cmd.SetOut(&o)
	cmd.SetErr(&e)
	cmd.SetArgs(append([]string{"--socket", socket}, args...))
	err = cmd.ExecuteContext(t.Context())
	return o.String(), e.String(), err
}

func TestCommands(t *testing.T) {
	n := &node{log: logFile(t, stamp+"stdout F hello\n")}
	for _, tt := range []struct {
		args string
		want []string
		not  string
	}{
		{"version", []string{"9.9.9", "CRI v1"}, ""},
		{"ps", []string{"default/web", "10.0.0.2", "  nginx", "running", "60m"}, "init"},
		{"ps --all", []string{"init", "exited"}, ""},
		{"images", []string{"docker.io/library/nginx:1", "2.0 KiB"}, ""},
		{"pull nginx", []string{"nginx", short(id2)}, ""},
		{"logs web/nginx", []string{"hello"}, "stdout"},
		{"inspect default/web", []string{`"kind": "pod"`, `"cgroupDir": "/x"`, `"note": "plain text"`, `"ip": "10.0.0.2"`}, ""},
		{"inspect nginx", []string{`"kind": "container"`}, ""},
	} {
		out, _, err := n.berth(t, strings.Fields(tt.args)...)
		if err != nil {
			t.Errorf("%s: %v", tt.args, err)
		}
		for _, w := range tt.want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: %q is missing in\n%s", tt.args, w, out)
			}
		}
		if tt.not != "" && strings.Contains(out, tt.not) {
			t.Errorf("%s: %q should not be in\n%s", tt.args, tt.not, out)
		}
	}
}

func TestJSON(t *testing.T) {
	n := &node{}
	for _, args := range []string{"ps -o json", "images -o json", "version -o json", "pull x -o json"} {
		out, _, err := n.berth(t, strings.Fields(args)...)
		if err != nil || !json.Valid([]byte(out)) {
			t.Errorf("%s: %v\n%s", args, err, out)
		}
	}
	out, _, err := n.berth(t, "ps", "-a", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var pods []podRow
	if err := json.Unmarshal([]byte(out), &pods); err != nil || len(pods) != 1 || len(pods[0].Containers) != 2 || pods[0].IPs[0] != "10.0.0.2" {
		t.Errorf("%v %+v", err, pods)
	}
}

func TestExecExitCode(t *testing.T) {
	n := &node{}
	out, errOut, err := n.berth(t, "exec", "nginx", "ls", "-l")
	var code exitCode
	if !errors.As(err, &code) || code != 3 || out != "ls -l" || errOut != "warned" {
		t.Errorf("%v, %q, %q", err, out, errOut)
	}
	if _, _, err = n.berth(t, "exec", "init", "ls"); err == nil || plain(err) != "container is not running" {
		t.Errorf("got %v", err)
	}
	if _, _, err = n.berth(t, "exec", "nope", "ls"); err == nil || !strings.Contains(err.Error(), "no such object") {
		t.Errorf("got %v", err)
	}
}

func TestNoDaemon(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none")
	for _, args := range [][]string{{"ps"}, {"images"}, {"version"}, {"pull", "x"}, {"logs", "x"}, {"exec", "x", "ls"}, {"inspect", "x"}} {
		cmd := command()
		cmd.SetOut(io.Discard)
		cmd.SetArgs(append(args, "--socket", socket))
		if args[0] == "exec" { // flags after the container are the command's
			cmd.SetArgs(append([]string{"--socket", socket}, args...))
		}
		err := cmd.ExecuteContext(t.Context())
		if err == nil || !strings.Contains(err.Error(), "no daemon can be reached on "+socket+" (no such file or directory); start berthd") {
			t.Errorf("%s: %v", args[0], err)
		}
	}
}
