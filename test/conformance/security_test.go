package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// procStatus reads fields of /proc/self/status of a process run in c.
func procStatus(t *testing.T, c string) map[string]string {
	t.Helper()
	out, _, _ := execSync(t, c, "/bin/cat", "/proc/self/status")
	m := map[string]string{}
	for line := range strings.Lines(out) {
		if k, v, ok := strings.Cut(line, ":"); ok {
			m[k] = strings.TrimSpace(v)
		}
	}
	return m
}

func secure(change func(*cri.LinuxContainerSecurityContext)) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) { change(c.Linux.SecurityContext) }
}

func started(t *testing.T, p *pod, change func(*cri.ContainerConfig)) string {
	t.Helper()
	c := create(t, p, change)
	start(t, c)
	return c
}

func TestDefaultCapabilitiesAreTheUsualFourteen(t *testing.T) {
	c := started(t, runPod(t, nil), nil)
	s := procStatus(t, c)
	if s["CapEff"] != "00000000a80425fb" || s["CapBnd"] != "00000000a80425fb" || s["CapInh"] != "0000000000000000" || s["CapAmb"] != "0000000000000000" {
		t.Fatalf("caps: eff %s bnd %s inh %s amb %s", s["CapEff"], s["CapBnd"], s["CapInh"], s["CapAmb"])
	}
}

func TestCapabilitiesAddDropAll(t *testing.T) {
	p := runPod(t, nil)
	c := started(t, p, secure(func(s *cri.LinuxContainerSecurityContext) {
		s.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"net_admin", "CAP_CHOWN"}}
	}))
	if s := procStatus(t, c); s["CapEff"] != fmt.Sprintf("%016x", 1<<12|1<<0) {
		t.Fatalf("CapEff %s", s["CapEff"])
	}
}

func TestUsersAndGroups(t *testing.T) {
	p := runPod(t, nil)
	c := started(t, p, secure(func(s *cri.LinuxContainerSecurityContext) {
		s.RunAsUser, s.RunAsGroup = &cri.Int64Value{Value: 1234}, &cri.Int64Value{Value: 4321}
		s.SupplementalGroups = []int64{77}
	}))
	s := procStatus(t, c)
	if f := strings.Fields(s["Uid"]); f[0] != "1234" || strings.Fields(s["Gid"])[0] != "4321" {
		t.Fatalf("uid %s gid %s", s["Uid"], s["Gid"])
	}
	if g := strings.Fields(s["Groups"]); strings.Join(g, " ") != "77 4321" && strings.Join(g, " ") != "4321 77" {
		t.Fatalf("groups %s", s["Groups"])
	}
	if s["CapEff"] != "0000000000000000" || s["CapAmb"] != "0000000000000000" {
		t.Fatalf("a non-root user has capabilities: %v", s)
	}
	u := containerStatus(t, c).User.Linux
	if u.Uid != 1234 || u.Gid != 4321 {
		t.Fatalf("status.user = %v", u)
	}
	cfg := containerConfig([]string{"true"})
	cfg.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: 5}
	_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
	wantCode(t, err, codes.InvalidArgument, "run_as_group")
	cfg = containerConfig([]string{"true"})
	cfg.Linux.SecurityContext.RunAsUsername = "nobody-of-that-name"
	_, err = node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
	wantCode(t, err, codes.InvalidArgument, "nobody-of-that-name")
}

func TestNoNewPrivs(t *testing.T) {
	p := runPod(t, nil)
	for _, on := range []bool{false, true} {
		c := started(t, p, secure(func(s *cri.LinuxContainerSecurityContext) { s.NoNewPrivs = on }))
		if got := procStatus(t, c)["NoNewPrivs"]; got != map[bool]string{false: "0", true: "1"}[on] {
			t.Errorf("no_new_privs %v: %s", on, got)
		}
	}
}

func TestSeccomp(t *testing.T) {
	p := runPod(t, nil)
	mode := func(profile *cri.SecurityProfile) string {
		return procStatus(t, started(t, p, secure(func(s *cri.LinuxContainerSecurityContext) { s.Seccomp = profile })))["Seccomp"]
	}
	if m := mode(nil); m != "0" {
		t.Errorf("no profile: mode %s", m)
	}
	if m := mode(&cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}); m != "0" {
		t.Errorf("unconfined: mode %s", m)
	}
	if m := mode(&cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}); m != "2" {
		t.Errorf("runtime default: mode %s", m)
	}
	file := filepath.Join(node.Dir, "profile.json")
	profile := `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["sethostname","chmod","fchmodat","fchmodat2"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}`
	if err := os.WriteFile(file, []byte(profile), 0o600); err != nil {
		t.Fatal(err)
	}
	c := started(t, p, secure(func(s *cri.LinuxContainerSecurityContext) {
		s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: file}
	}))
	if _, e, code := execSync(t, c, "/bin/prog", "chmod", "/bin/prog"); code == 0 || !strings.Contains(e, "permission denied") {
		t.Errorf("chmod under the profile: %d %q", code, e)
	}
	for _, ref := range []string{"", "/no/such/profile.json"} {
		cfg := containerConfig([]string{"true"})
		cfg.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: ref}
		_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
		wantCode(t, err, codes.InvalidArgument, "seccomp")
	}
}

