package conformance

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/pace"
)

// externals are the runtimes of the distribution that are tried as handlers.
var externals = []struct {
	name, path string
	args       string // TOML
}{
	{"runc", "/usr/sbin/runc", "[]"},
	{"crun", "/usr/bin/crun", `["--cgroup-manager=cgroupfs"]`},
}

// configureExternals gives the daemon tables for them, and for two that do not work.
func configureExternals() error {
	hangs := filepath.Join(node.Dir, "hangs")
	if err := os.WriteFile(hangs, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o700); err != nil {
		return err
	}
	tables := fmt.Sprintf("[runtimes.missing]\npath = \"/no/such/runtime\"\n[runtimes.hangs]\npath = %q\ntimeout = \"1s\"\n", hangs)
	for _, e := range externals {
		tables += fmt.Sprintf("[runtimes.%s]\npath = %q\nargs = %s\n", e.name, e.path, e.args)
	}
	return node.Config(tables)
}

// needExternal skips when the runtime is not installed or takes no such host.
func needExternal(t *testing.T, name, path string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		t.Skipf("%s is not installed: %v", name, err)
	}
	var v2 unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup/unified", &v2); name == "crun" && err == nil && v2.Type == unix.CGROUP2_SUPER_MAGIC {
		b, err := os.ReadFile("/sys/fs/cgroup/unified/cgroup.controllers")
		if s := strings.TrimSpace(string(b)); err == nil && s != "" {
			t.Skip("crun takes no hybrid host whose cgroup v2 has controllers, and this one has: " + s)
		}
	}
}

// ranBy fails the test unless the handler's own runtime knows the container.
func ranBy(t *testing.T, name, container string) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(node.Dir, "run/external", name, "state", container)); err != nil {
		t.Errorf("%s did not run it: %v", name, err)
	}
}

// nothingOf fails the test when a handler keeps something.
func nothingOf(t *testing.T, name string) {
	t.Helper()
	for _, d := range []string{"state", "bundles"} {
		dir := filepath.Join(node.Dir, "run/external", name, d)
		for deadline := time.Now().Add(pace.Wait(5 * time.Second)); ; time.Sleep(20 * time.Millisecond) {
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			if len(entries) == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("left in %s: %v", dir, entries)
				break
			}
		}
	}
}

func onHandler(t *testing.T, name string, change func(*cri.PodSandboxConfig)) *pod {
	t.Helper()
	p := preparePod(t, change)
	r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config, RuntimeHandler: name})
	if err != nil {
		t.Fatal(err)
	}
	p.id = r.PodSandboxId
	return p
}

func sharedPID(c *cri.PodSandboxConfig) {
	c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
}

// TestExternalHandlers lives a pod on each external runtime, with the daemon
// killed in the middle.
func TestExternalHandlers(t *testing.T) {
	for _, e := range externals {
		t.Run(e.name, func(t *testing.T) {
			needExternal(t, e.name, e.path)
			t.Cleanup(func() { nothingOf(t, e.name) }) // after the pod's removal
			p := onHandler(t, e.name, nil)
			c := run(t, p, "sleep", "1000")
			ranBy(t, e.name, c)
			if out, errOut, code := execSync(t, c, "/bin/both", "to out", "to err"); out != "to out\n" || errOut != "to err\n" || code != 0 {
				t.Errorf("exec: %q %q %d", out, errOut, code)
			}
			if _, _, code := execSync(t, c, "/bin/exit", "42"); code != 42 {
				t.Errorf("exec: code %d", code)
			}
			_, err := node.Runtime.ExecSync(ctx(t), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"/no/such"}})
			if err == nil || !strings.Contains(err.Error(), "/no/such") {
				t.Errorf("exec of a missing program: %v", err)
			}
			failing := run(t, p, "exit", "7")
			if s := waitExit(t, failing); s.ExitCode != 7 {
				t.Errorf("exit code: %v", s)
			}
			echo := run(t, p, "echo", "into the log")
			waitExit(t, echo)
			if l := logs(t, echo); len(l) != 1 || l[0].content != "into the log" {
				t.Errorf("log: %v", l)
			}
			short := run(t, p, "exit-after", "300", "42")
			created := create(t, p, nil)
			restart(t, func() { time.Sleep(600 * time.Millisecond) })
			if s := containerStatus(t, short); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 42 {
				t.Errorf("exit while the daemon was down: %v code %d", s.State, s.ExitCode)
			}
			start(t, created)
			ranBy(t, e.name, created)
			if out, _, code := execSync(t, c, "/bin/echo", "still here"); code != 0 || out != "still here\n" {
				t.Errorf("exec after the restart: %q %d", out, code)
			}
			stop(t, c, 10)
			if s := containerStatus(t, c); s.ExitCode != 0 { // what the program does at SIGTERM
				t.Errorf("stopped: code %d", s.ExitCode)
			}
			bad := create(t, p, func(c *cri.ContainerConfig) { c.Command, c.Args = []string{"/no/such"}, nil })
			_, err = node.Runtime.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: bad})
			if err == nil || !strings.Contains(err.Error(), "/no/such") {
				t.Errorf("start of a missing program: %v", err)
			}
		})
	}
}

