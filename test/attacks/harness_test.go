// Package attacks replays the published attacks on low-level container runtimes
// against Berth: against berth-oci with hostile images and bundles' volumes, and
// over CRI against the real daemon where an attack takes another way there. Each
// test is named after the advisory; its comment says how the attack worked and
// what must hold. "The canary" is a directory of the host outside of every
// container's root that must stay as it is, to the byte, mode, owner and time.
//
// Rows without a test, and why:
//   - CVE-2026-119101, CVE-2026-115520, CVE-2026-119614 (keys of external mounts
//     at restore) and the restore half of CVE-2022-29162: berth-oci has no
//     checkpoint and restore.
//   - CVE-2026-84042 (the helper passt of crun): Berth has no such helper; what it
//     does start, hooks, stands in for it.
//   - CVE-2025-65105, CVE-2025-64750: the writing of a label needs AppArmor or
//     SELinux, which the development machine has not; that a label is never left
//     out silently is tested.
package attacks

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/test/harness"
)

// The test binary is also the program in the containers and the hook outside of
// them (attacker_test.go).
const attackerName = "attacker"

var (
	runtimeBinary string // berth-oci as it is built for users
	self          string // the test binary
)

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == attackerName {
		os.Exit(attacker(os.Args[1:]))
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run()) // each test says why it is skipped
	}
	if err := harness.OwnNetwork(); err != nil {
		fmt.Println("attacks:", err)
		os.Exit(1)
	}
	os.Exit(suite(m))
}

func suite(m *testing.M) int {
	fail := func(what string, err error) int {
		fmt.Printf("attacks: %s: %v\n", what, err)
		return 1
	}
	dir, err := os.MkdirTemp("", "berth-attacks-")
	if err != nil {
		return fail("scratch folder", err)
	}
	defer os.RemoveAll(dir)
	if self, err = os.Executable(); err != nil {
		return fail("own program", err)
	}
	if runtimeBinary = os.Getenv("BERTH_TEST_OCI"); runtimeBinary == "" { // set where there is no go command
		runtimeBinary = filepath.Join(dir, "berth-oci")
		build := exec.Command("go", "build", "-o", runtimeBinary, "../../cmd/berth-oci")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return fail("build: "+string(out), err)
		}
	}
	code := m.Run()
	if err := closeNode(context.Background()); err != nil {
		return fail("close", err)
	}
	return code
}

const cgroupRoot = "/berth-attacks-test"

var serial atomic.Int64

var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// bench is a bundle with a state root and a canary of its own.
type bench struct {
	t      *testing.T
	dir    string
	root   string
	bundle string
	rootfs string
	spec   *specs.Spec
	canary *canary
	env    []string // of berth-oci, added to ours
}

// newBench makes a bundle whose program is the attacker with args. At the end of
// the test its containers are deleted, and the canary and the host's mounts must
// be as they were.
func newBench(t *testing.T, args ...string) *bench {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // for containers in a user namespace
		t.Fatal(err)
	}
	b := &bench{t: t, dir: dir, root: filepath.Join(dir, "state"), bundle: filepath.Join(dir, "bundle"), canary: newCanary(t, dir)}
	b.rootfs = filepath.Join(b.bundle, "rootfs")
	for _, d := range []string{"bin", "proc", "sys", "dev", "etc", "tmp"} {
		b.mkdir(d)
	}
	b.install(attackerName)
	b.spec = exampleSpec(args)
	mounts := hostMounts(t)
	t.Cleanup(func() {
		entries, _ := os.ReadDir(b.root)
		for _, e := range entries {
			b.do("delete", "--force", e.Name()).ok()
		}
		if got := hostMounts(t); got != mounts {
			t.Errorf("mounts of the host: before\n%s\nafter\n%s", mounts, got)
		}
		dirs, _ := filepath.Glob("/sys/fs/cgroup/*")
		for _, d := range append(dirs, "/sys/fs/cgroup") {
			_ = os.Remove(d + cgroupRoot) // another bench may use it
		}
	})
	return b
}

