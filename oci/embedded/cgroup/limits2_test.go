package cgroup

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// TestEveryFieldV2 needs the controllers of a pure cgroup v2 host: in the virtual
// machine of hack/vm.sh.
func TestEveryFieldV2(t *testing.T) {
	h := hosts(t)["v2"]
	if h == nil {
		t.Skip("no cgroup v2 is mounted")
	}
	text, err := readFile(h.Unified + "/cgroup.controllers")
	if err != nil {
		t.Fatal(err)
	}
	for _, need := range []string{"memory", "cpu", "cpuset", "io", "pids"} {
		if !slices.Contains(strings.Fields(text), need) {
			t.Skipf("cgroup v2 has no %s controller here", need)
		}
	}
	const mb = int64(1 << 20)
	major, minor := blockDevice(t)
	throttle := func(major, minor int64, rate uint64) []specs.LinuxThrottleDevice {
		d := specs.LinuxThrottleDevice{Rate: rate}
		d.Major, d.Minor = major, minor
		return []specs.LinuxThrottleDevice{d}
	}
	c := create(t, h, &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(64 * mb), Swap: ptr(64 * mb), Reservation: ptr(32 * mb)},
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(20000)), Period: ptr(uint64(50000)), Burst: ptr(uint64(10000)), Cpus: "0", Mems: "0"},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(0))},
		BlockIO: &specs.LinuxBlockIO{
			ThrottleReadBpsDevice: throttle(major, minor, 1<<20), ThrottleWriteIOPSDevice: throttle(major, minor, 200),
		},
		Unified: map[string]string{"memory.high": "50331648", "cgroup.max.depth": "7"},
	})
	expect := func(file, want string) {
		t.Helper()
		if got := read(t, c, "", file); got != want {
			t.Errorf("%s = %q, want %q", file, got, want)
		}
	}
	io := fmt.Sprintf("%d:%d rbps=1048576 wbps=max riops=max wiops=200", major, minor)
	for file, want := range map[string]string{
		"memory.max": fmt.Sprint(64 * mb), "memory.low": fmt.Sprint(32 * mb), "memory.high": fmt.Sprint(48 * mb), "cpu.weight": "100", "cpu.max": "20000 50000",
		"cpu.max.burst": "10000", "cpuset.cpus": "0", "cpuset.mems": "0", "pids.max": "1", "io.max": io, "cgroup.max.depth": "7",
	} {
		expect(file, want)
	}
	// A period or a quota alone keeps the other; bursts follow the quota both ways.
	for _, x := range []struct {
		cpu  specs.LinuxCPU
		want string
	}{
		{specs.LinuxCPU{Period: ptr(uint64(100_000))}, "20000 100000"},
		{specs.LinuxCPU{Quota: ptr(int64(40_000)), Burst: ptr(uint64(40_000))}, "40000 100000"},
		{specs.LinuxCPU{Quota: ptr(int64(5_000)), Burst: ptr(uint64(5_000))}, "5000 100000"},
		{specs.LinuxCPU{Quota: ptr(int64(-1)), Burst: ptr(uint64(0))}, "max 100000"},
	} {
		if _, err := c.Update(&specs.LinuxResources{CPU: &x.cpu}); err != nil {
			t.Fatal(err)
		}
		expect("cpu.max", x.want)
	}
	for _, idle := range []int64{1, 1, 0} {
		if _, err := c.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Idle: &idle, Shares: ptr(uint64(2))}}); err != nil {
			t.Fatal(err)
		}
		expect("cpu.idle", fmt.Sprint(idle))
	}
	expect("cpu.weight", "1")
	// What is before a refused write is taken back, the line of the device included.
	_, err = c.Update(&specs.LinuxResources{
		Memory:  &specs.LinuxMemory{Limit: ptr(128 * mb)},
		BlockIO: &specs.LinuxBlockIO{ThrottleReadBpsDevice: append(throttle(major, minor, 7<<20), throttle(4095, 1, 5)...)},
	})
	if err == nil || !strings.Contains(err.Error(), "linux.resources.blockIO.throttleReadBpsDevice[1]") {
		t.Errorf("a device that is not there: %v", err)
	}
	expect("io.max", io)
	expect("memory.max", fmt.Sprint(64*mb))
	_, err = c.Update(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(9))}, Unified: map[string]string{"memory.high": "lots"}})
	if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "unified[memory.high]") {
		t.Errorf("a value that is none: %v", err)
	}
	expect("pids.max", "1")
	_, err = c.Update(&specs.LinuxResources{Unified: map[string]string{"memory.nosuch": "1"}})
	if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "memory.nosuch") {
		t.Errorf("a file that is not there: %v", err)
	}
	if w, err := c.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1)), Reservation: ptr(int64(-1))}, Pids: &specs.LinuxPids{Limit: ptr(int64(-1))}}); err != nil || len(w) > 0 {
		t.Errorf("%v %v", w, err)
	}
	expect("memory.max", "max")
	expect("pids.max", "max")
}
