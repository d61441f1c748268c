package conformance

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// nsOf reads a namespace link of pid 1's view in the container.
func nsOf(t *testing.T, c, kind string) string {
	t.Helper()
	out, errOut, code := execSync(t, c, "/bin/prog", "readlink", "/proc/self/ns/"+kind)
	if code != 0 {
		t.Fatalf("readlink: %s", errOut)
	}
	return strings.TrimSpace(out)
}

func hostNS(t *testing.T, kind string) string {
	t.Helper()
	s, err := os.Readlink("/proc/self/ns/" + kind)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestContainersOfAPodShareNetworkIPCAndUTS(t *testing.T) {
	p := runPod(t, nil)
	a, b := run(t, p, "sleep", "1000"), run(t, p, "sleep", "1000")
	for _, kind := range []string{"net", "ipc", "uts"} {
		na, nb := nsOf(t, a, kind), nsOf(t, b, kind)
		if na != nb || na == hostNS(t, kind) {
			t.Errorf("%s: %s and %s, host %s", kind, na, nb, hostNS(t, kind))
		}
	}
	for _, kind := range []string{"pid", "mnt"} {
		na, nb := nsOf(t, a, kind), nsOf(t, b, kind)
		if na == nb || na == hostNS(t, kind) {
			t.Errorf("%s: %s and %s, host %s", kind, na, nb, hostNS(t, kind))
		}
	}
}

func TestPodPIDNamespaceIsShared(t *testing.T) {
	p := runPod(t, func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	})
	mode := func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	}
	a, b := create(t, p, mode), create(t, p, mode)
	start(t, a)
	start(t, b)
	if na, nb := nsOf(t, a, "pid"), nsOf(t, b, "pid"); na != nb || na == hostNS(t, "pid") {
		t.Fatalf("pid: %s and %s", na, nb)
	}
	out, _, _ := execSync(t, a, "/bin/prog", "ps")
	if n := strings.Count(out, "sleep"); n < 2 {
		t.Fatalf("a container does not see its neighbour:\n%s", out)
	}
	// the end of one container leaves the other alone
	stop(t, a, 0)
	if s := containerStatus(t, b); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("neighbour is %v", s.State)
	}
}

func TestHostPIDAndHostNetworkAndHostIPC(t *testing.T) {
	ns := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE}
	p := runPod(t, func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions = ns
		c.Hostname = ""
	})
	if s := podStatus(t, p.id); s.Network != nil && s.Network.Ip != "" {
		t.Fatalf("host network pod has address %v", s.Network)
	}
	if got := podStatus(t, p.id).Linux.Namespaces.Options; got.Network != cri.NamespaceMode_NODE || got.Pid != cri.NamespaceMode_NODE {
		t.Fatalf("namespace options are not echoed: %v", got)
	}
	c := create(t, p, func(c *cri.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions = ns })
	start(t, c)
	for _, kind := range []string{"net", "pid", "ipc", "uts"} {
		if got := nsOf(t, c, kind); got != hostNS(t, kind) {
			t.Errorf("%s: %s, host has %s", kind, got, hostNS(t, kind))
		}
	}
}

func TestTargetPIDNamespace(t *testing.T) {
	p := runPod(t, nil)
	target := run(t, p, "sleep", "1000")
	c := create(t, p, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: target}
	})
	start(t, c)
	if a, b := nsOf(t, target, "pid"), nsOf(t, c, "pid"); a != b {
		t.Fatalf("%s and %s", a, b)
	}
	other := runPod(t, nil)
	cfg := containerConfig([]string{"true"})
	cfg.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: target}
	_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: other.id, Config: cfg, SandboxConfig: other.config})
	wantCode(t, err, codes.InvalidArgument, "target")
}

func TestPodFiles(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "sleep", "1000")
	ip := podStatus(t, p.id).Network.Ip
	for path, want := range map[string]string{
		"/etc/hostname":    p.config.Hostname + "\n",
		"/etc/resolv.conf": "search test.example\nnameserver 192.0.2.53\noptions ndots:5\n",
		"/etc/hosts":       ip + "\t" + p.config.Hostname,
	} {
		out, _, _ := execSync(t, c, "/bin/cat", path)
		if path == "/etc/resolv.conf" {
			if out != want {
				t.Errorf("%s = %q", path, out)
			}
		} else if !strings.Contains(out, want) {
			t.Errorf("%s = %q, want %q", path, out, want)
		}
	}
	if out, _, _ := execSync(t, c, "/bin/prog", "hostname"); strings.TrimSpace(out) != p.config.Hostname {
		t.Errorf("hostname = %q", out)
	}
}

func TestShmIsSharedInThePod(t *testing.T) {
	p := runPod(t, nil)
	a, b := run(t, p, "sleep", "1000"), run(t, p, "sleep", "1000")
	if _, e, code := execSync(t, a, "/bin/prog", "write", "/dev/shm/x", "from a"); code != 0 {
		t.Fatal(e)
	}
	if out, _, _ := execSync(t, b, "/bin/cat", "/dev/shm/x"); out != "from a\n" {
		t.Fatalf("b reads %q", out)
	}
	out, _, _ := execSync(t, a, "/bin/prog", "statfs", "/dev/shm")
	if !strings.Contains(out, fmt.Sprint(64<<20)) {
		t.Errorf("/dev/shm is not 64 MiB: %s", out)
	}
}

func TestSysctls(t *testing.T) {
	p := runPod(t, func(c *cri.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 3000", "fs/mqueue/msg_max": "100"}
	})
	c := run(t, p, "sleep", "1000")
	for path, want := range map[string]string{
		"/proc/sys/kernel/shm_rmid_forced": "1\n", "/proc/sys/net/ipv4/ip_local_port_range": "2000\t3000\n", "/proc/sys/fs/mqueue/msg_max": "100\n",
	} {
		if out, _, _ := execSync(t, c, "/bin/cat", path); out != want {
			t.Errorf("%s = %q", path, out)
		}
	}
	for _, bad := range []string{"kernel.panic", "vm.swappiness", "kernel.hostname/../panic", "net.ipv4/../../kernel/panic"} {
		q := preparePod(t, func(c *cri.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{bad: "1"} })
		r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: q.config})
		if err == nil {
			q.id = r.PodSandboxId
		}
		wantCode(t, err, codes.InvalidArgument, "sysctl")
	}
	hostNet := preparePod(t, func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_NODE
		c.Hostname = ""
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "0"}
	})
	r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: hostNet.config})
	if err == nil {
		hostNet.id = r.PodSandboxId
	}
	wantCode(t, err, codes.InvalidArgument, "net.ipv4.ip_forward")
}
