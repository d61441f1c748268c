package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// blockDevice finds a whole disk whose queue takes limits.
func blockDevice(t *testing.T) (major, minor int64) {
	t.Helper()
	found, _ := filepath.Glob("/sys/block/*/dev")
	for _, f := range found {
		text, err := readFile(f)
		if err != nil {
			continue
		}
		if _, err := fmt.Sscanf(text, "%d:%d", &major, &minor); err == nil {
			return major, minor
		}
	}
	t.Skip("no block device in /sys/block")
	return 0, 0
}

func TestEveryFieldV1(t *testing.T) {
	h := hosts(t)["v1"]
	if h == nil {
		t.Skip("no cgroup v1 controllers are mounted")
	}
	const mb = int64(1 << 20)
	major, minor := blockDevice(t)
	throttle := func(rate uint64) []specs.LinuxThrottleDevice {
		d := specs.LinuxThrottleDevice{Rate: rate}
		d.Major, d.Minor = major, minor
		return []specs.LinuxThrottleDevice{d}
	}
	c := create(t, h, &specs.LinuxResources{
		Memory: &specs.LinuxMemory{
			Limit: ptr(64 * mb), Swap: ptr(96 * mb), Reservation: ptr(32 * mb), Swappiness: ptr(uint64(7)), DisableOOMKiller: ptr(true),
			UseHierarchy: ptr(true), Kernel: ptr(32 * mb), KernelTCP: ptr(16 * mb), //nolint:staticcheck // SA1019: the spec has it still
		},
		CPU:  &specs.LinuxCPU{Quota: ptr(int64(20000)), Period: ptr(uint64(50000)), Burst: ptr(uint64(10000)), Cpus: "0", Mems: "0"},
		Pids: &specs.LinuxPids{Limit: ptr(int64(0))},
		BlockIO: &specs.LinuxBlockIO{
			ThrottleReadBpsDevice: throttle(1 << 20), ThrottleWriteBpsDevice: throttle(2 << 20),
			ThrottleReadIOPSDevice: throttle(100), ThrottleWriteIOPSDevice: throttle(200),
		},
	})
	dev := fmt.Sprintf("%d:%d ", major, minor)
	for _, x := range []struct{ controller, file, want string }{
		{"memory", "memory.limit_in_bytes", fmt.Sprint(64 * mb)},
		{"memory", "memory.memsw.limit_in_bytes", fmt.Sprint(96 * mb)},
		{"memory", "memory.soft_limit_in_bytes", fmt.Sprint(32 * mb)},
		{"memory", "memory.swappiness", "7"},
		{"memory", "memory.use_hierarchy", "1"},
		{"memory", "memory.kmem.tcp.limit_in_bytes", fmt.Sprint(16 * mb)},
		{"cpu", "cpu.cfs_quota_us", "20000"},
		{"cpu", "cpu.cfs_period_us", "50000"},
		{"cpu", "cpu.cfs_burst_us", "10000"},
		{"cpuset", "cpuset.cpus", "0"},
		{"cpuset", "cpuset.mems", "0"},
		{"pids", "pids.max", "1"},
		{"blkio", "blkio.throttle.read_bps_device", dev + "1048576"},
		{"blkio", "blkio.throttle.write_bps_device", dev + "2097152"},
		{"blkio", "blkio.throttle.read_iops_device", dev + "100"},
		{"blkio", "blkio.throttle.write_iops_device", dev + "200"},
	} {
		if x.file == "memory.memsw.limit_in_bytes" && !h.hasFile("memory", x.file) {
			continue
		}
		if got := read(t, c, x.controller, x.file); got != x.want {
			t.Errorf("%s = %q, want %q", x.file, got, x.want)
		}
	}
	if got := read(t, c, "memory", "memory.oom_control"); !strings.Contains(got, "oom_kill_disable 1") {
		t.Errorf("memory.oom_control %q", got)
	}

	// No limit on memory is none on swap; -1 for the rest.
	if _, err := c.Update(&specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(-1))}, CPU: &specs.LinuxCPU{Burst: ptr(uint64(0)), Quota: ptr(int64(-1))}, Pids: &specs.LinuxPids{Limit: ptr(int64(-1))},
	}); err != nil {
		t.Fatal(err)
	}
	for file, controller := range map[string]string{"memory.limit_in_bytes": "memory", "memory.memsw.limit_in_bytes": "memory"} {
		if h.hasFile(controller, file) && len(read(t, c, controller, file)) < 15 {
			t.Errorf("%s is still %s", file, read(t, c, controller, file))
		}
	}
	if q, p := read(t, c, "cpu", "cpu.cfs_quota_us"), read(t, c, "pids", "pids.max"); q != "-1" || p != "max" {
		t.Errorf("quota %s, pids %s", q, p)
	}

	// A refused write takes back what is before it, lines of devices included.
	before := read(t, c, "blkio", "blkio.throttle.read_bps_device")
	bad := throttle(5)
	bad[0].Major = 4095
	_, err := c.Update(&specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{ThrottleReadBpsDevice: throttle(3 << 20), ThrottleWriteBpsDevice: bad}})
	if err == nil || !strings.Contains(err.Error(), "linux.resources.blockIO.throttleWriteBpsDevice[0]") {
		t.Errorf("a device that is not there: %v", err)
	}
	if got := read(t, c, "blkio", "blkio.throttle.read_bps_device"); got != before {
		t.Errorf("after a refused update %q, before %q", got, before)
	}
}

