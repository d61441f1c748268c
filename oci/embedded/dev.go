package embedded

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// defaultDevices are in every container (runtime-spec, "Default Devices").
var defaultDevices = []struct {
	name         string
	major, minor uint32
}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}}

var devLinks = [][2]string{
	{"fd", "/proc/self/fd"}, {"stdin", "/proc/self/fd/0"}, {"stdout", "/proc/self/fd/1"},
	{"stderr", "/proc/self/fd/2"}, {"ptmx", "pts/ptmx"},
}

// fillDev populates the detached tmpfs of p, which will be /dev.
func (a *assembly) fillDev(p *prepared) error {
	a.dev = p.file
	dev, fd := p.file, int(p.file.Fd())
	for _, d := range defaultDevices {
		rdev := unix.Mkdev(d.major, d.minor)
		err := unix.Mknodat(fd, d.name, unix.S_IFCHR|0o666, int(rdev))
		if err == unix.EPERM && a.rt.nested {
			err = a.bindDevice(p, d.name, "/dev/"+d.name, unix.S_IFCHR, rdev)
		}
		if err != nil {
			return fmt.Errorf("device %s: %w", d.name, err)
		}
	}
	for _, l := range devLinks {
		if err := unix.Symlinkat(l[1], fd, l[0]); err != nil {
			return fmt.Errorf("symlink %s: %w", l[0], err)
		}
	}
	for i := range a.plan.spec.Linux.Devices {
		d := &a.plan.spec.Linux.Devices[i]
		rel, ok := below("/dev", path.Clean(d.Path))
		if !ok {
			continue
		}
		err := makeDevice(dev, rel, d, a.plan.maps)
		if errors.Is(err, unix.EPERM) && a.rt.nested {
			if hasDefault(rel) {
				continue // bound already
			}
			err = a.bindDevice(p, rel, d.Path, 0, unix.Mkdev(uint32(d.Major), uint32(d.Minor)))
		}
		if err != nil {
			return fmt.Errorf("linux.devices %q: %w", d.Path, err)
		}
	}
	return nil
}

func hasDefault(name string) bool {
	for _, d := range defaultDevices {
		if d.name == name {
			return true
		}
	}
	return false
}

// bindDevice puts the host's node at path on an empty file: in a user namespace
// no device may be made. kind 0 is any.
func (a *assembly) bindDevice(p *prepared, name, path string, kind uint32, rdev uint64) error {
	t, err := kernel.CloneTree(unix.AT_FDCWD, path, false)
	if err != nil {
		return err
	}
	a.use(t)
	var st unix.Stat_t
	if err := unix.Fstat(int(t.Fd()), &st); err != nil {
		return err
	}
	if k := st.Mode & unix.S_IFMT; st.Rdev != rdev || k != unix.S_IFCHR && k != unix.S_IFBLK || kind != 0 && k != kind {
		return invalid("%s of the host is another device", path)
	}
	at, err := kernel.MakeInRoot(p.file, name, false)
	if err != nil {
		return err
	}
	p.parts = append(p.parts, part{name, t})
	return at.Close()
}

