package ocitest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/test/pace"
)

// cgroupParent holds the cgroups of the suite's containers: of this process, as
// the suite may run on several runtimes at a time.
var cgroupParent = fmt.Sprintf("berth-ocitest-%d", os.Getpid())

// suite is the suite on one runtime.
type suite struct {
	rt oci.Runtime
}

// request is a container to be made.
type request struct {
	t *testing.T
	oci.CreateRequest
}

// image makes a root filesystem with the program.
func image(t *testing.T) string {
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
	if err := os.Link(self, filepath.Join(dir, "bin", programName)); err != nil {
		b, err := os.ReadFile(self)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "bin", programName), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func folders(t *testing.T, names ...string) []string {
	t.Helper()
	dir := t.TempDir()
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = filepath.Join(dir, n)
		if err := os.Mkdir(out[i], 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

var caps = []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_SETGID", "CAP_SETUID", "CAP_KILL"}

// container is the request of a container as the engine makes them, with args
// for the program.
func container(t *testing.T, args ...string) *request {
	t.Helper()
	o := folders(t, "upper", "work")
	cid := id.NewContainer()
	s := &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: append([]string{programName}, args...), Cwd: "/", Env: []string{"PATH=/bin"}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/" + cgroupParent + "/" + string(cid),
			Resources:   &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
			},
			MaskedPaths:   []string{"/proc/keys", "/proc/timer_list", "/nosuch"},
			ReadonlyPaths: []string{"/proc/sys", "/proc/sysrq-trigger"},
		},
		Hostname: "ocitest",
	}
	return &request{t, oci.CreateRequest{ID: cid, Spec: s, Rootfs: oci.Rootfs{
		Lowers: []string{image(t), folders(t, "lower")[0]}, Upper: o[0], Work: o[1], Volatile: true,
	}}}
}

// create makes the container and deletes it at the end of the test.
func (s *suite) create(r *request) oci.Container {
	r.t.Helper()
	c, err := s.rt.Create(context.Background(), r.CreateRequest)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := c.KillAll(); err != nil {
			r.t.Error(err)
		}
		if err := c.Delete(); err != nil {
			r.t.Error(err)
		}
	})
	return c
}

// running is a started process of a container.
type running struct {
	t      *testing.T
	c      oci.Container
	p      oci.Process
	out    *bufio.Reader
	file   *os.File // below out
	reaped bool
}

// started takes a process that writes to file. Its end is waited for at the end
// of the test.
func started(t *testing.T, c oci.Container, p oci.Process, file *os.File) *running {
	r := &running{t: t, c: c, p: p, out: bufio.NewReader(file), file: file}
	t.Cleanup(func() {
		if !r.reaped {
			_ = unix.Kill(p.Pid, unix.SIGKILL)
			r.reap()
		}
	})
	return r
}

func (s *suite) start(r *request) *running {
	r.t.Helper()
	c := s.create(r)
	return startWith(r.t, c, oci.Stdio{})
}

// startWith starts a created container; its output is read from running.out.
func startWith(t *testing.T, c oci.Container, io oci.Stdio) *running {
	t.Helper()
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	io.Out, io.Err = w, w
	p, err := c.Start(context.Background(), io)
	if err != nil {
		out.Close()
		t.Fatal(err)
	}
	return started(t, c, p, out)
}

// exec runs a further process.
func (r *running) exec(p *specs.Process) *running {
	r.t.Helper()
	out, w, err := os.Pipe()
	if err != nil {
		r.t.Fatal(err)
	}
	defer w.Close()
	got, err := r.c.Exec(context.Background(), p, oci.Stdio{Out: w, Err: w})
	if err != nil {
		out.Close()
		r.t.Fatal(err)
	}
	return started(r.t, r.c, got, out)
}

// line reads one line of output.
func (r *running) line() string {
	r.t.Helper()
	if err := r.file.SetReadDeadline(time.Now().Add(pace.Wait(10 * time.Second))); err != nil && r.p.Console == nil {
		r.t.Fatal(err)
	}
	l, err := r.out.ReadString('\n')
	if err != nil {
		r.t.Fatalf("output: %q, %v", l, err)
	}
	return strings.TrimRight(l, "\r\n")
}

// end reads the output to its end and returns it with the wait status.
func (r *running) end() (string, unix.WaitStatus) {
	r.t.Helper()
	if err := r.file.SetReadDeadline(time.Now().Add(pace.Wait(20 * time.Second))); err != nil {
		r.t.Fatal(err)
	}
	b, err := io.ReadAll(r.out)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b), r.reap()
}

// others are the statuses of children that ended while another was waited for.
var others = map[int]unix.WaitStatus{}

// reap waits for a child, and takes every other that ends meanwhile as well: the
// first process of a PID namespace ends after all others of it were reaped, and
// a runtime whose exec failed leaves us its own.
func reap(pid int) (unix.WaitStatus, error) {
	for {
		if ws, ok := others[pid]; ok {
			delete(others, pid)
			return ws, nil
		}
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		if err == nil {
			others[got] = ws
		} else if err != unix.EINTR {
			return 0, err
		}
	}
}

func (r *running) reap() (ws unix.WaitStatus) {
	r.t.Helper()
	ws, err := reap(r.p.Pid)
	if err != nil {
		r.t.Errorf("process %d is not ours to wait for: %v", r.p.Pid, err)
	}
	r.reaped = true
	r.p.PidFD.Close()
	r.file.Close()
	return ws
}

// output runs the container to its end, which must be exit code 0.
func (s *suite) output(r *request) string {
	r.t.Helper()
	return s.start(r).output()
}

func (r *running) output() string {
	r.t.Helper()
	out, ws := r.end()
	if !ws.Exited() || ws.ExitStatus() != 0 {
		r.t.Fatalf("wait status %#x, output:\n%s", uint32(ws), out)
	}
	return out
}

// expect compares the results of the program's verbs.
func expect(t *testing.T, out string, want map[string]string) {
	t.Helper()
	for verb, w := range want {
		found := false
		for line := range strings.Lines(out) {
			if v, ok := strings.CutPrefix(strings.TrimRight(line, "\r\n"), verb+" "); ok {
				found = true
				if v != w {
					t.Errorf("%s = %q, want %q", verb, v, w)
				}
				break
			}
		}
		if !found {
			t.Errorf("no %q in output:\n%s", verb, out)
		}
	}
}

// process is a further process of the container that r asks for.
func (r *request) process(args ...string) *specs.Process {
	p := *r.Spec.Process
	p.Args = append([]string{programName}, args...)
	return &p
}

// leftovers is what containers could leave on the machine: mounts, cgroups,
// descriptors of this process, children.
func leftovers(t *testing.T) []string {
	t.Helper()
	var out []string
	// The folders of this test and of those below it: "/tmp/TestName123/001".
	scratch := strings.TrimRight(filepath.Dir(t.TempDir()), "0123456789")
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.Contains(f[4], scratch) {
			out = append(out, "mount "+f[4])
		}
	}
	for _, top := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		dirs, _ := filepath.Glob(top + cgroupParent + "/*")
		for _, d := range dirs {
			var fs unix.Statfs_t
			st, err := os.Stat(d)
			if err == nil && st.IsDir() && unix.Statfs(d, &fs) == nil && (fs.Type == unix.CGROUP_SUPER_MAGIC || fs.Type == unix.CGROUP2_SUPER_MAGIC) {
				out = append(out, "cgroup "+d)
			}
		}
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
	children, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
	if err == nil && len(children) > 0 {
		out = append(out, "children "+string(children))
	}
	slices.Sort(out)
	return out
}
