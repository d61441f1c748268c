package ocitest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

func (s *suite) testStart(t *testing.T) {
	r := container(t, "pid:", "host:", "env:A", "cwd:", "status:NoNewPrivs", "status:CapEff", "write:/tmp/x", "write:/proc/sys/kernel/hostname",
		"stat:/dev/null", "status:Seccomp", "exit:3")
	r.Spec.Process.Env = append(r.Spec.Process.Env, "A=b c")
	r.Spec.Process.Cwd = "/data"
	r.Spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"swapon"}, Action: specs.ActErrno}}}
	run := s.start(r)
	if _, err := run.c.Start(context.Background(), oci.Stdio{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("second start: %v", err)
	}
	out, ws := run.end()
	if !ws.Exited() || ws.ExitStatus() != 3 {
		t.Errorf("wait status %#x", uint32(ws))
	}
	expect(t, out, map[string]string{
		"pid:": "1", "host:": "ocitest", "env:A": "b c", "cwd:": "/data", "status:NoNewPrivs": "1", "status:CapEff": "00000000000000e3",
		"write:/tmp/x": "ok", "write:/proc/sys/kernel/hostname": "error: open /proc/sys/kernel/hostname: read-only file system",
		"stat:/dev/null": "Dcrw-rw-rw-", "status:Seccomp": "2",
	})
	if b, err := os.ReadFile(filepath.Join(r.Rootfs.Upper, "tmp/x")); err != nil || string(b) != "written" {
		t.Errorf("upper: %q, %v", b, err)
	}
}

func (s *suite) testStdio(t *testing.T) {
	c := s.create(container(t, "cat:", "err:to stderr"))
	in, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	run := startWith(t, c, oci.Stdio{In: in})
	in.Close()
	if _, err := w.WriteString("to stdin"); err != nil {
		t.Error(err)
	}
	w.Close()
	if out := run.output(); out != "to stdin\nto stderr\nerr:to stderr \n" {
		t.Errorf("output %q", out)
	}
	// Without streams of its own it has /dev/null.
	c = s.create(container(t, "cat:", "err:x", "exit:5"))
	p, err := c.Start(context.Background(), oci.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	if ws := started(t, c, p, pipeEnd(t)).reap(); ws.ExitStatus() != 5 {
		t.Errorf("wait status %#x", uint32(ws))
	}
}

func (s *suite) testExtraFiles(t *testing.T) {
	c := s.create(container(t, "fd:3", "fd:4"))
	var extra []*os.File
	for _, text := range []string{"three", "four"} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		extra = append(extra, r)
		if _, err := w.WriteString(text); err != nil {
			t.Fatal(err)
		}
		w.Close()
	}
	expect(t, startWith(t, c, oci.Stdio{Extra: extra}).output(), map[string]string{"fd:3": "three", "fd:4": "four"})
}

func (s *suite) testUser(t *testing.T) {
	r := container(t, "id:", "status:CapEff", "read:/proc/self/oom_score_adj", "open:/proc/self/fd/1")
	r.Spec.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{7}}
	adj := 777
	r.Spec.Process.OOMScoreAdj = &adj
	expect(t, s.output(r), map[string]string{
		"id:": "1000 1001 [7]", "status:CapEff": "0000000000000000", "read:/proc/self/oom_score_adj": "777|", "open:/proc/self/fd/1": "ok",
	})
}

func (s *suite) testNamespaces(t *testing.T) {
	kinds := map[specs.LinuxNamespaceType]kernel.Namespace{
		specs.NetworkNamespace: kernel.NetNS, specs.IPCNamespace: kernel.IPCNS, specs.UTSNamespace: kernel.UTSNS,
	}
	r := container(t)
	r.Namespaces = map[specs.LinuxNamespaceType]*os.File{}
	want := map[string]string{}
	for spec, k := range kinds {
		files, err := kernel.NewNamespaces([]kernel.Namespace{k}, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { files[0].Close() })
		r.Namespaces[spec] = files[0]
		verb := "link:/proc/self/ns/" + string(k)
		r.Spec.Process.Args = append(r.Spec.Process.Args, verb)
		if want[verb], err = os.Readlink("/proc/self/fd/" + itoa(int(files[0].Fd()))); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, s.output(r), want)
}

