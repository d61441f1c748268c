package attacks

import (
	"crypto/sha256"
	"fmt"
	"os"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// allCaps are those of the machine that the spec may name.
var allCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP",
	"CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
	"CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE",
	"CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP",
	"CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

func (b *bench) caps(names ...string) {
	b.spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: names, Effective: names, Permitted: names}
}

// A process of the container traces one that is just entering by exec, and takes
// the descriptors of the host that it still has.
// No process of the runtime may be traced, or its descriptors be reached, from inside.
func TestCVE_2016_9962(t *testing.T) {
	for name, change := range map[string]func(*bench){
		"default":               func(*bench) {},
		"user namespace's root": func(b *bench) { b.userNS(); b.caps(allCaps...) },
		"tracer":                func(b *bench) { b.caps(append([]string{"CAP_SYS_PTRACE"}, defaultCaps...)...) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, "hunt:")
			change(b)
			id, out := b.start()
			eventually(t, "the hunt is on", func() bool {
				text, _ := os.ReadFile(out)
				return strings.Contains(string(text), "hunting")
			})
			n := 200
			if testing.Short() {
				n = 20
			}
			for range n {
				b.do("exec", id, attackerName, "nothing:").ok()
				// Who may trace every process of the machine that it sees may trace the
				// start program in its last steps: by then it is no more than a process
				// of the container.
				if hits := hits(out, name == "tracer"); hits != "" {
					t.Fatalf("reached from inside:\n%s", hits)
				}
			}
		})
	}
}

// hits are what a hunt got hold of; program leaves out the start program itself.
func hits(out string, program bool) string {
	text, _ := os.ReadFile(out)
	var all strings.Builder
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "HIT") && !(program && strings.Contains(line, "/memfd:berth-start") && !strings.Contains(line, "descriptor")) {
			all.WriteString(line)
		}
	}
	return all.String()
}

// Programs of the image re-open /proc/self/exe, the runtime's own program, for
// writing: as the interpreter of a script, and of each process that enters.
// berth-oci stays as it is, and nothing of the host is reached by that name.
func TestCVE_2019_5736(t *testing.T) {
	sum := func() [32]byte {
		body, err := os.ReadFile(runtimeBinary)
		if err != nil {
			t.Fatal(err)
		}
		return sha256.Sum256(body)
	}
	before := sum()
	var st unix.Stat_t
	if err := unix.Stat(runtimeBinary, &st); err != nil {
		t.Fatal(err)
	}
	b := newBench(t)
	b.file("bin/again", "#!/proc/self/exe\n")
	b.spec.Process.Args = []string{"/bin/again"}
	if r := b.run(); r.code == 0 {
		t.Errorf("a script run by /proc/self/exe ends well: %s%s", r.out, r.err)
	}
	b.args("hunt:")
	id, out := b.start()
	for range 50 {
		_ = b.do("exec", id, "/bin/again") // fails in the one way or the other
		b.do("exec", id, attackerName, "nothing:").ok()
	}
	// The start program itself, sealed and in no file, runs again with no more
	// rights than the script that asked for it.
	if hits := hits(out, true); hits != "" {
		t.Errorf("reached from inside:\n%s", hits)
	}
	var now unix.Stat_t
	if err := unix.Stat(runtimeBinary, &now); err != nil {
		t.Fatal(err)
	}
	if sum() != before || now.Ino != st.Ino || now.Mtim != st.Mtim || now.Mode != st.Mode {
		t.Error("berth-oci was changed")
	}
}

