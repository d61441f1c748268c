package conformance

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// firstID is the host's id of root in the user namespaces of these tests, and
// firstGroup that of its group.
const (
	firstID    = 1 << 20
	firstGroup = 1<<20 + 1<<16
)

func mappings(first uint32) []*cri.IDMapping {
	return []*cri.IDMapping{{HostId: first, Length: 65536}}
}

func userNamespace() *cri.UserNamespace {
	return &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: mappings(firstID), Gids: mappings(firstGroup)}
}

// needUserNamespaces skips on nodes that do not offer them.
func needUserNamespaces(t *testing.T) {
	t.Helper()
	r, err := node.Runtime.Status(ctx(t), &cri.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range r.RuntimeHandlers {
		if h.Name == "" && h.Features.UserNamespaces {
			return
		}
	}
	t.Skip("skipped: this kernel, or the file system of the images, cannot do user namespaces of pods; the daemon's log says why")
}

// userPod runs a pod with a user namespace.
func userPod(t *testing.T, change func(*cri.PodSandboxConfig)) *pod {
	t.Helper()
	needUserNamespaces(t)
	return runPod(t, func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = userNamespace()
		if change != nil {
			change(c)
		}
	})
}

// inUser runs a container in such a pod.
func inUser(t *testing.T, p *pod, change func(*cri.ContainerConfig)) string {
	t.Helper()
	return started(t, p, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = p.config.Linux.SecurityContext.NamespaceOptions
		if change != nil {
			change(c)
		}
	})
}

