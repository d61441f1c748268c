package embedded

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// join appends the entry of the first process into the prepared namespaces. A
// user namespace comes after those that belong to the host, which its members
// could not enter, and before those that are to belong to it.
func (c *Container) join(s *script) {
	for _, n := range c.ns {
		s.do("join "+string(n.kind)+" namespace", unix.SYS_SETNS, s.fd(n.file), n.kind.CloneFlag())
	}
	if c.joinCgroupNS != nil {
		s.do("join cgroup namespace", unix.SYS_SETNS, s.fd(c.joinCgroupNS), unix.CLONE_NEWCGROUP)
	}
	if c.mountNS != nil {
		s.do("join mount namespace", unix.SYS_SETNS, s.fd(c.mountNS), unix.CLONE_NEWNS)
	}
	if c.rootDir != nil { // a tree with the root somewhere in it, which it becomes later
		s.do("enter root", unix.SYS_FCHDIR, s.fd(c.rootDir))
	}
	newCgroup := c.plan.ns[specs.CgroupNamespace].mode == nsNew
	if c.userNS == nil {
		if newCgroup {
			s.do("new cgroup namespace", unix.SYS_UNSHARE, unix.CLONE_NEWCGROUP)
		}
		return
	}
	s.do("join user namespace", unix.SYS_SETNS, s.fd(c.userNS), unix.CLONE_NEWUSER)
	if c.plan.ns[specs.PIDNamespace].mode == nsNew {
		s.forkInside(unix.CLONE_NEWPID)
	}
	// A copy of the mount namespace that belongs to the user namespace: the kernel
	// locks what was mounted and how, so that the container's root, whatever its
	// capabilities, cannot undo it.
	flags := unix.CLONE_NEWNS
	if newCgroup {
		flags |= unix.CLONE_NEWCGROUP
	}
	s.do("new mount namespace", unix.SYS_UNSHARE, flags)
}

// enterRoot appends what makes the container's root the process's root, with its
// procfs. Where more than the root is in the mount namespace, the rest goes.
func (c *Container) enterRoot(s *script) {
	switch {
	case c.rootDir == nil:
		c.mountProc(s)
	case !c.plan.ownMounts():
		s.do("chroot", unix.SYS_CHROOT, ".")
	default:
		if c.userNS != nil {
			// In the copied namespace the root is locked to its place: a clone is not.
			t := s.do("rootfs: open_tree", unix.SYS_OPEN_TREE, atCwd, ".", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE).out()
			s.do("rootfs: move_mount", unix.SYS_MOVE_MOUNT, t, "", atCwd, ".", unix.MOVE_MOUNT_F_EMPTY_PATH)
			s.do("enter root", unix.SYS_FCHDIR, t)
		}
		c.mountProc(s)
		s.do("pivot_root", unix.SYS_PIVOT_ROOT, ".", ".")
		s.do("unmount what is not the root", unix.SYS_UMOUNT2, ".", unix.MNT_DETACH)
		s.do("enter root", unix.SYS_CHDIR, "/")
		if c.userNS != nil {
			c.shareAgain(s)
		}
	}
}

// shareAgain appends the propagation of shared mounts: in the copy of the mount
// namespace the kernel made them slaves of those that were copied. They stay
// slaves towards the host and are shared with what the container makes of its
// namespace, as mounts made in a user namespace are.
func (c *Container) shareAgain(s *script) {
	share := func(field, at string, propagation uint64, flags int) {
		if propagation != unix.MS_SHARED {
			return
		}
		// The path is the container's own, and so is all that it may lead to. What was
		// covered by a later mount is not there to be found.
		attr := bytesOf(&unix.MountAttr{Propagation: propagation})
		s.do(field+": mount_setattr", unix.SYS_MOUNT_SETATTR, atCwd, at, flags, attr, len(attr)).ignore(unix.EINVAL, unix.ENOENT, unix.ENOTDIR)
	}
	for _, m := range c.plan.mounts {
		share(m.field, m.dest, m.rattr.Propagation, unix.AT_RECURSIVE)
	}
	recursive := 0
	if c.plan.recursive {
		recursive = unix.AT_RECURSIVE
	}
	share("linux.rootfsPropagation", "/", c.plan.propagate.Propagation, recursive)
}