// A descriptor of a directory of the host is left open, and the working
// directory is set to it by its name below /proc.
// Such a directory is refused, for run and exec, and only stdio is open inside.
func TestCVE_2024_21626(t *testing.T) {
	b := newBench(t, "fds:", "cwd:")
	b.spec.Process.OOMScoreAdj = ptr(500) // the start program gets a directory of the host's for it
	dir, err := os.Open(b.canary.dir)     // one that the caller leaks to berth-oci
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	leaky := func(args ...string) result {
		t.Helper()
		c := b.command(args...)
		for range 8 {
			c.ExtraFiles = append(c.ExtraFiles, dir)
		}
		return b.finish(c)
	}
	leaky("run", b.id()).ok().expect(map[string]string{"fds:": "", "cwd:": "/"})
	for fd := 3; fd <= 20; fd++ {
		for _, cwd := range []string{"/proc/self/fd/%d", "/proc/thread-self/fd/%d", "/proc/1/fd/%d/sub"} {
			b.spec.Process.Cwd = fmt.Sprintf(cwd, fd)
			leaky("run", b.id()).refused("process.cwd")
		}
	}
	b.spec.Process.Cwd = "/leap"
	b.symlink("/proc/self/fd/7", "leap")
	leaky("run", b.id()).refused("process.cwd")

	b.spec.Process.Cwd = "/"
	b.args("hold:")
	id, _ := b.start()
	for fd := 3; fd <= 20; fd++ {
		leaky("exec", "--cwd", fmt.Sprintf("/proc/self/fd/%d", fd), id, attackerName, "cwd:").refused("process.cwd")
	}
	leaky("exec", "--cwd", "/leap", id, attackerName, "cwd:").refused("process.cwd")
	leaky("exec", id, attackerName, "fds:", "cwd:").ok().expect(map[string]string{"fds:": "", "cwd:": "/"})
}

// The same over CRI: the image's and the pod's working directory.
func TestCVE_2024_21626_CRI(t *testing.T) {
	n := needNode(t)
	p := n.runPod(t)
	for fd := 3; fd <= 20; fd += 3 {
		c := n.config("hold:")
		c.WorkingDir = fmt.Sprintf("/proc/self/fd/%d", fd)
		if err := n.tryStart(t, p, c); err == nil {
			t.Errorf("working_dir %s: the container starts", c.WorkingDir)
		}
	}
	c := n.start(t, p, n.config("hold:"))
	n.exec(t, c, "fds:", "cwd:").expect(map[string]string{"fds:": "", "cwd:": "/"})
}

// exec enters the container without its seccomp filter, cgroup or limits of
// capabilities.
// A further process has what the first one has.
func TestCVE_2019_10144(t *testing.T) {
	b := newBench(t, "hold:")
	b.spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 512, Hard: 512}}
	b.spec.Process.OOMScoreAdj = ptr(500)
	b.spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mount"}, Action: specs.ActErrno}}}
	id, _ := b.start()
	look := func(pid string) []string {
		var out []string
		for _, f := range []string{"status", "cgroup", "limits", "oom_score_adj", "attr/current"} {
			out = append(out, "read:/proc/"+pid+"/"+f)
		}
		for _, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} {
			out = append(out, "link:/proc/"+pid+"/ns/"+ns)
		}
		return append(out, "link:/proc/"+pid+"/root")
	}
	r := b.do(append([]string{"exec", id, attackerName}, append(look("1"), look("self")...)...)...).ok()
	keep := []string{"Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Cpus_allowed", "Umask"}
	for i, first := range look("1") {
		own := look("self")[i]
		a, c := r.value(first), r.value(own)
		if strings.HasSuffix(first, "/status") {
			a, c = fields(a, keep), fields(c, keep)
			if !strings.Contains(a, "Seccomp:2") && !strings.Contains(a, "Seccomp:\t2") {
				t.Errorf("the first process has no filter: %s", a)
			}
		}
		if strings.ReplaceAll(a, "/proc/1/", "/proc/self/") != c {
			t.Errorf("%s: %q, of the exec %q", first, a, c)
		}
	}
}

// fields picks lines "key: value" out of a file whose lines end in "|".
func fields(file string, keys []string) string {
	var out []string
	for line := range strings.SplitSeq(file, "|") {
		k, _, _ := strings.Cut(line, ":")
		for _, want := range keys {
			if k == want {
				out = append(out, line)
			}
		}
	}
	return strings.Join(out, " ")
}

func ptr[T any](v T) *T { return &v }
