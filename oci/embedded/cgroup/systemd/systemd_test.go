package systemd

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/godbus/dbus/v5"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

func ptr[T any](v T) *T { return &v }

// each runs a test on the host's hierarchies, and on the v2 one alone.
func each(t *testing.T, f func(t *testing.T, h *cgroup.Host, d *Driver, s *fake, slice string)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	daemon(t)
	host, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]*cgroup.Host{"v1": host, "v2": {Unified: host.Unified}}
	if host.V2() {
		delete(all, "v1")
	} else if !host.Hybrid() {
		delete(all, "v2")
	}
	for name, h := range all {
		t.Run(name, func(t *testing.T) {
			addr := bus(t)
			s := newFake(t, h, addr, "")
			d := &Driver{host: h, dial: func() (*dbus.Conn, error) { return dialBus(addr, os.Getuid()) }}
			t.Cleanup(d.Close)
			slice := fmt.Sprintf("berthtest%d.slice", os.Getpid())
			t.Cleanup(func() {
				for _, m := range append([]cgroup.Controller{{Mount: h.Unified}}, h.V1...) {
					if m.Mount == "" {
						continue
					}
					if err := unix.Rmdir(filepath.Join(m.Mount, slice)); err != nil && err != unix.ENOENT {
						t.Errorf("%s/%s: %v", m.Mount, slice, err)
					}
				}
			})
			f(t, h, d, s, slice)
		})
	}
}

// waiting starts a process that only waits.
func waiting(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/bin/sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }() // reaped at once: its cgroup can go
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	return cmd
}

func readText(t *testing.T, c *cgroup.Cgroup, controller, file string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.Paths()[controller], file))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestLife(t *testing.T) {
	each(t, func(t *testing.T, h *cgroup.Host, d *Driver, s *fake, slice string) {
		r := &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: ptr(int64(10)), Minor: ptr(int64(229)), Access: "rw"}}}
		if !h.V2() {
			r.CPU = &specs.LinuxCPU{Quota: ptr(int64(12_345)), Period: ptr(uint64(100_000)), Cpus: "0"}
			r.Memory = &specs.LinuxMemory{Limit: ptr(int64(64 << 20))}
			r.Pids = &specs.LinuxPids{Limit: ptr(int64(0))}
		}
		path, scope := slice+":cri:life", "cri-life.scope"
		c, warnings, err := d.Create(path, r)
		if err != nil || len(warnings) > 0 {
			t.Fatal(warnings, err)
		}
		if !c.NeedsProcess() || c.Exists() || len(s.calls) > 0 {
			t.Errorf("before Adopt: %v %v %v", c.NeedsProcess(), c.Exists(), s.calls)
		}
		if _, err := c.Update(r); !errors.Is(err, errdefs.ErrFailedPrecondition) {
			t.Errorf("update before Adopt: %v", err)
		}
		first := waiting(t)
		if _, err := c.Adopt(first.Process.Pid); err != nil {
			t.Fatal(err)
		}
		if c.NeedsProcess() {
			t.Error("it needs another process")
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", first.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			in := strings.SplitN(strings.TrimSpace(line), ":", 3)
			if h.V2() && in[1] != "" {
				continue
			}
			if in[2] != "/"+slice+"/"+scope {
				t.Errorf("%q", line)
			}
		}
		for name, want := range map[string]any{
			"Slice": slice, "Delegate": true, "DefaultDependencies": false, "MemoryAccounting": true,
			"PIDs": []uint32{uint32(first.Process.Pid)},
		} {
			if got := s.property(scope, name); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%s = %v, want %v", name, got, want)
			}
		}
		if !h.V2() {
			// systemd knows whole percents; the kernel has what was asked for.
			for name, want := range map[string]any{
				"CPUQuotaPerSecUSec": 130_000, "CPUQuotaPeriodUSec": 100_000, "MemoryLimit": 64 << 20, "TasksMax": 1, "AllowedCPUs": []byte{1}, "DevicePolicy": "strict",
			} {
				if got := s.property(scope, name); fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("%s = %v, want %v", name, got, want)
				}
			}
			for controller, f := range map[string][2]string{
				"cpu": {"cpu.cfs_quota_us", "12345"}, "memory": {"memory.limit_in_bytes", "67108864"}, "pids": {"pids.max", "1"}, "cpuset": {"cpuset.cpus", "0"},
			} {
				if got := readText(t, c, controller, f[0]); got != f[1] {
					t.Errorf("%s = %s, want %s", f[0], got, f[1])
				}
			}
			if list := readText(t, c, "devices", "devices.list"); !strings.Contains(list, "c 10:229 rw") || strings.Contains(list, "a *:*") {
				t.Errorf("devices.list %q", list)
			}
			update(t, c, s, scope)
		}

		// Another process of the container, and the first one ends: the scope stays.
		second := waiting(t)
		again, err := d.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := again.Adopt(second.Process.Pid); err != nil {
			t.Fatal(err)
		}
		if pids, err := again.Processes(); err != nil || len(pids) != 2 {
			t.Errorf("processes %v %v", pids, err)
		}
		if err := again.KillAll(); err != nil {
			t.Fatal(err)
		}
		if err := again.Delete(); err != nil {
			t.Fatal(err)
		}
		if s.running(scope) || again.Exists() {
			t.Error("the scope or its directories are left")
		}
		if err := c.Delete(); err != nil {
			t.Errorf("delete again: %v", err)
		}
	})
}

