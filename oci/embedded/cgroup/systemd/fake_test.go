package systemd

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// daemon finds dbus-daemon.
func daemon(t *testing.T) string {
	t.Helper()
	at, err := exec.LookPath("dbus-daemon")
	if err != nil {
		t.Skip("dbus-daemon is not installed (package dbus)")
	}
	return at
}

// bus runs a private dbus-daemon and returns its address.
func bus(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "bus.conf")
	text := `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path=` + dir + `/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>`
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(daemon(t), "--config-file="+config, "--nofork", "--print-address")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	addr, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("dbus-daemon: %v", err)
	}
	return strings.TrimSpace(addr)
}

type prop struct {
	Name  string
	Value dbus.Variant
}

type auxUnit struct {
	Name  string
	Props []prop
}

// fake stands in for systemd on a bus: it makes the directories of scopes in the
// hierarchies it is given, puts the processes there, and removes them.
type fake struct {
	t     *testing.T
	conn  *dbus.Conn
	roots map[string]string // hierarchy to mount point; "" is v2
	base  string            // below the roots: its own cgroup

	mu     sync.Mutex
	jobs   int
	units  map[string]map[string]any // properties of the units that run
	failed map[string]bool           // that are over and not forgotten
	calls  []string
	result string // of the next job
}

func newFake(t *testing.T, h *cgroup.Host, addr, base string) *fake {
	t.Helper()
	conn, err := dialBus(addr, os.Getuid())
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{t: t, conn: conn, roots: map[string]string{}, base: base, units: map[string]map[string]any{}, failed: map[string]bool{}}
	for _, c := range h.V1 {
		for _, n := range []string{"name=systemd", "cpu", "memory", "devices"} {
			if c.Has(n) {
				f.roots[n] = c.Mount
			}
		}
	}
	if h.Unified != "" {
		f.roots[""] = h.Unified
	}
	const path = "/org/freedesktop/systemd1"
	if err := conn.Export(f, path, "org.freedesktop.systemd1.Manager"); err != nil {
		t.Fatal(err)
	}
	if err := conn.Export(managerProperties{base}, path, "org.freedesktop.DBus.Properties"); err != nil {
		t.Fatal(err)
	}
	if reply, err := conn.RequestName("org.freedesktop.systemd1", 0); err != nil || reply != dbus.RequestNameReplyPrimaryOwner {
		t.Fatalf("bus name: %v %v", reply, err)
	}
	t.Cleanup(func() { conn.Close() })
	return f
}

type managerProperties struct{ base string }

func (p managerProperties) Get(_, name string) (dbus.Variant, *dbus.Error) {
	switch name {
	case "Version":
		return dbus.MakeVariant("255.4-1"), nil
	case "ControlGroup":
		return dbus.MakeVariant(p.base), nil
	}
	return dbus.Variant{}, dbus.NewError("org.freedesktop.DBus.Error.UnknownProperty", nil)
}

func (f *fake) StartTransientUnit(name, mode string, props []prop, _ []auxUnit) (dbus.ObjectPath, *dbus.Error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "start "+name+" "+mode)
	if f.units[name] != nil || f.failed[name] {
		return "", dbus.NewError("org.freedesktop.systemd1.UnitExists", []any{name + " exists"})
	}
	p := map[string]any{}
	for _, x := range props {
		p[x.Name] = x.Value.Value()
	}
	pids, _ := p["PIDs"].([]uint32)
	if len(pids) == 0 {
		return "", dbus.NewError("org.freedesktop.DBus.Error.InvalidArgs", []any{"a scope needs a process"})
	}
	f.units[name] = p
	for _, dir := range f.dirs(name) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			f.t.Error(err)
		}
		for _, pid := range pids {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(int(pid))), 0); err != nil {
				f.t.Error(err)
			}
		}
	}
	f.write(name)
	return f.job(name), nil
}

// dirs lists the directories of a unit that runs.
func (f *fake) dirs(name string) []string {
	slice, err := expandSlice(f.units[name]["Slice"].(string))
	if err != nil {
		f.t.Error(err)
	}
	var out []string
	for _, root := range f.roots {
		out = append(out, filepath.Join(root, f.base, slice, name))
	}
	return out
}

// write writes the limits that this systemd knows, from whole percents.
func (f *fake) write(name string) {
	p := f.units[name]
	slice, _ := expandSlice(p["Slice"].(string))
	at := func(hierarchy, file string) string {
		return filepath.Join(f.roots[hierarchy], f.base, slice, name, file)
	}
	if _, v1 := f.roots["cpu"]; !v1 {
		return
	}
	if limit, ok := p["MemoryLimit"].(uint64); ok {
		if err := os.WriteFile(at("memory", "memory.limit_in_bytes"), []byte(strconv.FormatInt(int64(limit), 10)), 0); err != nil {
			f.t.Error(err)
		}
	}
	if per, ok := p["CPUQuotaPerSecUSec"].(uint64); ok && per != infinity {
		period, _ := p["CPUQuotaPeriodUSec"].(uint64)
		if err := os.WriteFile(at("cpu", "cpu.cfs_quota_us"), []byte(strconv.FormatUint(per*period/1_000_000, 10)), 0); err != nil {
			f.t.Error(err)
		}
	}
	if policy, ok := p["DevicePolicy"].(string); ok && policy == "strict" {
		if err := os.WriteFile(at("devices", "devices.deny"), []byte("a"), 0); err != nil {
			f.t.Error(err)
		}
	}
}

// job tells the end of a job, as systemd does: after the call's answer.
func (f *fake) job(name string) dbus.ObjectPath {
	f.jobs++
	path := dbus.ObjectPath(fmt.Sprintf("/org/freedesktop/systemd1/job/%d", f.jobs))
	result := f.result
	if f.result = ""; result == "" {
		result = "done"
	}
	id := uint32(f.jobs)
	time.AfterFunc(5*time.Millisecond, func() {
		_ = f.conn.Emit("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager.JobRemoved", id, path, name, result)
	})
	return path
}

func (f *fake) StopUnit(name, _ string) (dbus.ObjectPath, *dbus.Error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "stop "+name)
	if f.units[name] == nil {
		return "", dbus.NewError(noSuchUnit, []any{name + " not loaded"})
	}
	f.end(name)
	return f.job(name), nil
}

// end kills what runs in a unit and removes its directories.
func (f *fake) end(name string) {
	for _, dir := range f.dirs(name) {
		for range 500 {
			text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				break
			}
			for pid := range strings.FieldsSeq(string(text)) {
				if n, _ := strconv.Atoi(pid); n > 1 {
					_ = unix.Kill(n, unix.SIGKILL)
				}
			}
			if unix.Rmdir(dir) == nil {
				break
			}
			time.Sleep(2 * time.Millisecond)
		}
	}
	delete(f.units, name)
}

func (f *fake) ResetFailedUnit(name string) *dbus.Error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "reset "+name)
	if !f.failed[name] {
		return dbus.NewError(noSuchUnit, []any{name + " not loaded"})
	}
	delete(f.failed, name)
	return nil
}

func (f *fake) SetUnitProperties(name string, _ bool, props []prop) *dbus.Error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, "set "+name)
	if f.units[name] == nil {
		return dbus.NewError(noSuchUnit, []any{name + " not loaded"})
	}
	for _, x := range props {
		f.units[name][x.Name] = x.Value.Value()
	}
	f.write(name)
	return nil
}

// property returns a property of a unit that runs.
func (f *fake) property(name, property string) any {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.units[name][property]
}

func (f *fake) running(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.units[name] != nil
}