// TestOrderV1 moves values that depend on each other up and down.
func TestOrderV1(t *testing.T) {
	h := hosts(t)["v1"]
	if h == nil {
		t.Skip("no cgroup v1 controllers are mounted")
	}
	c := create(t, h, nil)
	parent := filepath.Dir(c.path)
	p, err := h.Open(parent)
	if err != nil {
		t.Fatal(err)
	}
	// The parent gives half a processor: quota / period of a child may not exceed it.
	if _, err := p.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(50_000)), Period: ptr(uint64(100_000))}}); err != nil {
		t.Fatal(err)
	}
	const mb = int64(1 << 20)
	for _, v := range []struct {
		quota         int64
		period, burst uint64
		limit, swap   int64
	}{
		{10_000, 20_000, 10_000, 64 * mb, 64 * mb}, {200_000, 400_000, 200_000, 256 * mb, 512 * mb}, {5_000, 10_000, 5_000, 4 * mb, 4 * mb},
		{25_000, 500_000, 1_000, 512 * mb, 1024 * mb}, {1_000, 10_000, 0, 128 * mb, 128 * mb},
	} {
		r := &specs.LinuxResources{
			CPU:    &specs.LinuxCPU{Quota: &v.quota, Period: &v.period, Burst: &v.burst},
			Memory: &specs.LinuxMemory{Limit: &v.limit, Swap: &v.swap},
		}
		if _, err := c.Update(r); err != nil {
			t.Fatalf("%+v: %v", v, err)
		}
		got := read(t, c, "cpu", "cpu.cfs_quota_us") + " " + read(t, c, "cpu", "cpu.cfs_period_us") + " " + read(t, c, "memory", "memory.limit_in_bytes")
		if want := fmt.Sprint(v.quota, " ", v.period, " ", v.limit); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	// Idle and back, with shares that the kernel takes only of a cgroup that is not.
	w, err := c.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Idle: ptr(int64(1)), Shares: ptr(uint64(512))}})
	if err != nil || len(w) == 0 || !strings.Contains(w[0], "linux.resources.cpu.shares") {
		t.Fatalf("%v %v", w, err)
	}
	if len(w) > 1 {
		t.Skip(w[1]) // no idle cgroups
	}
	if _, err := c.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Idle: ptr(int64(0)), Shares: ptr(uint64(512))}}); err != nil {
		t.Fatal(err)
	}
	if idle, shares := read(t, c, "cpu", "cpu.idle"), read(t, c, "cpu", "cpu.shares"); idle != "0" || shares != "512" {
		t.Errorf("idle %s, shares %s", idle, shares)
	}
}

func TestCheckBeforeUpdate(t *testing.T) {
	for name, h := range hosts(t) {
		t.Run(name, func(t *testing.T) {
			c := create(t, h, nil)
			d, err := c.controllerDir("memory")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(filepath.Join(d, "memory.stat")); err != nil {
				t.Skip("the memory controller is not in this hierarchy")
			}
			// A process that joined and then forked has memory in the cgroup.
			cmd := exec.Command("/bin/sh", "-c", "read x; y=$(echo forked); echo $y; read x")
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			start(t, c, cmd)
			if _, err := fmt.Fprintln(in); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "forked\n" {
				t.Fatalf("%q %v", line, err)
			}
			m := &specs.LinuxMemory{Limit: ptr(int64(1)), CheckBeforeUpdate: ptr(true)}
			_, err = c.Update(&specs.LinuxResources{Memory: m})
			if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "linux.resources.memory.limit") {
				t.Errorf("update: %v", err)
			}
		})
	}
}

