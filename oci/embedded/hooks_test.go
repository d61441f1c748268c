package embedded

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/test/pace"
)

// bundle gives a container the directory of a bundle with its root.
func (c *container) bundle() string {
	dir := c.t.TempDir()
	if err := os.Rename(c.req.Rootfs.Lowers[0], dir+"/rootfs"); err != nil {
		c.t.Fatal(err)
	}
	c.req.Rootfs, c.req.Bundle = oci.Rootfs{}, dir
	c.req.Spec.Root.Path = dir + "/rootfs"
	return dir
}

// script is a hook that is a shell script of the host, writing to $log.
func hookScript(t testing.TB, dir, name, body string) specs.Hook {
	t.Helper()
	path := filepath.Join(dir, name+".sh")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return specs.Hook{Path: path, Args: []string{name}, Env: []string{"log=" + dir + "/log", "PATH=/usr/bin:/bin"}}
}

// TestHooks: all six points in their order, with the state on stdin, each where
// the specification wants it.
func TestHooks(t *testing.T) {
	r := runtimeFor(t)
	for _, user := range []bool{false, true} {
		t.Run(fmt.Sprint("user namespace ", user), func(t *testing.T) {
			c := newContainer(t, "read:/etc/hooked", "fds:", "mounts:", "read:/tmp/env")
			if user {
				c = newUserContainer(t, "read:/etc/hooked", "fds:", "mounts:", "read:/tmp/env")
			}
			dir := c.bundle()
			if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dir+"/log", nil, 0o666); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(dir+"/log", 0o666); err != nil {
				t.Fatal(err)
			}
			note := `s=$(cat); p=$(echo "$s" | sed 's/.*"pid":\([0-9]*\).*/\1/'); `
			c.req.Spec.Annotations = map[string]string{"a": "b"}
			c.req.Spec.Hooks = &specs.Hooks{
				//lint:ignore SA1019 prestart is deprecated and still in use
				Prestart:      []specs.Hook{hookScript(t, dir, "prestart", note+`echo "$0 $s $(readlink /proc/$p/ns/net) $(env | sort | tr '\n' ' ')" >>$log`)},
				CreateRuntime: []specs.Hook{hookScript(t, dir, "createRuntime", note+`echo "$0 $(readlink /proc/self/ns/mnt) $(readlink /proc/$p/ns/mnt)" >>$log`)},
				// In the container's namespaces, with the host's tree: it changes the root,
				// which is its working directory.
				CreateContainer: []specs.Hook{hookScript(t, dir, "createContainer", note+`echo "$0 $(hostname) $(readlink /proc/self/ns/mnt)" >>$log; mount -t tmpfs hook ./etc && echo yes >`+dir+`/rootfs/etc/hooked`)},
				StartContainer:  []specs.Hook{{Path: "/bin/probe", Args: []string{"probe", "write:/tmp/started", "id:"}, Env: []string{"A=b"}}, {Path: "/bin/probe", Args: []string{"probe", "save:/tmp/env,PATH"}}},
				Poststart:       []specs.Hook{hookScript(t, dir, "poststart", note+`echo "$0 $s" >>$log`)},
				Poststop:        []specs.Hook{hookScript(t, dir, "poststop1", "exit 3"), hookScript(t, dir, "poststop2", note+`echo "$0 $s" >>$log`)},
			}
			out := c.output(r)
			expect(t, out, map[string]string{"read:/etc/hooked": "yes|", "fds:": "0,1,2", "read:/tmp/env": "/bin:/usr/bin"})
			if strings.Contains(value(t, out, "mounts:"), dir) {
				t.Errorf("a mount of the host is in the container: %s", value(t, out, "mounts:"))
			}
			if _, err := os.Stat(dir + "/rootfs/tmp/started"); err != nil {
				t.Errorf("startContainer hook: %v", err)
			}
			checkHookLog(t, c, dir)
		})
	}
}

