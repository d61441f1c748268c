package sandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// userConfig is a pod with a user namespace.
func userConfig(name string) *PodConfig {
	c := podConfig(name)
	c.Namespaces.User = &UserNamespace{UIDs: IDMapping{Host: 1 << 20, Length: 1 << 16}, GIDs: IDMapping{Host: 1<<20 + 1<<16, Length: 1 << 16}}
	return c
}

func userContainer(name string) *ContainerConfig {
	c := ctrConfig(name)
	c.Security.Namespaces.User = userConfig("").Namespaces.User
	return c
}

func TestUserNamespacePod(t *testing.T) {
	k := newKit(t)
	cfg := userConfig("a")
	cfg.Namespaces.PID = NamespacePod
	cfg.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 3000", "fs.mqueue.msg_max": "11"}
	p := must(k.RunPod(context.Background(), cfg))(t)
	if h := k.w.holds(); h != "containers 1, descriptors 5, attachments 1, pins 0" {
		t.Errorf("held: %s", h)
	}
	checkNamespaces(t, k, p)
	pod := must(k.findPod(string(p)))(t)
	user := must(pod.dup("user"))(t)
	defer user.Close()
	want := nsName(t, user)
	for _, name := range []string{"net", "ipc", "uts"} {
		f := must(pod.dup(name))(t)
		if got := nsOwner(t, f); got != want {
			t.Errorf("the %s namespace belongs to %s, want %s", name, got, want)
		}
		f.Close()
	}
	shm := must(pod.dup("shm"))(t)
	defer shm.Close()
	m := must(kernel.CloneHeld(shm, false))(t)
	defer m.Close()
	files := map[string]string{"/dev/shm": fmt.Sprintf("/proc/self/fd/%d/.", m.Fd())}
	for _, f := range []string{"hosts", "hostname", "resolv.conf"} {
		files[f] = filepath.Join(k.podDir(p), f)
	}
	for name, f := range files {
		checkOwner(t, name, f)
	}
	c := must(k.CreateContainer(context.Background(), string(p), userContainer("c")))(t)
	checkOwner(t, "upper", filepath.Join(k.containerDir(c), "upper"))
	for key, r := range map[string]wire.Create{"container": k.w.containers[c].create, "init": k.w.containers[pod.record().Init].create} {
		if r.Namespaces[specs.UserNamespace] != string(p)+"/user" {
			t.Errorf("%s joins %v", key, r.Namespaces)
		}
		if (key == "container") != r.Rootfs.Idmap {
			t.Errorf("%s: rootfs %v", key, r.Rootfs)
		}
	}
	for _, bad := range []*ContainerConfig{ctrConfig("no"), func() *ContainerConfig {
		c := userContainer("other")
		u := *c.Security.Namespaces.User
		u.GIDs.Length--
		c.Security.Namespaces.User = &u
		return c
	}()} {
		if _, err := k.CreateContainer(context.Background(), string(p), bad); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "userns_options") {
			t.Errorf("%s: %v", bad.Meta.Name, err)
		}
	}
	ok(t, k.RemovePod(context.Background(), string(p)))
	k.empty()
}

func nsName(t *testing.T, f *os.File) string {
	t.Helper()
	return must(os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())))(t)
}

// nsOwner names the user namespace that the namespace f belongs to.
func nsOwner(t *testing.T, f *os.File) string {
	t.Helper()
	fd := must(unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS))(t)
	owner := os.NewFile(uintptr(fd), "owner")
	defer owner.Close()
	return nsName(t, owner)
}

func checkOwner(t *testing.T, what, path string) {
	t.Helper()
	var st unix.Stat_t
	ok(t, unix.Stat(path, &st))
	if st.Uid != 1<<20 || st.Gid != 1<<20+1<<16 {
		t.Errorf("%s belongs to %d:%d", what, st.Uid, st.Gid)
	}
}

