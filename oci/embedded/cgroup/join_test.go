package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestEveryHierarchyIsBelowTheParent: CVE-2025-47291 had some of them elsewhere.
func TestEveryHierarchyIsBelowTheParent(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		c := create(t, h, nil)
		cmd := sleeper(t, c)
		text, err := readFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(text) {
			f := strings.SplitN(strings.TrimSpace(line), ":", 3)
			ours := f[1] != "" && !h.V2() || f[1] == "" && h.Unified != ""
			if ours && f[2] != c.path {
				t.Errorf("%s, want it in %s", strings.TrimSpace(line), c.path)
			}
		}
		again, err := h.Reopen("", c.Paths())
		if err != nil {
			t.Fatal(err)
		}
		if pids, err := again.Processes(); err != nil || len(pids) != 1 || pids[0] != cmd.Process.Pid || !again.Exists() {
			t.Errorf("opened by its paths: %v %v", pids, err)
		}
		if fmt.Sprint(again.dirs) != fmt.Sprint(c.dirs) {
			t.Errorf("dirs %v, want %v", again.dirs, c.dirs)
		}
	})
}

func TestReopenRefuses(t *testing.T) {
	h := &Host{V1: []Controller{{[]string{"cpu"}, "/sys/fs/cgroup/cpu"}}, Unified: "/sys/fs/cgroup/unified"}
	for _, bad := range []map[string]string{{}, {"cpu": "/etc"}, {"cpu": "/sys/fs/cgroup/cpu/../../../../etc"}, {"": "/sys/fs/cgroup/unified"}, {"memory": "/x"}} {
		if _, err := h.Reopen("", bad); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestSub(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		c := create(t, h, nil)
		for _, d := range c.dirs {
			if err := os.MkdirAll(d.path+"/a/b", 0o755); err != nil {
				t.Fatal(err)
			}
			if d.Has("cpuset") {
				if err := errors.Join(inheritCpuset(d.path, d.path+"/a"), inheritCpuset(d.path+"/a", d.path+"/a/b")); err != nil {
					t.Fatal(err)
				}
			}
		}
		sub, err := c.Sub("a/b")
		if err != nil {
			t.Fatal(err)
		}
		cmd := sleeper(t, sub)
		text, err := readFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
		if err != nil || strings.Count(text, ":"+c.path+"/a/b") != len(c.dirs) {
			t.Errorf("%s %v", text, err)
		}
		if pids, err := c.Processes(); err != nil || len(pids) != 1 {
			t.Errorf("processes %v %v", pids, err)
		}
		for _, bad := range [][]string{{"../x"}, {"a/../.."}, {"a", "a/b"}, {"nosuch:a"}, {"cpu:a", "cpu:a"}} {
			if _, err := c.Sub(bad...); !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("%q: %v", bad, err)
			}
		}
		if _, err := c.Sub("nosuch"); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("a sub-cgroup that is not there: %v", err)
		}
		if h.V2() {
			return
		}
		one, err := c.Sub("cpu:a", "memory,pids:/a/b")
		if err != nil {
			t.Fatal(err)
		}
		for ctl, want := range map[string]string{"cpu": "/a", "memory": "/a/b", "pids": "/a/b", "blkio": ""} {
			if d, err := one.controllerDir(ctl); err != nil || !strings.HasSuffix(d, c.path+want) {
				t.Errorf("%s: %s %v", ctl, d, err)
			}
		}
	})
}

