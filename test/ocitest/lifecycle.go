package ocitest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/test/pace"
)

func itoa(n int) string { return strconv.Itoa(n) }

// pollable makes a duplicate of a pty master whose reads have deadlines.
func pollable(t *testing.T, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	f.Close()
	return os.NewFile(uintptr(fd), "console")
}

func (s *suite) testTerminal(t *testing.T) {
	r := container(t, "line:", "tty:", "exit:4")
	r.Spec.Process.Terminal = true
	r.Spec.Process.User.UID = 1000
	r.Spec.Process.ConsoleSize = &specs.Box{Width: 81, Height: 25}
	c := s.create(r)
	p, err := c.Start(context.Background(), oci.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	if p.Console == nil {
		t.Fatal("no console")
	}
	s.onTerminal(t, started(t, c, p, pollable(t, p.Console)))
}

func (s *suite) testExecTerminal(t *testing.T) {
	r := container(t, "say:up", "sleep:")
	run := s.start(r)
	run.line()
	p := r.process("line:", "tty:", "exit:4")
	p.Terminal, p.ConsoleSize = true, &specs.Box{Width: 81, Height: 25}
	got, err := run.c.Exec(context.Background(), p, oci.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	s.onTerminal(t, started(t, run.c, got, pollable(t, got.Console)))
}

func (s *suite) onTerminal(t *testing.T, run *running) {
	t.Helper()
	if _, err := run.file.WriteString("typed\n"); err != nil {
		t.Fatal(err)
	}
	if got := run.line(); got != "typed" { // the echo
		t.Errorf("echo: %q", got)
	}
	if got := run.line(); got != "line: typed" {
		t.Errorf("answer: %q", got)
	}
	if got := run.line(); got != "tty: 81x25" {
		t.Errorf("terminal size: %q", got)
	}
	if ws := run.reap(); !ws.Exited() || ws.ExitStatus() != 4 {
		t.Errorf("wait status %#x", uint32(ws))
	}
}

func (s *suite) testExec(t *testing.T) {
	r := container(t, "say:up", "sleep:")
	run := s.start(r)
	run.line()
	for range 3 {
		p := r.process("say:hello", "env:B", "id:", "pid:", "read:/proc/self/cgroup", "exit:9")
		p.Env = append(p.Env, "B=c")
		p.User = specs.User{UID: 5, GID: 6}
		out, ws := run.exec(p).end()
		if !ws.Exited() || ws.ExitStatus() != 9 {
			t.Errorf("wait status %#x", uint32(ws))
		}
		expect(t, out, map[string]string{"env:B": "c", "id:": "5 6 []"})
		if !strings.HasPrefix(out, "hello\n") || strings.Contains(out, "pid: 1\n") {
			t.Errorf("output:\n%s", out)
		}
	}
	// The exit code of one that ends at once, many at a time.
	var all []*running
	for i := range 4 {
		all = append(all, run.exec(r.process("exit:"+itoa(i+1))))
	}
	for i, x := range all {
		if _, ws := x.end(); ws.ExitStatus() != i+1 {
			t.Errorf("exec %d: wait status %#x", i, uint32(ws))
		}
	}
	for name, x := range map[string]struct {
		change func(*specs.Process)
		kind   error
	}{
		"not in PATH":    {func(p *specs.Process) { p.Args = []string{"nosuch"} }, errdefs.ErrNotFound},
		"no such path":   {func(p *specs.Process) { p.Args = []string{"/no/such"} }, errdefs.ErrNotFound},
		"not executable": {func(p *specs.Process) { p.Args = []string{"/proc/version"} }, errdefs.ErrPermissionDenied},
		"no arguments":   {func(p *specs.Process) { p.Args = nil }, errdefs.ErrInvalidArgument},
	} {
		p := r.process()
		x.change(p)
		got, err := run.c.Exec(context.Background(), p, oci.Stdio{})
		if !errors.Is(err, x.kind) {
			t.Errorf("%s: %v, want kind %v", name, err, x.kind)
		}
		if err == nil {
			started(t, run.c, got, pipeEnd(t))
		}
	}
	if err := run.c.KillAll(); err != nil {
		t.Error(err)
	}
	if _, ws := run.end(); ws.Signal() != unix.SIGKILL {
		t.Errorf("wait status %#x", uint32(ws))
	}
	if _, err := run.c.Exec(context.Background(), r.process("say:x"), oci.Stdio{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("exec in a container that has ended: %v", err)
	}
}

func pipeEnd(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	return r
}

func (s *suite) testStartErrors(t *testing.T) {
	for name, x := range map[string]struct {
		args []string
		want string
		kind error
	}{
		"not in PATH":    {[]string{"nosuch"}, "nosuch", errdefs.ErrNotFound},
		"no such path":   {[]string{"/no/such"}, "/no/such", errdefs.ErrNotFound},
		"not executable": {[]string{"/etc/passwd"}, "", errdefs.ErrPermissionDenied},
	} {
		t.Run(name, func(t *testing.T) {
			r := container(t)
			r.Spec.Process.Args = x.args
			if err := os.WriteFile(filepath.Join(r.Rootfs.Lowers[0], "etc/passwd"), []byte("root:x:0:0::/:\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			c := s.create(r)
			_, err := c.Start(context.Background(), oci.Stdio{})
			if err == nil || !strings.Contains(err.Error(), x.want) || !errors.Is(err, x.kind) {
				t.Errorf("error %v, want %q of kind %v", err, x.want, x.kind)
			}
			if _, err := c.Start(context.Background(), oci.Stdio{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
				t.Errorf("second start: %v", err)
			}
		})
	}
}

// testCreateErrors: nothing is left behind (Run compares).
func (s *suite) testCreateErrors(t *testing.T) {
	for name, change := range map[string]func(*request){
		"no process":      func(r *request) { r.Spec.Process = nil },
		"cgroups path":    func(r *request) { r.Spec.Linux.CgroupsPath = "/a/../../b" },
		"work without":    func(r *request) { r.Rootfs.Upper = "" },
		"layer missing":   func(r *request) { r.Rootfs.Lowers = []string{"/no/such", "/nor/this"} },
		"unknown fd":      func(r *request) { r.bind("fd:nosuch") },
		"unknown image":   func(r *request) { r.bind("image:nosuch") },
		"source missing":  func(r *request) { r.bind("/no/such"); r.Spec.Mounts[len(r.Spec.Mounts)-1].Options[1] = "rshared" },
		"no linux at all": func(r *request) { r.Spec.Linux = nil },
	} {
		t.Run(name, func(t *testing.T) {
			r := container(t, "say:x")
			change(r)
			c, err := s.rt.Create(context.Background(), r.CreateRequest)
			if err == nil {
				t.Error("no error")
				_ = c.Delete()
			}
		})
	}
}

func (r *request) bind(source string) {
	r.Spec.Mounts = append(r.Spec.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: source, Options: []string{"rbind", "rprivate"}})
}

// testSignals: by the way that the supervisor takes.
func (s *suite) testSignals(t *testing.T) {
	run := s.start(container(t, "term:"))
	if got := run.line(); got != "ready" {
		t.Fatal(got)
	}
	send := func() error { return unix.PidfdSendSignal(int(run.p.PidFD.Fd()), unix.SIGTERM, nil, 0) }
	k, own := run.c.(oci.Signaler)
	if own {
		send = func() error { return k.SignalFirst(int(unix.SIGTERM)) }
	}
	if err := send(); err != nil {
		t.Fatal(err)
	}
	if _, ws := run.end(); !ws.Exited() || ws.ExitStatus() != 7 {
		t.Errorf("wait status %#x", uint32(ws))
	}
	if err := send(); own && !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("a signal to an ended container: %v", err)
	}
}

// testKillAll: processes that left the first one's session and outlive it too.
func (s *suite) testKillAll(t *testing.T) {
	r := container(t, "child:", "say:up", "sleep:")
	r.Spec.Linux.Namespaces = slices.DeleteFunc(r.Spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace })
	run := s.start(r)
	run.line()
	run.line()
	_ = unix.Kill(run.p.Pid, unix.SIGKILL)
	run.reap()
	if len(procs(t, r)) == 0 {
		t.Fatal("the child went with its parent: nothing to test")
	}
	if err := run.c.KillAll(); err != nil {
		t.Fatal(err)
	}
	// The child was reparented to us.
	for deadline := time.Now().Add(pace.Wait(5 * time.Second)); ; time.Sleep(5 * time.Millisecond) {
		if pid, _ := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid > 0 && len(procs(t, r)) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("still there: %v", procs(t, r))
		}
	}
	if err := run.c.KillAll(); err != nil {
		t.Errorf("again: %v", err)
	}
}

func procs(t *testing.T, r *request) []string {
	t.Helper()
	return strings.Fields(readCgroup(t, r, "cgroup.procs", "freezer", "cgroup.procs"))
}

func (s *suite) testPause(t *testing.T) {
	r := container(t, "say:up", "sleep:")
	run := s.start(r)
	run.line()
	frozen := func() bool {
		return strings.Contains(readCgroup(t, r, "cgroup.freeze", "freezer", "freezer.state"), "FROZEN") ||
			readCgroup(t, r, "cgroup.freeze", "freezer", "freezer.state") == "1"
	}
	if err := run.c.Pause(); err != nil {
		t.Fatal(err)
	}
	// Not every runtime waits for the kernel to stop the last thread.
	for deadline := time.Now().Add(pace.Wait(5 * time.Second)); !frozen(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not frozen")
		}
	}
	if err := run.c.Resume(); err != nil {
		t.Fatal(err)
	}
	if frozen() {
		t.Error("still frozen")
	}
	if got := run.exec(r.process("say:on")).output(); got != "on\n" {
		t.Errorf("exec after resume: %q", got)
	}
	// A frozen container dies all the same.
	if err := run.c.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := run.c.KillAll(); err != nil {
		t.Fatal(err)
	}
	if _, ws := run.end(); ws.Signal() != unix.SIGKILL {
		t.Errorf("wait status %#x", uint32(ws))
	}
}

func (s *suite) testUpdate(t *testing.T) {
	limit := func(t *testing.T, r *request) string {
		return readCgroup(t, r, "memory.max", "memory", "memory.limit_in_bytes")
	}
	pids := func(t *testing.T, r *request) string { return readCgroup(t, r, "pids.max", "pids", "pids.max") }
	one, two, three, n := int64(64<<20), int64(96<<20), int64(128<<20), int64(321)
	r := container(t, "say:up", "sleep:")
	r.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &one}
	r.Spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: &n}
	c := s.create(r)
	if err := c.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &two}}); err != nil {
		t.Fatalf("before the start: %v", err)
	}
	run := startWith(t, c, oci.Stdio{})
	run.line()
	if got := limit(t, r); got != itoa(int(two)) || pids(t, r) != "321" {
		t.Errorf("memory %s, pids %s", got, pids(t, r))
	}
	if err := c.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &three}}); err != nil {
		t.Fatal(err)
	}
	if got := limit(t, r); got != itoa(int(three)) || pids(t, r) != "321" {
		t.Errorf("memory %s, pids %s", got, pids(t, r))
	}
	// The devices are as they were.
	if got := run.exec(r.process("read:/dev/null")).output(); got != "read:/dev/null \n" && got != "read:/dev/null\n" {
		t.Errorf("after the update: %q", got)
	}
}

func (s *suite) testOOMKills(t *testing.T) {
	limit := int64(48 << 20)
	r := container(t, "say:up", "eat:200")
	r.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
	c := s.create(r)
	if n, err := c.OOMKills(); n != 0 || err != nil {
		t.Errorf("before the start: %d, %v", n, err)
	}
	run := startWith(t, c, oci.Stdio{})
	if _, ws := run.end(); ws.Signal() != unix.SIGKILL {
		t.Fatalf("wait status %#x", uint32(ws))
	}
	if n, err := c.OOMKills(); n == 0 || err != nil {
		t.Errorf("after it: %d, %v", n, err)
	}
}

func (s *suite) testDeleteUnstarted(t *testing.T) {
	r := container(t, "say:x")
	c := s.create(r)
	if err := c.KillAll(); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := c.Delete(); err != nil {
			t.Error(err)
		}
	}
	if _, err := c.Start(context.Background(), oci.Stdio{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("start after delete: %v", err)
	}
}
