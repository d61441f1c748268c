package embedded

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
)

func bind(dest, source string, options ...string) specs.Mount {
	return specs.Mount{Destination: dest, Type: "bind", Source: source, Options: append([]string{"rbind"}, options...)}
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// hostMount mounts a tmpfs on the host for the length of the test.
func hostMount(t testing.TB, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil && err != unix.EINVAL {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

func TestBinds(t *testing.T) {
	r := runtimeFor(t)
	src := t.TempDir()
	write(t, src+"/file", "content")
	hostMount(t, src+"/sub")
	write(t, src+"/sub/inner", "inner")
	if err := os.Symlink(src, src+"-link"); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(src + "-link")
	c := newContainer(t, "read:/data/file", "write:/data/new", "write:/ro/new", "write:/ro/sub/new", "write:/rro/sub/new", "read:/rro/sub/inner",
		"read:/etc/one", "write:/etc/one", "read:/made/deep/file", "mknod:c,1,3", "read:/viafd/file", "ls:/plain/sub", "write:/tmpfs/x", "read:/vialink/file")
	f, err := os.OpenFile(src, unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c.req.MountFDs = map[string]*os.File{"vol": f}
	c.req.Spec.Mounts = append(c.req.Spec.Mounts,
		bind("/data", src), bind("/ro", src, "ro"), bind("/rro", src, "rro"), bind("/etc/one", src+"/file", "ro"),
		bind("/made/deep/file", src+"/file"), bind("/viafd", "fd:vol", "ro"), bind("/vialink", src+"-link"),
		specs.Mount{Destination: "/plain", Type: "bind", Source: src, Options: []string{"bind"}},
		specs.Mount{Destination: "/tmpfs", Type: "tmpfs", Source: "tmpfs", Options: []string{"ro", "size=4k"}},
	)
	expect(t, c.output(r), map[string]string{
		"read:/data/file": "content", "write:/data/new": "ok", "write:/ro/new": "error: open /ro/new: read-only file system",
		"write:/ro/sub/new": "ok", "write:/rro/sub/new": "error: open /rro/sub/new: read-only file system", "read:/rro/sub/inner": "inner",
		"read:/etc/one": "content", "write:/etc/one": "error: open /etc/one: read-only file system", "read:/made/deep/file": "content",
		"read:/viafd/file": "content", "ls:/plain/sub": "", "write:/tmpfs/x": "error: open /tmpfs/x: read-only file system",
		"read:/vialink/file": "content",
	})
}

func TestReadonlyRoot(t *testing.T) {
	r := runtimeFor(t)
	args := []string{"write:/x", "write:/tmp/x", "write:/dev/shm/x", "ls:/new"}
	c := newContainer(t, args...)
	c.req.Spec.Root.Readonly = true
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, specs.Mount{Destination: "/new/dir", Type: "tmpfs", Source: "tmpfs"})
	want := map[string]string{
		"write:/x": "error: open /x: read-only file system", "write:/tmp/x": "error: open /tmp/x: read-only file system",
		"write:/dev/shm/x": "ok", "ls:/new": "dir",
	}
	expect(t, c.output(r), want)
	// One layer and no upper: read-only by nature.
	c = newContainer(t, args[:3]...)
	c.req.Rootfs.Upper, c.req.Rootfs.Work = "", ""
	delete(want, "ls:/new")
	expect(t, c.output(r), want)
	// A missing mount point can not be made there.
	c = newContainer(t)
	c.req.Rootfs.Upper, c.req.Rootfs.Work = "", ""
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, specs.Mount{Destination: "/new/dir", Type: "tmpfs", Source: "tmpfs"})
	if _, err := r.Create(context.Background(), c.req); !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), `] "/new/dir"`) {
		t.Errorf("create: %v", err)
	}
}

