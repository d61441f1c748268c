package embedded

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

const atCwd = unix.AT_FDCWD

// begin appends what every child does first, while it still sees nothing of the
// container: leave our cgroup, the settings that go through procfs, a session.
func (c *Container) begin(s *script, p *specs.Process) (warnings []string, err error) {
	// The program file is readable to nobody else; non-dumpable keeps a tracer in
	// the container from the descriptors until execve (invariant I5).
	s.do("prctl PR_SET_DUMPABLE", unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	for _, f := range c.joinFiles {
		// "0" is the writer itself. One thread moving by "tasks" does not take the
		// threadgroup lock, which costs an RCU grace period on a quiet machine.
		s.do("join cgroup", unix.SYS_WRITE, s.fd(f), "0", 1)
	}
	if p == nil {
		return nil, nil
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
	s.do("setsid", unix.SYS_SETSID)
	// A session keyring of its own: the runtime's would be shared. No keyrings in
	// the kernel, or none left in the quota, is no reason not to start.
	s.do("keyctl", unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0).ignoreAny()
	return warnings, nil
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
	if r.caps.permitted&(1<<unix.CAP_SYS_RESOURCE) != 0 {
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

// identity appends everything between the container's root and execve. The
// order follows the kernel's rules: a filter needs CAP_SYS_ADMIN or
// no_new_privs when it is loaded, ids need capabilities, and a filter must let
// through whatever still comes after it.
func (c *Container) identity(s *script, p *specs.Process, terminal bool) (warnings []string, err error) {
	caps, warnings, err := capsOf(p.Capabilities, c.rt.caps)
	if err != nil {
		return nil, err
	}
	c.cwd(s, p.Cwd)
	if terminal {
		s.do("controlling terminal", unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0)
	}
	// After the last descriptor that a limit on them could refuse.
	s.do("close_range", unix.SYS_CLOSE_RANGE, statusFD, uintptr(0xffffffff), unix.CLOSE_RANGE_CLOEXEC)
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
		if c.rt.caps.bounding&(1<<i) != 0 && caps.bounding&(1<<i) == 0 {
			s.do("drop capability", unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, i, 0, 0, 0)
		}
	}
	groups := []byte{}
	for _, g := range p.User.AdditionalGids {
		groups = binary.LittleEndian.AppendUint32(groups, g)
	}
	s.do("process.user.additionalGids", unix.SYS_SETGROUPS, len(p.User.AdditionalGids), groups)
	g, u := int(p.User.GID), int(p.User.UID)
	s.do("process.user.gid", unix.SYS_SETRESGID, g, g, g)
	s.do("process.user.uid", unix.SYS_SETRESUID, u, u, u)

	header := func() []byte { return bytesOf(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}) }
	filter := c.plan.filter
	extra := uint64(0)
	if filter != nil && !p.NoNewPrivileges {
		extra = 1 << unix.CAP_SYS_ADMIN
	}
	s.do("capset", unix.SYS_CAPSET, header(), caps.capData(extra))
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
	if filter != nil {
		s.loadFilter(filter)
		if extra&^caps.permitted != 0 || extra&^caps.effective != 0 {
			s.do("capset", unix.SYS_CAPSET, header(), caps.capData(0))
		}
	}
	return warnings, nil
}

// cwd enters the working directory. RESOLVE_IN_ROOT makes it impossible to end
// outside of the root, and magic links such as /proc/self/fd/7 are refused
// (CVE-2024-21626, invariant I4).
func (c *Container) cwd(s *script, dir string) {
	if dir == "" || dir == "/" {
		return // entering the namespace left the process in its root
	}
	how := &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	name := fmt.Sprintf("process.cwd %q", path.Clean(dir))
	f := s.do(name, unix.SYS_OPENAT2, atCwd, path.Clean(dir), bytesOf(how), unix.SizeofOpenHow).out()
	s.do(name, unix.SYS_FCHDIR, f)
}

func (r *Runtime) clampRlimit(l specs.POSIXRlimit) (unix.Rlimit, []string, error) {
	want := unix.Rlimit{Cur: l.Soft, Max: l.Hard}
	if r.caps.permitted&(1<<unix.CAP_SYS_RESOURCE) != 0 {
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

// execCell is the record's cell of one candidate of the search for a program.
type execCell struct{ index int }

// exec appends the execve. A name without a slash is looked for in the
// container's PATH by the child itself, as the user it will be.
func (s *script) exec(p *specs.Process) []execCell {
	argv, env := s.strs(p.Args), s.strs(p.Env)
	name := p.Args[0]
	if strings.Contains(name, "/") {
		s.do("exec "+strconv.Quote(name), unix.SYS_EXECVE, name, argv, env)
		return nil
	}
	search := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, e := range p.Env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			search = v
		}
	}
	var cells []execCell
	var last call
	for dir := range strings.SplitSeq(search, ":") {
		if dir == "" {
			dir = "."
		}
		ref, i, ok := s.cell()
		if !ok {
			break // more directories than a record has room for: 54
		}
		last = s.do("exec "+strconv.Quote(name), unix.SYS_EXECVE, path.Join(dir, name), argv, env)
		if dir == "." {
			s.ops[last.i].args[0] = s.str("./" + name)
		}
		last.to(ref).ignore(unix.ENOENT, unix.ENOTDIR, unix.EACCES, unix.ELOOP)
		cells = append(cells, execCell{i})
	}
	s.ops[last.i].ignore = 0
	return cells
}

// startError is an error of a child, with the kind that its errno means.
type startError struct {
	msg   string
	kind  error
	cause error
}

func (e *startError) Error() string   { return e.msg }
func (e *startError) Unwrap() []error { return []error{e.kind, e.cause} }

// explain turns a failed script into an error for people.
func explain(err error, p *specs.Process, cells []execCell) error {
	var se *scriptError
	if err == nil || !errors.As(err, &se) {
		return err
	}
	e := &startError{msg: err.Error(), kind: errdefs.ErrUnknown, cause: err}
	switch {
	case strings.HasPrefix(se.name, "exec "):
		if len(cells) > 0 && (se.errno == unix.ENOENT || se.errno == unix.ENOTDIR || se.errno == unix.EACCES || se.errno == unix.ELOOP) {
			e.kind, e.msg = errdefs.ErrNotFound, fmt.Sprintf("exec: %q: executable file not found in $PATH", p.Args[0])
			for _, c := range cells {
				if -unix.Errno(se.cells[c.index]) == unix.EACCES || se.cells[c.index] == -int64(unix.EACCES) {
					e.kind, e.msg = errdefs.ErrPermissionDenied, fmt.Sprintf("exec: %q: permission denied", p.Args[0])
				}
			}
			return e
		}
		e.msg = fmt.Sprintf("exec: %q: %s", p.Args[0], se.errno)
		switch se.errno {
		case unix.ENOENT, unix.ENOTDIR:
			e.kind = errdefs.ErrNotFound
		case unix.EACCES, unix.EPERM:
			e.kind = errdefs.ErrPermissionDenied
		case unix.ENOEXEC, unix.E2BIG, unix.ELOOP, unix.ENAMETOOLONG:
			e.kind = errdefs.ErrInvalidArgument
		}
	case strings.HasPrefix(se.name, "process."):
		e.kind = errdefs.ErrInvalidArgument
	}
	return e
}

// mountProc appends the procfs mounts with what lies on them.
func (c *Container) mountProc(s *script) {
	var dir, null childFD
	for _, m := range c.procs {
		name := fmt.Sprintf("mount %q: ", m.dest)
		f := s.do(name+"fsopen", unix.SYS_FSOPEN, "proc", unix.FSOPEN_CLOEXEC).out()
		for _, o := range m.opts {
			if o.Flag {
				s.do(name+o.Key, unix.SYS_FSCONFIG, f, unix.FSCONFIG_SET_FLAG, o.Key, 0, 0)
			} else {
				s.do(name+o.Key, unix.SYS_FSCONFIG, f, unix.FSCONFIG_SET_STRING, o.Key, o.Value, 0)
			}
		}
		s.do(name+"fsconfig", unix.SYS_FSCONFIG, f, unix.FSCONFIG_CMD_CREATE, 0, 0, 0)
		proc := s.do(name+"fsmount", unix.SYS_FSMOUNT, f, unix.FSMOUNT_CLOEXEC, int(m.attr.Attr_set|m.rattr.Attr_set)).out()
		s.do(name+"move_mount", unix.SYS_MOVE_MOUNT, proc, "", s.fd(m.at), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
		for _, b := range m.binds {
			s.do(fmt.Sprintf("mount %q: move_mount", path.Join(m.dest, b.rel)), unix.SYS_MOVE_MOUNT, s.fd(b.file), "", proc, b.rel, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
		for _, rel := range m.readonly {
			name := fmt.Sprintf("linux.readonlyPaths %q: ", path.Join(m.dest, rel))
			t := s.do(name+"open_tree", unix.SYS_OPEN_TREE, proc, rel, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE).
				ignore(unix.ENOENT, unix.ENOTDIR).skip(2).out()
			attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
			s.do(name+"mount_setattr", unix.SYS_MOUNT_SETATTR, t, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, bytesOf(attr), len(bytesOf(attr)))
			s.do(name+"move_mount", unix.SYS_MOVE_MOUNT, t, "", proc, rel, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
		for _, rel := range m.masked {
			isDir, ok := c.rt.procKind(rel)
			if !ok {
				continue
			}
			if dir == 0 {
				dir, null = s.fd(c.maskDir), s.fd(c.maskNull)
			}
			src := null
			if isDir {
				src = dir
			}
			name := fmt.Sprintf("linux.maskedPaths %q: ", path.Join(m.dest, rel))
			t := s.do(name+"open_tree", unix.SYS_OPEN_TREE, src, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH).out()
			s.do(name+"move_mount", unix.SYS_MOVE_MOUNT, t, "", proc, rel, unix.MOVE_MOUNT_F_EMPTY_PATH).ignore(unix.ENOENT)
		}
	}
}

// procKind says what a path of procfs is, looked up in a procfs of our own.
func (r *Runtime) procKind(rel string) (isDir, exists bool) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(r.proc.Fd()), rel, &st, 0); err != nil {
		return false, false
	}
	return st.Mode&unix.S_IFMT == unix.S_IFDIR, true
}

// join appends the entry into the prepared namespaces.
func (c *Container) join(s *script) {
	for _, n := range c.ns {
		s.do("join "+string(n.kind)+" namespace", unix.SYS_SETNS, s.fd(n.file), n.kind.CloneFlag())
	}
	switch {
	case c.joinCgroupNS != nil:
		s.do("join cgroup namespace", unix.SYS_SETNS, s.fd(c.joinCgroupNS), kernel.CgroupNS.CloneFlag())
	case c.plan.ns[specs.CgroupNamespace].mode == nsNew:
		s.do("new cgroup namespace", unix.SYS_UNSHARE, unix.CLONE_NEWCGROUP)
	}
	s.do("join mount namespace", unix.SYS_SETNS, s.fd(c.mountNS), unix.CLONE_NEWNS)
}