// makeDevice makes a node below root by the parent's descriptor. An owner that
// the container's user namespace does not have is its root.
func makeDevice(root *os.File, p string, d *specs.LinuxDevice, maps idMaps) error {
	var mode uint32
	switch d.Type {
	case "c", "u":
		mode = unix.S_IFCHR
	case "b":
		mode = unix.S_IFBLK
	case "p":
		mode = unix.S_IFIFO
	default:
		return invalid("type %q: want c, u, b or p", d.Type)
	}
	perm := uint32(0o666)
	if d.FileMode != nil {
		perm = uint32(d.FileMode.Perm())
	}
	dir, name := path.Split(path.Clean("/" + p))
	if name == "" {
		return invalid("path %q: no name", d.Path)
	}
	parent, err := kernel.MakeInRoot(root, dir, true)
	if err != nil {
		return err
	}
	defer parent.Close()
	fd := int(parent.Fd())
	dev := int(unix.Mkdev(uint32(d.Major), uint32(d.Minor)))
	err = unix.Mknodat(fd, name, mode|perm, dev)
	if err == unix.EEXIST {
		// A default device given again replaces ours; in an image's own /dev
		// whatever has the name goes.
		if err = unix.Unlinkat(fd, name, 0); err == nil {
			err = unix.Mknodat(fd, name, mode|perm, dev)
		}
	}
	if err != nil {
		return fmt.Errorf("mknod: %w", err)
	}
	uid, gid := -1, -1 // the thread's, which is the container's root
	if d.UID != nil && *d.UID != 0 {
		if id, ok := maps.uid(*d.UID); ok {
			uid = int(id)
		}
	}
	if d.GID != nil && *d.GID != 0 {
		if id, ok := maps.gid(*d.GID); ok {
			gid = int(id)
		}
	}
	if uid >= 0 || gid >= 0 {
		if err := unix.Fchownat(fd, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("chown: %w", err)
		}
	}
	return nil
}

// finishDev makes devices outside of a tmpfs /dev, and the console.
func (a *assembly) finishDev() error {
	for i := range a.plan.spec.Linux.Devices {
		d := &a.plan.spec.Linux.Devices[i]
		_, inDev := below("/dev", path.Clean(d.Path))
		if inDev && (a.dev != nil || a.bound("/dev")) {
			continue
		}
		if err := makeDevice(a.root, strings.TrimPrefix(path.Clean(d.Path), "/"), d, a.plan.maps); err != nil {
			return fmt.Errorf("linux.devices %q: %w", d.Path, err)
		}
	}
	if a.plan.spec.Process != nil && a.plan.spec.Process.Terminal && !a.podInit {
		if err := a.makeConsole(); err != nil {
			return err
		}
	}
	if a.devReadonly {
		if err := kernel.SetMountAttr(a.dev, false, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fmt.Errorf("mount \"/dev\": %w", err)
		}
	}
	return nil
}

// bound reports whether the spec mounts something at dest that brings its own content.
func (a *assembly) bound(dest string) bool {
	for _, m := range a.mounts {
		if m.dest == dest && m.fstype != "tmpfs" {
			return true
		}
	}
	return false
}

// makeConsole opens the first process's pty in the container's devpts and binds
// its terminal, by descriptor, to /dev/console (invariant I3).
func (a *assembly) makeConsole() error {
	if a.pts == nil {
		return invalid("process.terminal: the spec mounts no devpts at /dev/pts")
	}
	var err error
	if a.ptyMaster, a.ptySlave, err = openPty(a.pts, a.plan.spec.Process.ConsoleSize); err != nil {
		return err
	}
	at, err := kernel.MakeInRoot(a.root, "/dev/console", false)
	if err != nil {
		return fmt.Errorf("/dev/console: %w", err)
	}
	defer at.Close()
	t, err := kernel.CloneTree(int(a.ptySlave.Fd()), "", false)
	if err != nil {
		return fmt.Errorf("/dev/console: %w", err)
	}
	defer t.Close()
	if err := kernel.Attach(t, at); err != nil {
		return fmt.Errorf("/dev/console: %w", err)
	}
	return nil
}

// openPty makes a pty in the devpts instance mounted at pts. The slave is
// opened through the master, never by a path in the container.
func openPty(pts *os.File, size *specs.Box) (master, slave *os.File, err error) {
	fd, err := unix.Openat(int(pts.Fd()), "ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("pty: open ptmx: %w", err)
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	defer func() {
		if err != nil {
			err = errors.Join(err, master.Close())
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, fmt.Errorf("pty: unlock: %w", err)
	}
	if size != nil {
		ws := &unix.Winsize{Row: uint16(size.Height), Col: uint16(size.Width)}
		if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, ws); err != nil {
			return nil, nil, fmt.Errorf("pty: size: %w", err)
		}
	}
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return nil, nil, fmt.Errorf("pty: open terminal: %w", errno)
	}
	return master, os.NewFile(peer, "terminal"), nil
}
