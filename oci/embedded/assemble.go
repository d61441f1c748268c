package embedded

import (
	"errors"
	"fmt"
	"io/fs"
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
	masked   []string
	binds    []procBind
}

type procBind struct {
	rel  string
	file *os.File // detached
}

// assembly is the thread-bound work of Create.
type assembly struct {
	*Container
	req     oci.CreateRequest
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
		if !withRoot {
			var err error
			c.mountNS, err = dup(c.rt.empty)
			return err
		}
		return a.buildRoot()
	})
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
		t, err := openVolume(a.rt.empty, v)
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
	return p.setAttrs(t)
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

// enterNamespaces moves the thread into the container's net, ipc and uts
// namespaces and keeps them open for Start and Exec.
func (a *assembly) enterNamespaces() error {
	for _, k := range []struct {
		spec specs.LinuxNamespaceType
		name kernel.Namespace
	}{{specs.NetworkNamespace, kernel.NetNS}, {specs.IPCNamespace, kernel.IPCNS}, {specs.UTSNamespace, kernel.UTSNS}} {
		f, err := a.enter(k.spec, k.name)
		if err != nil {
			return fmt.Errorf("linux.namespaces: %s: %w", k.spec, err)
		}
		if f != nil {
			a.ns = append(a.ns, nsFile{k.name, f})
		}
	}
	for _, k := range []struct {
		spec specs.LinuxNamespaceType
		to   **os.File
	}{{specs.PIDNamespace, &a.joinPID}, {specs.CgroupNamespace, &a.joinCgroupNS}} {
		if a.plan.ns[k.spec].mode == nsJoin {
			f, err := a.openNS(k.spec)
			if err != nil {
				return fmt.Errorf("linux.namespaces: %s: %w", k.spec, err)
			}
			*k.to = f
		}
	}
	if h := a.plan.spec.Hostname; h != "" {
		if err := unix.Sethostname([]byte(h)); err != nil {
			return fmt.Errorf("hostname %q: %w", h, err)
		}
	}
	if d := a.plan.spec.Domainname; d != "" {
		if err := unix.Setdomainname([]byte(d)); err != nil {
			return fmt.Errorf("domainname %q: %w", d, err)
		}
	}
	return nil
}

func (a *assembly) openNS(t specs.LinuxNamespaceType) (*os.File, error) {
	if f := a.req.Namespaces[t]; f != nil {
		return dup(f)
	}
	return os.Open(a.plan.ns[t].path)
}

func (a *assembly) enter(t specs.LinuxNamespaceType, name kernel.Namespace) (*os.File, error) {
	switch a.plan.ns[t].mode {
	case nsJoin:
		f, err := a.openNS(t)
		if err != nil {
			return nil, err
		}
		if err := unix.Setns(int(f.Fd()), name.CloneFlag()); err != nil {
			f.Close()
			return nil, fmt.Errorf("setns: %w", err)
		}
		return f, nil
	case nsNew:
		if err := unix.Unshare(name.CloneFlag()); err != nil {
			return nil, fmt.Errorf("unshare: %w", err)
		}
		if name == kernel.NetNS {
			if err := loopbackUp(); err != nil {
				return nil, fmt.Errorf("loopback: %w", err)
			}
		}
		return a.rt.openProc("thread-self/ns/"+string(name), unix.O_RDONLY)
	}
	return nil, nil
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo)
}

