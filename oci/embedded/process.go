package embedded

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const atCwd = unix.AT_FDCWD

// allCPUs is the mask of sched_setaffinity(2) of every CPU.
var allCPUs = [1024 / 8]byte(bytes.Repeat([]byte{0xff}, 1024/8))

// begin appends what every child does first, while it still sees nothing of the
// container: leave our cgroup, the settings that go through procfs or that need
// the runtime's privileges. With p nil it is a hook's.
func (c *Container) begin(s *script, p *specs.Process) (warnings []string, err error) {
	// The program file is readable to nobody else; non-dumpable keeps a tracer in
	// the container from the descriptors until execve (invariant I5).
	s.do("prctl PR_SET_DUMPABLE", unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	if p != nil && p.ExecCPUAffinity != nil && p.ExecCPUAffinity.Initial != "" && c.joinDir == nil {
		// On cgroup v2 there is no time before: the process is born in its cgroup.
		if err := affinity(s, "process.execCPUAffinity.initial", p.ExecCPUAffinity.Initial); err != nil {
			return nil, err
		}
	}
	for _, f := range c.joinFiles {
		// "0" is the writer itself. One thread moving by "tasks" does not take the
		// threadgroup lock, which costs an RCU grace period on a quiet machine.
		s.do("join cgroup", unix.SYS_WRITE, s.fd(f), "0", 1)
	}
	if p == nil {
		return nil, nil
	}
	if p.ExecCPUAffinity == nil || p.ExecCPUAffinity.Final == "" {
		// The CPUs that the caller was bound to are no limit of the container's: all
		// that its cgroup has, of which the kernel keeps those that there are.
		s.do("all CPUs", unix.SYS_SCHED_SETAFFINITY, 0, len(allCPUs), allCPUs[:]).ignore(unix.EPERM, unix.EINVAL)
	}
	if err := c.attributes(s, p); err != nil {
		return nil, err
	}
	adj := p.OOMScoreAdj
	if adj == nil && c.plan.spec.Process != nil {
		adj = c.plan.spec.Process.OOMScoreAdj
	}
	proc := childFD(-1)
	procFD := func() childFD {
		if proc < 0 {
			proc = s.fd(c.rt.proc)
		}
		return proc
	}
	if adj != nil {
		v, warn, err := c.rt.clampOOM(*adj)
		if err != nil {
			return nil, err
		}
		warnings = append(warnings, warn...)
		text := strconv.Itoa(v)
		f := s.do("oom_score_adj", unix.SYS_OPENAT, procFD(), "self/oom_score_adj", unix.O_WRONLY|unix.O_CLOEXEC, 0).out()
		s.do("oom_score_adj", unix.SYS_WRITE, f, text, len(text))
	}
	for _, l := range []struct{ field, label, file string }{
		{"process.apparmorProfile", apparmorLabel(p.ApparmorProfile), apparmorFile()},
		{"process.selinuxLabel", p.SelinuxLabel, "self/attr/exec"},
	} {
		if l.label == "" {
			continue
		}
		if l.field == "process.apparmorProfile" && !apparmorEnabled() || l.field == "process.selinuxLabel" && !selinuxEnabled() {
			return nil, fmt.Errorf("%s: its security module is not enabled on this host: %w", l.field, errdefs.ErrFailedPrecondition)
		}
		// Only the task itself may set its label for the next execve.
		f := s.do(l.field, unix.SYS_OPENAT, procFD(), l.file, unix.O_WRONLY|unix.O_CLOEXEC, 0).out()
		named := fmt.Sprintf("%s %q", l.field, strings.TrimPrefix(l.label, "exec ")) // fails when it is not loaded
		s.do(named, unix.SYS_WRITE, f, l.label, len(l.label))
	}
	if c.plan.user() {
		// Inside a user namespace no limit can be raised any more.
		for _, l := range p.Rlimits {
			var own unix.Rlimit
			if err := unix.Prlimit(0, rlimits[l.Type], nil, &own); err != nil {
				return nil, fmt.Errorf("process.rlimits %s: %w", l.Type, err)
			}
			lim, _, err := c.rt.clampRlimit(l)
			if err != nil {
				return nil, err
			}
			if lim.Max > own.Max {
				own.Max = lim.Max
				s.do("process.rlimits "+l.Type, unix.SYS_PRLIMIT64, 0, rlimits[l.Type], bytesOf(&own), 0)
			}
		}
	}
	return warnings, nil
}

// session appends a session of the process's own, for which it must be the one
// that runs the program, not a parent of that one.
func (c *Container) session(s *script) {
	s.do("setsid", unix.SYS_SETSID)
	if !c.rt.keepKeyring {
		// A session keyring of its own: the runtime's would be shared. No keyrings in
		// the kernel, or none left in the quota, is no reason not to start.
		s.do("keyctl", unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0).ignoreAny()
	}
}

// attributes appends the settings that are one system call each.
func (c *Container) attributes(s *script, p *specs.Process) error {
	if p.ExecCPUAffinity != nil && p.ExecCPUAffinity.Final != "" {
		if err := affinity(s, "process.execCPUAffinity.final", p.ExecCPUAffinity.Final); err != nil {
			return err
		}
	}
	if p.Scheduler != nil && !lostByFork(p) {
		attr, err := schedAttr(p.Scheduler)
		if err != nil {
			return err
		}
		s.do("process.scheduler", unix.SYS_SCHED_SETATTR, 0, attr, 0)
	}
	if p.IOPriority != nil {
		v, err := ioPriority(p.IOPriority)
		if err != nil {
			return err
		}
		const whoProcess = 1
		s.do("process.ioPriority", unix.SYS_IOPRIO_SET, whoProcess, 0, v)
	}
	if m := c.plan.spec.Linux.MemoryPolicy; m != nil {
		mode, mask, maxNode, err := memoryPolicy(m)
		if err != nil {
			return err
		}
		s.do("linux.memoryPolicy", unix.SYS_SET_MEMPOLICY, mode, mask, maxNode)
	}
	if m := c.plan.spec.Linux.Personality; m != nil {
		v, err := personalityOf(m)
		if err != nil {
			return err
		}
		s.do("linux.personality", unix.SYS_PERSONALITY, v)
	}
	return nil
}

func affinity(s *script, field, list string) error {
	mask, err := cpuMask(field, list)
	if err != nil {
		return err
	}
	s.do(field, unix.SYS_SCHED_SETAFFINITY, 0, len(mask), mask)
	return nil
}

func apparmorEnabled() bool {
	b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && strings.HasPrefix(string(b), "Y")
}

// apparmorFile is the module's own attribute directory where the kernel has it
// (5.8 with stacked modules); "attr/exec" may belong to another module.
func apparmorFile() string {
	if _, err := os.Stat("/proc/self/attr/apparmor/exec"); err == nil {
		return "self/attr/apparmor/exec"
	}
	return "self/attr/exec"
}

func apparmorLabel(profile string) string {
	if profile == "" || profile == "unconfined" && !apparmorEnabled() {
		return ""
	}
	return "exec " + profile
}

// clampOOM limits a score to what we may set: without CAP_SYS_RESOURCE it can
// only be raised.
func (r *Runtime) clampOOM(want int) (int, []string, error) {
	if r.mayRaise() {
		return want, nil, nil
	}
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0, nil, fmt.Errorf("process.oomScoreAdj: %w", err)
	}
	own, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, nil, fmt.Errorf("process.oomScoreAdj: %w", err)
	}
	if want >= own {
		return want, nil, nil
	}
	return own, []string{fmt.Sprintf("process.oomScoreAdj: %d can not be set without CAP_SYS_RESOURCE; %d kept", want, own)}, nil
}

