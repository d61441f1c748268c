package embedded

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded/cgroup"
	"github.com/berth-runtime/berth/test/pace"
)

// The test binary is also the program that runs in the containers: under the
// name "probe" it does one thing and exits (probe_test.go).
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "probe" {
		probe(os.Args[1:])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var cgroupRoot = fmt.Sprintf("/berth-embedded-test-%d", os.Getpid())

var serial atomic.Int64

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// runtimeFor returns a runtime and checks at the end of the test that nothing
// is left: mounts of the host, cgroups, descriptors.
func runtimeFor(t testing.TB) *Runtime {
	t.Helper()
	needRoot(t)
	before := state(t)
	r, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		host := r.cgroups.(*cgroup.Host)
		for _, c := range host.V1 {
			_ = os.Remove(c.Mount + cgroupRoot)
		}
		_ = os.Remove(host.Unified + cgroupRoot)
		deadline := time.Now().Add(pace.Wait(2 * time.Second))
		for {
			after := state(t)
			if after == before {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("left behind: before\n%s\nafter\n%s", before, after)
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	return r
}

// state is what a container could leave on the machine.
func state(t testing.TB) string {
	t.Helper()
	var out []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); !strings.Contains(line, "/critest") {
			out = append(out, "mount "+f[4])
		}
	}
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/" + strings.TrimPrefix(cgroupRoot, "/") + "*")
	for _, d := range dirs {
		_ = filepath.WalkDir(d, func(p string, e os.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				out = append(out, "cgroup "+p)
			}
			return nil
		})
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		link, err := os.Readlink("/proc/self/fd/" + fd.Name())
		// The Go runtime's own poller comes on first use.
		if err != nil || strings.HasPrefix(link, "anon_inode:[event") || strings.HasSuffix(link, "/fd") {
			continue
		}
		out = append(out, "fd "+link)
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

// image makes a minimal root filesystem with the probe program.
func image(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"bin", "proc", "sys", "dev", "etc", "tmp", "data"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Link(self, dir+"/bin/probe"); err != nil {
		b, err := os.ReadFile(self)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir+"/bin/probe", b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s := newScript(nil)
	s.do("exit", unix.SYS_EXIT_GROUP, 0)
	if err := os.WriteFile(dir+"/bin/true", s.image(), 0o755); err != nil {
		t.Fatal(err)
	}
	s = newScript(nil)
	s.do("pause", unix.SYS_PPOLL, 0, 0, 0, 0).ignoreAny().skip(-1)
	if err := os.WriteFile(dir+"/bin/sleep", s.image(), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// container is a request under construction.
type container struct {
	t   testing.TB
	req oci.CreateRequest
}

var standardMounts = []specs.Mount{
	{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
	{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
	{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
	{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
	{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
	{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
}

var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

func newContainer(t testing.TB, args ...string) *container {
	t.Helper()
	overlay := t.TempDir()
	for _, d := range []string{"u", "w"} {
		if err := os.Mkdir(filepath.Join(overlay, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cid := id.NewContainer()
	s := &specs.Spec{
		Root: &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: append([]string{"probe"}, args...), Cwd: "/", Env: []string{"PATH=/bin:/usr/bin"}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: defaultCaps, Effective: defaultCaps, Permitted: defaultCaps},
		},
		Mounts: slices.Clone(standardMounts),
		Linux: &specs.Linux{
			CgroupsPath: fmt.Sprintf("%s/%s-%d", cgroupRoot, id.Short(cid), serial.Add(1)),
			Resources:   &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
			},
			MaskedPaths:   []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware", "/nosuch"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
		Hostname: "berth-test",
	}
	return &container{t, oci.CreateRequest{ID: cid, Spec: s, Rootfs: oci.Rootfs{
		Lowers: []string{image(t)}, Upper: overlay + "/u", Work: overlay + "/w", Volatile: true,
	}}}
}

// running is a started container.
type running struct {
	t    testing.TB
	c    oci.Container
	p    oci.Process
	out  *os.File // read end of stdout and stderr
	done bool
}

// create makes the container and deletes it at the end of the test.
func (c *container) create(r *Runtime) oci.Container {
	c.t.Helper()
	got, err := r.Create(context.Background(), c.req)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if err := got.KillAll(); err != nil {
			c.t.Error(err)
		}
		if err := got.Delete(); err != nil {
			c.t.Error(err)
		}
	})
	return got
}

func (c *container) start(r *Runtime) *running {
	c.t.Helper()
	got := c.create(r)
	out, w, err := os.Pipe()
	if err != nil {
		c.t.Fatal(err)
	}
	defer w.Close()
	p, err := got.Start(context.Background(), oci.Stdio{Out: w, Err: w})
	if err != nil {
		out.Close()
		c.t.Fatal(err)
	}
	run := &running{t: c.t, c: got, p: p, out: out}
	c.t.Cleanup(func() { run.stop() })
	return run
}

// wait returns the output and the wait status.
func (r *running) wait() (string, unix.WaitStatus) {
	r.t.Helper()
	out, err := io.ReadAll(r.out)
	if err != nil {
		r.t.Error(err)
	}
	return string(out), r.reap()
}

func (r *running) reap() unix.WaitStatus {
	ws, err := kernel.Reap(r.p.Pid)
	if err != nil {
		r.t.Error(err)
	}
	r.done = true
	r.p.PidFD.Close()
	r.out.Close()
	if r.p.Console != nil {
		r.p.Console.Close()
	}
	return ws
}

func (r *running) stop() {
	if !r.done {
		_ = unix.Kill(r.p.Pid, unix.SIGKILL)
		r.reap()
	}
}

// output runs the container to its end, which must be exit status 0.
func (c *container) output(r *Runtime) string {
	c.t.Helper()
	out, ws := c.start(r).wait()
	if !ws.Exited() || ws.ExitStatus() != 0 {
		c.t.Fatalf("wait status %#x, output:\n%s", uint32(ws), out)
	}
	return out
}

// exec runs a further process to its end.
func (r *running) exec(p *specs.Process) (string, unix.WaitStatus, error) {
	r.t.Helper()
	out, w, err := os.Pipe()
	if err != nil {
		r.t.Fatal(err)
	}
	defer out.Close()
	proc, err := r.c.Exec(context.Background(), p, oci.Stdio{Out: w, Err: w})
	w.Close()
	if err != nil {
		return "", 0, err
	}
	defer proc.PidFD.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(out); err != nil {
		r.t.Error(err)
	}
	ws, err := kernel.Reap(proc.Pid)
	return b.String(), ws, err
}

// value finds "key value..." in the probe's output.
func value(t testing.TB, out, key string) string {
	t.Helper()
	for line := range strings.Lines(out) {
		if v, ok := strings.CutPrefix(line, key+" "); ok {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("no %q in output:\n%s", key, out)
	return ""
}
func ptr[T any](v T) *T { return &v }
func itoa(n int) string { return strconv.Itoa(n) }