// pidOf is the host's pid of a container's first process.
func pidOf(t *testing.T, c string) int {
	t.Helper()
	r, err := node.Runtime.ContainerStatus(ctx(t), &cri.ContainerStatusRequest{ContainerId: c, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.Pid == 0 {
		t.Fatalf("info %v: %v", r.Info, err)
	}
	return info.Pid
}

// owners maps the files to "uid:gid" as the container sees them.
func owners(t *testing.T, c string, files ...string) map[string]string {
	t.Helper()
	out, e, code := execSync(t, c, append([]string{"/bin/prog", "stat"}, files...)...)
	if code != 0 {
		t.Fatal(e)
	}
	got := map[string]string{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 2 {
			got[f[0]] = f[2]
		}
	}
	return got
}

// mustWrite writes a file in the container.
func mustWrite(t *testing.T, c, file string) {
	t.Helper()
	if _, e, code := execSync(t, c, "/bin/prog", "write", file, "x"); code != 0 {
		t.Errorf("write %s: %s", file, e)
	}
}

func TestUserNamespaceOfAPod(t *testing.T) {
	p := userPod(t, func(c *cri.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 3000"}
	})
	u := podStatus(t, p.id).Linux.Namespaces.Options.UsernsOptions
	if u == nil || u.Mode != cri.NamespaceMode_POD || len(u.Uids) != 1 || u.Uids[0].HostId != firstID || u.Gids[0].HostId != firstGroup {
		t.Errorf("status echoes %v", u)
	}
	a, b := inUser(t, p, nil), inUser(t, p, nil)
	for file, want := range map[string]string{
		"/proc/self/uid_map": fmt.Sprint("0 ", firstID, " 65536"), "/proc/self/gid_map": fmt.Sprint("0 ", firstGroup, " 65536"),
		"/proc/sys/kernel/shm_rmid_forced": "1", "/proc/sys/net/ipv4/ip_local_port_range": "2000 3000",
		"/proc/sys/net/ipv4/ping_group_range": "0 65535", "/etc/hostname": p.config.Hostname,
	} {
		if got := strings.Join(strings.Fields(execOut(t, a, "/bin/cat", file)), " "); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
	if out := execOut(t, a, "/bin/prog", "hostname"); out != p.config.Hostname+"\n" {
		t.Errorf("host name %q", out)
	}
	for _, kind := range []string{"user", "net", "ipc", "uts"} {
		if na, nb := nsOf(t, a, kind), nsOf(t, b, kind); na != nb || na == hostNS(t, kind) {
			t.Errorf("%s: %s and %s, host %s", kind, na, nb, hostNS(t, kind))
		}
	}
	files := []string{"/", "/bin/prog", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev", "/dev/null", "/dev/shm", "/dev/pts/ptmx", "/dev/mqueue", "/proc/self/status"}
	got := owners(t, a, files...)
	for _, f := range files {
		if got[f] != "0:0" {
			t.Errorf("%s belongs to %s", f, got[f])
		}
	}
	for _, f := range []string{"/etc/made", "/etc/hosts", "/dev/shm/x", "/bin/prog2"} {
		mustWrite(t, a, f)
	}
	// Its capabilities count in the pod's network.
	admin := inUser(t, p, secure(func(s *cri.LinuxContainerSecurityContext) {
		s.NamespaceOptions = p.config.Linux.SecurityContext.NamespaceOptions
		s.Capabilities = &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}}
	}))
	if _, e, code := execSync(t, admin, "/bin/prog", "write", "/proc/sys/net/ipv4/ip_forward", "1"); code != 0 {
		t.Errorf("ip_forward: %s", e)
	}
	if out := execOut(t, b, "/bin/ls", "/dev/shm"); out != "x\n" {
		t.Errorf("/dev/shm is not shared: %q", out)
	}
	pid := pidOf(t, a)
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/root/etc/made", pid), &st); err != nil || st.Uid != firstID || st.Gid != firstGroup {
		t.Errorf("on the host a file belongs to %d:%d (%v)", st.Uid, st.Gid, err)
	}
	if err := unix.Stat(fmt.Sprintf("/proc/%d", pid), &st); err != nil || st.Uid != firstID {
		t.Errorf("on the host the process belongs to %d (%v)", st.Uid, err)
	}
	for _, kind := range []string{"net", "ipc", "uts", "pid", "mnt"} {
		if got := ownerOf(t, fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); got != nsOf(t, a, "user") {
			t.Errorf("the %s namespace belongs to %s", kind, got)
		}
	}
}

// ownerOf names the user namespace that a namespace belongs to.
func ownerOf(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	s, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestPrivilegedInAUserNamespace: what counts there counts for nothing outside.
func TestPrivilegedInAUserNamespace(t *testing.T) {
	p := userPod(t, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	c := inUser(t, p, func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	own, _ := os.ReadFile("/proc/self/status")
	if s := procStatus(t, c); !strings.Contains(string(own), "CapBnd:\t"+s["CapEff"]) {
		t.Errorf("CapEff %s", s["CapEff"])
	}
	if _, e, code := execSync(t, c, "/bin/prog", "mount", "/mnt"); code != 0 {
		t.Errorf("mount of a tmpfs: %s", e)
	}
	for _, f := range []string{"/proc/sys/kernel/panic", "/proc/sysrq-trigger", "/sys/kernel/mm/ksm/run"} {
		if _, _, code := execSync(t, c, "/bin/prog", "write", f, "0"); code == 0 {
			t.Errorf("%s of the node was written", f)
		}
	}
	if _, e, code := execSync(t, c, "/bin/prog", "mknod-open", "1", "1"); code == 0 || !strings.Contains(e, "not permitted") {
		t.Errorf("device node: %d %q", code, e)
	}
	if _, e, code := execSync(t, c, "/bin/prog", "write", "/dev/null", "x"); code != 0 {
		t.Errorf("/dev/null: %s", e)
	}
}

// TestUserNamespaceCgroups: every hierarchy has the container below its pod's
// parent (CVE-2025-47291), and the container's root cannot write there
// (CVE-2023-25809, CVE-2022-0492).
func TestUserNamespaceCgroups(t *testing.T) {
	p := userPod(t, nil)
	c := inUser(t, p, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}
	})
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pidOf(t, c)))
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if f[1] == "" && strings.Count(string(b), "\n") > 1 { // the unified hierarchy beside v1 has no controllers
			continue
		}
		lines++
		if want := "/berth/" + p.id + "/" + c; f[2] != want {
			t.Errorf("hierarchy %q: %s, want %s", f[1], f[2], want)
		}
	}
	if lines == 0 {
		t.Errorf("no hierarchy in %q", b)
	}
	for _, f := range []string{"/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/release_agent", "/sys/fs/cgroup/cgroup.procs"} {
		if _, _, code := execSync(t, c, "/bin/prog", "write", f, "0"); code == 0 {
			t.Errorf("%s was written", f)
		}
	}
}