// TestUserNamespacePodUndoesEachStep: nothing is left of one that cannot be made.
func TestUserNamespacePodUndoesEachStep(t *testing.T) {
	for _, op := range []string{"userns", "userns!", "attach", "attach!", "put", "put!"} {
		t.Run(op, func(t *testing.T) {
			k := newKit(t)
			fds := openFiles(t)
			k.w.failing(op, 1)
			if _, err := k.RunPod(context.Background(), userConfig("a")); !errdefs.IsUnavailable(err) {
				t.Errorf("%v", err)
			}
			k.empty()
			if now := openFiles(t); now > fds && op != "userns!" { // the fake itself drops what it made then
				t.Errorf("%d descriptors open, %d before", now, fds)
			}
			ok(t, k.RemovePod(context.Background(), string(must(k.RunPod(context.Background(), userConfig("a")))(t))))
			k.empty()
		})
	}
}

// openFiles counts the process's open namespaces.
func openFiles(t *testing.T) (n int) {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	ok(t, err)
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && strings.Contains(to, ":[") && !strings.HasPrefix(to, "anon") && !strings.HasPrefix(to, "socket") && !strings.HasPrefix(to, "pipe") {
			n++
		}
	}
	return n
}

// TestUserNamespaceRecovery: a new engine has the pod's user namespace back, and
// takes down what was half-made.
func TestUserNamespaceRecovery(t *testing.T) {
	k := newKit(t)
	p := must(k.RunPod(context.Background(), userConfig("a")))(t)
	user := must(must(k.findPod(string(p)))(t).dup("user"))(t)
	defer user.Close()
	want := nsName(t, user)
	k = k.killed()
	if s := must(k.Pod(string(p)))(t); s.State != PodReady || !s.Config.Namespaces.User.Same(userConfig("").Namespaces.User) {
		t.Errorf("%+v", s)
	}
	again := must(must(k.findPod(string(p)))(t).dup("user"))(t)
	defer again.Close()
	if got := nsName(t, again); got != want {
		t.Errorf("user namespace %s, want %s", got, want)
	}
	must(k.CreateContainer(context.Background(), string(p), userContainer("c")))(t)
	ok(t, k.RemovePod(context.Background(), string(p)))
	k.empty()
}

func TestUserNamespaceRefused(t *testing.T) {
	k := newKit(t)
	for want, change := range map[string]func(*PodConfig){
		"pid mode NODE":         func(c *PodConfig) { c.Namespaces.PID = NamespaceNode },
		"not in the pod's user": func(c *PodConfig) { c.Sysctls = map[string]string{"net.ipv4.ping_group_range": "65536 70000"} },
		"two numbers":           func(c *PodConfig) { c.Sysctls = map[string]string{"net.ipv4.ping_group_range": "all"} },
		`handler "other"`: func(c *PodConfig) {
			k.cfg.Handlers = []Handler{{Name: "other"}}
			c.Handler = "other"
		},
	} {
		c := userConfig("a")
		change(c)
		if _, err := k.RunPod(context.Background(), c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	ok(t, k.UserNamespaces())
	k.w.failing("userns", 1)
	k.probeUserNamespaces(context.Background())
	if _, err := k.RunPod(context.Background(), userConfig("a")); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "made to fail") {
		t.Errorf("a node without user namespaces: %v", err)
	}
	k.pod("plain")
	k.l.resync <- struct{}{} // a new supervisor: asked again
	until(t, "user namespaces are offered again", func() bool { return k.UserNamespaces() == nil })
}

func TestHostPingRange(t *testing.T) {
	gids := IDMapping{Host: 100000, Length: 1000}
	for in, want := range map[string]string{
		"0 2147483647": "100000 100999", "5 10": "100005 100010", "999\t999": "100999 100999", "1 0": "1 0", "7 3": "1 0",
		"1000 2000": "", "": "", "1": "", "1 2 3": "", "-1 5": "", "1 x": "",
	} {
		if got, err := hostPingRange(in, gids); got != want || (want == "") != errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q %v, want %q", in, got, err, want)
		}
	}
}
