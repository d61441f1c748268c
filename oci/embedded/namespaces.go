package embedded

import (
	"errors"
	"fmt"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// nsFiles are the namespaces of a container by kind, as they are found.
type nsFiles map[specs.LinuxNamespaceType]*os.File

func (n nsFiles) close() {
	for _, f := range n {
		f.Close()
	}
}

// perThread are the namespaces that a thread can be in alone.
var perThread = []struct {
	spec specs.LinuxNamespaceType
	kind kernel.Namespace
}{{specs.NetworkNamespace, kernel.NetNS}, {specs.IPCNamespace, kernel.IPCNS}, {specs.UTSNamespace, kernel.UTSNS}}

// openNamespaces opens those namespaces that are joined and makes those that a
// thread cannot make for itself: all that belong to a user namespace.
func (a *assembly) openNamespaces() (err error) {
	a.found = nsFiles{}
	for t, n := range a.plan.ns {
		if n.mode != nsJoin {
			continue
		}
		f, err := a.openNS(t)
		if err != nil {
			return fmt.Errorf("linux.namespaces: %s: %w", t, err)
		}
		a.found[t] = f
	}
	if !a.plan.user() {
		return nil
	}
	flags := 0
	for _, k := range perThread {
		if a.plan.ns[k.spec].mode == nsNew {
			flags |= k.kind.CloneFlag()
		}
	}
	if a.plan.ns[specs.TimeNamespace].mode == nsNew {
		flags |= kernel.TimeNS.CloneFlag()
	}
	h, err := a.rt.hold(a.found[specs.UserNamespace], a.plan.maps, flags)
	if err != nil {
		return fmt.Errorf("linux.namespaces: user: %w", err)
	}
	defer func() { err = errors.Join(err, h.end()) }()
	if a.plan.maps, err = a.rt.mapsOf(h.Pid); err != nil {
		return err
	}
	if err := a.checkJoined(); err != nil {
		return err
	}
	open := func(t specs.LinuxNamespaceType, name string) error {
		if a.plan.ns[t].mode != nsNew {
			return nil
		}
		f, err := h.open("ns/"+name, unix.O_RDONLY)
		if err == nil {
			a.found[t] = f
		}
		return err
	}
	for _, k := range perThread {
		if err := open(k.spec, string(k.kind)); err != nil {
			return err
		}
	}
	if a.plan.ns[specs.TimeNamespace].mode == nsNew {
		if err := a.writeTimeOffsets(h.Pid); err != nil {
			return err
		}
	}
	return errors.Join(open(specs.TimeNamespace, "time_for_children"), open(specs.UserNamespace, "user"))
}

// checkJoined compares the mapping of a joined user namespace with the spec.
func (a *assembly) checkJoined() error {
	l := a.plan.spec.Linux
	if len(l.UIDMappings) > 0 && !sameRanges(l.UIDMappings, a.plan.maps.uids) || len(l.GIDMappings) > 0 && !sameRanges(l.GIDMappings, a.plan.maps.gids) {
		return invalid("linux.uidMappings, linux.gidMappings: differ from those of the user namespace that is joined; leave them out")
	}
	if p := a.plan.spec.Process; p != nil {
		return a.plan.checkIDs(&p.User)
	}
	return nil
}

func (a *assembly) openNS(t specs.LinuxNamespaceType) (*os.File, error) {
	if f := a.req.Namespaces[t]; f != nil {
		return kernel.Dup(f)
	}
	return openNSPath(t, a.plan.ns[t].path)
}

// openNSPath opens a namespace of type t by its path.
func openNSPath(t specs.LinuxNamespaceType, path string) (*os.File, error) {
	f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO there must not block
	if err != nil {
		return nil, fmt.Errorf("path: %w", err)
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil {
		f.Close()
		return nil, invalid("path %q: not a namespace", path)
	}
	if want := kernelNames[t].CloneFlag(); kind != want {
		f.Close()
		return nil, invalid("path %q: a namespace of another type", path)
	}
	return f, nil
}

var kernelNames = map[specs.LinuxNamespaceType]kernel.Namespace{
	specs.NetworkNamespace: kernel.NetNS, specs.IPCNamespace: kernel.IPCNS, specs.UTSNamespace: kernel.UTSNS,
	specs.PIDNamespace: kernel.PIDNS, specs.MountNamespace: kernel.MountNS, specs.UserNamespace: kernel.UserNS,
	specs.CgroupNamespace: kernel.CgroupNS, specs.TimeNamespace: kernel.TimeNS,
}

// take gives a found namespace to the container.
func (a *assembly) take(t specs.LinuxNamespaceType) *os.File {
	f := a.found[t]
	delete(a.found, t)
	return f
}

// enterNamespaces moves the thread into the container's net, ipc and uts
// namespaces and keeps them and the others open for Start and Exec.
func (a *assembly) enterNamespaces() error {
	for _, k := range perThread {
		f, err := a.enter(k.spec, k.kind)
		if err != nil {
			return fmt.Errorf("linux.namespaces: %s: %w", k.spec, err)
		}
		if f != nil {
			a.ns = append(a.ns, nsFile{k.kind, f})
		}
	}
	a.joinPID, a.joinCgroupNS, a.userNS = a.take(specs.PIDNamespace), a.take(specs.CgroupNamespace), a.take(specs.UserNamespace)
	if err := a.timeNamespace(); err != nil {
		return fmt.Errorf("linux.namespaces: time: %w", err)
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

// enter moves the thread into a namespace of its kind: found or new.
func (a *assembly) enter(t specs.LinuxNamespaceType, name kernel.Namespace) (*os.File, error) {
	mode := a.plan.ns[t].mode
	if mode == nsHost {
		return nil, nil
	}
	f := a.take(t)
	var err error
	if f != nil {
		err = unix.Setns(int(f.Fd()), name.CloneFlag())
	} else if err = unix.Unshare(name.CloneFlag()); err == nil {
		f, err = a.rt.openProc("thread-self/ns/"+string(name), unix.O_RDONLY)
	}
	if err == nil && name == kernel.NetNS && mode == nsNew {
		err = loopbackUp()
	}
	if err == nil && name == kernel.NetNS && len(a.plan.spec.Linux.NetDevices) > 0 {
		err = a.takeNetDevices(f)
	}
	if err != nil {
		closeAll(&f)
		return nil, err
	}
	return f, nil
}

// takeNetDevices moves the host's devices into the container's namespace ns.
func (a *assembly) takeNetDevices(ns *os.File) error {
	host, err := a.rt.openProc("self/ns/net", unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer host.Close()
	return kernel.In(kernel.NetNS, host, func() error { return moveNetDevices(a.plan.spec.Linux.NetDevices, ns) })
}

// timeNamespace makes or takes the time namespace. The thread itself stays in
// its own: a new one is for children only.
func (a *assembly) timeNamespace() error {
	mode := a.plan.ns[specs.TimeNamespace].mode
	if mode == nsHost {
		return nil
	}
	f := a.take(specs.TimeNamespace)
	if f == nil {
		if err := unix.Unshare(unix.CLONE_NEWTIME); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := a.writeTimeOffsets(unix.Gettid()); err != nil {
			return err
		}
		var err error
		if f, err = a.rt.openProc("thread-self/ns/time_for_children", unix.O_RDONLY); err != nil {
			return err
		}
	}
	a.ns = append(a.ns, nsFile{kernel.TimeNS, f})
	return nil
}

// writeTimeOffsets sets the clocks of the time namespace that the children of
// the thread tid will be in. Nobody may be in it yet.
func (a *assembly) writeTimeOffsets(tid int) error {
	offsets := a.plan.spec.Linux.TimeOffsets
	if len(offsets) == 0 {
		return nil
	}
	f, err := a.rt.openProc(fmt.Sprintf("%d/timens_offsets", tid), unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	var b []byte
	for clock, o := range offsets {
		b = fmt.Appendf(b, "%s %d %d\n", clock, o.Secs, o.Nanosecs)
	}
	if _, err := f.Write(b); err != nil {
		return invalid("linux.timeOffsets: %w", err)
	}
	return nil
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return nil
}

// openProc opens a file of the private procfs. Magic links of a process's own
// directory are the only links followed.
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
