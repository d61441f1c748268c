package spec

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/sandbox/model"
)

func TestProbeHost(t *testing.T) {
	h, err := ProbeHost()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(h.Capabilities, "CAP_CHOWN") || h.MinOOMScoreAdj < -1000 || h.MinOOMScoreAdj > 1000 {
		t.Errorf("got %+v", h)
	}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err != nil {
		t.Fatal(err)
	}
	if v2 := st.Type == unix.CGROUP2_SUPER_MAGIC; v2 != h.CgroupV2 {
		t.Errorf("cgroup v2: got %v, want %v", h.CgroupV2, v2)
	}
}

func TestHugepageSizes(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{"hugepages-2048kB", "hugepages-1048576kB", "hugepages-64kB", "other"} {
		if err := os.Mkdir(filepath.Join(dir, n), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	got := hugepageSizes(dir)
	slices.Sort(got)
	if want := []string{"1GB", "2MB", "64KB"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestSwapOnV2(t *testing.T) {
	root := t.TempDir()
	child := filepath.Join(root, "system.slice")
	if err := os.Mkdir(child, 0o755); err != nil {
		t.Fatal(err)
	}
	if got, want := swapOnV2(root), exists("/proc/swaps"); got != want {
		t.Errorf("no controller yet: got %v, want %v", got, want)
	}
	for _, c := range []struct {
		file string
		want bool
	}{{"memory.max", false}, {"memory.swap.max", true}} {
		if err := os.WriteFile(filepath.Join(child, c.file), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if got := swapOnV2(root); got != c.want {
			t.Errorf("with %s: got %v, want %v", c.file, got, c.want)
		}
	}
}

func TestCheckSELinux(t *testing.T) {
	for level, ok := range map[string]bool{
		"s0": true, "s0:c1,c2": true, "s0-s15:c0.c1023": true, "s0:c1,c2-s0:c5": true, "": true,
		"s0:": false, "x": false, "s0:c1 c2": false, "s0\n": false, "c1": false,
	} {
		if err := CheckSELinux(&model.SELinux{Level: level}); (err == nil) != ok {
			t.Errorf("level %q: got %v", level, err)
		}
	}
	if err := CheckSELinux(nil); err != nil {
		t.Error(err)
	}
}

func TestHostDevices(t *testing.T) {
	all, err := devicesAt("/dev")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, d := range all {
		if seen[d.Path] || strings.HasPrefix(d.Path, "/dev/pts/") || d.Path == "/dev/console" {
			t.Errorf("%s is listed, or twice", d.Path)
		}
		seen[d.Path] = true
	}
	if !seen["/dev/null"] {
		t.Error("/dev/null is not listed")
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/dev/null", link); err != nil {
		t.Fatal(err)
	}
	d, err := devicesAt(link)
	if err != nil || len(d) != 1 || d[0].Major != 1 || d[0].Minor != 3 || d[0].Path != link {
		t.Errorf("symlink: got %+v, %v", d, err)
	}
	if _, err := devicesAt("/etc/passwd"); err == nil {
		t.Error("a regular file passes for a device")
	}
}

func TestRealNode(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(dir, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	in := input()
	in.Node = Node{}
	in.Container.Mounts = []model.Mount{{ContainerPath: "/m", HostPath: filepath.Join(dir, "link")}}
	s, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == "/m" })
	if s.Mounts[at].Source != dir {
		t.Errorf("source %q, want %q", s.Mounts[at].Source, dir)
	}
	in.Container.Mounts[0].HostPath = filepath.Join(dir, "none")
	if _, err := Build(in); !errdefs.IsInvalidArgument(err) {
		t.Errorf("missing path: got %v", err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	in.Container.Mounts = nil
	in.Container.Security.Seccomp = &model.Profile{Type: model.ProfileLocalhost, Ref: fifo}
	if _, err := Build(in); !errdefs.IsInvalidArgument(err) {
		t.Errorf("FIFO as a profile: got %v", err)
	}
}

func TestPropagationOfMounts(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Skipf("needs to mount: %v", err)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	sub := filepath.Join(dir, "a")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		flag          uintptr
		shared, slave bool
	}{{unix.MS_PRIVATE, false, false}, {unix.MS_SHARED, true, false}} {
		if err := unix.Mount("", dir, "", c.flag, ""); err != nil {
			t.Fatal(err)
		}
		shared, slave, err := propagationOf(sub)
		if err != nil || shared != c.shared || slave != c.slave {
			t.Errorf("flag %#x: got shared %v, slave %v, %v", c.flag, shared, slave, err)
		}
	}
}

func TestCDI(t *testing.T) {
	dir := t.TempDir()
	c, err := NewCDI(dir)
	if err != nil {
		t.Fatal(err)
	}
	put := func(name string, spec map[string]any) {
		t.Helper()
		b, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	build := func() *specs.Spec {
		s, err := Build(input())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, bad := range []string{"gpu0", "", "vendor.com/gpu=none", "../x=y"} {
		if err := c.Inject(build(), []string{bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %v, want an invalid argument", bad, err)
		}
	}
	edits := func(more map[string]any) map[string]any {
		e := map[string]any{"env": []string{"GPU=0"}, "deviceNodes": []map[string]any{{"path": "/dev/gpu0", "hostPath": "/dev/null"}}}
		for k, v := range more {
			e[k] = v
		}
		return map[string]any{"cdiVersion": "0.6.0", "kind": "vendor.com/gpu", "devices": []map[string]any{{"name": "0", "containerEdits": e}}}
	}
	put("gpu.json", edits(nil)) // written after the cache was made
	s := build()
	if err := c.Inject(s, []string{"vendor.com/gpu=0", "vendor.com/gpu=0"}); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(s.Process.Env, "GPU=0") || len(s.Linux.Devices) != 1 || s.Linux.Devices[0].Path != "/dev/gpu0" {
		t.Errorf("got env %q, devices %+v", s.Process.Env, s.Linux.Devices)
	}
	put("gpu.json", edits(map[string]any{"hooks": []map[string]any{{"hookName": "createContainer", "path": "/bin/true"}}}))
	s = build()
	if err := c.Inject(s, []string{"vendor.com/gpu=0"}); err != nil || s.Hooks == nil || len(s.Hooks.CreateContainer) != 1 {
		t.Errorf("hooks: got %+v, %v", s.Hooks, err)
	}
	if err := InjectCDI(build(), nil); err != nil {
		t.Errorf("no names: %v", err)
	}
}
