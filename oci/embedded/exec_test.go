package embedded

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

func process(base *specs.Process, args ...string) *specs.Process {
	p := *base
	p.Args = append([]string{"probe"}, args...)
	return &p
}

// TestExecIdentity: exec gets the namespaces, cgroup, filter and limits of the
// container (I5, CVE-2019-10144).
func TestExecIdentity(t *testing.T) {
	r := runtimeFor(t)
	own, _ := os.Readlink("/proc/self/ns/pid")
	for _, mode := range []string{"new", "host"} {
		t.Run(mode, func(t *testing.T) {
			c := newContainer(t, "hold:")
			c.req.Spec.Process.OOMScoreAdj = ptr(500)
			c.req.Spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
				{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno},
			}}
			if mode == "host" {
				c.req.Spec.Linux.Namespaces = c.req.Spec.Linux.Namespaces[1:]
			}
			run := c.start(r)
			args := []string{"pid:", "hostname:", "status:Seccomp", "status:CapEff", "status:NoNewPrivs", "mkdir:/tmp/x", "read:/proc/self/oom_score_adj", "fds:", "id:", "cwd:", "link:/proc/self/ns/pid", "read:/proc/self/cgroup"}
			p := process(c.req.Spec.Process, args...)
			p.User, p.Cwd = specs.User{UID: 42, GID: 43}, "/tmp"
			out, ws, err := run.exec(p)
			if err != nil || ws.ExitStatus() != 0 {
				t.Fatal(err, ws)
			}
			expect(t, out, map[string]string{
				"hostname:": "berth-test", "status:Seccomp": "2", "status:CapEff": "0000000000000000", "status:NoNewPrivs": "1",
				"mkdir:/tmp/x": "error: mkdir /tmp/x: operation not permitted", "read:/proc/self/oom_score_adj": "500|", "fds:": "0,1,2", "id:": "42 43 []", "cwd:": "/tmp",
			})
			for _, k := range []string{"mnt", "net", "ipc", "uts", "pid", "cgroup"} {
				a, err := os.Readlink("/proc/" + itoa(run.p.Pid) + "/ns/" + k)
				if k == "pid" && value(t, out, "link:/proc/self/ns/pid") != a {
					t.Errorf("pid namespace differs from %q (%v)", a, err)
				}
			}
			if strings.Contains(value(t, out, "read:/proc/self/cgroup"), "..") {
				t.Error("exec is not in the container's cgroup")
			}
			if now, _ := os.Readlink("/proc/thread-self/ns/pid_for_children"); now != own {
				t.Error("this thread kept the container's pid namespace")
			}
		})
	}
}