// TestUserNamespaceVolumes: a volume with mappings has the pod's ids, one without
// keeps the host's; so has an image.
func TestUserNamespaceVolumes(t *testing.T) {
	p := userPod(t, nil)
	dir := t.TempDir()
	term := filepath.Join(dir, "term")
	for _, f := range []string{filepath.Join(dir, "f"), term} {
		if err := os.WriteFile(f, []byte("of root"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	under := tmpfs(t, filepath.Join(dir, "under"), false)
	if err := os.WriteFile(filepath.Join(under, "deep"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mapped := func(m *cri.Mount) *cri.Mount {
		m.UidMappings, m.GidMappings = mappings(firstID), mappings(firstGroup)
		return m
	}
	c := inUser(t, p, func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{
			mapped(&cri.Mount{HostPath: dir, ContainerPath: "/mapped"}),
			mapped(&cri.Mount{HostPath: dir, ContainerPath: "/readonly", Readonly: true}),
			mapped(&cri.Mount{HostPath: term, ContainerPath: "/dev/termination-log"}),
			{HostPath: dir, ContainerPath: "/plain"},
			{Image: &cri.ImageSpec{Image: images.prog}, ContainerPath: "/image", Readonly: true},
			mapped(&cri.Mount{Image: &cri.ImageSpec{Image: images.prog}, ImageSubPath: "bin/prog", ContainerPath: "/prog", Readonly: true}),
		}
	})
	got := owners(t, c, "/mapped/f", "/mapped/under/deep", "/readonly/f", "/dev/termination-log", "/plain", "/image/bin/prog", "/prog")
	for f, o := range got {
		if want := map[bool]string{false: "0:0", true: "65534:65534"}[f == "/plain"]; o != want {
			t.Errorf("%s belongs to %s, want %s", f, o, want)
		}
	}
	if len(got) != 7 {
		t.Errorf("%v", got)
	}
	for _, f := range []string{"/mapped/new", "/mapped/under/new", "/dev/termination-log"} {
		mustWrite(t, c, f)
	}
	for _, f := range []string{"/readonly/x", "/image/x", "/plain/x"} {
		if _, _, code := execSync(t, c, "/bin/prog", "write", f, "x"); code == 0 {
			t.Errorf("%s was written", f)
		}
	}
	for _, f := range []string{"new", "under/new"} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, f), &st); err != nil || st.Uid != 0 || st.Gid != 0 {
			t.Errorf("on the host %s belongs to %d:%d (%v)", f, st.Uid, st.Gid, err)
		}
	}
	if m := containerStatus(t, c).Mounts; len(m) != 6 || len(m[0].UidMappings) != 1 || m[0].UidMappings[0].HostId != firstID || len(m[3].UidMappings) != 0 {
		t.Errorf("status.mounts = %v", m)
	}
	cfg := containerConfig([]string{"true"})
	cfg.Linux.SecurityContext.NamespaceOptions = p.config.Linux.SecurityContext.NamespaceOptions
	cfg.Mounts = []*cri.Mount{mapped(&cri.Mount{HostPath: "/proc", ContainerPath: "/m"})}
	_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
	if err == nil || !strings.Contains(err.Error(), "(proc)") {
		t.Errorf("a filesystem that cannot be mapped: %v", err)
	}
}

// TestUserNamespaceState: of what the runtime keeps, nothing but the pod's files
// and the containers' writable layers belongs to the pod's root, and the way to the
// layers is closed (CVE-2021-21284).
func TestUserNamespaceState(t *testing.T) {
	p := userPod(t, nil)
	c := inUser(t, p, nil)
	mustWrite(t, c, "/etc/made")
	seen := 0
	err := filepath.WalkDir(node.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // gone meanwhile
		}
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil || st.Uid < firstID {
			return nil
		}
		seen++
		switch filepath.Base(path) {
		case "hosts", "hostname", "resolv.conf":
			return nil
		case "upper":
			var dir unix.Stat_t
			if err := unix.Stat(filepath.Dir(path), &dir); err != nil || dir.Uid != 0 || dir.Mode&0o007 != 0 {
				t.Errorf("%s: mode %o of uid %d (%v)", filepath.Dir(path), dir.Mode, dir.Uid, err)
			}
			return fs.SkipDir
		}
		t.Errorf("%s belongs to %d", path, st.Uid)
		return nil
	})
	if err != nil || seen < 4 {
		t.Errorf("%d files of the pod's root, %v", seen, err)
	}
}