func TestLayers(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "read:/etc/which", "read:/etc/long", "write:/etc/which")
	top, long := t.TempDir(), t.TempDir()+strings.Repeat("/"+strings.Repeat("n", 100), 4)
	write(t, top+"/etc/which", "top")
	write(t, long+"/etc/which", "bottom")
	write(t, long+"/etc/long", "yes")
	c.req.Rootfs.Lowers = append([]string{top, long}, c.req.Rootfs.Lowers...)
	expect(t, c.output(r), map[string]string{"read:/etc/which": "top", "read:/etc/long": "yes", "write:/etc/which": "ok"})
	if b, _ := os.ReadFile(top + "/etc/which"); string(b) != "top" {
		t.Errorf("the layer was written to: %q", b)
	}
	// The fallbacks of older kernels make the same root: 3 layers, and more than one option holds.
	fresh := c.req.Rootfs // a volatile overlay's directories serve once
	dir := filepath.Dir(fresh.Upper)
	for i, layers := range []int{3, 120} {
		fresh.Upper, fresh.Work = fmt.Sprintf("%s/u%d", dir, i), fmt.Sprintf("%s/w%d", dir, i)
		for _, d := range []string{fresh.Upper, fresh.Work} {
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for len(fresh.Lowers) < layers {
			fresh.Lowers = append([]string{t.TempDir()}, fresh.Lowers...)
		}
		m, err := olderOverlay(fresh)
		if err != nil {
			t.Errorf("%d layers: %v", layers, err)
			continue
		}
		fd, err := unix.Openat(int(m.Fd()), "etc/long", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Errorf("%d layers: %v", layers, err)
		} else {
			unix.Close(fd)
		}
		m.Close()
	}
}

// TestDestinationsStayInside: no mount destination, working directory or device
// path of an image leads out of the root (I1, CVE-2019-18837, CVE-2026-41579).
func TestDestinationsStayInside(t *testing.T) {
	r := runtimeFor(t)
	canary := t.TempDir()
	write(t, canary+"/keep", "canary")
	src := t.TempDir()
	write(t, src+"/file", "bound")
	c := newContainer(t, "read:/etc/hosts", "ls:/link/below", "cwd:", "read:"+canary+"/hosts")
	img := c.req.Rootfs.Lowers[0]
	for name, target := range map[string]string{
		"etc/hosts": canary + "/hosts", "link": canary + "/dir", "up": "../../../../../../.." + canary, "dangling": canary + "/no/such/../where",
	} {
		if err := os.Symlink(target, filepath.Join(img, name)); err != nil {
			t.Fatal(err)
		}
	}
	c.req.Spec.Process.Cwd = "/up/cwd"
	c.req.Spec.Linux.Devices = []specs.LinuxDevice{{Path: "/up/null", Type: "c", Major: 1, Minor: 3}}
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, bind("/etc/hosts", src+"/file"), bind("/link/below", src), bind("/dangling", src))
	expect(t, c.output(r), map[string]string{
		"read:/etc/hosts": "bound", "ls:/link/below": "file", "cwd:": canary + "/cwd", "read:" + canary + "/hosts": "bound",
	})
	left, err := os.ReadDir(canary)
	if err != nil || len(left) != 1 || left[0].Name() != "keep" {
		t.Errorf("the host's directory was touched: %v %v", left, err)
	}
}

// TestProcMustBeReal: an image with a symlink for /proc or /sys is refused (I2).
func TestProcMustBeReal(t *testing.T) {
	r := runtimeFor(t)
	for _, name := range []string{"proc", "sys"} {
		c := newContainer(t)
		img := c.req.Rootfs.Lowers[0]
		if err := errors.Join(os.Remove(img+"/"+name), os.Symlink("/tmp", img+"/"+name)); err != nil {
			t.Fatal(err)
		}
		_, err := r.Create(context.Background(), c.req)
		if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), `] "/`+name+`"`) {
			t.Errorf("/%s as symlink: %v", name, err)
		}
	}
}

// TestDevAsSymlink: devices are made in our own tmpfs before it has a place.
func TestDevAsSymlink(t *testing.T) {
	r := runtimeFor(t)
	canary := t.TempDir()
	c := newContainer(t, "stat:/dev/null")
	img := c.req.Rootfs.Lowers[0]
	if err := errors.Join(os.Remove(img+"/dev"), os.Symlink(canary, img+"/dev")); err != nil {
		t.Fatal(err)
	}
	expect(t, c.output(r), map[string]string{"stat:/dev/null": "20666 1:3 0"})
	if left, err := os.ReadDir(canary); err != nil || len(left) > 0 {
		t.Errorf("the host's directory was touched: %v %v", left, err)
	}
}

