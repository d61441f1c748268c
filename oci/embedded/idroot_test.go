package embedded

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
)

var testMap = []specs.LinuxIDMapping{{HostID: hostID, Size: 65536}}

// newShared makes a user namespace with the given others, closed at the test's end.
func newShared(t *testing.T, r *Runtime, kinds ...specs.LinuxNamespaceType) []*os.File {
	t.Helper()
	files, err := r.NewUserNamespace(oci.UserNamespaceRequest{UIDs: testMap, GIDs: testMap, Kinds: kinds})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeLayers(files) })
	return files
}

// layers makes n image layers that belong to root, the probe's image below them.
func layers(t *testing.T, n int) []string {
	t.Helper()
	out := []string{image(t)}
	for i := range n {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("%s/layer%d", dir, i)
		write(t, name, "of the image")
		if err := os.Chown(name, i, i); err != nil {
			t.Fatal(err)
		}
		out = append([]string{dir}, out...)
	}
	return out
}

func owner(t *testing.T, name string) (uint32, uint32) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Uid, st.Gid
}

// TestIdmappedOverlay: the overlay shows shifted owners, and what is copied up or
// made belongs to the container's ids on disk, in all the ways it is made.
func TestIdmappedOverlay(t *testing.T) {
	r := runtimeFor(t)
	user := newShared(t, r)[0]
	ways := map[string]func(oci.Rootfs) (*os.File, error){
		"attached": func(r oci.Rootfs) (*os.File, error) { return attachedOverlay(r, user) },
		"chosen":   func(r oci.Rootfs) (*os.File, error) { return openRootfs(r, "", user) },
	}
	for name, open := range ways {
		for _, n := range []int{1, 30, 70} { // 70: too many for fsconfig(2) in one option
			t.Run(fmt.Sprint(name, n), func(t *testing.T) {
				dir := t.TempDir()
				fs := oci.Rootfs{Lowers: layers(t, n), Upper: dir + "/u", Work: dir + "/w", Volatile: true, Idmap: true}
				for _, d := range []string{fs.Upper, fs.Work} {
					if err := os.Mkdir(d, 0o755); err != nil {
						t.Fatal(err)
					}
				}
				if err := os.Chown(fs.Upper, hostID, hostID); err != nil {
					t.Fatal(err)
				}
				m, err := open(fs)
				if err != nil {
					t.Fatal(err)
				}
				defer m.Close()
				at := fmt.Sprintf("/proc/self/fd/%d", m.Fd())
				last := fmt.Sprintf("/layer%d", n-1)
				for name, want := range map[string]uint32{"/.": hostID, "/etc": hostID, last: hostID + uint32(n-1)} {
					if u, g := owner(t, at+name); u != want || g != want {
						t.Errorf("%s belongs to %d:%d, want %d", name, u, g, want)
					}
				}
				if err := os.WriteFile(at+last, []byte("changed"), 0o644); err != nil {
					t.Fatal(err)
				}
				if u, _ := owner(t, fs.Upper+last); u != hostID+uint32(n-1) {
					t.Errorf("a file that was copied up belongs to %d on disk", u)
				}
				if u, _ := owner(t, fs.Lowers[0]+last); u != uint32(n-1) {
					t.Errorf("the image's file belongs to %d on disk now", u)
				}
				if b, err := os.ReadFile(fs.Lowers[0] + last); err != nil || string(b) != "of the image" {
					t.Errorf("the image's file: %q %v", b, err)
				}
			})
		}
	}
}

// TestIdmappedReadOnly: images without a writable layer, one layer or several.
func TestIdmappedReadOnly(t *testing.T) {
	r := runtimeFor(t)
	user := newShared(t, r)[0]
	all := layers(t, 2)
	for _, lowers := range [][]string{all[2:], all} {
		empty, err := r.emptyNS()
		if err != nil {
			t.Fatal(err)
		}
		m, err := openVolume(empty, oci.Volume{Lowers: lowers, SubPath: "etc", Idmap: true}, user)
		if err != nil {
			t.Fatal(err)
		}
		if u, g := owner(t, fmt.Sprintf("/proc/self/fd/%d/.", m.Fd())); u != hostID || g != hostID {
			t.Errorf("%d layers: belongs to %d:%d", len(lowers), u, g)
		}
		if err := os.WriteFile(fmt.Sprintf("/proc/self/fd/%d/x", m.Fd()), nil, 0o600); err != unix.EROFS && !strings.Contains(fmt.Sprint(err), "read-only") {
			t.Errorf("%d layers: written to: %v", len(lowers), err)
		}
		m.Close()
	}
}

