package supervisor_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor"
	"github.com/berth-runtime/berth/oci/supervisor/client"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// The tests of this file run real containers: the supervisor with the embedded
// runtime. Their program is the test binary under another name.
const (
	insideName = "/inside"
	cgroupRoot = "/berth-supervisor-test"
)

// inside is the program of the containers.
func inside(args []string) {
	again := func(attr *syscall.SysProcAttr, args ...string) *exec.Cmd {
		c := exec.Command(insideName, args...)
		c.Stdout, c.SysProcAttr = os.Stdout, attr
		return c
	}
	switch args[0] {
	case "sleep":
		time.Sleep(time.Minute)
	case "filter":
		err := os.Mkdir("/tmp/x", 0o755)
		status, _ := os.ReadFile("/proc/self/status")
		fmt.Println(strings.Contains(string(status), "Seccomp:\t2\n"), err)
	case "env":
		fmt.Printf("%q\n", os.Getenv(args[1]))
	case "eat": // MiB
		n, _ := strconv.Atoi(args[1])
		all := make([]byte, n<<20)
		for i := 0; i < len(all); i += 4096 {
			all[i] = 1
		}
		fmt.Println("full", len(all))
	case "child-eats":
		fmt.Println("child:", again(nil, "eat", args[1]).Run())
		time.Sleep(time.Minute)
	case "count":
		for i := 0; ; i++ {
			fmt.Println(i)
			time.Sleep(time.Millisecond)
		}
	case "tree": // a child, one in a session of its own, and their children
		_ = again(nil, "leaf").Start()
		_ = again(&syscall.SysProcAttr{Setsid: true}, "branch").Start()
		fmt.Println("grown")
		time.Sleep(time.Minute)
	case "branch":
		_ = again(nil, "leaf").Run()
	case "leaf":
		fmt.Println("grown")
		time.Sleep(time.Minute)
	}
	os.Exit(0)
}

// rootfs makes the root filesystem of all containers of a test.
func rootfs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"proc", "dev", "sys", "tmp"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if os.Link(self, dir+insideName) != nil {
		b, err := os.ReadFile(self)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir+insideName, b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(removeCgroupRoot)
	return dir
}

// hierarchies are the folders of the tests' cgroup in each hierarchy.
func hierarchies() []string {
	v1, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupRoot)
	v2, _ := filepath.Glob("/sys/fs/cgroup" + cgroupRoot)
	return append(v1, v2...)
}

func removeCgroupRoot() {
	for _, d := range hierarchies() {
		_ = os.Remove(d)
	}
}

func isolated(root string, args ...string) wire.Create {
	kinds := []specs.LinuxNamespaceType{specs.PIDNamespace, specs.NetworkNamespace, specs.IPCNamespace,
		specs.UTSNamespace, specs.MountNamespace, specs.CgroupNamespace}
	s := &specs.Spec{
		Version: specs.Version, Root: &specs.Root{Path: "rootfs"}, Hostname: "test",
		Process: &specs.Process{Args: append([]string{insideName}, args...), Cwd: "/", NoNewPrivileges: true},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}},
		},
		Linux: &specs.Linux{Resources: &specs.LinuxResources{}},
	}
	for _, k := range kinds {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: k})
	}
	return wire.Create{Handler: "berth", Spec: s, Rootfs: oci.Rootfs{Lowers: []string{root}}}
}

// startIsolated gives the container a cgroup, makes it and starts it.
func startIsolated(t testing.TB, c *client.Client, dir string, r wire.Create) (id.Container, string) {
	t.Helper()
	r.Spec.Linux.CgroupsPath = cgroupRoot + "/" + string(id.NewContainer())[:12]
	return start(t, c, dir, r)
}

func pidOf(t testing.TB, c *client.Client, k id.Container) int {
	t.Helper()
	list, err := c.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		if i.ID == k {
			return i.Pid
		}
	}
	t.Fatalf("container %s is not listed", k)
	return 0
}

// cgroupFile returns the folder of pid's cgroup that holds the file.
func cgroupFile(t testing.TB, pid int, names ...string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		for _, name := range names {
			for _, mount := range []string{f[1], "unified", ""} {
				p := filepath.Join("/sys/fs/cgroup", mount, f[2], name)
				if _, err := os.Stat(p); err == nil && strings.Contains(f[2], cgroupRoot) {
					return p
				}
			}
		}
	}
	t.Fatalf("pid %d: no %v in its cgroups:\n%s", pid, names, b)
	return ""
}

