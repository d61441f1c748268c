package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
)

// tmpfs mounts a tmpfs of the host on a scratch folder until the test's end.
func tmpfs(t *testing.T, dir string, shared bool) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	flag := uintptr(unix.MS_PRIVATE)
	if shared {
		flag = unix.MS_SHARED
	}
	if err := unix.Mount("", dir, "", flag, ""); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestMountPropagation(t *testing.T) {
	top := tmpfs(t, t.TempDir(), true)
	before := tmpfs(t, filepath.Join(top, "before"), true)
	if err := os.WriteFile(filepath.Join(before, "f"), []byte("early"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	with := func(m cri.MountPropagation, privileged bool) string {
		return started(t, p, func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Privileged = privileged
			c.Mounts = []*cri.Mount{{HostPath: top, ContainerPath: "/m", Propagation: m}}
		})
	}
	private := with(cri.MountPropagation_PROPAGATION_PRIVATE, false)
	slave := with(cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, false)
	both := with(cri.MountPropagation_PROPAGATION_BIDIRECTIONAL, true)
	late := tmpfs(t, filepath.Join(top, "late"), true)
	if err := os.WriteFile(filepath.Join(late, "f"), []byte("late"), 0o644); err != nil {
		t.Fatal(err)
	}
	for c, sees := range map[string]bool{private: false, slave: true, both: true} {
		if out := execOut(t, c, "/bin/cat", "/m/before/f"); out != "early" {
			t.Errorf("a mount from before the start is not there: %q", out)
		}
		if out := execOut(t, c, "/bin/cat", "/m/late/f"); (out == "late") != sees {
			t.Errorf("%v: a later mount of the host is seen: %q", containerStatus(t, c).Mounts[0].Propagation, out)
		}
	}
	for _, c := range []string{slave, both} {
		if _, e, code := execSync(t, c, "/bin/prog", "mount", "/m/inside"); code != 0 && c == both {
			t.Fatalf("mount inside: %s", e)
		}
	}
	defer func() { _ = unix.Unmount(filepath.Join(top, "inside"), unix.MNT_DETACH) }()
	if _, err := os.Stat(filepath.Join(top, "inside", "mounted")); err != nil {
		t.Errorf("the host does not see the mount of a BIDIRECTIONAL container: %v", err)
	}
	if out := execOut(t, slave, "/bin/ls", "/m/inside"); out != "mounted\n" {
		t.Errorf("a HOST_TO_CONTAINER container does not see it: %q", out)
	}
	if m := containerStatus(t, both).Mounts; m[0].Propagation != cri.MountPropagation_PROPAGATION_BIDIRECTIONAL {
		t.Errorf("status.mounts = %v", m)
	}
	// A mount that a container leaves behind must not keep the pod from going.
	alone := tmpfs(t, t.TempDir(), false)
	for _, m := range []cri.MountPropagation{cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, cri.MountPropagation_PROPAGATION_BIDIRECTIONAL} {
		cfg := containerConfig([]string{"true"})
		cfg.Mounts = []*cri.Mount{{HostPath: alone, ContainerPath: "/m", Propagation: m}}
		_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
		wantCode(t, err, codes.FailedPrecondition, "make-rshared")
	}
}

func TestRecursiveReadOnlyMounts(t *testing.T) {
	top := tmpfs(t, t.TempDir(), true)
	tmpfs(t, filepath.Join(top, "sub"), true)
	p := runPod(t, nil)
	for recursive, want := range map[bool]int32{false: 0, true: 1} {
		c := started(t, p, func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{HostPath: top, ContainerPath: "/m", Readonly: true, RecursiveReadOnly: recursive}}
		})
		if _, e, code := execSync(t, c, "/bin/prog", "write", "/m/f", "x"); code == 0 || !strings.Contains(e, "read-only") {
			t.Errorf("write to the mount: %d %s", code, e)
		}
		if _, e, code := execSync(t, c, "/bin/prog", "write", "/m/sub/f", "x"); code != want {
			t.Errorf("recursive %v: write to a mount below: %d %s", recursive, code, e)
		}
		if m := containerStatus(t, c).Mounts[0]; !m.Readonly || m.RecursiveReadOnly != recursive {
			t.Errorf("status %v", m)
		}
	}
	if err := os.WriteFile(filepath.Join(top, "sub", "g"), nil, 0o600); err != nil {
		t.Errorf("the host's own mount became read-only: %v", err)
	}
}

