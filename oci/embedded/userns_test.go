package embedded

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// userNS gives the spec a user namespace of size ids from first on.
func userNS(s *specs.Spec, first, size uint32) {
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: first, Size: size}}
	s.Linux.GIDMappings = []specs.LinuxIDMapping{{HostID: first, Size: size}}
}

const hostID = 100000

// newUserContainer is a container in a user namespace whose image belongs to it.
func newUserContainer(t testing.TB, args ...string) *container {
	t.Helper()
	c := newContainer(t, args...)
	userNS(c.req.Spec, hostID, 65536)
	for _, dir := range []string{c.req.Rootfs.Lowers[0], c.req.Rootfs.Upper} {
		err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
			if err != nil || strings.HasSuffix(p, "bin/probe") { // a hard link of the test binary
				return err
			}
			return os.Lchown(p, hostID, hostID)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func TestUserNamespace(t *testing.T) {
	r := runtimeFor(t)
	kinds := []string{"pid", "net", "ipc", "uts", "mnt", "cgroup", "user"}
	args := []string{
		"id:", "read:/proc/self/uid_map", "read:/proc/self/setgroups", "hostname:", "pid:", "fds:", "status:CapEff", "status:NoNewPrivs",
		"stat:/", "stat:/tmp", "stat:/dev/null", "write:/dev/null", "stat:/dev/pts/ptmx", "stat:/dev/shm", "write:/dev/shm/x", "write:/made", "stat:/made",
		"chown:/made,7", "stat:/made", "stat:/dev/mqueue", "mkdir:/dev/mqueue/x", "ls:/proc/acpi", "stat:/proc/keys", "write:/proc/sys/kernel/hostname",
		"write:/sys/x", "mknod:c,1,3", "ls:/proc/self/task", "stat:/new/dir", "rlimit:7",
	}
	for _, k := range kinds {
		args = append(args, "link:/proc/self/ns/"+k)
	}
	c := newUserContainer(t, args...)
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, specs.Mount{Destination: "/new/dir", Type: "tmpfs", Source: "tmpfs", Options: []string{"uid=5", "gid=6"}})
	c.req.Spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 4000, Soft: 4000}}
	out := c.output(r)
	expect(t, out, map[string]string{
		"id:": "0 0 []", "read:/proc/self/uid_map": "0     100000      65536|", "read:/proc/self/setgroups": "allow|", "hostname:": "berth-test",
		"pid:": "1", "fds:": "0,1,2", "status:CapEff": "00000000a80425fb", "status:NoNewPrivs": "1",
		"stat:/dev/null": "20666 1:3 0", "write:/dev/null": "ok", "stat:/dev/pts/ptmx": "20666 5:2 0", "stat:/dev/shm": "41777 0:0 0", "write:/dev/shm/x": "ok",
		"write:/made": "ok", "chown:/made,7": "ok", "stat:/made": "100644 0:0 0", "ls:/proc/acpi": "", "stat:/proc/keys": "20666 1:3 65534",
		"write:/proc/sys/kernel/hostname": "error: open /proc/sys/kernel/hostname: read-only file system",
		"write:/sys/x":                    "error: open /sys/x: read-only file system", "mknod:c,1,3": "error: operation not permitted",
		"stat:/new/dir": "41777 0:0 5", "rlimit:7": "4000",
	})
	for _, k := range kinds {
		own, _ := os.Readlink("/proc/self/ns/" + k)
		if got := value(t, out, "link:/proc/self/ns/"+k); got == own {
			t.Errorf("%s namespace is the host's", k)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(c.req.Rootfs.Upper+"/new", &st); err != nil || st.Uid != hostID || st.Gid != hostID {
		t.Errorf("a mount point that was made belongs to %d:%d (%v), want the container's root", st.Uid, st.Gid, err)
	}
}

// TestUserNamespaceLocks: with every capability the container's root undoes
// nothing of its mounts, and finds nothing below its root.
func TestUserNamespaceLocks(t *testing.T) {
	r := runtimeFor(t)
	src := t.TempDir()
	write(t, src+"/file", "content")
	if err := os.Chmod(src, 0o777); err != nil {
		t.Fatal(err)
	}
	c := newUserContainer(t, "remount:/ro", "write:/ro/x", "umount:/ro", "umount:/", "ls:/", "umount:/sys/firmware", "mkdir:/tmp/m", "mount:tmpfs,/tmp/m,tmpfs", "write:/tmp/m/x", "mounts:",
		"read:/ro/file")
	all := []string{"CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_SYS_CHROOT", "CAP_CHOWN"}
	c.req.Spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, bind("/ro", src, "ro"))
	out := c.output(r)
	expect(t, out, map[string]string{
		"remount:/ro": "error: operation not permitted", "umount:/ro": "error: invalid argument", "umount:/": "error: invalid argument",
		"write:/ro/x": "error: open /ro/x: read-only file system", "umount:/sys/firmware": "error: invalid argument", "mount:tmpfs,/tmp/m,tmpfs": "ok", "write:/tmp/m/x": "ok",
		"read:/ro/file": "content",
	})
	if m := strings.Split(value(t, out, "mounts:"), ","); slices.Contains(m, "/p") || slices.Contains(m, "/r") || strings.Count(strings.Join(m, ",")+",", "/,") != 1 {
		t.Errorf("something beside the root is mounted: %s", m)
	}
}