// update changes the limits of a scope on v1.
func update(t *testing.T, c *cgroup.Cgroup, s *fake, scope string) {
	t.Helper()
	if _, err := c.Update(&specs.LinuxResources{
		CPU:     &specs.LinuxCPU{Quota: ptr(int64(22_222))}, // the period stays
		Memory:  &specs.LinuxMemory{Limit: ptr(int64(32 << 20))},
		Devices: []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(11)), Access: "r"}},
	}); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(s.property(scope, "CPUQuotaPerSecUSec"), s.property(scope, "CPUQuotaPeriodUSec"), s.property(scope, "MemoryLimit")); got != "230000 100000 33554432" {
		t.Errorf("properties after the update: %s", got)
	}
	if q, m := readText(t, c, "cpu", "cpu.cfs_quota_us"), readText(t, c, "memory", "memory.limit_in_bytes"); q != "22222" || m != "33554432" {
		t.Errorf("quota %s, memory %s", q, m)
	}
	list := readText(t, c, "devices", "devices.list")
	if !strings.Contains(list, "c 1:11 r") || !strings.Contains(list, "c 1:3 rwm") || strings.Contains(list, "10:229") {
		t.Errorf("devices.list %q", list)
	}
	// Refused by the kernel: systemd is not told.
	if _, err := c.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(1))}}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("update: %v", err)
	}
	if got := fmt.Sprint(s.property(scope, "CPUQuotaPerSecUSec")); got != "230000" {
		t.Errorf("systemd was told %s", got)
	}
}

// TestAdoptUndoes: what the kernel refuses after the scope was made leaves nothing.
func TestAdoptUndoes(t *testing.T) {
	each(t, func(t *testing.T, h *cgroup.Host, d *Driver, s *fake, slice string) {
		c, _, err := d.Create(slice+":cri:bad", &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "9000"}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Adopt(waiting(t).Process.Pid)
		if err == nil || !strings.Contains(err.Error(), "linux.resources.cpu.cpus") {
			t.Errorf("adopt: %v", err)
		}
		if s.running("cri-bad.scope") || c.Exists() {
			t.Error("the scope or its directories are left")
		}
	})
}

func TestFailedUnitIsForgotten(t *testing.T) {
	each(t, func(t *testing.T, h *cgroup.Host, d *Driver, s *fake, slice string) {
		s.failed["cri-old.scope"] = true
		c, _, err := d.Create(slice+":cri:old", nil)
		if err != nil {
			t.Fatal(err)
		}
		p := waiting(t)
		if _, err := c.Adopt(p.Process.Pid); err != nil {
			t.Fatal(err)
		}
		other, _, err := d.Create(slice+":cri:old", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := other.Adopt(p.Process.Pid); !errors.Is(err, errdefs.ErrAlreadyExists) {
			t.Errorf("a scope of the same name: %v", err)
		}
		if pids, err := c.Processes(); err != nil || len(pids) != 1 {
			t.Errorf("the running one was touched: %v %v", pids, err)
		}
		if err := errors.Join(c.KillAll(), c.Delete()); err != nil {
			t.Error(err)
		}
		s.result = "failed"
		bad, _, err := d.Create(slice+":cri:job", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := bad.Adopt(waiting(t).Process.Pid); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), `"failed"`) {
			t.Errorf("a job that failed: %v", err)
		}
		if err := bad.Delete(); err != nil {
			t.Error(err)
		}
	})
}

func TestReconnect(t *testing.T) {
	each(t, func(t *testing.T, h *cgroup.Host, d *Driver, _ *fake, _ string) {
		if ok, err := d.atLeast(200); err != nil || !ok {
			t.Fatal(ok, err)
		}
		d.conn.Close()
		if v, err := d.property("Version"); err != nil || v != "255.4-1" {
			t.Errorf("after the bus was gone: %q %v", v, err)
		}
	})
}

func TestUser(t *testing.T) {
	addr := bus(t)
	h := &cgroup.Host{Unified: "/sys/fs/cgroup"}
	newFake(t, &cgroup.Host{}, addr, "/user.slice/user-7.slice/user@7.service")
	d := &Driver{host: h, user: true, dial: func() (*dbus.Conn, error) { return dialBus(addr, os.Getuid()) }}
	defer d.Close()
	c, err := d.Open(":libpod:1")
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Paths()[""]; got != "/sys/fs/cgroup/user.slice/user-7.slice/user@7.service/user.slice/libpod-1.scope" {
		t.Error(got)
	}
	if _, err := New(&cgroup.Host{V1: []cgroup.Controller{{Names: []string{"cpu"}, Mount: "/x"}}}, true); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("a user's systemd with cgroup v1: %v", err)
	}
}