func TestReadonlyRootfsAndMasks(t *testing.T) {
	p := runPod(t, nil)
	c := started(t, p, secure(func(s *cri.LinuxContainerSecurityContext) {
		s.ReadonlyRootfs = true
		s.MaskedPaths = []string{"/proc/kcore", "/proc/timer_list", "/sys/firmware", "/proc/acpi", "/no/such/path"}
		s.ReadonlyPaths = []string{"/proc/sys", "/proc/bus", "/proc/sysrq-trigger"}
	}))
	if _, e, code := execSync(t, c, "/bin/prog", "write", "/x", "y"); code == 0 || !strings.Contains(e, "read-only") {
		t.Errorf("write to a read-only root: %d %q", code, e)
	}
	if out, _, _ := execSync(t, c, "/bin/cat", "/proc/timer_list"); out != "" {
		t.Errorf("masked file has content")
	}
	if _, e, code := execSync(t, c, "/bin/prog", "write", "/proc/sys/kernel/panic", "1"); code == 0 || !strings.Contains(e, "read-only") {
		t.Errorf("write below /proc/sys: %d %q", code, e)
	}
	bare := started(t, p, nil) // no masked_paths: nothing is masked
	if out, _, _ := execSync(t, bare, "/bin/cat", "/proc/timer_list"); out == "" {
		t.Errorf("an empty masked_paths list masked something")
	}
}

func TestPrivilegedContainer(t *testing.T) {
	p := runPod(t, nil)
	cfg := containerConfig([]string{"true"})
	cfg.Linux.SecurityContext.Privileged = true
	_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
	wantCode(t, err, codes.InvalidArgument, "privileged")

	q := runPod(t, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	c := started(t, q, secure(func(s *cri.LinuxContainerSecurityContext) {
		s.Privileged = true
		s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	}))
	s := procStatus(t, c)
	own, _ := os.ReadFile("/proc/self/status")
	if !strings.Contains(string(own), "CapBnd:\t"+s["CapEff"]) || s["Seccomp"] != "0" {
		t.Errorf("privileged: CapEff %s Seccomp %s", s["CapEff"], s["Seccomp"])
	}
	if _, _, code := execSync(t, c, "/bin/prog", "stat", "/dev/kmsg"); code != 0 {
		t.Errorf("privileged container lacks the host's /dev/kmsg")
	}
}

func TestDevicesAreDeniedByDefault(t *testing.T) {
	p := runPod(t, nil)
	c := started(t, p, nil)
	if _, e, code := execSync(t, c, "/bin/prog", "mknod-open", "1", "1"); code == 0 || !strings.Contains(e, "not permitted") {
		t.Errorf("/dev/mem node: %d %q", code, e)
	}
	if _, _, code := execSync(t, c, "/bin/prog", "write", "/dev/null", "x"); code != 0 {
		t.Errorf("/dev/null is not writable")
	}
	d := started(t, p, func(c *cri.ContainerConfig) {
		c.Devices = []*cri.Device{{HostPath: "/dev/kmsg", ContainerPath: "/dev/my-kmsg", Permissions: "rwm"}}
	})
	if _, e, code := execSync(t, d, "/bin/prog", "stat", "/dev/my-kmsg"); code != 0 {
		t.Errorf("given device: %s", e)
	}
	cfg := containerConfig([]string{"true"})
	cfg.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "rq"}}
	_, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.config})
	wantCode(t, err, codes.InvalidArgument, "permissions")
}

func TestMounts(t *testing.T) {
	p := runPod(t, nil)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("on the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	c := started(t, p, func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{{HostPath: link, ContainerPath: "/data/deep"}, {HostPath: dir, ContainerPath: "/ro", Readonly: true}}
	})
	if out, _, _ := execSync(t, c, "/bin/cat", "/data/deep/f"); out != "on the host" {
		t.Errorf("mounted file: %q", out)
	}
	if _, _, code := execSync(t, c, "/bin/prog", "write", "/data/deep/g", "from inside"); code != 0 {
		t.Errorf("write to a writable mount failed")
	}
	if b, _ := os.ReadFile(filepath.Join(dir, "g")); string(b) != "from inside\n" {
		t.Errorf("host sees %q", b)
	}
	if _, e, code := execSync(t, c, "/bin/prog", "write", "/ro/h", "x"); code == 0 || !strings.Contains(e, "read-only") {
		t.Errorf("write to a read-only mount: %d %q", code, e)
	}
	m := containerStatus(t, c).Mounts
	if len(m) != 2 || m[0].HostPath != link {
		t.Errorf("status.mounts = %v", m)
	}
}

func TestResourcesReachTheCgroup(t *testing.T) {
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 48 << 20, CpuQuota: 20000, CpuPeriod: 100000, CpuShares: 300}
	})
	paths := []string{"/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max"}
	found := false
	for _, f := range paths {
		if out, _, code := execSync(t, c, "/bin/cat", f); code == 0 {
			found = true
			if strings.TrimSpace(out) != fmt.Sprint(48<<20) {
				t.Errorf("%s = %s", f, out)
			}
		}
	}
	if !found {
		t.Error("no memory cgroup is visible in the container")
	}
}