func TestUserNamespaceExec(t *testing.T) {
	r := runtimeFor(t)
	c := newUserContainer(t, "hold:")
	run := c.start(r)
	kinds := []string{"pid", "net", "ipc", "uts", "mnt", "user", "cgroup"}
	args := []string{"id:", "status:CapEff", "status:CapBnd", "fds:", "cwd:", "read:/proc/1/cmdline", "write:/tmp/x"}
	for _, k := range kinds {
		args = append(args, "link:/proc/self/ns/"+k)
	}
	p := process(c.req.Spec.Process, args...)
	p.User, p.Cwd = specs.User{UID: 42, GID: 43, AdditionalGids: []uint32{44}}, "/tmp"
	out, ws, err := run.exec(p)
	if err != nil || ws.ExitStatus() != 0 {
		t.Fatal(err, ws, out)
	}
	expect(t, out, map[string]string{"id:": "42 43 [44]", "status:CapEff": "0000000000000000", "status:CapBnd": "00000000a80425fb", "fds:": "0,1,2", "cwd:": "/tmp"})
	for _, k := range kinds {
		want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", run.p.Pid, k))
		if got := value(t, out, "link:/proc/self/ns/"+k); err != nil || got != want {
			t.Errorf("%s namespace %s, that of the container is %s (%v)", k, got, want, err)
		}
	}
	bad := process(c.req.Spec.Process, "id:")
	bad.User.UID = 70000
	if _, _, err := run.exec(bad); err == nil || !strings.Contains(err.Error(), "process.user.uid 70000") {
		t.Errorf("an id without a mapping: %v", err)
	}
	// A terminal of an exec belongs to its user.
	tty := process(c.req.Spec.Process, "stat:/proc/self/fd/0", "winsize:")
	tty.Terminal, tty.ConsoleSize, tty.User = true, &specs.Box{Height: 30, Width: 90}, specs.User{UID: 9}
	proc, err := run.c.Exec(context.Background(), tty, oci.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	defer proc.PidFD.Close()
	defer proc.Console.Close()
	b := make([]byte, 4096)
	var got strings.Builder
	for {
		n, err := proc.Console.Read(b)
		got.Write(b[:n])
		if err != nil {
			break
		}
	}
	if _, err := kernel.Reap(proc.Pid); err != nil {
		t.Error(err)
	}
	expect(t, got.String(), map[string]string{"winsize:": "30x90"})
	if v := value(t, got.String(), "stat:/proc/self/fd/0"); !strings.HasSuffix(v, " 9") {
		t.Errorf("terminal: %s, want owner 9", v)
	}
}

// TestUserNamespaceTerminal: the first process of a PID namespace in a user
// namespace, which is forked there, leads a session and has the terminal.
func TestUserNamespaceTerminal(t *testing.T) {
	r := runtimeFor(t)
	c := newUserContainer(t, "winsize:", "stat:/proc/self/fd/0", "open:/dev/tty")
	c.req.Spec.Process.Terminal, c.req.Spec.Process.ConsoleSize = true, &specs.Box{Height: 30, Width: 90}
	run := c.start(r)
	b := make([]byte, 4096)
	var got strings.Builder
	for {
		n, err := run.p.Console.Read(b)
		got.Write(b[:n])
		if err != nil {
			break
		}
	}
	if ws := run.reap(); ws.ExitStatus() != 0 {
		t.Errorf("wait status %#x", uint32(ws))
	}
	expect(t, got.String(), map[string]string{"winsize:": "30x90", "open:/dev/tty": "ok"})
}

// TestJoinUserNamespace: a second container in the namespaces of the first.
func TestJoinUserNamespace(t *testing.T) {
	r := runtimeFor(t)
	first := newUserContainer(t, "hold:").start(r)
	second := newUserContainer(t, "id:", "read:/proc/self/uid_map", "link:/proc/self/ns/user", "link:/proc/self/ns/pid", "link:/proc/self/ns/net", "link:/proc/self/ns/uts", "write:/tmp/x", "ls:/proc/1/fd")
	second.req.Spec.Linux.UIDMappings, second.req.Spec.Linux.GIDMappings = nil, nil
	second.req.Spec.Hostname = ""
	for i, n := range second.req.Spec.Linux.Namespaces {
		name := map[specs.LinuxNamespaceType]string{specs.UserNamespace: "user", specs.NetworkNamespace: "net", specs.PIDNamespace: "pid"}[n.Type]
		if name != "" {
			second.req.Spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/%s", first.p.Pid, name)
		}
	}
	out := second.output(r)
	expect(t, out, map[string]string{"id:": "0 0 []", "read:/proc/self/uid_map": "0     100000      65536|", "write:/tmp/x": "ok"})
	for _, k := range []string{"user", "net", "pid"} {
		if want, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", first.p.Pid, k)); value(t, out, "link:/proc/self/ns/"+k) != want {
			t.Errorf("%s namespace is not the first container's", k)
		}
	}
	second.req.Spec.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 5, Size: 5}}
	if _, err := r.Create(context.Background(), second.req); err == nil || !strings.Contains(err.Error(), "differ from those of the user namespace") {
		t.Errorf("other mappings than the joined namespace has: %v", err)
	}
}

