package embedded

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
)

// TestAttributes: the settings that are one system call each, of the first
// process and of an exec.
func TestAttributes(t *testing.T) {
	r := runtimeFor(t)
	args := []string{"sched:", "ioprio:", "status:Cpus_allowed_list", "policy:", "personality:"}
	c := newContainer(t, append(args, "hold:")...)
	s := c.req.Spec
	s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch, Nice: 5}
	s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 6}
	s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolBind, Nodes: "0"}
	want := map[string]string{"sched:": "3 5", "ioprio:": "2 6", "policy:": "2 1"}
	if runtime.GOARCH == "amd64" || runtime.GOARCH == "arm64" {
		s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32}
		want["personality:"] = "0x8"
	}
	run := c.start(r)
	b := make([]byte, 4096)
	n := 0
	for !strings.Contains(string(b[:n]), "personality:") {
		k, err := run.out.Read(b[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += k
	}
	expect(t, string(b[:n]), want)
	p := process(s.Process, args...)
	p.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "0"}
	p.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Nice: 7}
	p.IOPriority = nil
	out, _, err := run.exec(p)
	if err != nil {
		t.Fatal(err)
	}
	want["sched:"], want["status:Cpus_allowed_list"] = "0 7", "0"
	delete(want, "ioprio:")
	expect(t, out, want)
}

// TestSchedulerAndForks: a policy that a fork ends or forbids is that of the
// program, however many processes came before it.
func TestSchedulerAndForks(t *testing.T) {
	r := runtimeFor(t)
	deadline := &specs.Scheduler{Policy: specs.SchedDeadline, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagResetOnFork}, Runtime: 42000, Deadline: 1000000, Period: 1000000}
	batch := &specs.Scheduler{Policy: specs.SchedBatch, Flags: deadline.Flags, Nice: 3}
	for _, user := range []bool{false, true} {
		for _, policy := range []*specs.Scheduler{deadline, batch} {
			c := newContainer(t, "hold:")
			if user {
				c = newUserContainer(t, "hold:")
			}
			c.req.Spec.Process.Scheduler = policy
			tracers := []string{"CAP_SYS_PTRACE"} // an exec appears by a fork, late
			c.req.Spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: tracers, Effective: tracers, Permitted: tracers}
			run := c.start(r)
			checkPolicy(t, fmt.Sprintf("user namespace %v, first process", user), run.p.Pid, policy)
			proc, err := run.c.Exec(context.Background(), process(c.req.Spec.Process, "hold:"), oci.Stdio{})
			if err != nil {
				t.Fatal(err)
			}
			checkPolicy(t, fmt.Sprintf("user namespace %v, exec", user), proc.Pid, policy)
			if err := abandon(proc); err != nil {
				t.Error(err)
			}
			run.stop()
		}
	}
}

// checkPolicy looks at the first thread of a process.
func checkPolicy(t *testing.T, what string, pid int, want *specs.Scheduler) {
	t.Helper()
	a, err := unix.SchedGetAttr(pid, 0)
	if err != nil || a.Policy != schedPolicies[want.Policy] {
		t.Errorf("%s: %+v, %v, want %s", what, a, err, want.Policy)
	}
}

// TestAllCPUs: what the caller is bound to, the container is not.
func TestAllCPUs(t *testing.T) {
	all := func() (set unix.CPUSet) {
		if err := unix.SchedGetaffinity(0, &set); err != nil {
			t.Fatal(err)
		}
		return set
	}
	var own unix.CPUSet
	if own = all(); own.Count() < 2 {
		t.Skip("needs two CPUs")
	}
	r := runtimeFor(t)
	out := newContainer(t, "status:Cpus_allowed_list").output(r)
	want := value(t, out, "status:Cpus_allowed_list")
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var one unix.CPUSet
	for i := 0; one.Count() == 0; i++ {
		if own.IsSet(i) {
			one.Set(i)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.SchedSetaffinity(0, &own); err != nil {
			t.Error(err)
		}
	}()
	c := newContainer(t, "status:Cpus_allowed_list", "policy:")
	c.req.Spec.Process.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "0"} // not for the first process
	c.req.Spec.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolDefault}
	expect(t, c.output(r), map[string]string{"status:Cpus_allowed_list": want, "policy:": "0 0"})
}