func output(t testing.TB, log string) string {
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestIsolatedOOM(t *testing.T) {
	n := newNode(t)
	c, root := n.open(), rootfs(t)
	limit := int64(64 << 20)
	limited := func(args ...string) wire.Create {
		r := isolated(root, args...)
		r.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
		return r
	}
	k, log := startIsolated(t, c, n.dir, limited("eat", "256"))
	if e := exitOf(t, c, k); e.Code != 137 || !e.OOMKilled {
		t.Errorf("exit %+v\n%s", e, output(t, log))
	}
	k, log = startIsolated(t, c, n.dir, limited("child-eats", "256"))
	waitFor(t, "the child's end", func() bool { return strings.Contains(output(t, log), "signal: killed") })
	if err := c.Signal(t.Context(), wire.Signal{ID: k, Signal: 9}); err != nil {
		t.Fatal(err)
	}
	if e := exitOf(t, c, k); e.Code != 137 || e.OOMKilled {
		t.Errorf("a child was killed for memory, the first process by us: %+v", e)
	}
}

func TestIsolatedUpdate(t *testing.T) {
	n := newNode(t)
	c, root := n.open(), rootfs(t)
	r := isolated(root, "sleep")
	limit := int64(128 << 20)
	r.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	k, _ := startIsolated(t, c, n.dir, r)
	file := cgroupFile(t, pidOf(t, c, k), "memory.limit_in_bytes", "memory.max")
	if b, _ := os.ReadFile(file); string(b) != "134217728\n" {
		t.Errorf("limit %q", b)
	}
	limit = 192 << 20
	up := wire.Update{ID: k, Resources: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}}
	if err := c.Update(t.Context(), up); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(file); string(b) != "201326592\n" {
		t.Errorf("limit after the update %q", b)
	}
}

func TestIsolatedPause(t *testing.T) {
	n := newNode(t)
	c, root := n.open(), rootfs(t)
	k, log := startIsolated(t, c, n.dir, isolated(root, "count"))
	size := func() int { return len(output(t, log)) }
	waitFor(t, "output", func() bool { return size() > 0 })
	if err := c.Pause(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	before := size()
	time.Sleep(300 * time.Millisecond)
	if after := size(); after != before {
		t.Errorf("a paused container wrote %d bytes", after-before)
	}
	if err := c.Resume(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "more output", func() bool { return size() > before })
	if err := c.Pause(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	if err := c.Delete(t.Context(), k); err != nil { // frozen processes must die too
		t.Fatal(err)
	}
	for i, line := range contents(t, log, "stdout") {
		if line != strconv.Itoa(i) {
			t.Fatalf("line %d is %q", i, line)
		}
	}
}

func TestIsolatedExecKillTree(t *testing.T) {
	n := newNode(t)
	c, root := n.open(), rootfs(t)
	k, _ := startIsolated(t, c, n.dir, isolated(root, "sleep"))
	procs := cgroupFile(t, pidOf(t, c, k), "cgroup.procs")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	x := id.NewExec()
	_, _, exit, err := c.Exec(t.Context(), wire.Exec{ID: k, Exec: x, Process: isolated(root, "tree").Spec.Process}, nil, w, nil)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	for seen := 0; seen < 3; { // the exec, its child, the grandchild
		b := make([]byte, 256)
		got, err := r.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		seen += bytes.Count(b[:got], []byte("grown"))
	}
	count := func() int { return strings.Count(output(t, procs), "\n") }
	if count() != 5 {
		t.Fatalf("processes %q", output(t, procs))
	}
	if err := c.Signal(t.Context(), wire.Signal{ID: k, Exec: x, Signal: 9, All: true}); err != nil {
		t.Fatal(err)
	}
	if e := <-exit; e.Code != 137 {
		t.Errorf("exit %+v", e)
	}
	waitFor(t, "only the first process to be left", func() bool { return count() == 1 })
	if pid := pidOf(t, c, k); !alive(pid) {
		t.Error("the container went down with its exec")
	}
}

func TestIsolatedPodInit(t *testing.T) {
	n := newNode(t)
	c, root := n.open(), rootfs(t)
	init := wire.Create{Handler: "berth", PodInit: true, Spec: &specs.Spec{
		Version: specs.Version,
		Linux:   &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}}},
	}}
	first, _ := startIsolated(t, c, n.dir, init)
	join := func() id.Container {
		r := isolated(root, "sleep")
		r.JoinPID = first
		k, _ := startIsolated(t, c, n.dir, r)
		return k
	}
	ns := func(k id.Container) string {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pidOf(t, c, k)))
		if err != nil {
			t.Error(err)
		}
		return link
	}
	a, b := join(), join()
	if pod := ns(first); ns(a) != pod || ns(b) != pod {
		t.Errorf("pid namespaces: init %s, containers %s and %s", pod, ns(a), ns(b))
	}
	if own, _ := os.Readlink("/proc/self/ns/pid"); own == ns(first) {
		t.Error("the pod is in our pid namespace")
	}
	score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pidOf(t, c, first)))
	if err != nil || strings.HasPrefix(string(score), "-") {
		t.Errorf("pod init has the supervisor's oom_score_adj: %s %v", score, err)
	}
	if err := c.Delete(t.Context(), a); err != nil {
		t.Error(err)
	}
	if !alive(pidOf(t, c, b)) {
		t.Error("b went down with a")
	}
	if err := c.Delete(t.Context(), first); err != nil {
		t.Error(err)
	}
	if e := exitOf(t, c, b); e.Code != 137 { // the kernel ends what is in a pid namespace without init
		t.Errorf("exit %+v", e)
	}
}