func TestManyRanges(t *testing.T) {
	r := runtimeFor(t)
	c := newUserContainer(t, "id:", "read:/proc/self/uid_map")
	c.req.Spec.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: hostID, Size: 1}, {ContainerID: 1, HostID: 300000, Size: 10}, {ContainerID: 1000, HostID: 400000, Size: 1}}
	c.req.Spec.Process.User.UID = 1000
	expect(t, c.output(r), map[string]string{"id:": "1000 0 []"})
}

func TestTimeNamespace(t *testing.T) {
	r := runtimeFor(t)
	for _, user := range []bool{false, true} {
		t.Run(fmt.Sprint("user namespace ", user), func(t *testing.T) {
			args := []string{"clock:7", "clock:1", "link:/proc/self/ns/time", "read:/proc/self/timens_offsets"}
			c := newContainer(t, args...)
			if user {
				c = newUserContainer(t, args...)
			}
			c.req.Spec.Linux.Namespaces = append(c.req.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			c.req.Spec.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 7_000_000}, "monotonic": {Secs: 8_000_000, Nanosecs: 5}}
			out := c.output(r)
			var boot, mono int
			fmt.Sscan(value(t, out, "clock:7"), &boot)
			fmt.Sscan(value(t, out, "clock:1"), &mono)
			if boot < 7_000_000 || boot > 7_900_000+5_000_000 || mono < 8_000_000 {
				t.Errorf("clocks: boot %d, monotonic %d", boot, mono)
			}
			own, _ := os.Readlink("/proc/self/ns/time")
			if value(t, out, "link:/proc/self/ns/time") == own {
				t.Error("the time namespace is the host's")
			}
		})
	}
}

// TestCgroupOwnership: on cgroup v2 the container's root has the cgroup that it
// sees mounted writable, without its limits.
func TestCgroupOwnership(t *testing.T) {
	r := runtimeFor(t)
	host, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if host.Unified == "" {
		t.Skip("no cgroup v2 is mounted")
	}
	r.cgroups = &cgroup.Host{Unified: host.Unified}
	for _, option := range []string{"rw", "ro"} {
		c := newUserContainer(t, "stat:/sys/fs/cgroup/cgroup.procs", "stat:/sys/fs/cgroup/cgroup.max.depth", "mkdir:/sys/fs/cgroup/below")
		c.req.Spec.Linux.Resources = nil
		for i, m := range c.req.Spec.Mounts {
			if m.Type == "cgroup" {
				c.req.Spec.Mounts[i].Options = []string{"nosuid", "noexec", "nodev", option}
			}
		}
		want := map[string]string{"stat:/sys/fs/cgroup/cgroup.procs": "100644 0:0 0", "stat:/sys/fs/cgroup/cgroup.max.depth": "100644 0:0 65534", "mkdir:/sys/fs/cgroup/below": "ok"}
		if option == "ro" {
			want["stat:/sys/fs/cgroup/cgroup.procs"], want["mkdir:/sys/fs/cgroup/below"] = "100644 0:0 65534", "error: mkdir /sys/fs/cgroup/below: read-only file system"
		}
		expect(t, c.output(r), want)
	}
}
