package embedded

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
)

func expect(t *testing.T, out string, want map[string]string) {
	t.Helper()
	for k, w := range want {
		if got := value(t, out, k); got != w {
			t.Errorf("%s = %q, want %q", k, got, w)
		}
	}
}

func TestStart(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "hostname:", "pid:", "id:", "fds:", "mounts:", "ls:/dev", "status:NoNewPrivs", "write:/tmp/x", "write:/proc/sys/kernel/hostname",
		"status:CapEff", "status:CapAmb", "status:CapInh", "ls:/proc/acpi", "status:SigIgn", "status:SigBlk", "write:/sys/x", "stat:/dev/null", "link:/dev/ptmx", "umask:", "stat:/proc/keys")
	out := c.output(r)
	expect(t, out, map[string]string{
		"hostname:": "berth-test", "pid:": "1", "id:": "0 0 []", "fds:": "0,1,2", "write:/tmp/x": "ok",
		"status:NoNewPrivs": "1", "status:CapEff": "00000000a80425fb", "status:CapAmb": "0000000000000000", "status:CapInh": "0000000000000000",
		"ls:/dev":                         "fd,full,mqueue,null,ptmx,pts,random,shm,stderr,stdin,stdout,tty,urandom,zero",
		"write:/proc/sys/kernel/hostname": "error: open /proc/sys/kernel/hostname: read-only file system",
		"ls:/proc/acpi":                   "", "status:SigIgn": "0000000000000000", "status:SigBlk": "0000000000000000",
		"write:/sys/x": "error: open /sys/x: read-only file system", "stat:/dev/null": "20666 1:3 0", "link:/dev/ptmx": "pts/ptmx", "umask:": "22",
		"stat:/proc/keys": "20666 1:3 0",
	})
	for m := range strings.SplitSeq(value(t, out, "mounts:"), ",") {
		if m != "/" && !strings.HasPrefix(m, "/proc") && !strings.HasPrefix(m, "/sys") && !strings.HasPrefix(m, "/dev") {
			t.Errorf("a mount that is not the container's is visible: %s", m)
		}
	}
	if strings.Count(value(t, out, "mounts:")+",", "/,") != 1 {
		t.Errorf("more than the root at /: %s", value(t, out, "mounts:"))
	}
}

func TestNamespaces(t *testing.T) {
	r := runtimeFor(t)
	kinds := []string{"pid", "net", "ipc", "uts", "mnt", "cgroup"}
	var args []string
	for _, k := range kinds {
		args = append(args, "link:/proc/self/ns/"+k)
	}
	own := map[string]string{}
	for _, k := range kinds {
		own[k], _ = os.Readlink("/proc/self/ns/" + k)
	}
	t.Run("new", func(t *testing.T) {
		out := newContainer(t, args...).output(r)
		for _, k := range kinds {
			if got := value(t, out, "link:/proc/self/ns/"+k); got == own[k] {
				t.Errorf("%s namespace is the host's", k)
			}
		}
	})
	t.Run("host", func(t *testing.T) {
		c := newContainer(t, append(args, "pid:")...)
		c.req.Spec.Hostname = ""
		c.req.Spec.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}}
		out := c.output(r)
		for _, k := range kinds {
			if got := value(t, out, "link:/proc/self/ns/"+k); k != "mnt" && got != own[k] {
				t.Errorf("%s namespace is not the host's", k)
			}
		}
		if value(t, out, "pid:") == "1" {
			t.Error("pid 1 in the host's pid namespace")
		}
	})
	t.Run("joined", func(t *testing.T) {
		first := newContainer(t, "hold:").start(r)
		c := newContainer(t, append(args, "pid:", "hostname:")...)
		c.req.Spec.Hostname = ""
		c.req.Namespaces = map[specs.LinuxNamespaceType]*os.File{}
		for spec, file := range map[specs.LinuxNamespaceType]string{
			specs.PIDNamespace: "pid", specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts",
		} {
			f, err := os.Open("/proc/" + itoa(first.p.Pid) + "/ns/" + file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			c.req.Namespaces[spec] = f
		}
		out := c.output(r)
		for _, k := range []string{"pid", "net", "ipc", "uts"} {
			want, err := os.Readlink("/proc/" + itoa(first.p.Pid) + "/ns/" + k)
			if got := value(t, out, "link:/proc/self/ns/"+k); err != nil || got != want {
				t.Errorf("%s namespace %q, want %q (%v)", k, got, want, err)
			}
		}
		if value(t, out, "pid:") == "1" || value(t, out, "hostname:") != "berth-test" {
			t.Errorf("not in the first container's namespaces:\n%s", out)
		}
		for _, k := range kinds {
			if now, _ := os.Readlink("/proc/self/ns/" + k); now != own[k] {
				t.Errorf("the runtime itself is in another %s namespace now", k)
			}
		}
	})
}