// TestMountTargets: a requested mount takes the place of Berth's own, files
// mount on files, and the order of the request does not matter.
func TestMountTargets(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"hosts": "192.0.2.1 mine\n", "term": "", "outer/inner/x": "deep"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	mounts := []*cri.Mount{
		{HostPath: dir + "/outer/inner", ContainerPath: "/a/b/c"}, {HostPath: dir + "/outer", ContainerPath: "a"},
		{HostPath: dir + "/hosts", ContainerPath: "/etc/hosts", Readonly: true}, {HostPath: dir + "/term", ContainerPath: "/dev/termination-log"},
		{HostPath: dir, ContainerPath: "/var/run/secrets/x", Readonly: true}, {HostPath: dir, ContainerPath: "/dev/shm"},
	}
	c := started(t, runPod(t, nil), func(c *cri.ContainerConfig) { c.Mounts = mounts })
	for path, want := range map[string]string{"/a/inner/x": "deep", "/a/b/c/x": "deep", "/etc/hosts": "192.0.2.1 mine\n", "/run/secrets/x/hosts": "192.0.2.1 mine\n", "/dev/shm/hosts": "192.0.2.1 mine\n"} {
		if out, e, _ := execSync(t, c, "/bin/cat", path); out != want {
			t.Errorf("%s: %q %s", path, out, e)
		}
	}
	if _, e, code := execSync(t, c, "/bin/prog", "write", "/dev/termination-log", "bye"); code != 0 {
		t.Errorf("termination message: %s", e)
	}
	if b, _ := os.ReadFile(dir + "/term"); string(b) != "bye\n" {
		t.Errorf("termination message on the host: %q", b)
	}
	got := containerStatus(t, c).Mounts
	if len(got) != len(mounts) {
		t.Fatalf("%d mounts in the status, want the %d requested", len(got), len(mounts))
	}
	for i, m := range got {
		if m.HostPath != mounts[i].HostPath || m.ContainerPath != mounts[i].ContainerPath || m.Readonly != mounts[i].Readonly {
			t.Errorf("status.mounts[%d] = %v, want %v", i, m, mounts[i])
		}
	}
}

// TestDeviceForms: a device, a symbolic link to one, a folder of them; and the
// permissions of each.
func TestDeviceForms(t *testing.T) {
	dir := t.TempDir()
	for name, minor := range map[string]uint32{"zero": 5, "deep/full": 7} {
		path := filepath.Join(dir, "devs", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, minor))); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	kmsg := filepath.Join(dir, "kmsg")
	if err := unix.Mknod(kmsg, unix.S_IFCHR|0o640, int(unix.Mkdev(1, 11))); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(kmsg, 0, 77); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(kmsg, link); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) {
		c.Devices = []*cri.Device{
			{HostPath: filepath.Join(dir, "devs"), ContainerPath: "/dev/many", Permissions: "rw"},
			{HostPath: link, ContainerPath: "/dev/log0", Permissions: "r"},
		}
	})
	for path, want := range map[string]string{
		"/dev/many/zero": "c0666 0:0 0 nlink=1", "/dev/many/deep/full": "c0666", "/dev/log0": "c0640 0:77",
	} {
		if out, e, _ := execSync(t, c, "/bin/stat", path); !strings.HasPrefix(out, path+" "+want) {
			t.Errorf("stat: %q %s, want %s", out, e, want)
		}
	}
	if out := execOut(t, c, "/bin/stat", "/dev/log0"); !strings.Contains(out, "dev=1:11") {
		t.Errorf("link to a device: %s", out)
	}
	if _, e, code := execSync(t, c, "/bin/prog", "write", "/dev/log0", "berth test"); code == 0 || !strings.Contains(e, "not permitted") {
		t.Errorf("write to a device with permission r: %d %s", code, e)
	}
	for _, bad := range []string{"/dev/no-such", filepath.Join(dir, "link-to-nothing"), "/etc/hostname"} {
		cfg := containerConfig([]string{"true"})
		cfg.Devices = []*cri.Device{{HostPath: bad, ContainerPath: "/dev/x", Permissions: "r"}}
		_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
		wantCode(t, err, codes.InvalidArgument, bad)
	}
}

// TestHostNetworkPod: the node's own name, files and addresses; no host ports.
func TestHostNetworkPod(t *testing.T) {
	p := runPod(t, func(c *cri.PodSandboxConfig) {
		c.Hostname = ""
		c.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_NODE
		c.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 80}}
	})
	c := run(t, p, "sleep", "1000")
	own, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if out := execOut(t, c, "/bin/hostname"); strings.TrimSpace(out) != own {
		t.Errorf("host name %q, the node's is %q", out, own)
	}
	if out := execOut(t, c, "/bin/cat", "/etc/hostname"); strings.TrimSpace(out) != own {
		t.Errorf("/etc/hostname %q, the node's is %q", out, own)
	}
	if s := podStatus(t, p.id); s.Network.GetIp() != "" || s.Linux.Namespaces.Options.Network != cri.NamespaceMode_NODE {
		t.Errorf("status: %v", s)
	}
	l := run(t, p, "listen", "tcp", "127.0.0.1:17171")
	waitLog(t, l, "listening")
	if execOut(t, c, "/bin/prog", "readlink", "/proc/self/ns/uts") != linkOf(t, "/proc/self/ns/uts") {
		t.Error("the UTS namespace is not the node's")
	}
}