// TestMaskIgnoresImage: what lies at the image's /dev/null never becomes a mask (I3).
func TestMaskIgnoresImage(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "stat:/etc/secret", "ls:/data", "mkdir:/data/x", "write:/etc/fixed", "write:/proc/sys/kernel/shmmni", "stat:/proc/keys")
	img := c.req.Rootfs.Lowers[0]
	write(t, img+"/etc/secret", "secret")
	write(t, img+"/etc/fixed", "fixed")
	write(t, img+"/data/secret", "secret")
	write(t, img+"/dev/null", "evil")
	c.req.Spec.Mounts = append(c.req.Spec.Mounts[:1:1], c.req.Spec.Mounts[5:]...) // no /dev of ours
	c.req.Spec.Linux.MaskedPaths = append(c.req.Spec.Linux.MaskedPaths, "/etc/secret", "/data")
	c.req.Spec.Linux.ReadonlyPaths = append(c.req.Spec.Linux.ReadonlyPaths, "/etc/fixed")
	expect(t, c.output(r), map[string]string{
		"stat:/etc/secret": "20666 1:3 0", "ls:/data": "", "mkdir:/data/x": "error: mkdir /data/x: read-only file system",
		"write:/etc/fixed":              "error: open /etc/fixed: read-only file system",
		"write:/proc/sys/kernel/shmmni": "error: open /proc/sys/kernel/shmmni: read-only file system", "stat:/proc/keys": "20666 1:3 0",
	})
}

// TestPropagation: a mount made on the host after the start appears inside with
// rslave, and one made inside appears on the host with rshared.
func TestPropagation(t *testing.T) {
	r := runtimeFor(t)
	src := t.TempDir()
	hostMount(t, src)
	if err := unix.Mount("", src, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"/host", "/inside"} {
		if err := os.Mkdir(src+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c := newContainer(t, "hold:")
	c.req.Spec.Linux.RootfsPropagation = "rshared"
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, bind("/private", src), bind("/slave", src, "rslave"), bind("/shared", src, "rshared"))
	caps := []string{"CAP_SYS_ADMIN"}
	c.req.Spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	run := c.start(r)
	hostMount(t, src+"/host")
	write(t, src+"/host/seen", "x")
	p := *c.req.Spec.Process
	p.Args = []string{"probe", "ls:/private/host", "ls:/slave/host", "ls:/shared/host", "mount:tmpfs,/slave/inside,tmpfs"}
	out, _, err := run.exec(&p)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, out, map[string]string{
		"ls:/private/host": "", "ls:/slave/host": "seen", "ls:/shared/host": "seen", "mount:tmpfs,/slave/inside,tmpfs": "ok",
	})
	if mounted(t, src+"/inside") {
		t.Error("a mount on the slave came to the host")
	}
	p.Args = []string{"probe", "mount:tmpfs,/shared/inside,tmpfs"}
	if out, _, err = run.exec(&p); err != nil {
		t.Fatal(err)
	}
	if !mounted(t, src+"/inside") {
		t.Errorf("a mount on the shared bind did not come to the host: %s", out)
	} else if err := unix.Unmount(src+"/inside", 0); err != nil {
		t.Error(err)
	}
	run.stop()
	time.Sleep(10 * time.Millisecond) // let the kernel take the namespace down before the sources go
}

func mounted(t *testing.T, path string) bool {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(b), " "+path+" ")
}

func TestProcBind(t *testing.T) {
	r := runtimeFor(t)
	src := t.TempDir()
	write(t, src+"/cpuinfo", "fake")
	c := newContainer(t, "read:/proc/cpuinfo")
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, bind("/proc/cpuinfo", src+"/cpuinfo"))
	expect(t, c.output(r), map[string]string{"read:/proc/cpuinfo": "fake"})
}

func TestBundleRoot(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "write:/etc/new")
	dir := c.req.Rootfs.Lowers[0]
	c.req.Rootfs = oci.Rootfs{}
	c.req.Spec.Root.Path = dir
	expect(t, c.output(r), map[string]string{"write:/etc/new": "ok"})
	if _, err := os.Stat(dir + "/etc/new"); err != nil {
		t.Error(err)
	}
}

// TestRelativeMounts: a source is relative to the bundle, a destination to "/"
// (runtime-spec, "Mounts").
func TestRelativeMounts(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "read:/data/file", "read:/tmp/below/file")
	dir := c.bundle()
	write(t, dir+"/src/file", "content")
	c.req.Spec.Mounts = append(c.req.Spec.Mounts, bind("/data", "src"), bind("tmp/below", "./src/"))
	expect(t, c.output(r), map[string]string{"read:/data/file": "content", "read:/tmp/below/file": "content"})
	c.req.Bundle = ""
	_, err := r.Create(context.Background(), c.req)
	refused(t, err, "mounts[7].source")
}

