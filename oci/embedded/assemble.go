package embedded

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

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

// part is a detached mount that belongs on a directory or file of another.
type part struct {
	name string
	file *os.File
}

// procMount is a procfs that the container's first process mounts: only a
// member of the PID namespace can. Masks and binds below it wait until then.
type procMount struct {
	mount
	at       *os.File // its mount point
	readonly []string // relative paths; "." is all of it
	masked   []procMask
	binds    []procBind
}

type procMask struct {
	rel   string
	isDir bool
	file  *os.File // a mask of its own, detached; nil: one of the common sources
}

type procBind struct {
	field string
	rel   string
	file  *os.File // detached
}

// assembly is the thread-bound work of Create.
type assembly struct {
	*Container
	req     oci.CreateRequest
	found   nsFiles
	rootfs  *os.File
	proc    *os.File // a clone of /proc, for a nested runtime
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
			empty, err := c.rt.emptyNS()
			if err == nil {
				c.mountNS, err = kernel.Dup(empty)
			}
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

// use keeps f until the assembly is done.
func (a *assembly) use(f *os.File) *os.File {
	a.closers = append(a.closers, f)
	return f
}

// attach makes what is to be made inside the namespaces and puts it in place.
func (a *assembly) attach(p *prepared) error {
	for i := range a.procs {
		if rel, ok := below(a.procs[i].dest, p.dest); ok {
			if p.fstype != "bind" || !slices.Contains(procBinds, rel) {
				return invalid("%s.destination: nothing but a bind of a known file may cover procfs", p.field)
			}
			f, err := kernel.Dup(p.file)
			if err != nil {
				return err
			}
			a.procs[i].binds = append(a.procs[i].binds, procBind{p.field, rel, f})
			return nil
		}
	}
	if p.takesMode() {
		if err := a.takeMode(p); err != nil {
			return err
		}
	}
	at, err := a.mountPoint(p)
	if err != nil {
		return err
	}
	defer at.Close()
	switch p.fstype {
	case "proc":
		keep, err := kernel.Dup(at)
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
		d, err := kernel.OpenInRoot(p.file, part.name, unix.O_PATH|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		err = kernel.Attach(part.file, d)
		d.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	if len(p.parts) > 0 && p.fstype != "tmpfs" { // only now: its entries are complete
		attr := &unix.MountAttr{Attr_set: p.attr.Attr_set | p.rattr.Attr_set}
		if err := kernel.SetMountAttr(p.file, false, attr); err != nil {
			return err
		}
	}
	if p.fstype == "devpts" && p.dest == "/dev/pts" {
		a.pts, err = kernel.Dup(p.file)
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
	if p.dest == "/proc" && p.file != nil {
		// What is written there later must go to procfs (CVE-2019-16884).
		var fs unix.Statfs_t
		if err := unix.Fstatfs(int(p.file.Fd()), &fs); err != nil || fs.Type != unix.PROC_SUPER_MAGIC {
			return nil, invalid("%s.destination: nothing but procfs may be mounted on /proc", p.field)
		}
	}
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