// TestRefusedFirst: what can not be done is said before a directory is made.
func TestRefusedFirst(t *testing.T) {
	each(t, func(t *testing.T, h *Host) {
		path := fmt.Sprintf("/berth-cgroup-refused-%d", os.Getpid())
		v2only := h.V2()
		for name, x := range map[string]struct {
			r     specs.LinuxResources
			on    string
			field string
		}{
			"idle":         {specs.LinuxResources{CPU: &specs.LinuxCPU{Idle: ptr(int64(2))}}, "", "cpu.idle"},
			"swappiness":   {specs.LinuxResources{Memory: &specs.LinuxMemory{Swappiness: ptr(uint64(101))}}, "", "memory.swappiness"},
			"weight":       {specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(5))}}, "", "blockIO.weight"},
			"page size":    {specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "../2MB"}}}, "", "hugepageLimits[0].pageSize"},
			"device":       {specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Type: "x"}}}, "", "devices[0].type"},
			"unified":      {specs.LinuxResources{Unified: map[string]string{"memory.high": "1"}}, "v1", "unified"},
			"unified file": {specs.LinuxResources{Unified: map[string]string{"cgroup.procs": "1"}}, "v2", "unified"},
			"class":        {specs.LinuxResources{Network: &specs.LinuxNetwork{ClassID: ptr(uint32(1))}}, "v2", "network.classID"},
			"priority":     {specs.LinuxResources{Network: &specs.LinuxNetwork{Priorities: []specs.LinuxInterfacePriority{{Name: "lo"}}}}, "v2", "network.priorities"},
			"realtime":     {specs.LinuxResources{CPU: &specs.LinuxCPU{RealtimeRuntime: ptr(int64(1))}}, "v2", "cpu.realtimeRuntime"},
			"swap":         {specs.LinuxResources{Memory: &specs.LinuxMemory{Swap: ptr(int64(1))}}, "v2", "memory.swap"},
			"cut":          {specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: ptr(int64(9)), Access: "rw"}, {Type: "c", Major: ptr(int64(9)), Minor: ptr(int64(1)), Access: "w"}}}, "v1", "devices"},
		} {
			if x.on == "v1" && v2only || x.on == "v2" && !v2only {
				continue
			}
			made, _, err := h.Create(path, &x.r)
			if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "linux.resources."+x.field) {
				t.Errorf("%s: %v", name, err)
			}
			if err == nil {
				_ = made.Delete()
			}
		}
		if !v2only && !h.hasController("net_cls") {
			_, _, err := h.Create(path, &specs.LinuxResources{Network: &specs.LinuxNetwork{ClassID: ptr(uint32(1))}})
			if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "network.classID: the net_cls controller") {
				t.Errorf("a controller that is not mounted: %v", err)
			}
		}
		if left, _ := filepath.Glob("/sys/fs/cgroup/*" + path); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

func (h *Host) hasController(name string) bool {
	for _, c := range h.V1 {
		if c.Has(name) {
			return true
		}
	}
	return false
}

// texts renders settings as file=value.
func texts(sets []setting) string {
	var out []string
	for _, s := range sets {
		out = append(out, s.file+"="+s.value)
	}
	return strings.Join(out, " ")
}

