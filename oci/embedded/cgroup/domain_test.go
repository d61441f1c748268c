package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func shell(script string) *exec.Cmd { return exec.Command("/bin/sh", "-c", script) }

// v2Parent makes an empty cgroup of v2 to put others below.
func v2Parent(t *testing.T) (*Host, string, string) {
	t.Helper()
	h := hosts(t)["v2"]
	if h == nil {
		t.Skip("no cgroup v2 is mounted")
	}
	rel := fmt.Sprintf("/berth-domain-%d", os.Getpid())
	at := h.Unified + rel
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeDir(at); err != nil {
			t.Error(err)
		}
	})
	return h, rel, at
}

// someController is a v2 controller of this machine with a file to write.
func someController(t *testing.T, h *Host) (name, file, value string) {
	t.Helper()
	text, err := readFile(h.Unified + "/cgroup.controllers")
	if err != nil {
		t.Fatal(err)
	}
	have := strings.Fields(text)
	switch {
	case slices.Contains(have, "memory"):
		return "memory", "memory.high", "100000000"
	case slices.Contains(have, "hugetlb"):
		return "hugetlb", "hugetlb.2MB.max", "2097152"
	}
	t.Skip("no controller of cgroup v2 to test with")
	return "", "", ""
}

func TestControllersAreHandedDown(t *testing.T) {
	h, rel, at := v2Parent(t)
	_, file, value := someController(t, h)
	c, _, err := h.Create(rel+"/a/b/leaf", &specs.LinuxResources{Unified: map[string]string{file: value}})
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, c, "", file); got == "max" || got == "" {
		t.Errorf("%s is %q", file, got)
	}
	if err := errors.Join(c.Delete(), removeDir(at+"/a")); err != nil {
		t.Error(err)
	}
}

// TestParentWithProcesses: the kernel hands no controllers down from a cgroup
// with processes of its own.
func TestParentWithProcesses(t *testing.T) {
	h, rel, at := v2Parent(t)
	name, file, value := someController(t, h)
	parent, err := h.Open(rel)
	if err != nil {
		t.Fatal(err)
	}
	sleeper(t, parent)
	_, _, err = h.Create(rel+"/leaf", &specs.LinuxResources{Unified: map[string]string{file: value}})
	for _, want := range []string{"linux.resources.unified[" + file + "]", "the " + name + " controller", at, "has processes of its own"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q in it", err, want)
		}
	}
	if !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("%v: its kind", err)
	}
	if _, err := os.Stat(at + "/leaf"); err == nil {
		t.Error("the cgroup was left")
	}
	if kind, err := readFile(at + "/cgroup.type"); err != nil || kind != "domain" {
		t.Errorf("the parent is now %q: %v", kind, err)
	}
	// Without such a limit it goes, and takes a process.
	c, _, err := h.Create(rel+"/leaf", nil)
	if err != nil {
		t.Fatal(err)
	}
	sleeper(t, c)
	if err := c.KillAll(); err != nil {
		t.Error(err)
	}
	if kind, err := readFile(at + "/cgroup.type"); err != nil || kind != "domain" {
		t.Errorf("the parent is now %q: %v", kind, err)
	}
}

func TestThreadedParent(t *testing.T) {
	h, rel, at := v2Parent(t)
	if err := os.Mkdir(at+"/threads", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(at+"/threads/cgroup.type", "threaded"); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{rel + "/leaf", rel + "/threads/leaf"} {
		_, _, err := h.Create(path, nil)
		if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), `cgroup.type is "domain"`) {
			t.Errorf("%s: %v", path, err)
		}
		if _, err := os.Stat(h.Unified + path); err == nil {
			t.Errorf("%s was left", path)
		}
	}
}

func TestMissingController(t *testing.T) {
	h := hosts(t)["v2"]
	if h == nil {
		t.Skip("no cgroup v2 is mounted")
	}
	text, err := readFile(h.Unified + "/cgroup.controllers")
	if err != nil {
		t.Fatal(err)
	}
	for controller, r := range map[string]*specs.LinuxResources{
		"memory": {Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 30))}},
		"pids":   {Pids: &specs.LinuxPids{Limit: ptr(int64(9))}},
		"rdma":   {Rdma: map[string]specs.LinuxRdma{"x": {HcaHandles: ptr(uint32(1))}}},
	} {
		if slices.Contains(strings.Fields(text), controller) {
			continue
		}
		path := fmt.Sprintf("/berth-missing-%d", os.Getpid())
		_, _, err := h.Create(path, r)
		if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "no "+controller+" controller") || !strings.Contains(err.Error(), "linux.resources."+controller) {
			t.Errorf("%s: %v", controller, err)
		}
		if _, err := os.Stat(h.Unified + path); err == nil {
			t.Errorf("%s was left", path)
		}
	}
}

// TestJoinBeside: a container that hands controllers down has moved its processes
// to a child, which further ones join as well.
func TestJoinBeside(t *testing.T) {
	h, rel, at := v2Parent(t)
	name, _, _ := someController(t, h)
	c, err := h.Open(rel)
	if err != nil {
		t.Fatal(err)
	}
	inner := &Cgroup{host: h, path: rel + "/inner", dirs: []dir{{Controller{Mount: h.Unified}, rel[1:] + "/inner", at + "/inner"}}}
	if err := os.Mkdir(inner.dirs[0].path, 0o755); err != nil {
		t.Fatal(err)
	}
	first := sleeper(t, inner)
	enableControllers(h.Unified)
	if err := writeFile(at+"/cgroup.subtree_control", "+"+name); err != nil {
		t.Fatal(err)
	}
	d, err := c.JoinDirBeside(first.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	cmd := exec.Command("/bin/sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	if text, err := readFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid)); err != nil || !strings.Contains(text, "0::"+rel+"/inner") {
		t.Errorf("%s %v", text, err)
	}
	// Not where some other process happens to be.
	if _, err := c.JoinDirBeside(os.Getpid()); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("a process outside: %v", err)
	}
}