func TestPodInit(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t)
	c.req.PodInit, c.req.Spec.Process, c.req.Rootfs = true, nil, oci.Rootfs{}
	c.req.Spec.Mounts, c.req.Spec.Root = nil, nil
	c.req.Spec.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}}
	c.req.Spec.Hostname = ""
	init := c.start(r)
	ns, err := os.Open("/proc/" + itoa(init.p.Pid) + "/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	// A process that outlives its parent is reaped by the init.
	w := newContainer(t, "pid:", "status:NSpid")
	w.req.Namespaces = map[specs.LinuxNamespaceType]*os.File{specs.PIDNamespace: ns}
	if got := value(t, w.output(r), "pid:"); got == "1" {
		t.Errorf("pid %s in a shared namespace", got)
	}
	rss, err := os.ReadFile("/proc/" + itoa(init.p.Pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(rss), "CapEff:\t0000000000000000") {
		t.Errorf("the pod's init keeps capabilities:\n%s", rss)
	}
	for line := range strings.Lines(string(rss)) {
		if strings.HasPrefix(line, "VmRSS") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if _, err := unix.Wait4(init.p.Pid, nil, unix.WNOHANG, nil); err != nil {
		t.Errorf("init ended: %v", err)
	}
}

func TestUser(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "id:", "umask:", "status:CapEff", "status:CapPrm", "status:CapBnd", "status:CapAmb", "status:Groups", "write:/proc/self/fd/1")
	c.req.Spec.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{1001, 7}, Umask: ptr(uint32(0o027))}
	caps := c.req.Spec.Process.Capabilities
	caps.Inheritable, caps.Ambient = []string{"CAP_NET_RAW"}, []string{"CAP_NET_RAW"}
	expect(t, c.output(r), map[string]string{
		"id:": "1000 1001 [7 1001]", "umask:": "27", "status:CapEff": "0000000000002000", "status:CapPrm": "0000000000002000",
		"status:CapBnd": "00000000a80425fb", "status:CapAmb": "0000000000002000",
	})
}

func TestSeccompInContainer(t *testing.T) {
	r := runtimeFor(t)
	for _, nnp := range []bool{true, false} {
		c := newContainer(t, "status:Seccomp", "status:NoNewPrivs", "status:CapEff", "socket:38", "socket:1", "mkdir:/tmp/d", "hostname:")
		p := c.req.Spec.Process
		p.NoNewPrivileges, p.User.UID = nnp, 5
		c.req.Spec.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow,
			Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32, specs.ArchAARCH64, specs.ArchARM},
			Syscalls: []specs.LinuxSyscall{
				{Names: []string{"socket"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(95)), Args: []specs.LinuxSeccompArg{{Index: 0, Value: 38, Op: specs.OpEqualTo}}},
				{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno},
				{Names: []string{"setuid", "setresuid", "setresgid", "setgroups", "mount"}, Action: specs.ActErrno},
			},
		}
		expect(t, c.output(r), map[string]string{
			"status:Seccomp": "2", "status:NoNewPrivs": map[bool]string{true: "1", false: "0"}[nnp], "status:CapEff": "0000000000000000",
			"socket:38": "error: operation not supported", "socket:1": "ok", "mkdir:/tmp/d": "error: mkdir /tmp/d: operation not permitted",
		})
	}
}

func TestDevicesAreDenied(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "mknod:b,8,0", "mknod:c,1,1", "mknod:c,1,3", "open:/dev/null", "open:/dev/mine", "open:/dev/kmsg", "stat:/dev/mine")
	c.req.Spec.Linux.Devices = []specs.LinuxDevice{
		{Path: "/dev/mine", Type: "c", Major: 1, Minor: 5, FileMode: ptr(os.FileMode(0o600)), UID: ptr(uint32(9))},
		{Path: "/dev/kmsg", Type: "c", Major: 1, Minor: 11},
	}
	expect(t, c.output(r), map[string]string{
		"mknod:b,8,0": "error: operation not permitted", "mknod:c,1,1": "error: operation not permitted", "mknod:c,1,3": "ok",
		"open:/dev/null": "ok", "open:/dev/mine": "ok", "stat:/dev/mine": "20600 1:5 9",
		"open:/dev/kmsg": "error: open /dev/kmsg: operation not permitted",
	})
	c = newContainer(t, "open:/dev/kmsg")
	caps := c.req.Spec.Process.Capabilities // kmsg asks for it
	for _, set := range []*[]string{&caps.Bounding, &caps.Permitted, &caps.Effective} {
		*set = append(slices.Clone(*set), "CAP_SYSLOG")
	}
	c.req.Spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/kmsg", Type: "c", Major: 1, Minor: 11}}
	c.req.Spec.Linux.Resources.Devices = append(c.req.Spec.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"})
	expect(t, c.output(r), map[string]string{"open:/dev/kmsg": "ok"})
}