// exampleSpec is what an engine would write for a plain container.
func exampleSpec(args []string) *specs.Spec {
	return &specs.Spec{
		Version:  specs.Version,
		Root:     &specs.Root{Path: "rootfs"},
		Hostname: "berth",
		Process: &specs.Process{
			Args: append([]string{attackerName}, args...), Cwd: "/", NoNewPrivileges: true,
			// The Go runtime of the attacker would keep cpu.max open.
			Env:          []string{"PATH=/bin", "GODEBUG=containermaxprocs=0,updatemaxprocs=0"},
			Capabilities: &specs.LinuxCapabilities{Bounding: defaultCaps, Effective: defaultCaps, Permitted: defaultCaps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &specs.Linux{
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
			},
			MaskedPaths:   []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
}

// ways runs f on a bench for each way in which the embedded runtime builds a
// root: in an empty mount namespace, in a copy of the host's (hooks look for the
// host's files there), and in a user namespace.
func ways(t *testing.T, f func(b *bench)) {
	for name, change := range map[string]func(b *bench){
		"plain": func(*bench) {},
		"hooks": func(b *bench) { b.hook("nothing") },
		"user":  (*bench).userNS,
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			change(b)
			f(b)
		})
	}
}

// hook adds a createRuntime hook: the attacker with args, from outside the rootfs.
func (b *bench) hook(args ...string) {
	b.t.Helper()
	path := filepath.Join(b.dir, attackerName)
	link(b.t, self, path)
	if b.spec.Hooks == nil {
		b.spec.Hooks = &specs.Hooks{}
	}
	b.spec.Hooks.CreateRuntime = append(b.spec.Hooks.CreateRuntime, specs.Hook{Path: path, Args: append([]string{attackerName}, args...)})
}

const firstID = 100000 // of the user namespace, on the host

// userNS gives the container a user namespace to whose root its rootfs belongs.
func (b *bench) userNS() {
	b.t.Helper()
	m := []specs.LinuxIDMapping{{HostID: firstID, Size: 65536}}
	b.spec.Linux.Namespaces = append(b.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	b.spec.Linux.UIDMappings, b.spec.Linux.GIDMappings = m, m
	for _, d := range []string{"", "bin", "proc", "sys", "dev", "etc", "tmp"} {
		if err := os.Lchown(filepath.Join(b.rootfs, d), firstID, firstID); err != nil {
			b.t.Fatal(err)
		}
	}
	if err := os.Chmod(b.dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) args(args ...string) { b.spec.Process.Args = append([]string{attackerName}, args...) }

func (b *bench) mount(m specs.Mount) { b.spec.Mounts = append(b.spec.Mounts, m) }

func (b *bench) bind(source, dest string, options ...string) {
	b.mount(specs.Mount{Destination: dest, Type: "bind", Source: source, Options: append([]string{"rbind"}, options...)})
}

// unmount takes the mount at dest, and what lies below it, out of the spec.
func (b *bench) unmount(dest string) {
	b.spec.Mounts = slices.DeleteFunc(b.spec.Mounts, func(m specs.Mount) bool {
		return m.Destination == dest || strings.HasPrefix(m.Destination, dest+"/")
	})
}

// in is the path of the image's file name on the host.
func (b *bench) in(name string) string { return filepath.Join(b.rootfs, name) }

func (b *bench) mkdir(name string) {
	b.t.Helper()
	if err := os.MkdirAll(b.in(name), 0o755); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) file(name, content string) {
	b.t.Helper()
	b.mkdir(filepath.Dir(name))
	if err := os.WriteFile(b.in(name), []byte(content), 0o755); err != nil {
		b.t.Fatal(err)
	}
}

// symlink makes the image's name, whatever it was, a link.
func (b *bench) symlink(target, name string) {
	b.t.Helper()
	if err := os.RemoveAll(b.in(name)); err != nil {
		b.t.Fatal(err)
	}
	b.mkdir(filepath.Dir(name))
	if err := os.Symlink(target, b.in(name)); err != nil {
		b.t.Fatal(err)
	}
}

// install puts the attacker into the image's /bin.
func (b *bench) install(name string) {
	b.t.Helper()
	link(b.t, self, b.in("bin/"+name))
}

func link(t *testing.T, from, to string) {
	t.Helper()
	if os.Link(from, to) == nil {
		return
	}
	body, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, body, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// volume makes a directory of the host that containers may share.
func (b *bench) volume(name string) string {
	b.t.Helper()
	dir := filepath.Join(b.dir, name)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		b.t.Fatal(err)
	}
	return dir
}

// id names a new container and writes the config for it.
func (b *bench) id() string {
	b.t.Helper()
	id := fmt.Sprintf("a%d-%d", os.Getpid(), serial.Add(1))
	b.spec.Linux.CgroupsPath = cgroupRoot + "/" + id
	b.rewrite()
	return id
}

// rewrite writes the config anew.
func (b *bench) rewrite() {
	b.t.Helper()
	data, err := json.Marshal(b.spec)
	if err == nil {
		err = os.WriteFile(filepath.Join(b.bundle, "config.json"), data, 0o644)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// race calls f, in which the attack is tried once, until it has had its chances.
func race(t *testing.T, f func(try int)) {
	t.Helper()
	tries, limit := 2000, 12*time.Second
	if testing.Short() {
		tries, limit = 50, 2*time.Second
	}
	n := 0
	for end := time.Now().Add(limit); n < tries && time.Now().Before(end) && !t.Failed(); n++ {
		f(n)
	}
	t.Logf("%d tries", n)
}

// hostMounts are the host's mounts with their propagation, without other suites'.
func hostMounts(t *testing.T) string {
	t.Helper()
	m, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for line := range bytes.Lines(m) {
		if !bytes.Contains(line, []byte("/critest")) && !bytes.Contains(line, []byte("/berth-e2e")) {
			out.Write(line)
		}
	}
	return out.String()
}