// TestUserNamespaceStreams: exec, attach, logs, port-forward, stats, terminals.
func TestUserNamespaceStreams(t *testing.T) {
	p := userPod(t, nil)
	c := inUser(t, p, func(c *cri.ContainerConfig) {
		c.Args = []string{"listen", "tcp", "127.0.0.1:7171"}
		c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: 1234}, &cri.Int64Value{Value: 4321}
		c.Linux.SecurityContext.SupplementalGroups = []int64{77}
	})
	waitLog(t, c, "listening")
	if out := execOut(t, c, "/bin/prog", "id"); out != "uid=1234 gid=4321 groups=77,4321\n" {
		t.Errorf("identity %q", out)
	}
	if u := containerStatus(t, c).User.Linux; u.Uid != 1234 || u.Gid != 4321 {
		t.Errorf("status.user = %v", u)
	}
	r, err := node.Runtime.PortForward(ctx(t), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{7171}})
	if err != nil {
		t.Fatal(err)
	}
	conn := spdyDial(t, r.Url, "portforward.k8s.io")
	_ = stream(t, conn, "error", "port", "7171", "requestID", "1")
	data := stream(t, conn, "data", "port", "7171", "requestID", "1")
	_, _ = io.WriteString(data, "through\n")
	_ = data.Close()
	if got, err := io.ReadAll(data); err != nil || string(got) != "through\n" {
		t.Errorf("port-forward: %q %v", got, err)
	}
	s := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/prog", "tty"}, Stdin: true, Stdout: true, Tty: true}), true, true, false, true)
	if out, _ := io.ReadAll(s.out); !strings.Contains(string(out), "stdout=1") {
		t.Errorf("terminal says %q", out)
	}
	st, err := node.Runtime.ContainerStats(ctx(t), &cri.ContainerStatsRequest{ContainerId: c})
	if err != nil || st.Stats.Memory.UsageBytes.Value == 0 || st.Stats.Cpu.UsageCoreNanoSeconds.Value == 0 {
		t.Errorf("stats %v %v", st, err)
	}
	tty := inUser(t, p, func(c *cri.ContainerConfig) { c.Args, c.Tty = []string{"tty"}, true })
	if st := waitExit(t, tty); st.ExitCode != 0 || !strings.Contains(logs(t, tty)[0].content, "stdin=1 stdout=1 stderr=1") {
		t.Errorf("terminal of a container: %d %v", st.ExitCode, logs(t, tty))
	}
	cat := inUser(t, p, func(c *cri.ContainerConfig) { c.Args, c.Stdin, c.StdinOnce = []string{"cat"}, true, true })
	a, err := node.Runtime.Attach(ctx(t), &cri.AttachRequest{ContainerId: cat, Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	s = open(t, a.Url, true, true, false, false)
	_, _ = io.WriteString(s.in, "attached\n")
	_ = s.in.Close()
	if st := waitExit(t, cat); st.ExitCode != 0 || logs(t, cat)[0].content != "attached" {
		t.Errorf("attach: %v %v", st, logs(t, cat))
	}
}

// TestUserNamespaceNetwork: a pod with a user namespace is on the network as any
// other, its ports are published.
func TestUserNamespaceNetwork(t *testing.T) {
	p := userPod(t, func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{Protocol: cri.Protocol_TCP, ContainerPort: 80, HostPort: 18380}}
	})
	inUser(t, p, func(c *cri.ContainerConfig) { c.Args = []string{"serve", ":80"} })
	ip := podStatus(t, p.id).Network.Ip
	want := fetch(t, "http://"+ip+"/")
	if got := fetch(t, "http://127.0.0.1:18380/"); got != want {
		t.Errorf("through the published port: %q, want %q", got, want)
	}
	other := run(t, runPod(t, nil), "sleep", "1000")
	if out, e, code := execSync(t, other, "/bin/prog", "get", ip+":80"); code != 0 || out != want {
		t.Errorf("from another pod: %d %q %q", code, out, e)
	}
}

// TestUserNamespaceWithSharedPIDs: the pod's PID namespace belongs to its user
// namespace, so its containers can mount procfs; so can the target of a debugger.
func TestUserNamespaceWithSharedPIDs(t *testing.T) {
	p := userPod(t, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD })
	a, b := inUser(t, p, nil), inUser(t, p, nil)
	if na, nb := nsOf(t, a, "pid"), nsOf(t, b, "pid"); na != nb || na == hostNS(t, "pid") {
		t.Errorf("pid: %s and %s", na, nb)
	}
	if n := strings.Count(execOut(t, a, "/bin/prog", "ps"), "sleep"); n < 2 {
		t.Errorf("a container does not see its neighbour")
	}
	own := userPod(t, nil)
	target := inUser(t, own, nil)
	c := inUser(t, own, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: target, UsernsOptions: userNamespace()}
	})
	if a, b := nsOf(t, target, "pid"), nsOf(t, c, "pid"); a != b {
		t.Errorf("target: %s and %s", a, b)
	}
}

