package embedded

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

// prepared is a mount of the spec whose detached mount exists, or will be made
// by build inside the container's namespaces.
type prepared struct {
	mount
	file  *os.File // detached
	isDir bool
	parts []part // to be attached below it
}

// part is a detached mount that belongs on a directory of another.
type part struct {
	name string
	file *os.File
}

// procMount is a procfs that the container's first process mounts: only a
// member of the PID namespace can. Masks and binds below it wait until then.
type procMount struct {
	mount
	at       *os.File // its mount point
	readonly []string // relative paths
	masked   []procMask
	binds    []procBind
}

type procMask struct {
	rel   string
	isDir bool
	file  *os.File // a mask of its own, detached; nil: one of the common sources
}

type procBind struct {
	rel  string
	file *os.File // detached
}

// assembly is the thread-bound work of Create.
type assembly struct {
	*Container
	req     oci.CreateRequest
	found   nsFiles
	rootfs  *os.File
	mounts  []prepared
	root    *os.File // the container's root, attached
	closers []*os.File
}

// assemble makes the container's namespaces and its mount namespace.
func (c *Container) assemble(req oci.CreateRequest, root *rootAside) error {
	a := &assembly{Container: c, req: req}
	defer func() {
		for _, f := range a.closers {
			f.Close()
		}
	}()
	withRoot := hasRoot(req)
	defer func() { a.found.close() }()
	if err := a.openNamespaces(); err != nil {
		return err
	}
	if withRoot {
		if err := a.prepare(root); err != nil {
			return err
		}
	}
	return kernel.OnThread(func() error {
		// The thread's own root, working directory and umask.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare CLONE_FS: %w", err)
		}
		unix.Umask(0)
		if err := a.enterNamespaces(); err != nil {
			return err
		}
		if err := a.writeSysctls(); err != nil {
			return err
		}
		switch {
		case !withRoot:
			var err error
			c.mountNS, err = dup(c.rt.empty)
			return err
		case !c.plan.ownMounts():
			return a.shareMounts()
		}
		if err := a.beRoot(); err != nil {
			return err
		}
		if err := a.newFilesystems(); err != nil {
			return err
		}
		return a.buildRoot()
	})
}

// beRoot makes files that the thread makes from now on belong to the container's
// root. The thread keeps its capabilities.
func (a *assembly) beRoot() error {
	uid, ok1 := a.plan.maps.uid(0)
	gid, ok2 := a.plan.maps.gid(0)
	if !ok1 || !ok2 || uid == 0 && gid == 0 {
		return nil
	}
	if err := kernel.SetFSIDs(uid, gid); err != nil {
		return fmt.Errorf("files of the container's root: %w", err)
	}
	return nil
}