// TestIsolatedUserNamespace: a pod's namespaces are made in the supervisor, kept
// by key and joined by containers.
func TestIsolatedUserNamespace(t *testing.T) {
	n := newNode(t)
	c, root := n.open(), rootfs(t)
	maps := []specs.LinuxIDMapping{{HostID: 1 << 20, Size: 1 << 16}}
	req := wire.UserNamespace{UIDs: maps, GIDs: maps, Kinds: []specs.LinuxNamespaceType{specs.UTSNamespace, specs.NetworkNamespace}, Layers: []string{root, t.TempDir()}}
	files, err := c.UserNamespace(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	defer wire.CloseFiles(files)
	for i, want := range []string{"user", "uts", "net"} {
		if link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", files[i].Fd())); err != nil || !strings.HasPrefix(link, want+":") {
			t.Errorf("descriptor %d is %s (%v)", i, link, err)
		}
	}
	if err := c.PutFDs(t.Context(), []string{"u"}, files[:1]); err != nil {
		t.Fatal(err)
	}
	r := isolated(root, "sleep")
	dir := t.TempDir()
	r.Rootfs = oci.Rootfs{Lowers: []string{root}, Upper: filepath.Join(dir, "u"), Work: filepath.Join(dir, "w"), Idmap: true}
	for _, d := range []string{r.Rootfs.Upper, r.Rootfs.Work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(r.Rootfs.Upper, 1<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	r.Namespaces = map[specs.LinuxNamespaceType]string{specs.UserNamespace: "u"}
	k, _ := startIsolated(t, c, n.dir, r)
	want, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", files[0].Fd()))
	if got, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", pidOf(t, c, k))); err != nil || got != want {
		t.Errorf("user namespace %s, want %s (%v)", got, want, err)
	}
	if err := c.Delete(t.Context(), k); err != nil {
		t.Error(err)
	}
	req.Layers = []string{"/proc", "/sys"}
	if _, err := c.UserNamespace(t.Context(), req); err == nil || !strings.Contains(err.Error(), "idmap") {
		t.Errorf("layers that cannot be mapped: %v", err)
	}
}

func TestIsolatedEnvironmentBytes(t *testing.T) {
	n := newNode(t)
	c, root := n.open(), rootfs(t)
	r := isolated(root, "env", "RAW")
	r.Spec.Process.Env = []string{"A=ä", "RAW=\xff\x80b"}
	k, log := startIsolated(t, c, n.dir, r)
	exitOf(t, c, k)
	if got := contents(t, log, "stdout"); len(got) != 1 || got[0] != `"\xff\x80b"` {
		t.Errorf("environment %q", got)
	}
	k, _ = startIsolated(t, c, n.dir, isolated(root, "sleep"))
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	_, _, exit, err := c.Exec(t.Context(), wire.Exec{ID: k, Exec: id.NewExec(), Process: r.Spec.Process}, nil, w, nil)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	<-exit
	b := make([]byte, 100)
	if got, _ := out.Read(b); string(b[:got]) != `"\xff\x80b"`+"\n" {
		t.Errorf("environment of an exec %q", b[:got])
	}
}

// TestIsolatedSeccomp: the profile that travels by its digest is in force, for
// the first container with it and the next, and no other is in its place.
func TestIsolatedSeccomp(t *testing.T) {
	n := newNode(t)
	c, root := n.open(), rootfs(t)
	t.Cleanup(removeCgroupRoot)
	for _, errno := range []uint{18, 18, 39, 18} {
		r := isolated(root, "filter")
		r.Spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: &errno},
		}}
		k, log := startIsolated(t, c, n.dir, r)
		exitOf(t, c, k)
		if got, want := output(t, log), fmt.Sprintf("true mkdir /tmp/x: %v\n", syscall.Errno(errno)); !strings.HasSuffix(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
		if err := c.Delete(t.Context(), k); err != nil {
			t.Error(err)
		}
	}
}