func TestIDMappedMounts(t *testing.T) {
	r := runtimeFor(t)
	src := t.TempDir()
	write(t, src+"/file", "x")
	// A mount below, of a filesystem that every kernel can idmap.
	if err := errors.Join(os.Mkdir(src+"/sub", 0o755), unix.Mount(t.TempDir(), src+"/sub", "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(src+"/sub", 0); err != nil {
			t.Error(err)
		}
	})
	write(t, src+"/sub/inner", "x")
	for _, p := range []string{src, src + "/file", src + "/sub", src + "/sub/inner"} {
		if err := os.Chown(p, 1000, 1000); err != nil {
			t.Fatal(err)
		}
	}
	maps := []specs.LinuxIDMapping{{ContainerID: 1000, HostID: 7000, Size: 10}}
	t.Run("mappings of the mount", func(t *testing.T) {
		c := newContainer(t, "stat:/flat/file", "stat:/flat/sub/inner", "stat:/deep/sub/inner", "stat:/plain/file")
		flat, deep := bind("/flat", src), bind("/deep", src, "ridmap")
		flat.UIDMappings, flat.GIDMappings, deep.UIDMappings, deep.GIDMappings = maps, maps, maps, maps
		c.req.Spec.Mounts = append(c.req.Spec.Mounts, flat, deep, bind("/plain", src))
		expect(t, c.output(r), map[string]string{
			"stat:/flat/file": "100644 0:0 7000", "stat:/flat/sub/inner": "100644 0:0 1000", "stat:/deep/sub/inner": "100644 0:0 7000", "stat:/plain/file": "100644 0:0 1000",
		})
	})
	t.Run("mappings of the container", func(t *testing.T) {
		c := newUserContainer(t, "stat:/data/file", "write:/data/made", "stat:/data/made")
		c.req.Spec.Process.User = specs.User{UID: 1000, GID: 1000}
		c.req.Spec.Process.Capabilities = nil
		c.req.Spec.Mounts = append(c.req.Spec.Mounts, bind("/data", src, "idmap"))
		expect(t, c.output(r), map[string]string{"stat:/data/file": "100644 0:0 1000", "write:/data/made": "ok", "stat:/data/made": "100644 0:0 1000"})
		var st unix.Stat_t
		if err := unix.Stat(src+"/made", &st); err != nil || st.Uid != 1000 {
			t.Errorf("on the host the file belongs to %d (%v)", st.Uid, err)
		}
	})
}

func TestTmpCopyUp(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "read:/data/a/file", "link:/data/link", "write:/data/new", "stat:/data")
	lower := c.req.Rootfs.Lowers[0]
	write(t, lower+"/data/a/file", "content")
	if err := os.Symlink("/etc/passwd", lower+"/data/link"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(lower+"/data", 0o711); err != nil {
		t.Fatal(err)
	}
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, specs.Mount{Destination: "/data", Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup"}})
	expect(t, c.output(r), map[string]string{"read:/data/a/file": "content", "link:/data/link": "/etc/passwd", "write:/data/new": "ok", "stat:/data": "40711 0:0 0"})
	if _, err := os.Stat(c.req.Rootfs.Upper + "/data/new"); err == nil {
		t.Error("the file was written below the tmpfs")
	}
}

func TestRemount(t *testing.T) {
	r := runtimeFor(t)
	src := t.TempDir()
	c := newContainer(t, "write:/data/x", "write:/t/x", "read:/proc/self/mountinfo")
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, bind("/data", src),
		specs.Mount{Destination: "/data", Type: "bind", Source: "/ignored", Options: []string{"remount", "bind", "ro", "nosuid"}},
		specs.Mount{Destination: "/t", Type: "tmpfs", Source: "tmpfs"},
		specs.Mount{Destination: "/t", Type: "tmpfs", Options: []string{"remount", "size=8192"}})
	out := c.output(r)
	expect(t, out, map[string]string{"write:/data/x": "error: open /data/x: read-only file system", "write:/t/x": "ok"})
	if info := value(t, out, "read:/proc/self/mountinfo"); !strings.Contains(info, "size=8k") {
		t.Errorf("the tmpfs was not reconfigured: %s", info)
	}
	c = newContainer(t)
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, specs.Mount{Destination: "/etc", Options: []string{"remount", "ro"}})
	if _, err := r.Create(t.Context(), c.req); err == nil || !strings.Contains(err.Error(), "mounts[7].options: remount") {
		t.Errorf("remount of what is no mount: %v", err)
	}
}

// TestLongOptions: an overlay of the spec's own, with more options than
// fsconfig(2) takes for one key.
func TestLongOptions(t *testing.T) {
	r := runtimeFor(t)
	dir := t.TempDir()
	var lowers []string
	for i := range 40 {
		lowers = append(lowers, fmt.Sprintf("%s/lower-%d", dir, i))
		write(t, fmt.Sprintf("%s/file-%d", lowers[i], i), "x")
	}
	for _, d := range []string{"u", "w"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c := newContainer(t, "read:/data/file-0", "read:/data/file-39", "write:/data/new")
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, specs.Mount{Destination: "/data", Type: "overlay", Source: "overlay", Options: []string{
		"lowerdir=" + strings.Join(lowers, ":"), "upperdir=" + dir + "/u", "workdir=" + dir + "/w", "nosuid",
	}})
	expect(t, c.output(r), map[string]string{"read:/data/file-0": "x", "read:/data/file-39": "x", "write:/data/new": "ok"})
	if _, err := os.Stat(dir + "/u/new"); err != nil {
		t.Error(err)
	}
}

