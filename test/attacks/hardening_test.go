package attacks

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A length of 16 bits overflows in the message to the starting process, and what
// follows is read as its fields.
// A long value arrives whole or is refused, and changes nothing else.
func TestCVE_2021_43784(t *testing.T) {
	b := newBench(t, "arg:LONG", "status:CapEff", "cwd:")
	for _, n := range []int{65530, 65536, 70000, 130000} {
		b.spec.Process.Env = append(b.spec.Process.Env[:2:2], "LONG="+strings.Repeat("x", n))
		r := b.run().ok()
		r.expect(map[string]string{"status:CapEff": "00000000a80425fb", "cwd:": "/"})
		if r.value("arg:LONG") != strconv.Itoa(n) {
			t.Errorf("%d bytes arrive as %s", n, r.value("arg:LONG"))
		}
	}
	b.spec.Process.Env = append(b.spec.Process.Env[:2:2], "LONG="+strings.Repeat("x", 200000)) // more than a string of execve may have
	b.run().refused("argument list too long")
	b.spec.Process.Env = b.spec.Process.Env[:2]
	b.mount(specs.Mount{Destination: "/" + strings.Repeat("long/", 14000), Type: "tmpfs", Source: "tmpfs"})
	b.run().refused("file name too long")
}

// The host's cgroup tree can be written in a container of a user who is not root,
// or of root in a user namespace, that shares the host's cgroup namespace.
// Below the cgroup mount nothing can be written.
func TestCVE_2023_25809(t *testing.T) {
	b := newBench(t, "write:/sys/fs/cgroup/cgroup.procs,1", "mkdir:/sys/fs/cgroup/x", "write:/sys/fs/cgroup/memory/tasks,1", "mkdir:/sys/fs/cgroup/memory/x",
		"write:/sys/fs/cgroup/memory/release_agent,/x", "remount:/sys/fs/cgroup", "remount:/sys/fs/cgroup/memory", "write:/sys/fs/cgroup/memory/tasks,2")
	b.userNS()
	b.caps(allCaps...)
	var ns []specs.LinuxNamespace
	for _, n := range b.spec.Linux.Namespaces {
		if n.Type != specs.CgroupNamespace {
			ns = append(ns, n)
		}
	}
	b.spec.Linux.Namespaces = ns
	r := b.run().ok()
	for line := range strings.Lines(r.out) {
		if strings.HasSuffix(line, " ok\n") {
			t.Error(line)
		}
	}
	// The host's /sys bound, as for a user without a network namespace of its own.
	b.unmount("/sys")
	b.bind("/sys", "/sys", "nosuid", "noexec", "nodev", "ro")
	r = b.run().ok()
	for line := range strings.Lines(r.out) {
		if strings.HasSuffix(line, " ok\n") {
			t.Error("with the host's /sys: " + line)
		}
	}
	// Whoever may write to the host's cgroups finds them read-only.
	const made = "/sys/fs/cgroup/memory/berth-attacks-test-made"
	defer os.Remove(made)
	b = newBench(t, "mkdir:"+made)
	b.unmount("/sys")
	b.bind("/sys", "/sys", "nosuid", "noexec", "nodev", "ro")
	if got := b.run().ok().value("mkdir:" + made); !strings.Contains(got, "read-only") && !strings.Contains(got, "no such file") {
		t.Errorf("a cgroup of the host's: %s", got)
	}
}

// A process in a new user namespace mounts cgroup v1 and names a release agent
// (CVE-2022-0492); invariant I16.
// With the capabilities of a default container it cannot.
func TestReleaseAgentIsOutOfReach(t *testing.T) {
	b := newBench(t, "unshare-mount:cgroup,/tmp,cgroup,memory", "mount:cgroup,/tmp,cgroup,memory", "write:/sys/fs/cgroup/memory/release_agent,/x", "write:/tmp/release_agent,/x")
	b.run().ok()
	r := b.run().ok()
	for _, q := range []string{"mount:cgroup,/tmp,cgroup,memory", "write:/sys/fs/cgroup/memory/release_agent,/x"} {
		if r.value(q) == "ok" {
			t.Errorf("%s succeeds", q)
		}
	}
	if r.value("unshare-mount:cgroup,/tmp,cgroup,memory") == "ok" && r.value("write:/tmp/release_agent,/x") == "ok" {
		t.Error("a release agent can be set")
	}
}