func checkHookLog(t *testing.T, c *container, dir string) {
	b, err := os.ReadFile(dir + "/log")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	want := []string{"prestart", "createRuntime", "createContainer", "poststart"}
	if len(lines) != len(want) {
		t.Fatalf("log:\n%s", b)
	}
	for i, l := range lines {
		if !strings.HasPrefix(l, dir+"/"+want[i]+".sh ") {
			t.Errorf("line %d: %s, want %s", i, l, want[i])
		}
	}
	state := func(line string) (s specs.State) {
		if err := json.NewDecoder(strings.NewReader(line[strings.Index(line, "{"):])).Decode(&s); err != nil {
			t.Errorf("state of %q: %v", line, err)
		}
		return s
	}
	for i, status := range map[int]specs.ContainerState{0: specs.StateCreating, 3: specs.StateRunning} {
		s := state(lines[i])
		if s.ID != string(c.req.ID) || s.Status != status || s.Pid <= 1 || s.Bundle != dir || s.Annotations["a"] != "b" || s.Version != specs.Version {
			t.Errorf("state of %s: %+v", want[i], s)
		}
	}
	// The environment is the hook's alone, and the shell's.
	for _, kv := range strings.Fields(lines[0][strings.LastIndex(lines[0], "] ")+2:]) {
		if name, _, _ := strings.Cut(kv, "="); !slices.Contains([]string{"PATH", "log", "PWD", "SHLVL", "_", "OLDPWD"}, name) {
			t.Errorf("environment of a hook: %s", kv)
		}
	}
	own, _ := os.Readlink("/proc/self/ns/mnt")
	if f := strings.Fields(lines[1]); f[1] != own || f[2] == own {
		t.Errorf("createRuntime: mount namespaces %v, ours is %s", f[1:], own)
	}
	if f := strings.Fields(lines[2]); len(f) < 3 || f[1] != "berth-test" || f[2] == own {
		t.Errorf("createContainer: %v", f)
	}
}

// TestHookFails: the failed hook's point, number, path and output are in the
// error, and no process is left.
func TestHookFails(t *testing.T) {
	r := runtimeFor(t)
	dir := t.TempDir()
	bad := hookScript(t, dir, "bad", "echo the reason >&2; exit 4")
	good := hookScript(t, dir, "good", "cat >/dev/null")
	slow := hookScript(t, dir, "slow", "sleep 100 & wait")
	slow.Timeout = ptr(1)
	inside := specs.Hook{Path: "/bin/probe", Args: []string{"probe", "exit:5"}}
	for name, x := range map[string]struct {
		hooks *specs.Hooks
		want  string
	}{
		"createRuntime":   {&specs.Hooks{CreateRuntime: []specs.Hook{good, bad}}, `hooks.createRuntime[1] "` + bad.Path + `": exit status 4: the reason`},
		"createContainer": {&specs.Hooks{CreateContainer: []specs.Hook{bad}}, `hooks.createContainer[0] "` + bad.Path + `": exit status 4: the reason`},
		"startContainer":  {&specs.Hooks{StartContainer: []specs.Hook{inside}}, `hooks.startContainer[0] "/bin/probe": exit status 5`},
		"startMissing":    {&specs.Hooks{StartContainer: []specs.Hook{{Path: "/no/such"}}}, `hooks.startContainer[0] "/no/such": `},
		"poststart":       {&specs.Hooks{Poststart: []specs.Hook{bad}}, `hooks.poststart[0] "` + bad.Path + `": exit status 4: the reason`},
		"timeout":         {&specs.Hooks{CreateRuntime: []specs.Hook{slow}}, `hooks.createRuntime[0] "` + slow.Path + `": not done after its timeout of 1 s`},
		"missing":         {&specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/no/such"}}}, `hooks.createRuntime[0] "/no/such": fork/exec /no/such: no such file`},
	} {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t, "hold:")
			c.bundle()
			c.req.Spec.Hooks = x.hooks
			got := c.create(r)
			_, err := got.Start(context.Background(), oci.Stdio{})
			if err == nil || !strings.Contains(err.Error(), x.want) {
				t.Errorf("error %v, want %q", err, x.want)
			}
			if pids, err := got.(*Container).Processes(); err != nil || len(pids) > 0 {
				t.Errorf("processes left: %v %v", pids, err)
			}
		})
	}
}