// TestSharedMounts: without a mount namespace of its own a container is chrooted
// in the one it has.
func TestSharedMounts(t *testing.T) {
	r := runtimeFor(t)
	holder := newContainer(t, "hold:")
	holder.bundle()
	write(t, holder.req.Spec.Root.Path+"/inner/etc/name", "inner")
	other := holder.start(r)
	for name, ns := range map[string]specs.LinuxNamespace{
		"the host's": {}, "joined": {Type: specs.MountNamespace, Path: fmt.Sprintf("/proc/%d/ns/mnt", other.p.Pid)},
	} {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t, "ls:/", "cwd:", "link:/etc/host")
			dir := c.bundle()
			if err := os.Symlink("/x", dir+"/rootfs/etc/host"); err != nil {
				t.Fatal(err)
			}
			s := c.req.Spec
			s.Mounts, s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil, nil
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.MountNamespace })
			s.Process.Cwd = "/tmp"
			s.Process.Args = append(s.Process.Args, "hold:")
			of := "self"
			if ns.Type != "" {
				s.Linux.Namespaces = append(s.Linux.Namespaces, ns)
				s.Root.Path, of = "/", fmt.Sprint(other.p.Pid) // of the joined namespace
			}
			run := c.start(r)
			want, _ := os.Readlink("/proc/" + of + "/ns/mnt")
			if got, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", run.p.Pid)); got != want {
				t.Errorf("mount namespace %s, want %s", got, want)
			}
			if ns.Type != "" {
				out, _, err := run.exec(process(s.Process, "cwd:", "read:/inner/etc/name"))
				if err != nil {
					t.Fatal(err)
				}
				expect(t, out, map[string]string{"cwd:": "/tmp", "read:/inner/etc/name": "inner"})
				return
			}
			out, _, err := run.exec(process(s.Process, "ls:/", "cwd:", "link:/etc/host"))
			if err != nil {
				t.Fatal(err)
			}
			expect(t, out, map[string]string{"ls:/": "bin,data,dev,etc,proc,sys,tmp", "cwd:": "/tmp", "link:/etc/host": "/x"})
		})
	}
}

// TestNetDevices: a device of the host, with its address and another name. How
// devices move is shown by the tests of moveNetDevices.
func TestNetDevices(t *testing.T) {
	r := runtimeFor(t)
	for _, user := range []bool{false, true} {
		name := fmt.Sprintf("brt%d", serial.Add(1))
		l := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "p"}
		if err := netlink.LinkAdd(l); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = netlink.LinkDel(l) }) // gone with the container, mostly
		addr, err := netlink.ParseAddr("198.51.100.7/32")
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrAdd(l, addr); err != nil {
			t.Fatal(err)
		}
		c := newContainer(t, "links:")
		if user {
			c = newUserContainer(t, "links:")
		}
		c.req.Spec.Linux.NetDevices = map[string]specs.LinuxNetDevice{name: {Name: "eth9"}}
		expect(t, c.output(r), map[string]string{"links:": "lo,eth9=198.51.100.7/32"})
	}
	c := newContainer(t, "links:")
	c.req.Spec.Linux.NetDevices = map[string]specs.LinuxNetDevice{"no-such-dev": {Name: "eth9"}}
	if _, err := r.Create(t.Context(), c.req); err == nil || !strings.Contains(err.Error(), "linux.netDevices[no-such-dev]") {
		t.Errorf("a device that is not there: %v", err)
	}
}

// TestFeaturesTellTheTruth: each mount option and namespace that is listed is
// taken, and hooks too.
func TestFeaturesTellTheTruth(t *testing.T) {
	f := Features()
	for _, o := range f.MountOptions {
		m := specs.Mount{Destination: "/x", Type: "tmpfs", Source: "tmpfs", Options: []string{o}}
		if strings.Contains(o, "bind") && o != "unbindable" && o != "runbindable" || strings.HasSuffix(o, "idmap") {
			m.Type, m.Source = "bind", "/tmp"
		}
		got, err := parseMount("m", m)
		if err != nil {
			t.Errorf("%s: %v", o, err)
			continue
		}
		for _, x := range got.opts {
			if !slices.Contains(superFlags, x.Key) {
				t.Errorf("%s is passed on to the filesystem", o)
			}
		}
	}
	r := runtimeFor(t)
	for _, n := range f.Linux.Namespaces {
		s := &specs.Spec{Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.LinuxNamespaceType(n)}}}, Process: &specs.Process{Args: []string{"x"}, Cwd: "/"}}
		if n == "user" {
			s.Linux.UIDMappings, s.Linux.GIDMappings = []specs.LinuxIDMapping{{HostID: 1, Size: 1}}, []specs.LinuxIDMapping{{HostID: 1, Size: 1}}
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.MountNamespace})
		}
		if _, err := r.plan(oci.CreateRequest{Spec: s}); err != nil {
			t.Errorf("%s namespace: %v", n, err)
		}
	}
}
