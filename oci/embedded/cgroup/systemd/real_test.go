package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	sd "github.com/coreos/go-systemd/v22/dbus"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// TestRealSystemd takes scopes of the machine's own systemd through their life.
func TestRealSystemd(t *testing.T) {
	if !Running() || os.Geteuid() != 0 {
		t.Skip("needs root and a machine that systemd booted")
	}
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if !h.V2() {
		t.Skip("needs cgroup v2 alone")
	}
	d, err := New(h, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	slice := fmt.Sprintf("berthreal%d.slice", os.Getpid())
	path, scope := slice+":cri:real", "cri-real.scope"
	t.Cleanup(func() {
		err := d.call(func(ctx context.Context, c *sd.Conn) error {
			_, err := c.StopUnitContext(ctx, slice, "replace", nil)
			return err
		})
		if err != nil && !isError(err, noSuchUnit) {
			t.Errorf("stop %s: %v", slice, err)
		}
	})
	c, warnings, err := d.Create(path, &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20))},
		CPU:    &specs.LinuxCPU{Quota: ptr(int64(12_345)), Period: ptr(uint64(100_000)), Shares: ptr(uint64(512)), Cpus: "0"},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(20))},
	})
	if err != nil || len(warnings) > 0 {
		t.Fatal(warnings, err)
	}
	t.Cleanup(func() { _ = errors.Join(c.KillAll(), c.Delete()) })
	p := waiting(t)
	if warnings, err := c.Adopt(p.Process.Pid); err != nil || len(warnings) > 0 {
		t.Fatal(warnings, err)
	}
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.Process.Pid)); err != nil || strings.TrimSpace(string(text)) != "0::/"+slice+"/"+scope {
		t.Errorf("the process is in %q, %v", text, err)
	}
	same := func(when string, want map[string]string) {
		t.Helper()
		for file, value := range want {
			if got := readText(t, c, "", file); got != value {
				t.Errorf("%s: %s = %q, want %q", when, file, got, value)
			}
		}
	}
	limits := map[string]string{"memory.max": "67108864", "cpu.max": "12345 100000", "pids.max": "20", "cpuset.cpus": "0"}
	same("made", limits)

	// systemd rewrites the files of its units when it reloads: limits are kept.
	reload := func() {
		t.Helper()
		if err := d.call(func(ctx context.Context, c *sd.Conn) error { return c.ReloadContext(ctx) }); err != nil {
			t.Fatal(err)
		}
	}
	reload()
	limits["cpu.max"] = readText(t, c, "", "cpu.max") // its own whole percents may show now
	same("after daemon-reload", limits)

	if _, err := c.Update(&specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(32 << 20))}, Pids: &specs.LinuxPids{Limit: ptr(int64(30))},
	}); err != nil {
		t.Fatal(err)
	}
	limits["memory.max"], limits["pids.max"] = "33554432", "30"
	same("updated", limits)
	reload()
	same("updated, after daemon-reload", limits)

	other, _, err := d.Create(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Adopt(waiting(t).Process.Pid); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("a second scope of that name: %v", err)
	}
	if err := errors.Join(c.KillAll(), c.Delete()); err != nil {
		t.Fatal(err)
	}
	if c.Exists() {
		t.Error("the scope's directory is left")
	}
	state := ""
	err = d.call(func(ctx context.Context, c *sd.Conn) error {
		units, err := c.ListUnitsByPatternsContext(ctx, nil, []string{scope})
		for _, u := range units {
			state = u.ActiveState
		}
		return err
	})
	if err != nil || state != "" {
		t.Errorf("systemd still lists the scope as %q, %v", state, err)
	}
	if err := c.Delete(); err != nil {
		t.Errorf("delete again: %v", err)
	}
}