func TestPoststopHooks(t *testing.T) {
	r := runtimeFor(t)
	dir := t.TempDir()
	c := newContainer(t, "id:")
	c.req.Spec.Hooks = &specs.Hooks{Poststop: []specs.Hook{hookScript(t, dir, "fails", "exit 1"), hookScript(t, dir, "works", `cat >>$log`)}}
	got, err := r.Create(context.Background(), c.req)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // once, however often it is deleted
		if err := got.Delete(); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(dir + "/log")
	var s specs.State
	if uerr := json.Unmarshal(b, &s); err != nil || uerr != nil || s.Status != specs.StateStopped {
		t.Errorf("state %q %v %v", b, err, uerr)
	}
}

// TestCreated: a container of one process, seen by another one from created to
// deleted.
func TestCreated(t *testing.T) {
	r := runtimeFor(t)
	for _, user := range []bool{false, true} {
		t.Run(fmt.Sprint("user namespace ", user), func(t *testing.T) {
			c := newContainer(t, "pid:", "fds:", "hostname:", "hold:")
			if user {
				c = newUserContainer(t, "pid:", "fds:", "hostname:", "hold:")
			}
			made, p, out, dir := c.prepare(t, r)
			saved, err := made.Save()
			if err != nil {
				t.Fatal(err)
			}
			b, err := json.Marshal(saved)
			if err != nil {
				t.Fatal(err)
			}
			var again Saved
			if err := json.Unmarshal(b, &again); err != nil {
				t.Fatal(err)
			}
			other, err := r.Reopen(again)
			if err != nil {
				t.Fatal(err)
			}
			defer other.closeFiles()
			if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.Pid)); strings.Contains(link, "probe") {
				t.Error("the program runs before the start")
			}
			gate, err := OpenGate(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := other.Release(context.Background(), gate); err != nil {
				t.Fatal(err)
			}
			gate.Close()
			if !other.Running() {
				t.Error("not running")
			}
			if _, err := OpenGate(dir); !errors.Is(err, errdefs.ErrFailedPrecondition) {
				t.Errorf("a second start: %v", err)
			}
			run := &running{t: t, c: other, p: p, out: out}
			got, ws, err := run.exec(process(c.req.Spec.Process, "pid:", "hostname:", "read:/proc/1/cmdline", "status:Seccomp"))
			if err != nil || ws.ExitStatus() != 0 {
				t.Fatal(err, ws)
			}
			expect(t, got, map[string]string{"hostname:": "berth-test"})
			tty := process(c.req.Spec.Process, "winsize:")
			tty.Terminal = true
			x, err := other.Exec(context.Background(), tty, oci.Stdio{})
			if err != nil {
				t.Error("terminal of a container that was found again:", err)
			} else {
				_, _ = kernel.Reap(x.Pid)
				x.Console.Close()
				x.PidFD.Close()
			}
			first := make([]byte, 4096)
			n := 0
			for !strings.Contains(string(first[:n]), "hostname:") {
				k, err := out.Read(first[n:])
				if err != nil {
					t.Fatal(err)
				}
				n += k
			}
			if err := other.Signal(int(unix.SIGKILL)); err != nil {
				t.Error(err)
			}
			rest, ws := run.wait()
			text := string(first[:n]) + rest
			if !ws.Signaled() {
				t.Errorf("wait status %#x", ws)
			}
			expect(t, text, map[string]string{"pid:": "1", "fds:": "0,1,2", "hostname:": "berth-test"})
			late, err := r.Reopen(again)
			if err != nil {
				t.Fatal(err)
			}
			if late.Running() || !errors.Is(late.Signal(9), errdefs.ErrFailedPrecondition) {
				t.Error("an ended container is found running")
			}
			if err := errors.Join(late.KillAll(), late.Delete(), late.Delete()); err != nil {
				t.Error(err)
			}
		})
	}
}

