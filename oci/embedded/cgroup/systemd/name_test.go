package systemd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

func TestParseName(t *testing.T) {
	for in, want := range map[string]string{
		"kubepods-burstable-pod1_2.slice:cri-containerd:0123": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-0123.scope",
		":runc:a":           "/system.slice/runc-a.scope",
		"::a":               "/system.slice/-a.scope",
		"-.slice:p:a":       "/p-a.scope",
		"a.slice:p:a.scope": "/a.slice/p-a.scope.scope",
		"/pod/a":            "", "a:b": "", "a.slice:b:": "", "a.slice:b:c:d": "", "a:b:c": "", "../x.slice:b:c": "", "a--b.slice:b:c": "", "-a.slice:b:c": "",
		".slice:b:c": "", "a.slice:../..:c": "", "a.slice:b:c/d": "", "a.slice:b:c.slice": "", "a.slice:b:c d": "", "a.slice:b:" + strings.Repeat("c", 250): "",
	} {
		n, err := parseName(in, false)
		got := ""
		if err == nil {
			got = filepath.Join(n.slicePath, n.scope)
		}
		if got != want || (want == "") != errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: %q %v, want %q", in, got, err, want)
		}
	}
	if n, err := parseName(":p:a", true); err != nil || n.slice != "user.slice" {
		t.Errorf("%+v %v", n, err)
	}
}

func TestVersionsBitmapsUsers(t *testing.T) {
	for in, want := range map[string]int{"252.5-2~deb12u1": 252, "v245.4-1.fc32": 245, "239": 239, "": 0, "x": 0} {
		if got, err := parseVersion(in); got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %d %v", in, got, err)
		}
	}
	for in, want := range map[string][]byte{"0": {1}, "0-3,8": {15, 1}, "17": {0, 0, 2}, "": nil, "x": nil, "3-1": nil} {
		if got, err := bitmap(in); !slices.Equal(got, want) || (err == nil) != (want != nil) {
			t.Errorf("%q: %v %v", in, got, err)
		}
	}
	if uid, err := outerUID(5, "         0       1000          1\n         1     100000      65536\n"); err != nil || uid != 100004 {
		t.Errorf("%d %v", uid, err)
	}
	if _, err := outerUID(5, "0 0 1\n"); err == nil {
		t.Error("a user id without a mapping")
	}
	dir := t.TempDir()
	env := map[string]string{}
	get := func(k string) string { return env[k] }
	if _, err := sessionBus(get); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Error(err)
	}
	env["XDG_RUNTIME_DIR"] = dir
	if err := os.WriteFile(dir+"/bus", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if a, err := sessionBus(get); err != nil || a != "unix:path="+dir+"/bus" {
		t.Error(a, err)
	}
	env["DBUS_SESSION_BUS_ADDRESS"] = "unix:path=/x"
	if a, err := sessionBus(get); err != nil || a != "unix:path=/x" {
		t.Error(a, err)
	}
}

func TestPropertiesV2(t *testing.T) {
	r := &specs.LinuxResources{
		Memory:  &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(150)), Reservation: ptr(int64(10))},
		CPU:     &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(-1)), Period: ptr(uint64(50_000)), Cpus: "0-1", Mems: "0"},
		Pids:    &specs.LinuxPids{Limit: ptr(int64(-1))},
		BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(1000))},
		Unified: map[string]string{"memory.max": "99", "memory.high": "max", "memory.oom.group": "1", "pids.max": "0", "io.latency": "8:0 target=5"},
	}
	for _, x := range []struct {
		version int
		r       *specs.LinuxResources
		want    string
	}{
		{255, r, "AllowedCPUs=[3] AllowedMemoryNodes=[1] CPUQuotaPerSecUSec=18446744073709551615 CPUQuotaPeriodUSec=50000 CPUWeight=100 IOWeight=10000 MemoryHigh=18446744073709551615 MemoryLow=10 MemoryMax=99 MemorySwapMax=50 TasksMax=1"},
		{240, r, "CPUQuotaPerSecUSec=18446744073709551615 CPUWeight=100 IOWeight=10000 MemoryHigh=18446744073709551615 MemoryLow=10 MemoryMax=99 MemorySwapMax=50 TasksMax=1"},
		{255, &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(9)), Idle: ptr(int64(1))}}, "CPUWeight=0"},
		{251, &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(2)), Idle: ptr(int64(1))}}, "CPUWeight=1"},
		{255, &specs.LinuxResources{Unified: map[string]string{"cpu.max": "20000 50000", "cpu.idle": "1", "cpu.weight": "5"}}, "CPUQuotaPerSecUSec=400000 CPUQuotaPeriodUSec=50000 CPUWeight=0"},
		{255, &specs.LinuxResources{}, ""},
	} {
		d := &Driver{host: &cgroup.Host{Unified: "/x"}, version: x.version}
		props, err := d.properties(x.r)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range props {
			got = append(got, fmt.Sprintf("%s=%v", p.Name, p.Value.Value()))
		}
		slices.Sort(got)
		if s := strings.Join(got, " "); s != x.want {
			t.Errorf("version %d: %s\nwant %s", x.version, s, x.want)
		}
	}
	d := &Driver{host: &cgroup.Host{Unified: "/x"}, version: 255}
	if p, err := d.oomPolicy(r); err != nil || len(p) != 1 || p[0].Value.Value() != "kill" {
		t.Errorf("%v %v", p, err)
	}
	for _, bad := range []map[string]string{{"memory.max": "x"}, {"cpu.max": ""}, {"cpu.max": "1 0"}, {"cpuset.cpus": "x"}} {
		if _, err := d.properties(&specs.LinuxResources{Unified: bad}); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestDeviceProperties(t *testing.T) {
	n := func(v int64) *int64 { return &v }
	p, err := deviceProperties([]specs.LinuxDeviceCgroup{
		{Allow: true, Type: "b", Access: "m"}, {Allow: true, Type: "c", Minor: n(3), Access: "r"}, {Allow: true, Type: "c", Major: n(10), Minor: n(229), Access: "rw"},
	})
	if err != nil || len(p) != 3 {
		t.Fatal(p, err)
	}
	got := fmt.Sprint(p[2].Value.Value())
	for _, want := range []string{"{block-* m}", "{/dev/char/10:229 rw}", "{char-136 rwm}", "{/dev/char/1:3 rwm}"} {
		if !strings.Contains(got, want) {
			t.Errorf("%s is not in %s", want, got)
		}
	}
	if p, err = deviceProperties([]specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}); err != nil || p[1].Value.Value() != "auto" {
		t.Error(p, err)
	}
}