// TestTmpfsMode: without a mode it is that of the directory below; the table of
// mounts shows it, and the source.
func TestTmpfsMode(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "stat:/data", "stat:/given", "stat:/made/up", "read:/proc/self/mounts")
	lower := c.req.Rootfs.Lowers[0]
	if err := os.Chmod(lower+"/data", 0o2710|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	for dest, options := range map[string][]string{"/data": nil, "/given": {"mode=1500"}, "/made/up": nil} {
		c.req.Spec.Mounts = append(c.req.Spec.Mounts, specs.Mount{Destination: dest, Type: "tmpfs", Source: "store", Options: options})
	}
	out := c.output(r)
	expect(t, out, map[string]string{"stat:/data": "42710 0:0 0", "stat:/given": "41500 0:0 0", "stat:/made/up": "41777 0:0 0"})
	mounts := value(t, out, "read:/proc/self/mounts")
	for _, want := range []string{"store /data tmpfs rw,relatime,mode=2710", "proc /proc proc ", "tmpfs /dev tmpfs ", "sysfs /sys sysfs "} {
		if !strings.Contains(mounts, want) {
			t.Errorf("no %q in %s", want, mounts)
		}
	}
}

func TestMaskOnce(t *testing.T) {
	r := runtimeFor(t)
	c := newContainer(t, "mounts:")
	c.req.Spec.Linux.MaskedPaths = []string{"/data", "/data/", "/data"}
	if at := value(t, c.output(r), "mounts:"); strings.Count(at, "/data") != 1 {
		t.Errorf("mounts at %s", at)
	}
}

// TestWholeProcProtected: a path that is a procfs's mount point means the procfs,
// which is mounted later than the paths are looked at.
func TestWholeProcProtected(t *testing.T) {
	r := runtimeFor(t)
	for _, make := range []func(testing.TB, ...string) *container{newContainer, newUserContainer} {
		c := make(t, "write:/proc/self/oom_score_adj", "read:/proc/self/comm")
		c.req.Spec.Linux.ReadonlyPaths = append(c.req.Spec.Linux.ReadonlyPaths, "/proc")
		expect(t, c.output(r), map[string]string{"write:/proc/self/oom_score_adj": "error: open /proc/self/oom_score_adj: read-only file system", "read:/proc/self/comm": "probe|"})
		c = make(t, "ls:/proc")
		c.req.Spec.Linux.MaskedPaths = append([]string{"/proc"}, c.req.Spec.Linux.MaskedPaths...)
		expect(t, c.output(r), map[string]string{"ls:/proc": ""})
	}
}

// TestPropagationKinds: what is shared in a user namespace is, and a root that is
// to be a slave has the host's mount for its master.
func TestPropagationKinds(t *testing.T) {
	r := runtimeFor(t)
	dir := t.TempDir()
	hostMount(t, dir)
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		root        string
		user        bool
		root1, data string // the tags of the root and of /data
	}{{"", false, "", "shared"}, {"slave", false, "master", "shared"}, {"rslave", true, "master", "shared"}, {"rshared", true, "shared", "shared"}} {
		c := newContainer(t, "tags:/", "tags:/data")
		if x.user {
			c = newUserContainer(t, "tags:/", "tags:/data")
		}
		root := filepath.Join(dir, fmt.Sprintf("root-%s-%v", x.root, x.user))
		for _, d := range []string{"bin", "proc", "sys", "dev", "etc", "tmp", "data"} {
			if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mount(c.req.Rootfs.Lowers[0]+"/bin", root+"/bin", "", unix.MS_BIND, ""); err != nil { // the probe is larger than the tmpfs
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(root+"/bin", unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		c.req.Rootfs = oci.Rootfs{}
		c.req.Spec.Root.Path, c.req.Spec.Linux.RootfsPropagation = root, x.root
		c.req.Spec.Mounts = append(c.req.Spec.Mounts, bind("/data", t.TempDir(), "shared"))
		out := c.output(r)
		for at, want := range map[string]string{"tags:/": x.root1, "tags:/data": x.data} {
			if got := value(t, out, at); want == "" && got != "" || !strings.Contains(got, want) {
				t.Errorf("rootfsPropagation %q, user namespace %v: %s %q, want %q", x.root, x.user, at, got, want)
			}
		}
	}
}