func TestSettingsOfEveryField(t *testing.T) {
	dev := specs.LinuxBlockIODevice{Major: 8, Minor: 16}
	throttle := []specs.LinuxThrottleDevice{{LinuxBlockIODevice: dev, Rate: 9}}
	r := &specs.LinuxResources{
		BlockIO: &specs.LinuxBlockIO{
			Weight: ptr(uint16(500)), LeafWeight: ptr(uint16(20)), WeightDevice: []specs.LinuxWeightDevice{{LinuxBlockIODevice: dev, Weight: ptr(uint16(10)), LeafWeight: ptr(uint16(30))}},
			ThrottleReadIOPSDevice: throttle,
		},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "1GB", Limit: 1 << 30}},
		Rdma:           map[string]specs.LinuxRdma{"mlx5_1": {HcaHandles: ptr(uint32(3)), HcaObjects: ptr(uint32(10000))}, "mlx4_0": {HcaObjects: ptr(uint32(1))}},
		CPU:            &specs.LinuxCPU{Shares: ptr(uint64(2)), Idle: ptr(int64(0)), Burst: ptr(uint64(5)), Period: ptr(uint64(1000)), Mems: "0"},
		Pids:           &specs.LinuxPids{Limit: ptr(int64(0))},
	}
	sets, warnings, err := settingsV2(r)
	if err != nil {
		t.Fatal(err)
	}
	want := "cpu.idle=0 cpu.weight=1 cpu.max=max 1000 cpu.max.burst=5 cpuset.mems=0 pids.max=1 hugetlb.1GB.max=1073741824 hugetlb.1GB.rsvd.max=1073741824 " +
		"io.bfq.weight=500 io.bfq.weight=8:16 10 io.max=8:16 riops=9 rdma.max=mlx4_0 hca_object=1 rdma.max=mlx5_1 hca_handle=3 hca_object=10000"
	if got := texts(sets); got != want {
		t.Errorf("v2: %s\nwant %s", got, want)
	}
	if len(warnings) != 2 {
		t.Errorf("v2 warnings %q", warnings)
	}
	r.Network = &specs.LinuxNetwork{ClassID: ptr(uint32(0x100001)), Priorities: []specs.LinuxInterfacePriority{{Name: "eth0", Priority: 5}}}
	r.CPU.RealtimePeriod, r.CPU.RealtimeRuntime = ptr(uint64(1_000_000)), ptr(int64(950_000))
	sets, _, err = (&Host{}).settingsV1(r)
	if err != nil {
		t.Fatal(err)
	}
	want = "cpu.idle=0 cpu.shares=2 cpu.cfs_period_us=1000 cpu.cfs_burst_us=5 cpu.rt_period_us=1000000 cpu.rt_runtime_us=950000 cpuset.mems=0 pids.max=1 " +
		"hugetlb.1GB.limit_in_bytes=1073741824 hugetlb.1GB.rsvd.limit_in_bytes=1073741824 blkio.weight=500 blkio.leaf_weight=20 blkio.weight_device=8:16 10 " +
		"blkio.leaf_weight_device=8:16 30 blkio.throttle.read_iops_device=8:16 9 net_cls.classid=1048577 net_prio.ifpriomap=eth0 5 " +
		"rdma.max=mlx4_0 hca_object=1 rdma.max=mlx5_1 hca_handle=3 hca_object=10000"
	if got := texts(sets); got != want {
		t.Errorf("v1: %s\nwant %s", got, want)
	}
	for _, s := range sets {
		if s.file == "blkio.weight" && (s.alt != "blkio.bfq.weight" || s.lacking == "") {
			t.Errorf("%+v", s)
		}
	}
}

func TestRevert(t *testing.T) {
	for _, x := range []struct {
		s           setting
		shown, want string
	}{
		{setting{file: "io.max", key: "8:16", unset: "rbps=max"}, "8:0 rbps=1\n8:16 rbps=2 wbps=max", "8:16 rbps=2 wbps=max"},
		{setting{file: "io.max", key: "8:32", unset: "rbps=max"}, "8:0 rbps=1\n8:16 rbps=2", "8:32 rbps=max"},
		{setting{file: "memory.oom_control"}, "oom_kill_disable 1\nunder_oom 0", "1"},
		{setting{file: "pids.max"}, "max", "max"},
		{setting{file: "io.weight", key: "default"}, "default 100\n8:0 3", "default 100"},
	} {
		if got, ok := x.s.revert(x.shown); !ok || got != x.want {
			t.Errorf("%+v: %q, want %q", x.s, got, x.want)
		}
	}
	sets, _, err := settingsV2(&specs.LinuxResources{CPU: &specs.LinuxCPU{Period: ptr(uint64(5000))}})
	if err != nil || sets[0].merge("2000 100000") != "2000 5000" || sets[0].merge("max 100000") != "max 5000" {
		t.Errorf("a period alone: %v", err)
	}
}

func TestWeight(t *testing.T) {
	last := uint64(0)
	for _, x := range [][2]uint64{{0, 1}, {2, 1}, {256, 29}, {512, 57}, {1024, 100}, {2048, 179}, {262144, 10000}, {1 << 40, 10000}} {
		got := Weight(x[0])
		if got < last {
			t.Errorf("Weight(%d) = %d is below that of fewer shares", x[0], got)
		}
		if last = got; (x[0] <= 2 || x[0] == 1024 || x[0] >= 262144) && got != x[1] {
			t.Errorf("Weight(%d) = %d, want %d", x[0], got, x[1])
		}
	}
	if IOWeight(10) != 1 || IOWeight(1000) != 10000 {
		t.Error(IOWeight(10), IOWeight(1000))
	}
}
