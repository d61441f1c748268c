package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func ptr[T any](v T) *T { return &v }

// hosts returns the host's hierarchies, and the v2 one alone where a hybrid
// host has it: both code paths run on such a machine.
func hosts(t *testing.T) map[string]*Host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*Host{"v2": {Unified: h.Unified}}
	if !h.V2() {
		out["v1"] = &Host{V1: h.V1}
		if h.Unified != "" {
			out["hybrid"] = h
		}
	}
	if h.Unified == "" {
		delete(out, "v2")
	}
	return out
}

func each(t *testing.T, f func(t *testing.T, h *Host)) {
	for name, h := range hosts(t) {
		t.Run(name, func(t *testing.T) { f(t, h) })
	}
}

func create(t *testing.T, h *Host, r *specs.LinuxResources) *Cgroup {
	t.Helper()
	parent := fmt.Sprintf("berth-cgroup-test-%d", os.Getpid())
	c, _, err := h.Create("/"+parent+"/leaf", r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.KillAll(), c.Delete(), c.Delete()); err != nil {
			t.Error(err)
		}
		for _, d := range c.dirs {
			if err := os.Remove(filepath.Dir(d.path)); err != nil {
				t.Error(err)
			}
		}
	})
	return c
}

// sleeper runs a process in the cgroup.
func sleeper(t *testing.T, c *Cgroup) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/bin/sleep", "1000")
	start(t, c, cmd)
	return cmd
}

// start starts a command and puts it into the cgroup.
func start(t *testing.T, c *Cgroup, cmd *exec.Cmd) {
	t.Helper()
	dir, err := c.JoinDir()
	if err != nil {
		t.Fatal(err)
	}
	if dir != nil {
		defer dir.Close()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	files, err := c.JoinFiles()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if _, err := fmt.Fprint(f, cmd.Process.Pid); err != nil {
			t.Error(err)
		}
		f.Close()
	}
}

func TestKillFrozen(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		c := create(t, h, nil)
		cmd := sleeper(t, c)
		if pids, err := c.Processes(); err != nil || len(pids) != 1 || pids[0] != cmd.Process.Pid {
			t.Fatalf("processes %v %v", pids, err)
		}
		if err := c.Freeze(); err != nil {
			t.Fatal(err)
		}
		if err := c.KillAll(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case <-done:
		case <-time.After(5 * time.Second):
			t.Fatal("a frozen process outlived KillAll")
		}
		if err := c.KillAll(); err != nil {
			t.Errorf("an empty cgroup: %v", err)
		}
	})
}

func TestKillEach(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		c := create(t, h, nil)
		cmd := sleeper(t, c)
		if err := c.killEach(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil {
			t.Error("the process ended by itself")
		}
	})
}

func TestDeleteNested(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		c := create(t, h, nil)
		for _, d := range c.dirs {
			if err := os.MkdirAll(d.path+"/a/b", 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Delete(); err != nil {
			t.Error(err)
		}
		if err := c.KillAll(); err != nil {
			t.Errorf("kill in a deleted cgroup: %v", err)
		}
	})
}

func TestDeviceFilterLoads(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		c := create(t, h, &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
			{Allow: false, Access: "rwm"}, {Allow: true, Type: "c", Major: ptr(int64(10)), Access: "r"}, {Allow: false, Type: "b", Major: ptr(int64(7)), Minor: ptr(int64(1)), Access: "w"},
		}})
		if c.host.V2() {
			return // deviceProgram's meaning: TestDeviceProgram
		}
		dir, err := c.controllerDir("devices")
		if err != nil {
			t.Fatal(err)
		}
		list, err := os.ReadFile(dir + "/devices.list")
		if err != nil || !strings.Contains(string(list), "c 10:* r\n") || strings.Contains(string(list), "a *:*") {
			t.Errorf("devices.list %q %v", list, err)
		}
	})
}