// mountProc appends the procfs mounts with what lies on them. The working
// directory is the container's root.
func (c *Container) mountProc(s *script) {
	for _, m := range c.procs {
		name := fmt.Sprintf("%s %q: ", m.field, m.dest)
		f := s.do(name+"fsopen", unix.SYS_FSOPEN, "proc", unix.FSOPEN_CLOEXEC).out()
		if m.source != "" { // what the table of mounts shows
			s.do(name+"source", unix.SYS_FSCONFIG, f, unix.FSCONFIG_SET_STRING, "source", m.source, 0)
		}
		for _, o := range m.opts {
			if o.Flag {
				s.do(name+o.Key, unix.SYS_FSCONFIG, f, unix.FSCONFIG_SET_FLAG, o.Key, 0, 0)
			} else {
				s.do(name+o.Key, unix.SYS_FSCONFIG, f, unix.FSCONFIG_SET_STRING, o.Key, o.Value, 0)
			}
		}
		s.do(name+"fsconfig", unix.SYS_FSCONFIG, f, unix.FSCONFIG_CMD_CREATE, 0, 0, 0)
		proc := s.do(name+"fsmount", unix.SYS_FSMOUNT, f, unix.FSMOUNT_CLOEXEC, int(m.attr.Attr_set|m.rattr.Attr_set)).out()
		if c.userNS != nil {
			// What Create opened is in the namespace that was copied from.
			at := s.openat2(name+"open", m.dest, realDir)
			s.do(name+"move_mount", unix.SYS_MOVE_MOUNT, proc, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
		} else {
			s.do(name+"move_mount", unix.SYS_MOVE_MOUNT, proc, "", s.fd(m.at), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
		}
		for _, b := range m.binds {
			s.do(fmt.Sprintf("%s %q: move_mount", b.field, path.Join(m.dest, b.rel)), unix.SYS_MOVE_MOUNT, s.fd(b.file), "", proc, b.rel, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
		for _, rel := range m.readonly {
			name := fmt.Sprintf("linux.readonlyPaths %q: ", path.Join(m.dest, rel))
			if rel == "." { // with what lies on it, so not yet
				continue
			}
			t := s.do(name+"open_tree", unix.SYS_OPEN_TREE, proc, rel, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE).
				ignore(unix.ENOENT, unix.ENOTDIR).skip(2).out()
			attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
			s.do(name+"mount_setattr", unix.SYS_MOUNT_SETATTR, t, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, bytesOf(attr), len(bytesOf(attr)))
			s.do(name+"move_mount", unix.SYS_MOVE_MOUNT, t, "", proc, rel, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
		c.maskProc(s, m, proc)
		if slices.Contains(m.readonly, ".") {
			attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
			s.do(fmt.Sprintf("linux.readonlyPaths %q: mount_setattr", m.dest), unix.SYS_MOUNT_SETATTR, proc, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, bytesOf(attr), len(bytesOf(attr)))
		}
	}
}

// realDir opens a directory below the working directory, through no link.
var realDir = &unix.OpenHow{
	Flags:   unix.O_PATH | unix.O_CLOEXEC | unix.O_DIRECTORY | unix.O_NOFOLLOW,
	Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS,
}

// maskProc appends the masks of a procfs.
func (c *Container) maskProc(s *script, m procMount, proc ref) {
	dir, null := childFD(-1), childFD(-1)
	// The whole of it last: nothing below could be reached any more.
	slices.SortStableFunc(m.masked, func(a, b procMask) int { return strings.Compare(b.rel, a.rel) }) // "." sorts before names
	for _, k := range m.masked {
		name := fmt.Sprintf("linux.maskedPaths %q: ", path.Join(m.dest, k.rel))
		if k.file != nil { // a clone of its own
			s.do(name+"move_mount", unix.SYS_MOVE_MOUNT, s.fd(k.file), "", proc, k.rel, unix.MOVE_MOUNT_F_EMPTY_PATH).ignore(unix.ENOENT)
			continue
		}
		if dir < 0 {
			dir, null = s.fd(c.maskDir), s.fd(c.maskNull)
		}
		src := null
		if k.isDir {
			src = dir
		}
		t := s.do(name+"open_tree", unix.SYS_OPEN_TREE, src, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH).out()
		s.do(name+"move_mount", unix.SYS_MOVE_MOUNT, t, "", proc, k.rel, unix.MOVE_MOUNT_F_EMPTY_PATH).ignore(unix.ENOENT)
	}
}

// enterRunning appends the entry of a further process into the namespaces of the
// first one, pid; into its PID namespace only if that is to be late. The caller
// closes root, which may be nil, when the script has started.
func (c *Container) enterRunning(s *script, pidfd *os.File, pid int, late bool) (root *os.File, err error) {
	flags := 0
	if late {
		flags = unix.CLONE_NEWPID // its children's: see appear
	}
	for _, k := range []struct {
		spec specs.LinuxNamespaceType
		kind kernel.Namespace
	}{
		{specs.MountNamespace, kernel.MountNS}, {specs.NetworkNamespace, kernel.NetNS}, {specs.IPCNamespace, kernel.IPCNS},
		{specs.UTSNamespace, kernel.UTSNS}, {specs.CgroupNamespace, kernel.CgroupNS}, {specs.TimeNamespace, kernel.TimeNS},
		{specs.UserNamespace, kernel.UserNS},
	} {
		if c.plan.ns[k.spec].mode != nsHost {
			flags |= k.kind.CloneFlag()
		}
	}
	if c.rt.plain && c.plan.ns[specs.PIDNamespace].mode != nsHost {
		// Only in one step with the user namespace, and so not by the forking thread.
		flags |= unix.CLONE_NEWPID
	}
	if flags != 0 {
		s.do("join namespaces", unix.SYS_SETNS, s.fd(pidfd), flags)
	}
	if flags&unix.CLONE_NEWPID != 0 && !late {
		s.forkInside(0)
	}
	if c.plan.ownMounts() || c.podInit {
		return nil, nil
	}
	if root, err = c.rt.openProc(fmt.Sprintf("%d/root", pid), unix.O_PATH|unix.O_DIRECTORY); err != nil {
		return nil, err
	}
	s.do("enter root", unix.SYS_FCHDIR, s.fd(root))
	s.do("chroot", unix.SYS_CHROOT, ".")
	return root, nil
}

// mayBeTraced tells whether a process in the container's PID namespace may trace
// one of the runtime's there: not being dumpable protects it from all but
// CAP_SYS_PTRACE in the machine's own user namespace. Of a namespace that others
// share, and of a container that was found again, nobody knows.
func (c *Container) mayBeTraced() bool {
	mode := c.plan.ns[specs.PIDNamespace].mode
	if c.plan.user() || mode == nsHost || c.rt.plain {
		return false
	}
	p := c.plan.spec.Process
	return c.tracers.Load() || mode == nsJoin || c.podInit || p != nil && tracer(p)
}

// tracer tells whether p, or what it executes, may have CAP_SYS_PTRACE.
func tracer(p *specs.Process) bool {
	l := p.Capabilities
	return l != nil && slices.Contains(slices.Concat(l.Permitted, l.Bounding), "CAP_SYS_PTRACE")
}

// appear appends a late entry into the PID namespace, by a fork after the identity:
// who is in there and may trace the process gets nothing that it has not itself,
// neither capabilities nor descriptors of the host (CVE-2016-9962, invariant I5).
// Of these only in, unless it is negative, stays open; its new number is returned.
func (s *script) appear(terminal bool, in childFD) childFD {
	first := s.program() // has done its work
	if in >= 0 {
		s.do("dup3", unix.SYS_DUP3, in, first, unix.O_CLOEXEC)
		in = first
		first++
	}
	s.do("close_range", unix.SYS_CLOSE_RANGE, first, uintptr(0xffffffff), 0)
	s.forkInside(0)
	s.do("setsid", unix.SYS_SETSID)
	if terminal {
		s.do("controlling terminal", unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0)
	}
	return in
}