// prepare makes a created container.
func (c *container) prepare(t *testing.T, r *Runtime) (*Container, oci.Process, *os.File, string) {
	t.Helper()
	made := c.create(r).(*Container)
	dir := t.TempDir()
	gate, err := MakeGate(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer gate.Close()
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	p, err := made.Prepare(context.Background(), oci.Stdio{Out: w, Err: w}, gate)
	if err != nil {
		out.Close()
		t.Fatal(err)
	}
	return made, p, out, dir
}

// TestCreatedErrors: what can be known before the start is known at create; what
// fails after the gate is told to who starts.
func TestCreatedErrors(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t)
	c.req.Spec.Process.Args = []string{"nosuch"}
	dir := t.TempDir()
	gate, err := MakeGate(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.create(r).(*Container).Prepare(context.Background(), oci.Stdio{}, gate)
	gate.Close()
	if !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), `exec: "nosuch": executable file not found in $PATH`) {
		t.Errorf("no such program: %v", err)
	}

	c = newContainer(t)
	write(t, c.req.Rootfs.Lowers[0]+"/bin/text", "neither a script nor a program")
	if err := os.Chmod(c.req.Rootfs.Lowers[0]+"/bin/text", 0o755); err != nil {
		t.Fatal(err)
	}
	c.req.Spec.Process.Args = []string{"/bin/text"}
	made, p, out, dir := c.prepare(t, r)
	out.Close()
	gate, err = OpenGate(dir)
	if err != nil {
		t.Fatal(err)
	}
	err = made.Release(context.Background(), gate)
	gate.Close()
	if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), `exec: "/bin/text": exec format error`) {
		t.Errorf("no program: %v", err)
	}
	_, _ = kernel.Reap(p.Pid)
	p.PidFD.Close()
}

// TestCreatorDies: without a gate, a process whose runtime has died ends.
func TestCreatorDies(t *testing.T) {
	r := runtimeFor(t)
	wait, gate, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s := newScript(nil)
	in := s.fd(wait)
	s.hold(in)
	ch, err := r.spawn(s, launch{stdio: [3]*os.File{r.null, r.null, r.null}})
	wait.Close()
	if err != nil {
		t.Fatal(err)
	}
	if m, err := ch.next(); err != nil || m.kind != msgHold {
		t.Fatal(m, err)
	}
	gate.Close()
	time.AfterFunc(pace.Wait(10*time.Second), func() { _ = unix.Kill(ch.Pid, unix.SIGKILL) }).Stop()
	if _, err := ch.next(); err == nil || !strings.Contains(err.Error(), "the runtime is gone") {
		t.Errorf("error %v", err)
	}
}

// TestExtraFiles: descriptors 3 and up of the process, and no others.
func TestExtraFiles(t *testing.T) {
	r := runtimeFor(t)
	name := t.TempDir() + "/file"
	a, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	c := newContainer(t, "fds:", "hold:")
	made := c.create(r)
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := made.Start(context.Background(), oci.Stdio{Out: w, Extra: []*os.File{a, a}})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	run := &running{t: t, c: made, p: p, out: out}
	defer run.stop()
	b := make([]byte, 4096)
	n, _ := out.Read(b)
	expect(t, string(b[:n]), map[string]string{"fds:": "0,1,2,3=" + name + ",4=" + name})
	out2, w2, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	x, err := made.Exec(context.Background(), process(c.req.Spec.Process, "fds:"), oci.Stdio{Out: w2, Extra: []*os.File{a}})
	w2.Close()
	if err != nil {
		t.Fatal(err)
	}
	n, _ = out2.Read(b)
	out2.Close()
	_, _ = kernel.Reap(x.Pid)
	x.PidFD.Close()
	expect(t, string(b[:n]), map[string]string{"fds:": "0,1,2,3=" + name})
}

// TestReopenRefused: a container whose spec is not taken any more can still be
// ended and deleted.
func TestReopenRefused(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "hold:")
	run := c.start(r)
	saved, err := run.c.(*Container).Save()
	if err != nil {
		t.Fatal(err)
	}
	s := *saved.Spec
	s.Hooks = &specs.Hooks{Poststart: []specs.Hook{{Path: "relative"}}}
	saved.Spec = &s
	found, err := r.Reopen(saved)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := found.Exec(context.Background(), process(c.req.Spec.Process, "id:"), oci.Stdio{}); err == nil || !strings.Contains(err.Error(), "hooks.poststart[0].path") {
		t.Errorf("exec: %v", err)
	}
	if err := found.KillAll(); err != nil {
		t.Fatal(err)
	}
	run.wait()
	if err := found.Delete(); err != nil {
		t.Fatal(err)
	}
}