// mayRaise tells whether limits may be raised: the capability counts in the first
// user namespace alone.
func (r *Runtime) mayRaise() bool {
	return r.caps.permitted&(1<<unix.CAP_SYS_RESOURCE) != 0 && !r.nested
}

// identity appends everything between the container's root and execve. The
// order follows the kernel's rules: a filter needs CAP_SYS_ADMIN or
// no_new_privs when it is loaded, ids need capabilities, and a filter must let
// through whatever still comes after it.
func (c *Container) identity(s *script, p *specs.Process, terminal bool) (warnings []string, err error) {
	own := c.ownCaps()
	caps, warnings, err := capsOf(p.Capabilities, own)
	if err != nil {
		return nil, err
	}
	c.cwd(s, p.Cwd)
	if terminal {
		s.do("controlling terminal", unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0)
	}
	// After the last descriptor that a limit on them could refuse.
	s.do("close_range", unix.SYS_CLOSE_RANGE, s.status(), uintptr(0xffffffff), unix.CLOSE_RANGE_CLOEXEC)
	for _, l := range p.Rlimits {
		lim, warn, err := c.rt.clampRlimit(l)
		if err != nil {
			return nil, err
		}
		warnings = append(warnings, warn...)
		s.do("process.rlimits "+l.Type, unix.SYS_PRLIMIT64, 0, rlimits[l.Type], bytesOf(&lim), 0)
	}
	s.do("signal mask", unix.SYS_RT_SIGPROCMASK, 2, make([]byte, 8), 0, 8)
	umask := 0o022
	if p.User.Umask != nil {
		umask = int(*p.User.Umask)
	}
	s.do("umask", unix.SYS_UMASK, umask)

	s.do("keep capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0, 0, 0)
	for i := range lastCap + 24 {
		if own.bounding&(1<<i) != 0 && caps.bounding&(1<<i) == 0 {
			s.do("drop capability", unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, i, 0, 0, 0)
		}
	}
	groups := []byte{}
	for _, g := range p.User.AdditionalGids {
		groups = binary.LittleEndian.AppendUint32(groups, g)
	}
	setgroups := s.do("process.user.additionalGids", unix.SYS_SETGROUPS, len(p.User.AdditionalGids), groups)
	if len(groups) == 0 && (c.plan.user() || c.rt.nested) {
		setgroups.ignore(unix.EPERM) // a user namespace made without privileges allows no setgroups at all
	}
	g, u := int(p.User.GID), int(p.User.UID)
	s.do("process.user.gid", unix.SYS_SETRESGID, g, g, g)
	s.do("process.user.uid", unix.SYS_SETRESUID, u, u, u)

	extra := uint64(0)
	if c.plan.filter != nil && !p.NoNewPrivileges {
		extra = 1 << unix.CAP_SYS_ADMIN
	}
	s.do("capset", unix.SYS_CAPSET, capHeader(), caps.capData(extra))
	for i := range lastCap + 1 {
		if caps.ambient&(1<<i) != 0 {
			s.do("ambient capability", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, i, 0, 0)
		}
	}
	if p.NoNewPrivileges {
		s.do("no_new_privs", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	// A change of ids makes the process dumpable by sysctl fs.suid_dumpable only,
	// never more than before; said again because execve is still to come.
	s.do("prctl PR_SET_DUMPABLE", unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	return warnings, nil
}

func capHeader() []byte {
	return bytesOf(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3})
}

// seal appends the filter, the last thing before execve, and what only it needed.
// A filter with a listener waits at the read end in until the listener has it.
func (c *Container) seal(s *script, p *specs.Process, in childFD) error {
	f := c.plan.filter
	if f == nil {
		return nil
	}
	caps, _, err := capsOf(p.Capabilities, c.ownCaps())
	if err != nil {
		return err
	}
	load := s.loadFilter(f)
	if f.Listener {
		at, value := s.message(msgFilter)
		load.to(value)
		s.tell(at)
		s.wait(in)
	}
	if extra := uint64(1 << unix.CAP_SYS_ADMIN); !p.NoNewPrivileges && (extra&^caps.permitted != 0 || extra&^caps.effective != 0) {
		s.do("capset", unix.SYS_CAPSET, capHeader(), caps.capData(0))
	}
	return nil
}

// ownCaps are the limits of what a process of the container can have: everything
// that the kernel knows in a user namespace of its own, else what we have.
func (c *Container) ownCaps() capSets {
	if c.plan.user() {
		all := kernelCaps()
		return capSets{bounding: all, permitted: all}
	}
	return c.rt.caps
}

// cwd enters the working directory. RESOLVE_IN_ROOT makes it impossible to end
// outside of the root, and magic links such as /proc/self/fd/7 are refused
// (CVE-2024-21626, invariant I4).
func (c *Container) cwd(s *script, dir string) {
	if dir == "" || path.Clean(dir) == "/" {
		return // entering the namespace left the process in its root
	}
	how := &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	name := fmt.Sprintf("process.cwd %q", path.Clean(dir))
	f := s.openat2(name, path.Clean(dir), how)
	s.do(name, unix.SYS_FCHDIR, f)
}

func (r *Runtime) clampRlimit(l specs.POSIXRlimit) (unix.Rlimit, []string, error) {
	want := unix.Rlimit{Cur: l.Soft, Max: l.Hard}
	if r.mayRaise() {
		return want, nil, nil
	}
	var own unix.Rlimit
	if err := unix.Prlimit(0, rlimits[l.Type], nil, &own); err != nil {
		return want, nil, fmt.Errorf("process.rlimits %s: %w", l.Type, err)
	}
	if want.Max <= own.Max {
		return want, nil, nil
	}
	want.Max = own.Max
	want.Cur = min(want.Cur, own.Max)
	return want, []string{fmt.Sprintf("process.rlimits: %s hard limit %d can not be raised without CAP_SYS_RESOURCE; %d kept", l.Type, l.Hard, own.Max)}, nil
}

// candidates are the paths that execve is tried with. A name without a slash is
// looked for in the container's PATH by the child itself, as the user it will be.
func candidates(p *specs.Process) []string {
	name := p.Args[0]
	if strings.Contains(name, "/") {
		return []string{name}
	}
	search := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, e := range p.Env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			search = v
		}
	}
	var out []string
	for dir := range strings.SplitSeq(search, ":") {
		if dir == "" || dir == "." {
			out = append(out, "./"+name)
		} else {
			out = append(out, path.Join(dir, name))
		}
		if len(out) == maxCells {
			break // more directories than a record has room for
		}
	}
	return out
}

// notThere are the errnos after which the search for a program goes on.
var notThere = []unix.Errno{unix.ENOENT, unix.ENOTDIR, unix.EACCES, unix.ELOOP}

// exec appends the execve.
func (s *script) exec(p *specs.Process) {
	argv, env := s.strs(p.Args), s.strs(p.Env)
	s.search(p, func(name, path string) call { return s.do(name, unix.SYS_EXECVE, path, argv, env) })
}

// lookup appends a check that the program is there and may be executed, so that
// a created container fails before its start.
func (s *script) lookup(p *specs.Process) {
	n := len(candidates(p))
	i := 0
	s.search(p, func(name, path string) call {
		i++
		c := s.do(name, unix.SYS_FACCESSAT2, atCwd, path, unix.X_OK, unix.AT_EACCESS)
		if left := n - i; left > 0 {
			s.jump(2*left - 1) // found: what is left are calls with their jumps, and the last call
		}
		return c
	})
}

// search appends one try for each candidate; all but the last may fail.
func (s *script) search(p *specs.Process, try func(name, path string) call) {
	name := "exec " + strconv.Quote(p.Args[0])
	all := candidates(p)
	for i, path := range all {
		c := try(name, path)
		if len(all) == 1 && strings.Contains(p.Args[0], "/") {
			return // its own errno says it all
		}
		c.to(s.cell(i))
		if i < len(all)-1 {
			c.ignore(notThere...).skip(len(s.ops) - 1 - c.i)
		}
	}
}

// startError is an error of a child, with the kind that its errno means.
type startError struct {
	msg   string
	kind  error
	cause error
}

func (e *startError) Error() string   { return e.msg }
func (e *startError) Unwrap() []error { return []error{e.kind, e.cause} }

// explain turns a failed script into an error for people. arg0 is the program.
func explain(err error, arg0 string) error {
	var se *scriptError
	if err == nil || !errors.As(err, &se) {
		return err
	}
	e := &startError{msg: err.Error(), kind: errdefs.ErrUnknown, cause: err}
	switch {
	case strings.HasPrefix(se.name, "exec "):
		if !strings.Contains(arg0, "/") && slices.Contains(notThere, se.errno) {
			e.kind, e.msg = errdefs.ErrNotFound, fmt.Sprintf("exec: %q: executable file not found in $PATH", arg0)
			for _, c := range se.cells {
				if c == -int64(unix.EACCES) {
					e.kind, e.msg = errdefs.ErrPermissionDenied, fmt.Sprintf("exec: %q: permission denied", arg0)
				}
			}
			return e
		}
		e.msg = fmt.Sprintf("exec: %q: %s", arg0, se.errno)
		switch se.errno {
		case unix.ENOENT, unix.ENOTDIR:
			e.kind = errdefs.ErrNotFound
		case unix.EACCES, unix.EPERM:
			e.kind = errdefs.ErrPermissionDenied
		case unix.ENOEXEC, unix.E2BIG, unix.ELOOP, unix.ENAMETOOLONG:
			e.kind = errdefs.ErrInvalidArgument
		}
	case strings.HasPrefix(se.name, "process."), strings.HasPrefix(se.name, "linux."):
		e.kind = errdefs.ErrInvalidArgument
	}
	return e
}