// A hook inherits the image's environment (LD_PRELOAD), runs in the container's
// root, or loads from it (CVE-2024-0133, CVE-2025-23266, CVE-2025-23267).
// It has the environment that its spec says, no descriptors, and its own directory.
func TestCVE_2024_0132(t *testing.T) {
	b := newBench(t, "nothing:")
	b.file("tmp/evil.so", "not a library")
	b.spec.Process.Env = append(b.spec.Process.Env, "LD_PRELOAD=/tmp/evil.so", "LD_LIBRARY_PATH=/tmp")
	b.spec.Process.Cwd = "/tmp"
	b.env = []string{"SECRET_OF_THE_RUNTIME=1"}
	out := b.volume("out")
	b.hook("env:", "cwd:")
	hook := b.spec.Hooks.CreateRuntime[0]
	b.spec.Hooks.CreateRuntime = nil
	script := func(name string) specs.Hook {
		h := hook
		h.Args = []string{attackerName, "report:" + filepath.Join(out, name)}
		return h
	}
	//lint:ignore SA1019 prestart is deprecated and still in use
	b.spec.Hooks.Prestart = []specs.Hook{script("prestart")}
	b.spec.Hooks.CreateRuntime = []specs.Hook{script("createRuntime")}
	b.spec.Hooks.CreateContainer = []specs.Hook{script("createContainer")}
	b.spec.Hooks.Poststart = []specs.Hook{script("poststart")}
	b.spec.Hooks.Poststop = []specs.Hook{script("poststop")}
	b.run().ok()
	for _, name := range []string{"prestart", "createRuntime", "createContainer", "poststart", "poststop"} {
		got, err := os.ReadFile(filepath.Join(out, name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		env, rest, _ := strings.Cut(string(got), "\n")
		cwd, fds, _ := strings.Cut(rest, "\n")
		where := b.bundle
		if name == "createContainer" {
			where = b.rootfs // as hooks expect; with nothing in the environment that would look there
		}
		if env != "env" || cwd != "cwd "+where || fds != "fds \n" {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// A helper of the runtime is found by the caller's PATH, or inherits its
// environment, and so runs what the container brings (crun's passt helper).
// The helpers that there are, hooks, have absolute paths.
func TestCVE_2026_84042(t *testing.T) {
	b := newBench(t, "nothing:")
	b.env = []string{"PATH=" + b.in("bin") + ":" + os.Getenv("PATH"), "LD_PRELOAD=" + b.in("tmp/evil.so")}
	b.run().ok()
	b.spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: attackerName}}}
	b.run().refused("absolute")
}

// Without a mount namespace of its own a container makes the host's mounts
// private, or masks its paths.
// The host's mounts stay as they are, and a spec that would mount is refused.
func TestHardening_sharedMountNamespace(t *testing.T) {
	b := newBench(t, "nothing:")
	var ns []specs.LinuxNamespace
	for _, n := range b.spec.Linux.Namespaces {
		if n.Type != specs.MountNamespace {
			ns = append(ns, n)
		}
	}
	b.spec.Linux.Namespaces = ns
	b.run().refused("mount namespace")
	b.spec.Mounts = nil
	b.run().refused("maskedPaths")
	b.spec.Linux.MaskedPaths, b.spec.Linux.ReadonlyPaths = nil, nil
	b.run().ok() // the bench compares the host's mounts
}

// Ids and cgroup paths lead out of the directories that they are put in.
// They are names.
func TestHardening_ids(t *testing.T) {
	b := newBench(t, "nothing:")
	b.id()
	for _, id := range []string{"a/b", "..", ".", "../x", "a\nb", "a b", "/x", ""} {
		b.do("run", id).refused("id")
		b.do("state", id).refused()
		b.do("delete", "--force", id)
	}
	for _, p := range []string{"/../x", "../../x", cgroupRoot + "/../../x", "/a/../../b"} {
		id := b.id()
		b.spec.Linux.CgroupsPath = p
		b.rewrite()
		b.do("run", id).refused("cgroupsPath")
	}
}

// A missing mount point is made inside of a read-only source of a bind.
// The source is as it was.
func TestHardening_readonlyBindSource(t *testing.T) {
	ways(t, func(b *bench) {
		src := b.volume("src")
		b.volume("src/there")
		before := act("ls", src)
		b.bind(src, "/data", "ro")
		b.mount(specs.Mount{Destination: "/data/there", Type: "tmpfs", Source: "tmpfs"})
		b.args("nothing:")
		b.run().ok()
		b.mount(specs.Mount{Destination: "/data/missing", Type: "tmpfs", Source: "tmpfs"})
		b.run().refused("read-only")
		if after := act("ls", src); after != before {
			t.Errorf("the source: before %s, after %s", before, after)
		}
	})
}

// A kill of a frozen cgroup fails, and leaves it frozen for ever or its
// processes alive.
// They are dead, and the container can be deleted.
func TestHardening_killOfAPausedContainer(t *testing.T) {
	b := newBench(t, "hold:")
	id, _ := b.start()
	b.do("pause", id).ok()
	b.do("kill", id, "KILL").ok()
	eventually(t, "stopped", func() bool { return strings.Contains(b.do("state", id).out, `"stopped"`) })
	b.do("delete", id).ok()
}

// AF_ALG lets a process write to the page cache of files that it may only read
// (CVE-2026-31431); AF_VSOCK reaches the hypervisor; invariant I16.
// The default profile of CRI refuses both.
func TestSocketFamiliesOfTheDefaultProfile(t *testing.T) {
	n := needNode(t)
	c := n.config("hold:")
	c.Linux.SecurityContext.Seccomp = runtimeDefault
	id := n.start(t, n.runPod(t), c)
	r := n.exec(t, id, "socket:38", "socket:40", "socket:2", "unshare-mount:cgroup,/tmp,cgroup,memory").ok()
	r.expect(map[string]string{"socket:2": "ok"})
	for _, q := range []string{"socket:38", "socket:40", "unshare-mount:cgroup,/tmp,cgroup,memory"} {
		if !strings.Contains(r.value(q), unix.EPERM.Error()) {
			t.Errorf("%s: %s", q, r.value(q))
		}
	}
}
