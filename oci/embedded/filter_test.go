package embedded

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded/seccomp"
)

// agent answers mkdir(2) of one process after another with EEXIST, and returns
// the states that came with the listeners.
type agent struct {
	path   string
	states chan specs.ContainerProcessState
}

func newAgent(t *testing.T) *agent {
	t.Helper()
	a := &agent{path: t.TempDir() + "/agent", states: make(chan specs.ContainerProcessState, 8)}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: a.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); all.Wait() })
	all.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			all.Go(func() { a.serve(t, conn) })
		}
	})
	return a
}

func (a *agent) serve(t *testing.T, conn *net.UnixConn) {
	defer conn.Close()
	text, oob := make([]byte, 1<<16), make([]byte, 64)
	n, oobn, _, _, err := conn.ReadMsgUnix(text, oob)
	if err != nil {
		t.Error(err)
		return
	}
	var st specs.ContainerProcessState
	msgs, err1 := unix.ParseSocketControlMessage(oob[:oobn])
	if err := errors.Join(err1, json.Unmarshal(text[:n], &st)); err != nil || len(msgs) != 1 {
		t.Error(err, len(msgs))
		return
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		t.Error(err, fds)
		return
	}
	listener := os.NewFile(uintptr(fds[0]), "listener")
	defer listener.Close()
	a.states <- st
	for {
		p := []unix.PollFd{{Fd: int32(fds[0]), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, -1); err == unix.EINTR {
			continue
		} else if err != nil || n == 1 && p[0].Revents&unix.POLLIN == 0 {
			return // nobody uses the filter any more
		}
		var question [80]byte // struct seccomp_notif: id, pid, flags, data
		if err := notify(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, &question[0]); err != nil {
			continue // the caller was killed meanwhile
		}
		var answer [24]byte // struct seccomp_notif_resp: id, val, error, flags
		copy(answer[:8], question[:8])
		result := -int32(unix.EEXIST)
		binary.LittleEndian.PutUint32(answer[16:], uint32(result))
		_ = notify(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, &answer[0]) // as above
	}
}

// TestListener: the agent has the filter before the program runs, of the first
// process, of one that was created first, and of an exec.
func TestListener(t *testing.T) {
	r := runtimeFor(t)
	for _, priv := range []bool{true, false} { // with and without no_new_privs
		a := newAgent(t)
		profile := &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow, ListenerPath: a.path, ListenerMetadata: "meta",
			Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActNotify}},
		}
		check := func(what string, status specs.ContainerState, out string) {
			t.Helper()
			expect(t, out, map[string]string{"mkdir:/tmp/x": "error: mkdir /tmp/x: file exists"})
			st := <-a.states
			if st.State.Status != status || st.Metadata != "meta" || st.Pid == 0 || st.State.Pid == 0 || !slices.Equal(st.Fds, []string{specs.SeccompFdName}) {
				t.Errorf("%s: state %+v", what, st)
			}
		}
		c := newContainer(t, "mkdir:/tmp/x", "fds:")
		c.req.Spec.Linux.Seccomp, c.req.Spec.Process.NoNewPrivileges = profile, priv
		out := c.output(r)
		check("start", specs.StateCreating, out)
		expect(t, out, map[string]string{"fds:": "0,1,2"})

		c = newContainer(t, "mkdir:/tmp/x", "hold:")
		c.req.Spec.Linux.Seccomp, c.req.Spec.Process.NoNewPrivileges = profile, priv
		made, p, pipe, dir := c.prepare(t, r)
		run := &running{t: t, c: made, p: p, out: pipe}
		defer run.stop()
		gate, err := OpenGate(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := made.Release(context.Background(), gate); err != nil {
			t.Fatal(err)
		}
		gate.Close()
		b := make([]byte, 4096)
		n, _ := pipe.Read(b)
		check("created", specs.StateRunning, string(b[:n]))
		out, _, err = run.exec(process(c.req.Spec.Process, "mkdir:/tmp/x"))
		if err != nil {
			t.Fatal(err)
		}
		check("exec", specs.StateRunning, out)
	}
}

// TestListenerGone: without its agent a container is not started.
func TestListenerGone(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "id:")
	c.req.Spec.Linux.Seccomp = &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, ListenerPath: t.TempDir() + "/none",
		Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActNotify}},
	}
	_, err := c.create(r).Start(context.Background(), oci.Stdio{})
	if err == nil || !strings.Contains(err.Error(), "linux.seccomp.listenerPath") {
		t.Errorf("error %v", err)
	}
}

func notify(f *os.File, op uintptr, p *byte) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), op, uintptr(unsafe.Pointer(p))); errno != 0 {
		return errno
	}
	return nil
}

// TestFilterCache: a digest finds the filter without a look at the profile, and
// the same profile without its digest finds it too.
func TestFilterCache(t *testing.T) {
	var c filterCache
	profile := func(a specs.LinuxSeccompAction) *specs.LinuxSeccomp { return &specs.LinuxSeccomp{DefaultAction: a} }
	get := func(a specs.LinuxSeccompAction, digest [32]byte) *seccomp.Filter {
		t.Helper()
		f, err := c.get(profile(a), digest)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	allow, kill := get(specs.ActAllow, [32]byte{}), get(specs.ActKill, [32]byte{})
	if allow == kill || get(specs.ActAllow, [32]byte{}) != allow {
		t.Error("not found by content")
	}
	named := get(specs.ActLog, [32]byte{1})
	if get(specs.ActLog, [32]byte{1}) != named || get(specs.ActLog, [32]byte{2}) == named {
		t.Error("not found by digest")
	}
	if _, err := c.get(profile("X"), [32]byte{3}); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "linux.seccomp.defaultAction") {
		t.Error(err)
	}
	for i := range 3 * maxFilters {
		get(specs.ActLog, [32]byte{byte(i), byte(i >> 8), 1})
		if len(c.m) > maxFilters {
			t.Fatalf("%d filters", len(c.m))
		}
	}
}

// TestFilterOfHooks: a startContainer hook is a program of the container and
// stands under its filter, the listener's too.
func TestFilterOfHooks(t *testing.T) {
	r := runtimeFor(t)
	a := newAgent(t)
	for _, x := range []struct {
		action specs.LinuxSeccompAction
		fails  bool
	}{{specs.ActKillProcess, true}, {specs.ActNotify, false}} {
		for _, priv := range []bool{true, false} {
			c := newContainer(t, "stat:/tmp/x")
			c.req.Spec.Process.NoNewPrivileges = priv
			c.req.Spec.Linux.Seccomp = &specs.LinuxSeccomp{
				DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: x.action}},
			}
			c.req.Spec.Hooks = &specs.Hooks{StartContainer: []specs.Hook{{Path: "/bin/probe", Args: []string{"probe", "mkdir:/tmp/x"}}}}
			if x.fails {
				_, err := c.create(r).Start(context.Background(), oci.Stdio{})
				if err == nil || !strings.Contains(err.Error(), "bad system call") {
					t.Errorf("a hook past the filter: %v", err)
				}
				continue
			}
			c.req.Spec.Linux.Seccomp.ListenerPath = a.path
			expect(t, c.output(r), map[string]string{"stat:/tmp/x": "error: no such file or directory"})
			for range 2 { // the hook's filter and the program's
				<-a.states
			}
		}
	}
}