func TestExecErrors(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "hold:")
	got := c.create(r)
	p := process(c.req.Spec.Process)
	if _, err := got.Exec(context.Background(), p, oci.Stdio{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("exec before start: %v", err)
	}
	proc, err := got.Start(context.Background(), oci.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	run := &running{t: t, c: got, p: proc, out: os.NewFile(^uintptr(0), "")}
	for _, x := range []struct {
		want string
		kind error
		f    func(p *specs.Process)
	}{
		{`exec: "nosuch": executable file not found in $PATH`, errdefs.ErrNotFound, func(p *specs.Process) { p.Args = []string{"nosuch"} }},
		{`process.cwd "/nosuch": no such file`, errdefs.ErrInvalidArgument, func(p *specs.Process) { p.Cwd = "/nosuch" }},
		{`process.cwd "/proc/self/fd/5": too many`, errdefs.ErrInvalidArgument, func(p *specs.Process) { p.Cwd = "/proc/self/fd/5" }},
		{"process.args", errdefs.ErrInvalidArgument, func(p *specs.Process) { p.Args = nil }},
		{"process.cwd", errdefs.ErrInvalidArgument, func(p *specs.Process) { p.Cwd = "tmp" }},
	} {
		q := *p
		x.f(&q)
		_, err := got.Exec(context.Background(), &q, oci.Stdio{})
		if err == nil || !strings.Contains(err.Error(), x.want) || !errors.Is(err, x.kind) {
			t.Errorf("error %v, want %q of kind %v", err, x.want, x.kind)
		}
	}
	_ = unix.Kill(proc.Pid, unix.SIGKILL)
	if _, err := kernel.Reap(proc.Pid); err != nil {
		t.Error(err)
	}
	run.p.PidFD.Close()
	if _, err := got.Exec(context.Background(), p, oci.Stdio{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("exec after the end: %v", err)
	}
}

// readTerminal reads until all holders of the terminal are gone.
func readTerminal(t *testing.T, f *os.File) string {
	t.Helper()
	b, err := io.ReadAll(f)
	if err != nil && !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	return strings.ReplaceAll(string(b), "\r\n", "\n")
}

func TestTerminal(t *testing.T) {
	r := runtimeFor(t)
	args := []string{"link:/proc/self/fd/0", "winsize:", "open:/dev/tty", "stat:/dev/console", "ls:/dev/pts", "id:"}
	c := newContainer(t, args...)
	c.req.Spec.Process.Terminal = true
	c.req.Spec.Process.ConsoleSize = &specs.Box{Height: 33, Width: 77}
	canary := t.TempDir()
	img := c.req.Rootfs.Lowers[0]
	if err := os.Symlink(canary+"/console", img+"/dev/console"); err != nil {
		t.Fatal(err)
	}
	run := c.start(r)
	out := readTerminal(t, run.p.Console)
	run.reap()
	expect(t, out, map[string]string{"link:/proc/self/fd/0": "/dev/pts/0", "winsize:": "33x77", "open:/dev/tty": "ok", "stat:/dev/console": "20620 136:0 0", "ls:/dev/pts": "0,ptmx"})
	if left, _ := os.ReadDir(canary); len(left) > 0 {
		t.Errorf("console on the host: %v", left)
	}

	c = newContainer(t, "hold:")
	run = c.start(r)
	p := process(c.req.Spec.Process, args...)
	p.Terminal, p.ConsoleSize = true, &specs.Box{Height: 5, Width: 6}
	p.User.UID = 1000
	proc, err := run.c.Exec(context.Background(), p, oci.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Console.Close()
	defer proc.PidFD.Close()
	out = readTerminal(t, proc.Console)
	if _, err := kernel.Reap(proc.Pid); err != nil {
		t.Error(err)
	}
	expect(t, out, map[string]string{"link:/proc/self/fd/0": "/dev/pts/0", "winsize:": "5x6", "open:/dev/tty": "ok", "id:": "1000 0 []"})
}

func TestOOMUpdatePauseKill(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "eat:268435456")
	c.req.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(32 << 20)), Swap: ptr(int64(32 << 20))}
	run := c.start(r)
	if out, ws := run.wait(); !ws.Signaled() || ws.Signal() != unix.SIGKILL {
		t.Fatalf("status %#x: %s", uint32(ws), out)
	}
	if n, err := run.c.OOMKills(); err != nil || n != 1 {
		t.Errorf("OOM kills %d %v, want 1", n, err)
	}

	c = newContainer(t, "hold:")
	run = c.start(r)
	if err := run.c.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := run.c.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := run.c.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := run.c.KillAll(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { run.reap(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatal("a frozen container outlived KillAll")
	}
}

// TestSequentialLives: nothing accumulates over many lives (runtimeFor compares).
func TestSequentialLives(t *testing.T) {
	r := runtimeFor(t)
	base := newContainer(t)
	base.req.Rootfs.Volatile = false // its directories are used again
	for range 50 {
		c := *base
		s := *base.req.Spec
		l := *s.Linux
		s.Linux = &l
		p := *s.Process
		p.Args = []string{"true"}
		s.Process = &p
		c.req.Spec = &s
		l.CgroupsPath = cgroupRoot + "/life-" + itoa(int(serial.Add(1)))
		got, err := r.Create(context.Background(), c.req)
		if err != nil {
			t.Fatal(err)
		}
		proc, err := got.Start(context.Background(), oci.Stdio{})
		if err != nil {
			t.Fatal(err)
		}
		if ws, err := kernel.Reap(proc.Pid); err != nil || ws != 0 {
			t.Fatal(ws, err)
		}
		proc.PidFD.Close()
		if err := errors.Join(got.Delete(), got.Delete()); err != nil {
			t.Fatal(err)
		}
	}
}