func linkOf(t *testing.T, path string) string {
	t.Helper()
	s, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return s + "\n"
}

// TestDNSConfig: none means the node's file; an empty one is what was asked for.
func TestDNSConfig(t *testing.T) {
	own, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		config *cri.DNSConfig
		want   string
	}{"none": {nil, string(own)}, "empty": {&cri.DNSConfig{}, ""}} {
		p := runPod(t, func(c *cri.PodSandboxConfig) { c.DnsConfig = row.config })
		if out := execOut(t, run(t, p, "sleep", "1000"), "/bin/cat", "/etc/resolv.conf"); out != row.want {
			t.Errorf("%s: %q", name, out)
		}
	}
}

// TestGivenCgroupParent: containers run below it, and it stays: it is the
// kubelet's.
func TestGivenCgroupParent(t *testing.T) {
	parent := fmt.Sprintf("/berth-test-%d/podx", os.Getpid())
	var made []string
	for _, h := range hierarchies(t) {
		dir := filepath.Join(h, parent)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		made = append(made, dir)
		t.Cleanup(func() {
			_ = os.Remove(dir)
			_ = os.Remove(filepath.Dir(dir))
		})
	}
	p := runPod(t, func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	c := run(t, p, "sleep", "1000")
	if out := execOut(t, c, "/bin/cat", "/proc/1/cgroup"); !strings.Contains(out, parent+"/") && !strings.Contains(out, "/../") && !strings.Contains(out, ":/\n") {
		t.Errorf("the container is not below %s:\n%s", parent, out)
	}
	if _, err := node.Runtime.StopPodSandbox(ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Runtime.RemovePodSandbox(ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Fatal(err)
	}
	for _, dir := range made {
		if _, err := os.Stat(dir); err != nil {
			t.Errorf("the kubelet's cgroup was removed: %v", err)
		}
		left, _ := filepath.Glob(dir + "/*/")
		if len(left) > 0 {
			t.Errorf("left below it: %v", left)
		}
	}
}

// hierarchies are the mounted cgroup filesystems.
func hierarchies(t *testing.T) []string {
	t.Helper()
	out, err := harness.Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestLabelsAndAnnotationsAreVerbatim: kubelets read their own state back from them.
func TestLabelsAndAnnotationsAreVerbatim(t *testing.T) {
	labels := map[string]string{"io.kubernetes.pod.name": "x", "empty": "", "ünï": "code \"quoted\"\n\t\x00<>&"}
	notes := map[string]string{"cdi.k8s.io/none": "", "io.kubernetes.cri.untrusted-workload": "true", "json": `{"a":"\u2028<b>"}`, "line\nfeed": "\u2028\u2029"}
	p := runPod(t, func(c *cri.PodSandboxConfig) { c.Labels, c.Annotations = labels, notes })
	c := create(t, p, func(c *cri.ContainerConfig) {
		c.Labels, c.Annotations = labels, map[string]string{"json": notes["json"]}
	})
	same := func(what string, got, want map[string]string) {
		t.Helper()
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	for range 2 {
		s, cs := podStatus(t, p.id), containerStatus(t, c)
		same("pod labels", s.Labels, labels)
		same("pod annotations", s.Annotations, notes)
		same("container labels", cs.Labels, labels)
		l, err := node.Runtime.ListPodSandbox(ctx(t), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: labels}})
		if err != nil || len(l.Items) != 1 || l.Items[0].Id != p.id {
			t.Fatalf("list by labels: %v, %v", l, err)
		}
		same("listed annotations", l.Items[0].Annotations, notes)
		restart(t, nil)
	}
}

// TestCreatedAtOrders: kubelets take the newest attempt by created_at.
func TestCreatedAtOrders(t *testing.T) {
	p := runPod(t, nil)
	var last int64
	for range 20 {
		c := create(t, p, nil)
		if at := containerStatus(t, c).CreatedAt; at <= last {
			t.Fatalf("created_at %d is not after %d", at, last)
		} else {
			last = at
		}
	}
	if d := time.Since(time.Unix(0, last)); d < 0 || d > time.Minute {
		t.Errorf("created_at is %v ago", d)
	}
}