// A container joins the PID namespace of another, which lives.
func (s *suite) testPIDNamespace(t *testing.T) {
	first := s.start(container(t, "say:up", "sleep:"))
	first.line()
	r := container(t, "link:/proc/self/ns/pid", "pid:")
	ns := nsOf(t, first.p.Pid, "pid")
	r.Namespaces = map[specs.LinuxNamespaceType]*os.File{specs.PIDNamespace: ns}
	want, err := os.Readlink("/proc/" + itoa(first.p.Pid) + "/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	out := s.output(r)
	expect(t, out, map[string]string{"link:/proc/self/ns/pid": want})
	if strings.Contains(out, "pid: 1\n") {
		t.Errorf("pid 1 in a namespace that another made:\n%s", out)
	}
}

func (s *suite) testMounts(t *testing.T) {
	dir := folders(t, "host", "image")
	for path, text := range map[string]string{dir[0] + "/h": "from the host", dir[1] + "/top": "top", dir[0] + "/file": "a file"} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Mkdir(dir[1]+"/sub", 0o755), os.WriteFile(dir[1]+"/sub/s", []byte("sub"), 0o644),
		os.Symlink("/etc", dir[1]+"/out")); err != nil {
		t.Fatal(err)
	}
	shm, err := kernel.NewFS("tmpfs", []kernel.FSOption{{Key: "mode", Value: "1777"}}, unix.MOUNT_ATTR_NOSUID)
	if err != nil {
		t.Fatal(err)
	}
	empty, err := kernel.NewEmptyMountNS()
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	if shm, err = kernel.Hold(empty, shm); err != nil {
		t.Fatal(err)
	}
	defer shm.Close()
	request := func(args ...string) *request {
		r := container(t, args...)
		r.MountFDs = map[string]*os.File{"shm": shm}
		r.Volumes = map[string]oci.Volume{"0": {Lowers: []string{dir[1]}}, "1": {Lowers: []string{dir[1], dir[0]}, SubPath: "sub"}}
		for dest, m := range map[string]specs.Mount{
			"/dev/shm": {Source: "fd:shm", Options: []string{"rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"}},
			"/img":     {Source: "image:0", Options: []string{"rbind", "rprivate", "ro", "nosuid", "nodev"}},
			"/sub":     {Source: "image:1", Options: []string{"rbind", "rprivate", "ro", "nosuid", "nodev"}},
			"/host":    {Source: dir[0], Options: []string{"rbind", "rprivate", "ro"}},
			"/rw/file": {Source: dir[0] + "/file", Options: []string{"rbind", "rprivate", "rw"}},
		} {
			m.Destination, m.Type = dest, "bind"
			r.Spec.Mounts = append(r.Spec.Mounts, m)
		}
		return r
	}
	expect(t, s.output(request("write:/dev/shm/x", "read:/img/top", "read:/sub/s", "read:/host/h", "write:/rw/file", "write:/img/x", "write:/host/x")), map[string]string{
		"write:/dev/shm/x": "ok", "read:/img/top": "top", "read:/sub/s": "sub", "read:/host/h": "from the host", "write:/rw/file": "ok",
		"write:/img/x": "error: open /img/x: read-only file system", "write:/host/x": "error: open /host/x: read-only file system",
	})
	if b, err := os.ReadFile(dir[0] + "/file"); err != nil || string(b) != "written" {
		t.Errorf("the host's file: %q, %v", b, err)
	}
	// One filesystem for all containers that the descriptor is given to.
	expect(t, s.output(request("read:/dev/shm/x")), map[string]string{"read:/dev/shm/x": "written"})

	r := request("say:x")
	r.Volumes["1"] = oci.Volume{Lowers: []string{dir[1]}, SubPath: "out/passwd"}
	if c, err := s.rt.Create(context.Background(), r.CreateRequest); err == nil {
		t.Error("a sub path led out of its image")
		_ = c.Delete()
	} else if !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a sub path that leads out of its image: %v", err)
	}
}