func TestRlimitsAndSysctls(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "rlimit:7", "read:/proc/sys/net/ipv4/ip_unprivileged_port_start", "read:/proc/sys/kernel/shmmni", "read:/proc/self/oom_score_adj", "env:A", "cwd:")
	p := c.req.Spec.Process
	p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}}
	p.OOMScoreAdj = ptr(777)
	p.Env = append(p.Env, "A=b c")
	p.Cwd = "/new/dir"
	c.req.Spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "7", "kernel.shmmni": "99"}
	expect(t, c.output(r), map[string]string{
		"rlimit:7": "200",
		"read:/proc/sys/net/ipv4/ip_unprivileged_port_start": "7|", "read:/proc/sys/kernel/shmmni": "99|",
		"read:/proc/self/oom_score_adj": "777|", "env:A": "b c", "cwd:": "/new/dir",
	})
	host, err := os.ReadFile("/proc/sys/kernel/shmmni")
	if err != nil || strings.TrimSpace(string(host)) == "99" {
		t.Errorf("the host's sysctl changed: %s %v", host, err)
	}
}

// TestStartErrors: a start that fails names the reason and leaves a container
// that can only be deleted.
func TestStartErrors(t *testing.T) {
	r := runtimeFor(t)
	for _, x := range []struct {
		name, want string
		kind       error
		change     func(s *specs.Spec)
	}{
		{"not in PATH", `exec: "nosuch": executable file not found in $PATH`, errdefs.ErrNotFound, func(s *specs.Spec) { s.Process.Args = []string{"nosuch"} }},
		{"no such path", `exec: "/no/such": no such file or directory`, errdefs.ErrNotFound, func(s *specs.Spec) { s.Process.Args = []string{"/no/such"} }},
		{"directory", `exec: "/bin": permission denied`, errdefs.ErrPermissionDenied, func(s *specs.Spec) { s.Process.Args = []string{"/bin"} }},
		{"not executable", `exec: "data": permission denied`, errdefs.ErrPermissionDenied, func(s *specs.Spec) {
			s.Process.Args, s.Process.Env = []string{"data"}, []string{"PATH=/nosuch:/:/bin"}
		}},
		{"cwd by magic link", `process.cwd "/proc/self/fd/3": too many levels`, errdefs.ErrInvalidArgument, func(s *specs.Spec) { s.Process.Cwd = "/proc/self/fd/3" }},
		{"cwd by magic link to the root", `process.cwd "/proc/1/root": too many levels`, errdefs.ErrInvalidArgument, func(s *specs.Spec) { s.Process.Cwd = "/proc/1/root" }},
		{"no AppArmor", "process.apparmorProfile", errdefs.ErrFailedPrecondition, func(s *specs.Spec) { s.Process.ApparmorProfile = "nosuch" }},
		{"no SELinux", "process.selinuxLabel", errdefs.ErrFailedPrecondition, func(s *specs.Spec) { s.Process.SelinuxLabel = "a:b:c:s0" }},
	} {
		t.Run(x.name, func(t *testing.T) {
			if x.name == "no AppArmor" && apparmorEnabled() || x.name == "no SELinux" && selinuxEnabled() {
				t.Skip("the module is enabled here")
			}
			c := newContainer(t)
			x.change(c.req.Spec)
			got := c.create(r)
			_, err := got.Start(context.Background(), oci.Stdio{})
			if err == nil || !strings.Contains(err.Error(), x.want) || !errors.Is(err, x.kind) {
				t.Errorf("error %v, want %q of kind %v", err, x.want, x.kind)
			}
			if _, err := got.Start(context.Background(), oci.Stdio{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
				t.Errorf("second start: %v", err)
			}
		})
	}
}

// TestCreateErrors: nothing is left behind (runtimeFor compares).
func TestCreateErrors(t *testing.T) {
	r := runtimeFor(t)
	for _, x := range []struct {
		name, want string
		kind       error
		change     func(s *specs.Spec)
	}{
		{"user namespace without a mapping", "linux.uidMappings: missing", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}},
		{"mapping without a user namespace", "linux.uidMappings, linux.gidMappings: set", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 1, Size: 1}}
		}},
		{"overlapping ranges", "linux.uidMappings[1]: overlaps linux.uidMappings[0]", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			userNS(s, 100000, 65536)
			s.Linux.UIDMappings = append(s.Linux.UIDMappings, specs.LinuxIDMapping{ContainerID: 65535, HostID: 1, Size: 9})
		}},
		{"id without a mapping", "process.user.uid 70000: not in linux.uidMappings", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			userNS(s, 100000, 65536)
			s.Process.User.UID = 70000
		}},
		{"group without a mapping", "process.user.additionalGids: 70000", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			userNS(s, 100000, 65536)
			s.Process.User.AdditionalGids = []uint32{70000}
		}},
		{"relative hook", `hooks.poststop[0].path "x"`, errdefs.ErrInvalidArgument, func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "x"}}} }},
		{"hook timeout", "hooks.createContainer[0].timeout 0", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/x", Timeout: ptr(0)}}}
		}},
		{"scheduler", "process.scheduler", errdefs.ErrInvalidArgument, func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{} }},
		{"io priority", "process.ioPriority", errdefs.ErrInvalidArgument, func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{Class: "x"} }},
		{"time offsets without a namespace", "linux.timeOffsets", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1}}
		}},
		{"unknown clock", `linux.timeOffsets: clock "x"`, errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"x": {Secs: 1}}
		}},
		{"namespace path that is none", "linux.namespaces: uts: path \"/proc/self/status\": not a namespace", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Linux.Namespaces[3].Path = "/proc/self/status"
		}},
		{"namespace path of another kind", "linux.namespaces: uts: path \"/proc/self/ns/net\": a namespace of another type", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Linux.Namespaces[3].Path = "/proc/self/ns/net"
		}},
		{"mounts in the host's mount namespace", "mounts: needs a mount namespace of its own", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Linux.Namespaces = s.Linux.Namespaces[:4]
		}},
		{"idmap of a tmpfs", "an idmapped mount is a bind mount", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/data", Type: "tmpfs", Options: []string{"idmap"}})
		}},
		{"idmap without a mapping", "idmap without mappings", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, bind("/data", "/tmp", "idmap"))
		}},
		{"network device without a namespace", "linux.netDevices", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces[:1], s.Linux.Namespaces[2:]...)
			s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth9": {}}
		}},
		{"missing source", `mounts[7] "/data": source "/no/such": open_tree: no such file`, nil, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: "/no/such"})
		}},
		{"bad memory limit", "linux.resources.cpu.quota", nil, func(s *specs.Spec) {
			s.Linux.Resources.CPU = &specs.LinuxCPU{Quota: ptr(int64(7))}
		}},
		{"host sysctl", "linux.sysctl", errdefs.ErrInvalidArgument, func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.core_pattern": "x"} }},
		{"sysctl path", "linux.sysctl", errdefs.ErrInvalidArgument, func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net/../kernel/core_pattern": "x"} }},
		{"sysctl without namespace", "linux.sysctl", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.UTSNamespace}}
		}},
		{"cgroup path", "linux.cgroupsPath", errdefs.ErrInvalidArgument, func(s *specs.Spec) { s.Linux.CgroupsPath = "/a/../../b" }},
		{"root mount", "mounts[7].destination", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/", Type: "tmpfs"})
		}},
		{"mount over proc", "nothing but a bind", errdefs.ErrInvalidArgument, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/proc/self/attr", Type: "tmpfs", Source: "tmpfs"})
		}},
		{"tmpfs option", "tmpfs option", nil, func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/data", Type: "tmpfs", Options: []string{"nonsense=1"}})
		}},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := newContainer(t)
			x.change(c.req.Spec)
			got, err := r.Create(context.Background(), c.req)
			if err == nil {
				// Capabilities are checked when the process is built.
				_, err = got.Start(context.Background(), oci.Stdio{})
				if derr := got.Delete(); derr != nil {
					t.Error(derr)
				}
			}
			if err == nil || !strings.Contains(err.Error(), x.want) || x.kind != nil && !errors.Is(err, x.kind) {
				t.Errorf("error %v, want %q of kind %v", err, x.want, x.kind)
			}
			dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + c.req.Spec.Linux.CgroupsPath)
			if x.name != "cgroup path" && len(dirs) > 0 {
				t.Errorf("cgroups left: %v", dirs)
			}
		})
	}
}

func TestTinyMemoryLimit(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t)
	c.req.Spec.Process.Args = []string{"true"}
	c.req.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(4 << 20))}
	if out, ws := c.start(r).wait(); ws.ExitStatus() != 0 || !ws.Exited() {
		t.Errorf("status %#x %s", uint32(ws), out)
	}
}