func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("dup: %w", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// use keeps f until the assembly is done.
func (a *assembly) use(f *os.File) *os.File {
	a.closers = append(a.closers, f)
	return f
}

// prepare opens what lies on the host, in the host's mount namespace.
func (a *assembly) prepare(root *rootAside) error {
	f, err := root.take()
	if err != nil {
		return err
	}
	a.rootfs = a.use(f)
	if !a.plan.ownMounts() {
		return nil
	}
	for _, m := range a.plan.mounts {
		p := prepared{mount: m, isDir: true}
		switch m.fstype {
		case "bind":
			err = a.openBind(&p)
		case "cgroup", "cgroup2":
			err = a.openCgroups(&p)
		}
		if err != nil {
			return fmt.Errorf("mount %q: %w", m.dest, err)
		}
		a.mounts = append(a.mounts, p)
	}
	return nil
}

func (a *assembly) openBind(p *prepared) error {
	if name, ok := strings.CutPrefix(p.source, imageSource); ok {
		v, ok := a.req.Volumes[name]
		if !ok {
			return invalid("%s.source %q: no such image was passed", p.field, p.source)
		}
		user := a.found[specs.UserNamespace]
		if !v.Idmap {
			user = nil
		} else if user == nil {
			return invalid("%s: an image with idmap, but linux.namespaces has no user namespace", p.field)
		}
		t, err := openVolume(a.rt.empty, v, user)
		if err != nil {
			return fmt.Errorf("source %q: %w", p.source, err)
		}
		return a.useBind(p, t)
	}
	if name, ok := strings.CutPrefix(p.source, fdSource); ok {
		f := a.req.MountFDs[name]
		if f == nil {
			return invalid("%s.source %q: no such descriptor was passed", p.field, p.source)
		}
		t, err := kernel.CloneHeld(f, p.recursive)
		if err != nil {
			return fmt.Errorf("source %q: %w", p.source, err)
		}
		return a.useBind(p, t)
	}
	t, err := kernel.CloneTree(unix.AT_FDCWD, p.source, p.recursive)
	if err != nil {
		return fmt.Errorf("source %q: %w", p.source, err)
	}
	return a.useBind(p, t)
}

// useBind keeps the source t of a bind and sets its attributes.
func (a *assembly) useBind(p *prepared, t *os.File) error {
	p.file = a.use(t)
	var st unix.Stat_t
	if err := unix.Fstat(int(t.Fd()), &st); err != nil {
		return fmt.Errorf("source %q: %w", p.source, err)
	}
	p.isDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
	if err := p.setAttrs(t); err != nil {
		return err
	}
	if !p.idmap {
		return nil
	}
	maps := p.maps
	if maps.empty() {
		if maps = a.plan.maps; maps.empty() {
			return invalid("%s: idmap without mappings, and the container has no user namespace", p.field)
		}
	}
	user := a.found[specs.UserNamespace]
	if user == nil || !sameRanges(maps.uids, a.plan.maps.uids) || !sameRanges(maps.gids, a.plan.maps.gids) {
		var err error
		if user, err = a.rt.userNSFor(maps); err != nil {
			return fmt.Errorf("%s: idmap: %w", p.field, err)
		}
		defer user.Close()
	}
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(user.Fd())}
	if err := kernel.SetMountAttr(t, p.ridmap, attr); err != nil {
		return fmt.Errorf("%s: idmap: %s of the source may not support it: %w", p.field, fsName(p.source), err)
	}
	return nil
}

// openCgroups makes the tree of a cgroup mount: one bind on cgroup v2, a tmpfs
// with one bind for each hierarchy on v1. The binds show the container's own
// cgroup, as a mount made inside its cgroup namespace would.
func (a *assembly) openCgroups(p *prepared) error {
	if a.cgroup == nil {
		return invalid("%s: a cgroup mount needs linux.cgroupsPath", p.field)
	}
	whole := a.plan.ns[specs.CgroupNamespace].mode == nsHost
	views := a.cgroup.Views(whole)
	attr := &unix.MountAttr{Attr_set: p.attr.Attr_set | p.rattr.Attr_set, Propagation: unix.MS_PRIVATE}
	if len(views) == 1 && views[0].Name == "" {
		t, err := kernel.CloneTree(unix.AT_FDCWD, views[0].Dir, false)
		if err != nil {
			return err
		}
		p.file = a.use(t)
		return kernel.SetMountAttr(t, false, attr)
	}
	t, err := kernel.NewFS("tmpfs", []kernel.FSOption{{Key: "mode", Value: "755"}}, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return err
	}
	p.file = a.use(t)
	for _, v := range views {
		if err := unix.Mkdirat(int(t.Fd()), v.Name, 0o755); err != nil {
			return fmt.Errorf("mkdir %s: %w", v.Name, err)
		}
		for _, l := range v.Links {
			if err := unix.Symlinkat(v.Name, int(t.Fd()), l); err != nil && err != unix.EEXIST {
				return fmt.Errorf("symlink %s: %w", l, err)
			}
		}
		b, err := kernel.CloneTree(unix.AT_FDCWD, v.Dir, false)
		if err != nil {
			return fmt.Errorf("%s: %w", v.Dir, err)
		}
		a.use(b)
		if err := kernel.SetMountAttr(b, false, attr); err != nil {
			return err
		}
		p.parts = append(p.parts, part{v.Name, b})
	}
	return nil
}