func read(t *testing.T, c *Cgroup, controller, file string) string {
	t.Helper()
	d, err := c.controllerDir(controller)
	if err != nil {
		t.Fatal(err)
	}
	v, err := readFile(filepath.Join(d, file))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestLimitsAndUpdateV1(t *testing.T) {
	h := hosts(t)["v1"]
	if h == nil {
		t.Skip("no cgroup v1 controllers are mounted")
	}
	const mb = int64(1 << 20)
	c := create(t, h, &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000))},
		Memory: &specs.LinuxMemory{Limit: ptr(64 * mb), Swap: ptr(64 * mb)},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(77))},
	})
	expect := func(controller, file, want string) {
		t.Helper()
		if got := read(t, c, controller, file); got != want {
			t.Errorf("%s = %q, want %q", file, got, want)
		}
	}
	expect("cpu", "cpu.shares", "512")
	expect("cpu", "cpu.cfs_quota_us", "50000")
	expect("memory", "memory.limit_in_bytes", fmt.Sprint(64*mb))
	expect("pids", "pids.max", "77")
	if read(t, c, "cpuset", "cpuset.cpus") == "" {
		t.Error("cpuset.cpus is empty: no process could join")
	}
	// Both ways: the kernel wants memory <= memory + swap at each moment.
	for _, v := range []int64{128 * mb, 32 * mb} {
		if _, err := c.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(v), Swap: ptr(v)}}); err != nil {
			t.Fatal(err)
		}
		expect("memory", "memory.limit_in_bytes", fmt.Sprint(v))
	}
	// The second write is refused: the first is taken back.
	_, err := c.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(1))}})
	if err == nil || !strings.Contains(err.Error(), "linux.resources.cpu.quota") {
		t.Errorf("update: %v", err)
	}
	expect("cpu", "cpu.shares", "512")
	expect("memory", "memory.limit_in_bytes", fmt.Sprint(32*mb))
	if n, err := c.OOMKills(); err != nil || n != 0 {
		t.Errorf("OOM kills %d %v", n, err)
	}
	if _, err := c.Update(&specs.LinuxResources{Unified: map[string]string{"memory.high": "1"}}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("unified on v1: %v", err)
	}
}

func TestCreateUndoes(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		path := fmt.Sprintf("/berth-cgroup-undo-%d", os.Getpid())
		bad := &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "9999-"}}
		if _, _, err := h.Create(path, bad); err == nil || !strings.Contains(err.Error(), "linux.resources.cpu.cpus") {
			t.Errorf("create: %v", err)
		}
		if left, _ := filepath.Glob("/sys/fs/cgroup/*" + path); len(left) > 0 {
			t.Errorf("left: %v", left)
			for _, l := range left {
				_ = unix.Rmdir(l)
			}
		}
	})
}

func TestSettingsV2(t *testing.T) {
	sets, _, err := settingsV2(&specs.LinuxResources{
		CPU:            &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(-1)), Period: ptr(uint64(100000)), Cpus: "0-1"},
		Memory:         &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(150)), Reservation: ptr(int64(50))},
		Pids:           &specs.LinuxPids{Limit: ptr(int64(-1))},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4}},
		Unified:        map[string]string{"memory.high": "90"},
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range sets {
		got = append(got, s.file+"="+s.value)
	}
	want := "memory.max=100 memory.swap.max=50 memory.low=50 cpu.weight=100 cpu.max=max 100000 cpuset.cpus=0-1 pids.max=max hugetlb.2MB.max=4 hugetlb.2MB.rsvd.max=4 memory.high=90"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("settings %q, want %q", s, want)
	}
	for _, bad := range []*specs.LinuxResources{
		{Unified: map[string]string{"cgroup.procs": "1"}}, {Unified: map[string]string{"../x.y": "1"}},
		{Memory: &specs.LinuxMemory{Swap: ptr(int64(5))}},
	} {
		if _, _, err := settingsV2(bad); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"/a/b": "/a/b", "a": "a", "a//b/": "a/b", "/kubepods.slice/x//y": "/kubepods.slice/x/y", "": "", "/": "", "/a/../b": "", "..": "", "slice:cri:id": "",
	} {
		got, err := Clean(in)
		if got != want || (want == "") != errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Clean(%q) = %q, %v", in, got, err)
		}
	}
}