func TestExternalHandlersStreams(t *testing.T) {
	for _, e := range externals {
		t.Run(e.name, func(t *testing.T) {
			needExternal(t, e.name, e.path)
			t.Cleanup(func() { nothingOf(t, e.name) })
			p := onHandler(t, e.name, sharedPID)
			c := started(t, p, func(c *cri.ContainerConfig) {
				c.Args, c.Stdin, c.StdinOnce = []string{"cat"}, true, true
				c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
			})
			s := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/prog", "tty", "wait"}, Stdin: true, Stdout: true, Tty: true}), true, true, false, true)
			if _, err := io.WriteString(s.resizeOut, `{"Width": 97, "Height": 31}`); err != nil {
				t.Fatal(err)
			}
			time.Sleep(200 * time.Millisecond)
			if _, err := io.WriteString(s.in, "go\n"); err != nil {
				t.Fatal(err)
			}
			if out, _ := io.ReadAll(s.out); !strings.Contains(string(out), "97") || !strings.Contains(string(out), "31") {
				t.Errorf("terminal says %q", out)
			}
			r, err := node.Runtime.Attach(ctx(t), &cri.AttachRequest{ContainerId: c, Stdin: true, Stdout: true})
			if err != nil {
				t.Fatal(err)
			}
			s = open(t, r.Url, true, true, false, false)
			if _, err := io.WriteString(s.in, "through attach\n"); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 64)
			if n, err := s.out.Read(buf); err != nil || string(buf[:n]) != "through attach\n" {
				t.Fatalf("%q, %v", buf[:n], err)
			}
			_ = s.in.Close()
			if st := waitExit(t, c); st.ExitCode != 0 {
				t.Errorf("code %d", st.ExitCode)
			}
		})
	}
}

// When the supervisor dies and the daemon with it, nobody holds its external
// containers, and they go: their processes, their mounts, what the runtime knows of them.
func TestExternalContainersOfALostSupervisor(t *testing.T) {
	for _, e := range externals {
		t.Run(e.name, func(t *testing.T) {
			needExternal(t, e.name, e.path)
			p := onHandler(t, e.name, nil)
			c := run(t, p, "sleep", "1000")
			ranBy(t, e.name, c)
			restart(t, func() {
				if err := syscall.Kill(node.SupervisorPid(), syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			})
			if s := waitExit(t, c); s.ExitCode != 255 {
				t.Errorf("status: %v", s)
			}
			nothingOf(t, e.name)
			for _, h := range hierarchies(t) {
				_ = filepath.WalkDir(h, func(path string, d os.DirEntry, err error) error {
					if err == nil && filepath.Base(path) == c {
						t.Errorf("cgroup left: %s", path)
					}
					return nil
				})
			}
		})
	}
}

// A handler that does not work says why, and keeps nobody else waiting.
func TestExternalHandlersThatDoNotWork(t *testing.T) {
	r, err := node.Runtime.Status(ctx(t), &cri.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]*cri.RuntimeHandlerFeatures{}
	for _, h := range r.RuntimeHandlers {
		names[h.Name] = h.Features
	}
	for _, want := range []string{"", "berth", "runc", "crun", "missing"} {
		if names[want] == nil {
			t.Errorf("status has no handler %q", want)
		}
	}
	if names["missing"].GetRecursiveReadOnlyMounts() {
		t.Error("a runtime that is not there has features")
	}
	p := onHandler(t, "missing", nil)
	_, err = node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.config, Config: containerConfig([]string{"sleep", "1"})})
	wantCode(t, err, codes.FailedPrecondition, "/no/such/runtime")

	slow := onHandler(t, "hangs", nil)
	c := create(t, slow, nil)
	late := make(chan error, 1)
	go func() {
		_, err := node.Runtime.StartContainer(context.Background(), &cri.StartContainerRequest{ContainerId: c})
		late <- err
	}()
	other := run(t, runPod(t, nil), "exit", "3")
	if s := waitExit(t, other); s.ExitCode != 3 {
		t.Errorf("beside a runtime that hangs: %v", s)
	}
	// A command that hangs makes nothing, and is no hindrance to removal either.
	if err := <-late; err == nil || !strings.Contains(err.Error(), `handler "hangs"`) || !strings.Contains(err.Error(), "create: did not end within 1s") {
		t.Errorf("start by a runtime that hangs: %v", err)
	}
	_, err = node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: preparePod(t, nil).config, RuntimeHandler: "nosuch"})
	wantCode(t, err, codes.InvalidArgument, "runtimes.nosuch")
}