// TestSharedUserNamespace: two containers in a user namespace, and its net, ipc and
// uts namespaces, that were made before them; their images and volumes are root's.
func TestSharedUserNamespace(t *testing.T) {
	r := runtimeFor(t)
	kinds := []specs.LinuxNamespaceType{specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace}
	files := newShared(t, r, kinds...)
	volume := layers(t, 1)
	data := t.TempDir()
	write(t, data+"/file", "of root")
	var links [2]string
	for i := range links {
		c := newContainer(t, "id:", "stat:/", "stat:/bin/true", "stat:/image/layer0", "stat:/idmapped/file", "stat:/plain/file", "write:/idmapped/new"+itoa(i), "write:/made",
			"chown:/made,7", "write:/bin/true", "mkdir:/dev/mqueue/x", "stat:/dev/mqueue", "stat:/dev/disk", "write:/proc/sys/kernel/hostname", "read:/proc/self/uid_map", "link:/proc/self/ns/user", "status:CapEff")
		c.req.Rootfs.Lowers = append([]string{volume[0]}, c.req.Rootfs.Lowers...)
		c.req.Rootfs.Idmap = true
		if err := os.Chown(c.req.Rootfs.Upper, hostID, hostID); err != nil {
			t.Fatal(err)
		}
		s := c.req.Spec
		s.Hostname = ""
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		s.Linux.UIDMappings, s.Linux.GIDMappings = testMap, testMap // as a check
		s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/disk", Type: "c", Major: 1, Minor: 3, UID: ptr(uint32(6)), GID: ptr(uint32(70000))}}
		s.Mounts = append(s.Mounts,
			specs.Mount{Destination: "/idmapped", Type: "bind", Source: data, Options: []string{"rbind", "ridmap"}},
			bind("/plain", data, "ro"),
			specs.Mount{Destination: "/image", Type: "bind", Source: "image:0", Options: []string{"rbind", "ro"}})
		c.req.Volumes = map[string]oci.Volume{"0": {Lowers: volume, Idmap: true}}
		c.req.Namespaces = map[specs.LinuxNamespaceType]*os.File{specs.UserNamespace: files[0]}
		for k, t := range kinds {
			c.req.Namespaces[t] = files[k+1]
		}
		out := c.output(r)
		expect(t, out, map[string]string{
			"id:": "0 0 []", "read:/proc/self/uid_map": "0     100000      65536|", "status:CapEff": "00000000a80425fb",
			"write:/made": "ok", "chown:/made,7": "ok", "write:/bin/true": "ok", "write:/idmapped/new" + itoa(i): "ok",
			"write:/proc/sys/kernel/hostname": "error: open /proc/sys/kernel/hostname: read-only file system",
		})
		for key, id := range map[string]string{"stat:/": "0", "stat:/bin/true": "0", "stat:/image/layer0": "0", "stat:/idmapped/file": "0",
			"stat:/plain/file": "65534", "stat:/dev/mqueue": "0", "stat:/dev/disk": "6"} {
			if v := value(t, out, key); !strings.HasSuffix(v, " "+id) {
				t.Errorf("%s %s, want owner %s", key, v, id)
			}
		}
		links[i] = value(t, out, "link:/proc/self/ns/user")
		if u, g := owner(t, data+"/new"+itoa(i)); u != 0 || g != 0 {
			t.Errorf("a file made in an idmapped volume belongs to %d:%d on disk", u, g)
		}
		if u, _ := owner(t, c.req.Rootfs.Upper+"/made"); u != hostID+7 {
			t.Errorf("a file that was given to 7 belongs to %d on disk", u)
		}
	}
	if own, _ := os.Readlink("/proc/self/ns/user"); links[0] != links[1] || links[0] == own {
		t.Errorf("user namespaces %v, the host's %s", links, own)
	}
	for i, k := range kinds {
		f, err := unix.IoctlRetInt(int(files[i+1].Fd()), unix.NS_GET_USERNS)
		if err != nil {
			t.Fatal(err)
		}
		link, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f))
		unix.Close(f)
		if link != links[0] {
			t.Errorf("the %s namespace belongs to %s, want %s", k, link, links[0])
		}
	}
}

