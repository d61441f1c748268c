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
)

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
	if a.rt.nested {
		t, err := kernel.CloneTree(unix.AT_FDCWD, "/proc", true)
		if err != nil {
			return err
		}
		a.proc = a.use(t)
	}
	for _, m := range a.plan.mounts {
		p := prepared{mount: m, isDir: true}
		switch {
		case m.remount:
		case m.fstype == "bind":
			err = a.openBind(&p)
		case m.fstype == "cgroup" || m.fstype == "cgroup2":
			err = a.openCgroups(&p)
		}
		if err != nil {
			return fmt.Errorf("%s %q: %w", m.field, m.dest, err)
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
		empty, err := a.rt.emptyNS()
		if err != nil {
			return err
		}
		t, err := openVolume(empty, v, user)
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
	source := p.source
	if !path.IsAbs(source) {
		if source = path.Join(a.bundle, source); !path.IsAbs(source) {
			return invalid("%s.source %q: want an absolute path where there is no bundle", p.field, p.source)
		}
	}
	t, err := kernel.CloneTree(unix.AT_FDCWD, source, p.recursive)
	if err != nil {
		return fmt.Errorf("source %q: %w", source, err)
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
		if a.plan.user() && !whole && attr.Attr_set&unix.MOUNT_ATTR_RDONLY == 0 {
			if err := a.ownCgroup(t); err != nil {
				return err
			}
		}
		return kernel.SetMountAttr(t, false, attr)
	}
	t, err := kernel.NewFS("tmpfs", []kernel.FSOption{{Key: "source", Value: "tmpfs"}, {Key: "mode", Value: "755"}}, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
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
		if p.remount || p.takesMode() {
			continue
		}
		if err := a.newFS(p); err != nil {
			return fmt.Errorf("%s %q: %w", p.field, p.dest, err)
		}
	}
	return nil
}

// ownCgroup gives the container's cgroup, at dir, to the root of its user
// namespace, which may then make cgroups below it (runtime-spec, "Cgroup
// Ownership"): the directory and the files that the kernel lists for that. The
// limits stay the host's.
func (a *assembly) ownCgroup(dir *os.File) error {
	uid, ok := a.plan.maps.uid(0)
	if !ok {
		return nil
	}
	list, err := os.ReadFile("/sys/kernel/cgroup/delegate")
	if errors.Is(err, os.ErrNotExist) { // before Linux 4.15
		list, err = []byte("cgroup.procs cgroup.subtree_control cgroup.threads"), nil
	}
	if err != nil {
		return fmt.Errorf("cgroup ownership: %w", err)
	}
	for _, name := range append([]string{"."}, strings.Fields(string(list))...) {
		err := unix.Fchownat(int(dir.Fd()), name, int(uid), -1, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil && err != unix.ENOENT { // a controller that is not there
			return fmt.Errorf("cgroup ownership: %s: %w", name, err)
		}
	}
	return nil
}

// newFS makes the filesystem of a spec's mount inside the namespaces.
func (a *assembly) newFS(p *prepared) error {
	opts, err := p.hostIDs(a.plan.maps)
	if err != nil {
		return err
	}
	if p.source != "" {
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
	if errors.Is(err, unix.EPERM) && p.fstype == "sysfs" && a.rt.nested {
		// The network namespace is not ours: what is mounted at /sys shows the same.
		return a.bindSys(p)
	}
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
		return a.fillDev(p)
	}
	return nil
}

// bindSys makes a bind of the host's /sys of a sysfs mount.
func (a *assembly) bindSys(p *prepared) error {
	t, err := kernel.CloneTree(unix.AT_FDCWD, "/sys", true)
	if err != nil {
		return err
	}
	p.file = a.use(t)
	return kernel.SetMountAttr(t, true, &unix.MountAttr{Attr_set: p.attr.Attr_set | p.rattr.Attr_set, Propagation: p.rattr.Propagation})
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