// shareMounts opens the root as a directory of a mount namespace that is not
// the container's own, the runtime's or a joined one: nothing is mounted in it.
func (a *assembly) shareMounts() error {
	if f := a.take(specs.MountNamespace); f != nil {
		a.mountNS = f
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("linux.namespaces: mount: setns: %w", err)
		}
	}
	path := a.plan.spec.Root.Path
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return invalid("root.path %q: %w", path, err)
	}
	a.rootDir = os.NewFile(uintptr(fd), path)
	a.root = a.rootDir
	return a.makeCwd()
}

// newFilesystems makes the filesystems of the spec's mounts inside the
// namespaces, and before the mount namespace: one that belongs to a user namespace
// does not let just any procfs or sysfs be made.
func (a *assembly) newFilesystems() error {
	for i := range a.mounts {
		p := &a.mounts[i]
		switch p.fstype {
		case "bind", "cgroup", "cgroup2", "proc":
			continue
		}
		if p.remount {
			continue
		}
		if err := a.newFS(p); err != nil {
			return fmt.Errorf("mount %q: %w", p.dest, err)
		}
	}
	return nil
}

// buildRoot makes the mount namespace and attaches every mount in the spec's
// order.
func (a *assembly) buildRoot() error {
	hidden, err := a.enterBase()
	if err != nil {
		return err
	}
	defer hidden.Close()
	for _, x := range []struct {
		to   **os.File
		name string
	}{{&a.maskDir, kernel.EmptyDir}, {&a.maskNull, kernel.EmptyNull}} {
		fd, err := unix.Openat(int(hidden.Fd()), x.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
		*x.to = os.NewFile(uintptr(fd), x.name)
	}
	at := hidden
	if a.userNS != nil {
		if err := a.placeWitness(hidden); err != nil {
			return err
		}
	}
	if a.userNS != nil && !a.plan.hostTree() {
		if at, err = kernel.OpenInRoot(hidden, kernel.EmptyRoot, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err != nil {
			return err
		}
		defer at.Close()
	}
	if err := kernel.Attach(a.rootfs, at); err != nil {
		return fmt.Errorf("rootfs: %w", err)
	}
	a.root = a.rootfs
	if a.plan.hostTree() || a.userNS != nil {
		if a.rootDir, err = dup(a.root); err != nil {
			return err
		}
	} else {
		if err := unix.Fchdir(int(a.root.Fd())); err != nil {
			return fmt.Errorf("rootfs: %w", err)
		}
		if err := unix.Chroot("."); err != nil {
			return fmt.Errorf("rootfs: chroot: %w", err)
		}
	}
	if a.mountNS, err = a.rt.openProc("thread-self/ns/mnt", unix.O_RDONLY); err != nil {
		return err
	}
	for i := range a.mounts {
		if err := a.attach(&a.mounts[i]); err != nil {
			return fmt.Errorf("mount %q: %w", a.mounts[i].dest, err)
		}
	}
	if err := a.finishDev(); err != nil {
		return err
	}
	if err := a.makeCwd(); err != nil {
		return err
	}
	return a.protect()
}

// enterBase moves the thread to a new mount namespace and returns the directory
// in it that the container's root is to lie upon, with the sources of masks. The
// namespace is a copy of the empty one; for hooks that look for the host's files
// it is a copy of the host's, with a small filesystem like the empty one's over
// root.path.
func (a *assembly) enterBase() (*os.File, error) {
	if !a.plan.hostTree() {
		if err := unix.Setns(int(a.rt.empty.Fd()), unix.CLONE_NEWNS); err != nil {
			return nil, fmt.Errorf("enter the empty mount namespace: %w", err)
		}
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return nil, fmt.Errorf("new mount namespace: %w", err)
		}
		return os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY, 0)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("new mount namespace: %w", err)
	}
	// Nothing of the container may reach the host, and what the host unmounts goes.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return nil, fmt.Errorf("mount propagation: %w", err)
	}
	path := a.plan.spec.Root.Path
	at, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, invalid("root.path %q: %w", path, err)
	}
	defer at.Close()
	hidden, err := kernel.NewEmptyFS()
	if err != nil {
		return nil, err
	}
	if err := kernel.Attach(hidden, at); err != nil {
		hidden.Close()
		return nil, err
	}
	return hidden, nil
}