// TestSharedPIDNamespace: a pod's init in the pod's user namespace owns the PID
// namespace that containers with that user namespace join.
func TestSharedPIDNamespace(t *testing.T) {
	r := runtimeFor(t)
	user := newShared(t, r)[0]
	init := newContainer(t)
	init.req.PodInit, init.req.Rootfs = true, oci.Rootfs{}
	init.req.Spec.Process = nil
	init.req.Spec.Mounts, init.req.Spec.Hostname = nil, ""
	l := init.req.Spec.Linux
	l.MaskedPaths, l.ReadonlyPaths = nil, nil
	l.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}, {Type: specs.UserNamespace}}
	init.req.Namespaces = map[specs.LinuxNamespaceType]*os.File{specs.UserNamespace: user}
	run := init.start(r)
	pids, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", run.p.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer pids.Close()
	c := newContainer(t, "pid:", "read:/proc/1/comm", "ls:/proc/acpi", "link:/proc/self/ns/pid")
	c.req.Rootfs.Idmap = true
	if err := os.Chown(c.req.Rootfs.Upper, hostID, hostID); err != nil {
		t.Fatal(err)
	}
	c.req.Spec.Linux.Namespaces = append(c.req.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	c.req.Namespaces = map[specs.LinuxNamespaceType]*os.File{specs.UserNamespace: user, specs.PIDNamespace: pids}
	out := c.output(r)
	if value(t, out, "pid:") == "1" {
		t.Error("the container is pid 1")
	}
	want, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", run.p.Pid))
	if value(t, out, "link:/proc/self/ns/pid") != want {
		t.Error("the PID namespace is not the init's")
	}
}

func TestUserNamespaceErrors(t *testing.T) {
	r := runtimeFor(t)
	for want, req := range map[string]oci.UserNamespaceRequest{
		"uids: missing":      {GIDs: testMap},
		"gids[0].size":       {UIDs: testMap, GIDs: []specs.LinuxIDMapping{{HostID: 1}}},
		`kinds: "pid"`:       {UIDs: testMap, GIDs: testMap, Kinds: []specs.LinuxNamespaceType{specs.PIDNamespace}},
		"no such file":       {UIDs: testMap, GIDs: testMap, Layers: []string{"/no/such", "/tmp"}},
		"may not support it": {UIDs: testMap, GIDs: testMap, Layers: []string{"/proc", "/sys"}},
	} {
		if files, err := r.NewUserNamespace(req); err == nil || files != nil || !strings.Contains(err.Error(), want) {
			closeLayers(files)
			t.Errorf("err %v, want %q", err, want)
		}
	}
	c := newContainer(t, "id:")
	c.req.Rootfs.Idmap = true
	if _, err := r.Create(context.Background(), c.req); err == nil || !strings.Contains(err.Error(), "rootfs.idmap") {
		t.Errorf("idmapped layers without a user namespace: %v", err)
	}
	proc := newUserContainer(t, "id:")
	proc.req.Spec.Mounts = append(proc.req.Spec.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/proc", Options: []string{"bind", "idmap"}})
	if _, err := r.Create(context.Background(), proc.req); err == nil || !strings.Contains(err.Error(), "(proc)") {
		t.Errorf("an idmapped bind of procfs: %v", err)
	}
	left, err := filepath.Glob("/sys/0")
	if err != nil || len(left) > 0 {
		t.Errorf("a private mount is seen on the host: %v %v", left, err)
	}
}