// What the container mounts on a bidirectional volume is seen on the host, and
// what the host mounts later is seen in the container.
func (s *suite) testPropagation(t *testing.T) {
	dir := folders(t, "shared")[0]
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"in", "out"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r := container(t, "mount:/vol/out", "write:/vol/out/x", "line:", "read:/vol/in/y", "read:/slave/in/y")
	admin := append([]string{"CAP_SYS_ADMIN"}, caps...)
	r.Spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: admin, Effective: admin, Permitted: admin}
	r.Spec.Linux.RootfsPropagation = "rshared"
	r.Spec.Mounts = append(r.Spec.Mounts,
		specs.Mount{Destination: "/vol", Type: "bind", Source: dir, Options: []string{"rbind", "rshared", "rw"}},
		specs.Mount{Destination: "/slave", Type: "bind", Source: dir, Options: []string{"rbind", "rslave", "rw"}})
	in, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	c := s.create(r)
	run := startWith(t, c, oci.Stdio{In: in})
	in.Close()
	first := run.line() + "\n" + run.line()
	expect(t, first, map[string]string{"mount:/vol/out": "ok", "write:/vol/out/x": "ok"})
	if b, err := os.ReadFile(filepath.Join(dir, "out/x")); err != nil || string(b) != "written" {
		t.Errorf("what the container mounted is not on the host: %q, %v", b, err)
	}
	if err := unix.Mount("tmpfs", filepath.Join(dir, "in"), "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "in/y"), []byte("later"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	expect(t, run.output(), map[string]string{"read:/vol/in/y": "later", "read:/slave/in/y": "later"})
	for _, d := range []string{"in", "out"} {
		if err := unix.Unmount(filepath.Join(dir, d), unix.MNT_DETACH); err != nil {
			t.Errorf("%s: %v", d, err)
		}
	}
}

func (s *suite) testRootfs(t *testing.T) {
	r := container(t, "write:/x", "write:/tmp/x", "write:/dev/shm")
	r.Spec.Root.Readonly = true
	expect(t, s.output(r), map[string]string{"write:/x": "error: open /x: read-only file system", "write:/tmp/x": "error: open /tmp/x: read-only file system"})

	// One layer and nothing to write to.
	r = container(t, "say:up")
	r.Rootfs = oci.Rootfs{Lowers: r.Rootfs.Lowers[:1]}
	r.Spec.Root.Readonly = true
	r.Spec.Mounts = r.Spec.Mounts[:3]
	if out := s.output(r); out != "up\n" {
		t.Errorf("output %q", out)
	}
	// A folder of the caller's.
	r = container(t, "write:/tmp/mine")
	folder := r.Rootfs.Lowers[0]
	r.Rootfs, r.Spec.Root.Path = oci.Rootfs{}, folder
	expect(t, s.output(r), map[string]string{"write:/tmp/mine": "ok"})
	if _, err := os.Stat(filepath.Join(folder, "tmp/mine")); err != nil {
		t.Error(err)
	}
	// More layers than one option of 255 bytes names.
	r = container(t, "read:/deep")
	for range 70 {
		r.Rootfs.Lowers = append(r.Rootfs.Lowers, folders(t, "layer")[0])
	}
	if err := os.WriteFile(filepath.Join(r.Rootfs.Lowers[len(r.Rootfs.Lowers)-1], "deep"), []byte("bottom"), 0o644); err != nil {
		t.Fatal(err)
	}
	expect(t, s.output(r), map[string]string{"read:/deep": "bottom"})
}