func TestNothingIsLeftAfterManyLives(t *testing.T) {
	n := newNode(t)
	c, root := n.open(), rootfs(t)
	life := func() {
		k, _ := startIsolated(t, c, n.dir, isolated(root, "sleep"))
		_, _, exit, err := c.Exec(t.Context(), wire.Exec{ID: k, Exec: id.NewExec(), Process: isolated(root, "env", "A").Spec.Process}, nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		<-exit
		if err := c.Delete(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	count := func() (fds, mounts, cgroups, threads int) {
		proc := fmt.Sprintf("/proc/%d/", n.pid())
		entries, err := os.ReadDir(proc + "fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range hierarchies() {
			_ = filepath.WalkDir(d, func(_ string, e fs.DirEntry, err error) error {
				if err == nil && e.IsDir() {
					cgroups++
				}
				return nil
			})
		}
		children, _ := os.ReadFile(proc + "task/" + strconv.Itoa(n.pid()) + "/children")
		return len(entries), strings.Count(output(t, proc+"mountinfo"), "\n"), cgroups, len(strings.Fields(string(children)))
	}
	for range 3 {
		life()
	}
	fds, mounts, cgroups, children := count()
	for range 50 {
		life()
	}
	waitFor(t, "descriptors, mounts, cgroups and children as before", func() bool {
		f, m, g, k := count()
		return f <= fds && m == mounts && g == cgroups && k <= children
	})
	f, m, g, k := count()
	t.Logf("descriptors %d -> %d, mounts %d -> %d, cgroups %d -> %d, children %d -> %d", fds, f, mounts, m, cgroups, g, children, k)
}

// TestNothingIsLeftAfterManyTakeovers: what the client holds, and what each next
// supervisor or program is given, is what there is, not what there was.
func TestNothingIsLeftAfterManyTakeovers(t *testing.T) {
	n := newNode(t)
	c, root := n.open(), rootfs(t)
	sleeper := func() wire.Create {
		r := isolated(root, "sleep")
		r.Stdin = true
		r.Spec.Mounts = append(r.Spec.Mounts, specs.Mount{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}})
		return r
	}
	long, _ := startIsolated(t, c, n.dir, sleeper())
	terminal := sleeper()
	terminal.Spec.Process.Terminal = true
	tty, _ := startIsolated(t, c, n.dir, terminal)
	pid := pidOf(t, c, long)
	type counted struct{ client, supervisor int }
	count := func() (k counted) {
		for dir, to := range map[string]*int{"/proc/self/fd": &k.client, fmt.Sprintf("/proc/%d/fd", n.pid()): &k.supervisor} {
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			*to = len(entries)
		}
		return k
	}
	kill := func(t *testing.T) {
		former := n.pid()
		if err := unix.Kill(former, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "another supervisor", func() bool { return n.pid() != former && n.pid() != 0 })
	}
	life := func(end func(*testing.T)) {
		k, _ := startIsolated(t, c, n.dir, sleeper())
		x := isolated(root, "sleep").Spec.Process
		x.Terminal = true
		_, console, exit, err := c.Exec(t.Context(), wire.Exec{ID: k, Exec: id.NewExec(), Process: x}, nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer console.Close()
		end(t)
		if got := pidOf(t, c, long); got != pid {
			t.Fatalf("pid %d, was %d", got, pid)
		}
		if err := c.Signal(t.Context(), wire.Signal{ID: k, Signal: 9}); err != nil {
			t.Fatal(err)
		}
		if e := exitOf(t, c, k); e.Code != 137 {
			t.Errorf("%+v", e)
		}
		<-exit
		if err := c.Delete(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	life(kill)
	life(n.upgrade)
	before := count()
	for range 3 { // an init that does not hurry to reap makes each last 2 s
		life(kill)
		life(n.upgrade)
	}
	var after counted
	waitFor(t, "descriptors as before", func() bool {
		after = count()
		return after.client <= before.client && after.supervisor <= before.supervisor
	})
	t.Logf("descriptors %+v -> %+v", before, after)
	for _, k := range []id.Container{long, tty} {
		if err := c.Delete(t.Context(), k); err != nil {
			t.Error(err)
		}
	}
}

// upgrade makes the supervisor the same program once more.
func (n *node) upgrade(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(n.dir, supervisor.SocketName)}); err != nil {
		t.Fatal(err)
	}
	conn, err := wire.NewConn(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	body, err := json.Marshal(wire.Upgrade{Binary: os.Args[0]})
	if err != nil {
		t.Fatal(err)
	}
	former := n.pid()
	if err := conn.Send(wire.Frame{ID: 1, Op: wire.OpUpgrade, Body: body}); err != nil {
		t.Fatal(err)
	}
	if f, _, err := conn.Recv(); err == nil {
		t.Fatalf("upgrade: %v", f.Err)
	}
	if now := n.pid(); now != former {
		t.Errorf("supervisor %d, was %d", now, former)
	}
}