// openProc opens a file of the private procfs. Magic links of the calling
// thread's own directory are the only links followed.
func (r *Runtime) openProc(path string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(r.proc.Fd()), path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("proc %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (a *assembly) writeSysctls() error {
	for _, s := range a.plan.sysctls {
		fd, err := unix.Openat2(int(a.rt.proc.Fd()), "sys/"+s.path, &unix.OpenHow{
			Flags:   unix.O_WRONLY | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
		})
		if err == nil {
			_, err = unix.Write(fd, []byte(s.value))
			unix.Close(fd)
		}
		if err != nil {
			return invalid("linux.sysctl %q = %q: %w", s.key, s.value, err)
		}
	}
	return nil
}

// buildRoot makes the mount namespace: the thread enters a copy of the empty
// one, puts the root over "/" and attaches every mount in the spec's order.
func (a *assembly) buildRoot() error {
	if err := unix.Setns(int(a.rt.empty.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter the empty mount namespace: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("new mount namespace: %w", err)
	}
	var err error
	for _, x := range []struct {
		to   **os.File
		name string
	}{{&a.maskDir, "/" + kernel.EmptyDir}, {&a.maskNull, "/" + kernel.EmptyNull}} {
		if *x.to, err = os.OpenFile(x.name, unix.O_PATH, 0); err != nil {
			return err
		}
	}
	if err := unix.MoveMount(int(a.rootfs.Fd()), "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("rootfs: move_mount: %w", err)
	}
	a.root = a.rootfs
	if err := unix.Fchdir(int(a.root.Fd())); err != nil {
		return fmt.Errorf("rootfs: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("rootfs: chroot: %w", err)
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
	case "bind", "cgroup", "cgroup2":
	default:
		if err := a.newFS(p); err != nil {
			return err
		}
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
	how := &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC | unix.O_DIRECTORY | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS,
	}
	fd, err := unix.Openat2(int(a.root.Fd()), p.dest, how)
	if err == unix.ENOENT {
		f, err := kernel.MakeInRoot(a.root, p.dest, true)
		if err != nil {
			return nil, err
		}
		f.Close()
		fd, err = unix.Openat2(int(a.root.Fd()), p.dest, how)
		if err != nil {
			return nil, fmt.Errorf("mount point: %w", err)
		}
		return os.NewFile(uintptr(fd), p.dest), nil
	}
	if err == unix.ELOOP || err == unix.ENOTDIR {
		return nil, invalid("%s.destination: the image has no real directory there: %w", p.field, err)
	}
	if err != nil {
		return nil, fmt.Errorf("mount point: %w", err)
	}
	return os.NewFile(uintptr(fd), p.dest), nil
}

// newFS makes the filesystem of a spec's mount inside the namespaces.
func (a *assembly) newFS(p *prepared) error {
	opts := p.opts
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
	f, err := kernel.NewFS(p.fstype, opts, int(set))
	if err != nil {
		return err
	}
	p.file = a.use(f)
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

// protect makes paths read-only or masks them, and the root itself last.
func (a *assembly) protect() error {
	for _, p := range a.plan.spec.Linux.ReadonlyPaths {
		if !a.protectInProc(path.Clean(p), false) {
			if err := a.readonly(p); err != nil {
				return fmt.Errorf("linux.readonlyPaths %q: %w", p, err)
			}
		}
	}
	for _, p := range a.plan.spec.Linux.MaskedPaths {
		if !a.protectInProc(path.Clean(p), true) {
			if err := a.mask(p); err != nil {
				return fmt.Errorf("linux.maskedPaths %q: %w", p, err)
			}
		}
	}
	var attr unix.MountAttr
	if r := a.plan.spec.Root; r != nil && r.Readonly {
		attr.Attr_set = unix.MOUNT_ATTR_RDONLY
	}
	attr.Propagation = a.plan.propagate
	if attr == (unix.MountAttr{}) {
		return nil
	}
	if err := kernel.SetMountAttr(a.root, false, &attr); err != nil {
		return fmt.Errorf("rootfs: %w", err)
	}
	return nil
}

// protectInProc leaves a path below a procfs to Start.
func (a *assembly) protectInProc(p string, mask bool) bool {
	for i := range a.procs {
		rel, ok := below(a.procs[i].dest, p)
		if !ok {
			continue
		}
		if mask {
			a.procs[i].masked = append(a.procs[i].masked, rel)
		} else {
			a.procs[i].readonly = append(a.procs[i].readonly, rel)
		}
		return true
	}
	return false
}

func (a *assembly) readonly(p string) error {
	at, err := kernel.OpenInRoot(a.root, p, unix.O_PATH, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer at.Close()
	t, err := kernel.CloneTree(int(at.Fd()), "", true)
	if err != nil {
		return err
	}
	defer t.Close()
	if err := kernel.SetMountAttr(t, true, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return err
	}
	return kernel.Attach(t, at)
}

func (a *assembly) mask(p string) error {
	at, err := kernel.OpenInRoot(a.root, p, unix.O_PATH, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer at.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(at.Fd()), &st); err != nil {
		return err
	}
	src, attr := a.maskNull, unix.MountAttr{}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		src, attr.Attr_set = a.maskDir, unix.MOUNT_ATTR_NODEV
	}
	t, err := kernel.CloneTree(int(src.Fd()), "", false)
	if err != nil {
		return err
	}
	defer t.Close()
	if attr.Attr_set != 0 {
		if err := kernel.SetMountAttr(t, false, &attr); err != nil {
			return err
		}
	}
	return kernel.Attach(t, at)
}