func TestParseMountinfo(t *testing.T) {
	h, err := parseMountinfo(strings.NewReader(`30 20 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
34 30 0:28 /kubepods/x /var/run/view rw - cgroup cgroup rw,cpu,cpuacct
35 30 0:28 / /mnt/a\040b rw - cgroup cgroup rw,pids
36 garbage
`))
	if err != nil {
		t.Fatal(err)
	}
	want := "{[{[cpu cpuacct] /sys/fs/cgroup/cpu,cpuacct} {[name=systemd] /sys/fs/cgroup/systemd} {[pids] /mnt/a b}] /sys/fs/cgroup/unified}"
	if got := fmt.Sprint(*h); got != want {
		t.Errorf("hosts %s, want %s", got, want)
	}
}

func FuzzParseMountinfo(f *testing.F) {
	f.Add("31 30 0:27 / /x rw - cgroup2 cgroup2 rw\n")
	f.Fuzz(func(t *testing.T, s string) {
		h, err := parseMountinfo(strings.NewReader(s))
		if err != nil {
			return
		}
		for _, c := range h.V1 {
			if len(c.Names) == 0 {
				t.Error("a hierarchy without a name")
			}
		}
	})
}

// runDevice interprets a device program: what the kernel would answer.
func runDevice(t *testing.T, p []insn, kind, access, major, minor uint32) bool {
	t.Helper()
	ctx := map[int16]uint64{0: uint64(access<<16 | kind), 4: uint64(major), 8: uint64(minor)}
	var r [11]uint64
	for i := 0; i < len(p); i++ {
		dst, src, imm := p[i].regs&15, p[i].regs>>4, uint64(p[i].imm)
		switch p[i].code {
		case ldxw:
			r[dst] = ctx[p[i].off]
		case movImm:
			r[dst] = imm
		case movReg:
			r[dst] = r[src]
		case andImm:
			r[dst] &= imm
		case rshImm:
			r[dst] >>= imm
		case jneImm:
			if r[dst] != imm {
				i += int(p[i].off)
			}
		case jneReg:
			if r[dst] != r[src] {
				i += int(p[i].off)
			}
		case jeqImm:
			if r[dst] == imm {
				i += int(p[i].off)
			}
		case exit:
			return r[0] == 1
		default:
			t.Fatalf("unknown instruction %#x", p[i].code)
		}
	}
	t.Fatal("the program has no end")
	return false
}

func TestDeviceProgram(t *testing.T) {
	rs, err := rules([]specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Major: ptr(int64(10)), Minor: ptr(int64(200)), Access: "rw"},
		{Allow: true, Type: "b", Access: "m"},
		{Allow: false, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "w"},
	})
	if err != nil {
		t.Fatal(err)
	}
	p := deviceProgram(rs)
	const blk, chr, m, r, w = unix.BPF_DEVCG_DEV_BLOCK, unix.BPF_DEVCG_DEV_CHAR, unix.BPF_DEVCG_ACC_MKNOD, unix.BPF_DEVCG_ACC_READ, unix.BPF_DEVCG_ACC_WRITE
	for _, x := range []struct {
		kind, access, major, minor uint32
		want                       bool
	}{
		{chr, r | w, 10, 200, true}, {chr, r | w | m, 10, 200, false}, {chr, r, 10, 201, false}, {blk, m, 8, 0, true},
		{blk, r, 8, 0, false}, {chr, r, 1, 3, true}, {chr, w, 1, 3, false}, {chr, r | w, 1, 3, false}, {chr, r | w, 1, 5, true}, {chr, r, 136, 9, true}, {chr, m, 1, 1, false},
	} {
		if got := runDevice(t, p, x.kind, x.access, x.major, x.minor); got != x.want {
			t.Errorf("%+v: %v", x, got)
		}
	}
	all, err := rules([]specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}})
	if err != nil || !runDevice(t, deviceProgram(all), blk, r|w|m, 8, 0) {
		t.Errorf("a rule for all devices: %v", err)
	}
	if _, err := rules([]specs.LinuxDeviceCgroup{{Type: "x"}}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Error(err)
	}
}