// placeWitness mounts a procfs beside the root. In a user namespace the kernel
// lets the container's own procfs be mounted only where there is one already that
// hides nothing. This one shows next to nothing, no files but processes, and of
// these only the reader's own; and it goes before the user's program runs, or
// that could mount a procfs without masks.
func (a *assembly) placeWitness(hidden *os.File) error {
	atime := uint64(0)
	for _, m := range a.mounts {
		if m.fstype == "proc" {
			atime = (m.attr.Attr_set | m.rattr.Attr_set) & unix.MOUNT_ATTR__ATIME // must be the same
		}
	}
	attrs := unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC | int(atime)
	w, err := kernel.NewFS("proc", []kernel.FSOption{{Key: "subset", Value: "pid"}, {Key: "hidepid", Value: "ptraceable"}}, attrs)
	if err != nil {
		return fmt.Errorf("procfs beside the root: %w", err)
	}
	defer w.Close()
	at, err := kernel.OpenInRoot(hidden, kernel.EmptyProc, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer at.Close()
	return kernel.Attach(w, at)
}

// attach makes what is to be made inside the namespaces and puts it in place.
func (a *assembly) attach(p *prepared) error {
	for i := range a.procs {
		if rel, ok := below(a.procs[i].dest, p.dest); ok {
			if p.fstype != "bind" || !slices.Contains(procBinds, rel) {
				return invalid("%s.destination: nothing but a bind of a known file may cover procfs", p.field)
			}
			f, err := dup(p.file)
			if err != nil {
				return err
			}
			a.procs[i].binds = append(a.procs[i].binds, procBind{rel, f})
			return nil
		}
	}
	at, err := a.mountPoint(p)
	if err != nil {
		return err
	}
	defer at.Close()
	switch p.fstype {
	case "proc":
		keep, err := dup(at)
		if err != nil {
			return err
		}
		a.procs = append(a.procs, procMount{mount: p.mount, at: keep})
		return nil
	}
	if p.copyUp {
		if err := copyUp(at, p.file); err != nil {
			return fmt.Errorf("tmpcopyup: %w", err)
		}
	}
	if p.remount {
		return p.remountAt(at)
	}
	if err := kernel.Attach(p.file, at); err != nil {
		return err
	}
	for _, part := range p.parts {
		d, err := kernel.OpenInRoot(p.file, part.name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		err = kernel.Attach(part.file, d)
		d.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	if len(p.parts) > 0 { // only now: its entries are complete
		attr := &unix.MountAttr{Attr_set: p.attr.Attr_set | p.rattr.Attr_set}
		if err := kernel.SetMountAttr(p.file, false, attr); err != nil {
			return err
		}
	}
	if p.fstype == "devpts" && p.dest == "/dev/pts" {
		a.pts, err = dup(p.file)
	}
	return err
}

// below reports whether p lies strictly below dir and where.
func below(dir, p string) (string, bool) {
	rel, ok := strings.CutPrefix(p, strings.TrimSuffix(dir, "/")+"/")
	return rel, ok && rel != ""
}

// mountPoint opens the destination, making it if it is missing. procfs and
// sysfs must lie on a real directory: an image that makes /proc a symlink could
// have the runtime's later writes go elsewhere (invariant I2).
func (a *assembly) mountPoint(p *prepared) (*os.File, error) {
	strict := p.fstype == "proc" || p.fstype == "sysfs" || p.dest == "/proc" || p.dest == "/sys"
	if !strict {
		return kernel.MakeInRoot(a.root, p.dest, p.isDir)
	}
	at, err := openRealDir(a.root, p.dest)
	if errors.Is(err, unix.ENOENT) {
		f, err := kernel.MakeInRoot(a.root, p.dest, true)
		if err != nil {
			return nil, err
		}
		f.Close()
		return openRealDir(a.root, p.dest)
	}
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return nil, invalid("%s.destination: the image has no real directory there: %w", p.field, err)
	}
	return at, err
}

// openRealDir opens a directory below root through no link at all.
func openRealDir(root *os.File, name string) (*os.File, error) {
	fd, err := unix.Openat2(int(root.Fd()), name, realDir)
	if err != nil {
		return nil, fmt.Errorf("mount point: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// newFS makes the filesystem of a spec's mount inside the namespaces.
func (a *assembly) newFS(p *prepared) error {
	opts, err := p.hostIDs(a.plan.maps)
	if err != nil {
		return err
	}
	if p.source != "" && p.source != p.fstype && p.source != "none" {
		opts = append([]kernel.FSOption{{Key: "source", Value: p.source}}, opts...)
	}
	set := p.attr.Attr_set | p.rattr.Attr_set
	// Read-only comes last for /dev: its devices are still to be made.
	late := p.dest == "/dev" && set&unix.MOUNT_ATTR_RDONLY != 0
	if late {
		set &^= unix.MOUNT_ATTR_RDONLY
	}
	if p.fstype == "devpts" && !slices.ContainsFunc(opts, func(o kernel.FSOption) bool { return o.Key == "newinstance" }) {
		opts = append(opts, kernel.FSOption{Key: "newinstance", Flag: true})
	}
	if l := a.plan.spec.Linux.MountLabel; l != "" && labelled(p.fstype) {
		opts = append(opts, kernel.FSOption{Key: "context", Value: l})
	}
	f, err := newMount(p.fstype, opts, int(set))
	if err != nil {
		return err
	}
	p.file = a.use(f)
	if uid, ok := a.plan.maps.uid(0); p.fstype == "devpts" && ok && uid != 0 {
		// devpts gives ptmx to the root of the user namespace that it is made in.
		if err := unix.Fchownat(int(f.Fd()), "ptmx", int(uid), -1, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("ptmx: %w", err)
		}
	}
	if p.rattr.Propagation != unix.MS_PRIVATE {
		if err := kernel.SetMountAttr(f, false, &unix.MountAttr{Propagation: p.rattr.Propagation}); err != nil {
			return err
		}
	}
	if p.fstype == "tmpfs" && p.dest == "/dev" {
		a.devReadonly = late
		return a.fillDev(f)
	}
	return nil
}

// labelled tells the filesystems that take an SELinux label for all their files.
// procfs, sysfs and the cgroups are labelled by policy.
func labelled(fstype string) bool {
	switch fstype {
	case "tmpfs", "devpts", "mqueue", "ramfs":
		return true
	}
	return false
}

// makeCwd makes the working directory if it is missing. One below procfs can
// only be a trick with magic links; Start refuses it.
func (a *assembly) makeCwd() error {
	if a.plan.spec.Process == nil || a.podInit {
		return nil
	}
	cwd := path.Clean(a.plan.spec.Process.Cwd)
	for _, p := range a.procs {
		if _, ok := below(p.dest, cwd); ok || p.dest == cwd {
			return nil
		}
	}
	f, err := kernel.MakeInRoot(a.root, cwd, true)
	if err != nil {
		return invalid("process.cwd: %w", err)
	}
	return f.Close()
}