func TestRelativePath(t *testing.T) {
	text := "9:name=systemd:/a\n8:pids:/pods/x\n3:cpu,cpuacct:/c:d\n0::/user/me.scope\n"
	for _, x := range []struct {
		d    Controller
		v2   bool
		want string
	}{
		{Controller{Names: []string{"pids"}}, false, "/pods/x"},
		{Controller{Names: []string{"cpu", "cpuacct"}}, false, "/c:d"},
		{Controller{Names: []string{"name=systemd"}}, false, "/a"},
		{Controller{}, false, "/user/me.scope"},
		{Controller{}, true, "/user"},
		{Controller{Names: []string{"memory"}}, false, ""},
	} {
		if got, err := ownCgroup(text, x.d, x.v2); got != x.want || (err == nil) != (x.want != "") {
			t.Errorf("%v: %q %v, want %q", x.d, got, err, x.want)
		}
	}
	if _, err := ownCgroup("0::/../x\n", Controller{}, false); err == nil {
		t.Error("an own cgroup outside of the mount is accepted")
	}
	each(t, func(t *testing.T, h *Host) {
		name := "berth-relative-" + strconv.Itoa(os.Getpid())
		c, _, err := h.Create(name, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := c.Delete(); err != nil {
				t.Error(err)
			}
		}()
		own, err := readFile("/proc/self/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range c.dirs {
			at, err := ownCgroup(own, d.Controller, h.V2())
			if want := filepath.Join(d.Mount, at, name); err != nil || d.path != want {
				t.Errorf("%s, want %s (%v)", d.path, want, err)
			}
			if _, err := os.Stat(d.path); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestNotOurs: a user without rights gets the kind of error that lets a caller go
// on without a cgroup.
func TestNotOurs(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with its user id
			if err := unix.Setfsuid(65534); err != nil {
				done <- err
				return
			}
			_, _, err := h.Create("/berth-cgroup-not-ours", nil)
			done <- err
		}()
		err := <-done
		if !errors.Is(err, errdefs.ErrPermissionDenied) || !strings.Contains(err.Error(), "/berth-cgroup-not-ours") || !strings.Contains(err.Error(), "Delegate=yes") {
			t.Errorf("create: %v", err)
		}
	})
}

// TestAdoptAndFrozen moves a process in by its pid.
func TestAdoptAndFrozen(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		c := create(t, h, nil)
		other := create2(t, h)
		cmd := sleeper(t, other)
		if c.NeedsProcess() {
			t.Error("a cgroup of the file system needs no process")
		}
		if _, err := c.Adopt(cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
		if pids, err := c.Processes(); err != nil || len(pids) != 1 || pids[0] != cmd.Process.Pid {
			t.Fatalf("processes %v %v", pids, err)
		}
		for _, want := range []bool{true, false} {
			f := c.Thaw
			if want {
				f = c.Freeze
			}
			if err := f(); err != nil {
				t.Fatal(err)
			}
			if got, err := c.Frozen(); err != nil || got != want {
				t.Errorf("frozen %v %v, want %v", got, err, want)
			}
		}
		if _, err := c.Adopt(0); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("adopt 0: %v", err)
		}
	})
}

// create2 makes a second cgroup beside that of create.
func create2(t *testing.T, h *Host) *Cgroup {
	t.Helper()
	c, _, err := h.Create(fmt.Sprintf("/berth-cgroup-other-%d", os.Getpid()), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.KillAll(), c.Delete()); err != nil {
			t.Error(err)
		}
	})
	return c
}

// TestKillNestedFrozen: the container has frozen a cgroup of its own.
func TestKillNestedFrozen(t *testing.T) {
	h := hosts(t)["v1"]
	if h == nil {
		t.Skip("no cgroup v1 freezer")
	}
	c := create(t, h, nil)
	d, err := c.controllerDir("freezer")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(d+"/inner", 0o755); err != nil {
		t.Fatal(err)
	}
	inner, err := c.Sub("freezer:inner")
	if err != nil {
		t.Fatal(err)
	}
	cmd := sleeper(t, inner)
	if err := inner.Freeze(); err != nil {
		t.Fatal(err)
	}
	if err := c.KillAll(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatal("a process frozen below the cgroup outlived KillAll")
	}
}

// TestTinyMemory: 4 MiB with a process that is killed for more.
func TestTinyMemory(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		if h.V2() {
			if text, _ := readFile(h.Unified + "/cgroup.controllers"); !strings.Contains(text, "memory") {
				t.Skip("the memory controller is not in this hierarchy")
			}
		}
		c := create(t, h, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(4 << 20)), Swap: ptr(int64(4 << 20))}})
		cmd := shell("read x; y=$(head -c 20000000 /dev/zero | tr '\\000' x); echo $y | wc -c")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		start(t, c, cmd)
		in.Write([]byte("\n"))
		in.Close()
		_ = cmd.Wait()
		if n, err := c.OOMKills(); err != nil || n == 0 {
			t.Errorf("OOM kills %d %v", n, err)
		}
		if err := c.Delete(); err != nil {
			t.Error(err)
		}
	})
}