// TestUserNamespaceOnTheHostsNetwork: features.user_namespaces_host_network.
func TestUserNamespaceOnTheHostsNetwork(t *testing.T) {
	p := userPod(t, func(c *cri.PodSandboxConfig) {
		n := c.Linux.SecurityContext.NamespaceOptions
		n.Network, n.Ipc = cri.NamespaceMode_NODE, cri.NamespaceMode_NODE
		c.Hostname = ""
	})
	r, err := node.Runtime.Status(ctx(t), &cri.StatusRequest{})
	if err != nil || !r.Features.UserNamespacesHostNetwork {
		t.Errorf("features %v, %v", r.Features, err)
	}
	c := inUser(t, p, nil)
	for _, kind := range []string{"net", "ipc", "uts"} {
		if got := nsOf(t, c, kind); got != hostNS(t, kind) {
			t.Errorf("%s: %s", kind, got)
		}
	}
	if got := nsOf(t, c, "user"); got == hostNS(t, "user") {
		t.Error("the user namespace is the host's")
	}
	if out := execOut(t, c, "/bin/ls", "/sys/class/net"); !strings.Contains(out, "lo") {
		t.Errorf("/sys/class/net: %q", out)
	}
	mustWrite(t, c, "/etc/made")
}

func TestUserNamespaceRefusals(t *testing.T) {
	needUserNamespaces(t)
	options := func(change func(*cri.NamespaceOption)) *cri.PodSandboxConfig {
		return preparePod(t, func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = userNamespace()
			change(c.Linux.SecurityContext.NamespaceOptions)
		}).config
	}
	for want, c := range map[string]*cri.PodSandboxConfig{
		"userns_options.mode":  options(func(n *cri.NamespaceOption) { n.UsernsOptions.Mode = cri.NamespaceMode_CONTAINER }),
		"userns_options.uids":  options(func(n *cri.NamespaceOption) { n.UsernsOptions.Uids = append(mappings(5), mappings(1<<17)...) }),
		"userns_options.gids":  options(func(n *cri.NamespaceOption) { n.UsernsOptions.Gids = nil }),
		"mode NODE":            options(func(n *cri.NamespaceOption) { n.UsernsOptions.Mode = cri.NamespaceMode_NODE }),
		"pid mode NODE":        options(func(n *cri.NamespaceOption) { n.Pid = cri.NamespaceMode_NODE }),
		"uids[0].container_id": options(func(n *cri.NamespaceOption) { n.UsernsOptions.Uids[0].ContainerId = 1 }),
	} {
		_, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: c})
		wantCode(t, err, codes.InvalidArgument, want)
	}
	p := userPod(t, nil)
	for want, change := range map[string]func(*cri.LinuxContainerSecurityContext){
		"userns_options":          func(s *cri.LinuxContainerSecurityContext) { s.NamespaceOptions.UsernsOptions.Uids[0].HostId++ },
		"differs":                 func(s *cri.LinuxContainerSecurityContext) { s.NamespaceOptions.UsernsOptions = nil },
		"run_as_user: user 65540": func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = &cri.Int64Value{Value: 65540} },
	} {
		cfg := containerConfig([]string{"true"})
		cfg.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER, UsernsOptions: userNamespace()}
		change(cfg.Linux.SecurityContext)
		_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
		wantCode(t, err, codes.InvalidArgument, want)
	}
}

// TestUserNamespaceOutlivesTheDaemon, and the supervisor, with the pod's shared PID
// namespace.
func TestUserNamespaceOutlivesTheDaemon(t *testing.T) {
	p := userPod(t, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD })
	a := inUser(t, p, nil)
	user := nsOf(t, a, "user")
	restart(t, nil)
	check := func(c string) {
		t.Helper()
		if got := nsOf(t, c, "user"); got != user {
			t.Errorf("user namespace %s, want %s", got, user)
		}
		mustWrite(t, c, "/etc/made")
		if got := owners(t, c, "/etc/made", "/dev/shm")["/etc/made"]; got != "0:0" {
			t.Errorf("a file belongs to %s", got)
		}
	}
	if s := podStatus(t, p.id); s.State != cri.PodSandboxState_SANDBOX_READY || s.Linux.Namespaces.Options.UsernsOptions == nil {
		t.Errorf("pod: %v", s)
	}
	check(a)
	check(inUser(t, p, nil))
	killSupervisor(t)
	check(a)
	check(inUser(t, p, nil))
	own := userPod(t, nil)
	user = nsOf(t, inUser(t, own, nil), "user")
	killSupervisor(t)
	check(inUser(t, own, nil))
}

// TestKilledWhileMakingUserNamespaces: every retry succeeds and nothing is left.
func TestKilledWhileMakingUserNamespaces(t *testing.T) {
	needUserNamespaces(t)
	for round := range 6 {
		p := preparePod(t, func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = userNamespace()
		})
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config})
		}()
		time.Sleep(time.Duration(round) * 800 * time.Microsecond)
		restart(t, nil)
		<-done
		r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config})
		if err != nil {
			t.Fatalf("round %d: retried RunPodSandbox: %v", round, err)
		}
		p.id = r.PodSandboxId
		stop(t, inUser(t, p, nil), 0)
	}
}
