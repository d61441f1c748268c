package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	userID  = 61234 // of nobody
	firstID = 261234
)

// rootless is a bench of a user who is not root: its bundle is what
// "spec --rootless" writes, and all belongs to the user.
func rootless(t *testing.T, args ...string) *bench {
	t.Helper()
	b := newBench(t, args...)
	makeRootless(b.spec, userID, userID)
	b.spec.Root.Readonly = false
	if err := os.Mkdir(b.root, 0o700); err != nil {
		t.Fatal(err)
	}
	b.write()
	b.own()
	return b
}

// own gives the bench's files to the user, who reaches them.
func (b *bench) own() {
	b.t.Helper()
	dir := filepath.Dir(b.root)
	err := filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error { return errors.Join(err, os.Lchown(p, userID, userID)) })
	for d := dir; err == nil && d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		err = os.Chmod(d, 0o755)
	}
	if err := errors.Join(err, os.Chmod(filepath.Dir(binary), 0o755)); err != nil {
		b.t.Fatal(err)
	}
}

// as runs a command as the user.
func (b *bench) as(args ...string) result {
	b.t.Helper()
	return b.finish(b.asUser(b.command(args...)))
}

func (b *bench) asUser(c *exec.Cmd) *exec.Cmd {
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: userID, Gid: userID, Groups: []uint32{}}}
	if c.Env == nil {
		c.Env = []string{"PATH=/usr/bin:/bin"}
	}
	return c
}

// needUserNamespaces skips where users may make none.
func needUserNamespaces(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for file, no := range map[string]string{"user/max_user_namespaces": "0", "kernel/unprivileged_userns_clone": "0", "kernel/apparmor_restrict_unprivileged_userns": "1"} {
		if b, err := os.ReadFile("/proc/sys/" + file); err == nil && strings.TrimSpace(string(b)) == no {
			t.Skipf("users may make no user namespaces here: sysctl %s is %s", file, no)
		}
	}
}

func TestRootless(t *testing.T) {
	needUserNamespaces(t)
	b := rootless(t, "id")
	r := b.as("run", "r1").ok()
	if !strings.Contains(r.out, "uid=0") && !strings.HasPrefix(r.out, "0 ") {
		t.Errorf("id: %q", r.out)
	}
	b.spec.Process.Args = []string{"prog", "exit", "7"}
	b.write()
	b.as("run", "r2").exits(7)

	b.spec.Process.Args = []string{"prog", "sleep", "100"}
	b.write()
	pidFile := filepath.Join(b.bundle, "pid")
	b.as("create", "--pid-file", pidFile, "r3").ok()
	b.status("r3", "created")
	if pid, err := os.ReadFile(pidFile); err != nil || string(pid) != strconv.Itoa(b.state("r3").Pid) {
		t.Errorf("pid file %q %v", pid, err)
	}
	b.as("start", "r3").ok()
	b.status("r3", "running")
	b.as("exec", "r3", "prog", "exit", "5").exits(5)
	b.as("exec", "r3", "prog", "hostname").ok().prints("berth\n")
	// The processes of an exec are in all of the container's namespaces.
	pid := b.state("r3").Pid
	for _, kind := range []string{"user", "pid", "mnt", "ipc", "uts"} {
		own, _ := os.Readlink("/proc/self/ns/" + kind)
		want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		got := b.as("exec", "r3", "prog", "readlink", "/proc/self/ns/"+kind).ok().out
		if err != nil || want == own || strings.TrimSpace(got) != want {
			t.Errorf("%s namespace: %q, want %q (%v)", kind, got, want, err)
		}
	}
	b.as("exec", "r3", "prog", "write", "/dev/null", "x").ok()
	b.as("kill", "r3", "KILL").ok()
	b.eventually("stopped", func() bool { return string(b.state("r3").Status) == "stopped" })
	b.as("delete", "r3").ok()

	b.as("create", "r4").ok()
	b.as("delete", "--force", "r4").ok()
}

// TestRootlessErrors: each names the field and the remedy.
func TestRootlessErrors(t *testing.T) {
	needUserNamespaces(t)
	b := rootless(t, "true")
	b.spec.Linux.Resources = &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64)}}
	b.write()
	b.as("run", "r1").exits(1).says("linux.resources")
	b.spec.Linux.Resources = nil
	b.spec.Linux.UIDMappings[0].HostID++
	b.write()
	b.as("run", "r2").exits(1).says("linux.uidMappings")
	b.spec.Linux.UIDMappings[0].HostID--
	b.spec.Linux.Namespaces = b.spec.Linux.Namespaces[:len(b.spec.Linux.Namespaces)-1]
	b.spec.Linux.UIDMappings, b.spec.Linux.GIDMappings = nil, nil
	b.write()
	b.as("run", "r3").exits(1).says("needs a new user namespace")
}

// TestMain's program also stands in for newuidmap(1): set-user-id root, it maps
// what it is told to.
func init() {
	name := filepath.Base(os.Args[0])
	if name != "newuidmap" && name != "newgidmap" {
		return
	}
	var b bytes.Buffer
	for i := 2; i+2 < len(os.Args); i += 3 {
		fmt.Fprintln(&b, os.Args[i], os.Args[i+1], os.Args[i+2])
	}
	file := map[string]string{"newuidmap": "uid_map", "newgidmap": "gid_map"}[name]
	if err := errors.Join(syscall.Setuid(0), os.WriteFile("/proc/"+os.Args[1]+"/"+file, b.Bytes(), 0)); err != nil {
		fmt.Fprintln(os.Stderr, err, os.Environ())
		os.Exit(1)
	}
	// The Go runtime sets GOTRACEBACK in set-user-id programs.
	if env := os.Environ(); len(env) > 1 || len(env) == 1 && env[0] != "GOTRACEBACK=none" {
		fmt.Fprintln(os.Stderr, "the environment is not empty")
		os.Exit(1)
	}
	os.Exit(0)
}

// TestRootlessRanges: with ranges of /etc/subuid the container has more than one user.
func TestRootlessRanges(t *testing.T) {
	needUserNamespaces(t)
	b := rootless(t, "id")
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(b.bundle, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"newuidmap", "newgidmap"} {
		path := filepath.Join(bin, name)
		if err := errors.Join(os.WriteFile(path, self, 0o755), os.Chmod(path, 0o755|os.ModeSetuid)); err != nil {
			t.Fatal(err)
		}
	}
	b.spec.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: userID, Size: 1}, {ContainerID: 1, HostID: firstID, Size: 100}}
	b.spec.Linux.GIDMappings = b.spec.Linux.UIDMappings
	b.spec.Process.User = specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{9}}
	b.spec.Process.Args = []string{"prog", "write", "/tmp/made", "x"}
	if err := os.Chmod(filepath.Join(b.bundle, "rootfs/tmp"), 0o777); err != nil {
		t.Fatal(err)
	}
	b.write()
	c := b.asUser(b.command("run", "r1"))
	c.Env = []string{"PATH=" + bin}
	b.finish(c).ok()
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(b.bundle, "rootfs/tmp/made"), &st); err != nil || st.Uid != firstID+6 || st.Gid != firstID+7 {
		t.Errorf("a file of user 7, group 8 belongs to %d, %d on the host (%v)", st.Uid, st.Gid, err)
	}
	c = b.asUser(b.command("run", "r2"))
	c.Env = []string{"PATH=/nowhere"}
	b.finish(c).exits(1).says("newuidmap: not found; install it")
}
