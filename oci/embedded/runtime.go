package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/undo"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// Config configures a Runtime; the zero value serves.
type Config struct {
	// Cgroups makes the cgroups; nil means through the detected hierarchies.
	Cgroups cgroup.Manager
	// KeepKeyring leaves processes in the caller's session keyring.
	KeepKeyring bool
	// Log takes warnings; nil means slog.Default.
	Log *slog.Logger
}

// Runtime makes containers. It holds no list of them.
type Runtime struct {
	cgroups cgroup.Manager
	log     *slog.Logger
	proc    *os.File // a procfs of our own that nothing can be mounted over (invariant I2)
	pidNS   *os.File // our own
	null    *os.File // /dev/null, verified
	caps    capSets  // our own
	filters filterCache
	close   sync.Once

	keepKeyring bool
	// plain is a runtime without privileges: it enters user namespaces that belong
	// to its user and makes nothing itself. nested is one in a user namespace, root
	// there and nobody outside.
	plain, nested bool

	emptyOnce sync.Once
	empty     *os.File // the empty mount namespace; see emptyNS
	emptyErr  error
}

var _ oci.Runtime = (*Runtime)(nil)

// New prepares a runtime. It makes the process non-dumpable: for a moment a
// forked child that is already in a container's PID namespace shares its memory.
func New(c Config) (_ *Runtime, err error) {
	r := &Runtime{cgroups: c.Cgroups, log: c.Log, keepKeyring: c.KeepKeyring}
	if r.log == nil {
		r.log = slog.Default()
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if r.cgroups == nil {
		if r.cgroups, err = cgroup.Detect(); err != nil {
			return nil, err
		}
	}
	if r.caps, err = ownCaps(); err != nil {
		return nil, err
	}
	r.plain = r.caps.effective&(1<<unix.CAP_SYS_ADMIN) == 0
	r.nested = !r.plain && kernel.InUserNamespace()
	if !r.plain {
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
			return nil, fmt.Errorf("prctl PR_SET_DUMPABLE: %w", err)
		}
	}
	if r.proc, err = openProcFS(r.plain || r.nested); err != nil {
		return nil, err
	}
	if r.pidNS, err = os.Open("/proc/self/ns/pid"); err != nil {
		return nil, err
	}
	r.null, err = openNull()
	return r, err
}

// openProcFS makes a procfs of our own. Who may not is content with the one at
// /proc, after a look at what it is.
func openProcFS(unprivileged bool) (*os.File, error) {
	attrs := unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	f, err := kernel.NewFS("proc", nil, attrs)
	if err == nil || !unprivileged {
		return f, err
	}
	fd, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("/proc: %w", err)
	}
	f = os.NewFile(uintptr(fd), "/proc")
	const procRoot = 1 // inode number of a procfs's root
	var fs unix.Statfs_t
	var st unix.Stat_t
	if err := errors.Join(unix.Fstatfs(fd, &fs), unix.Fstat(fd, &st)); err != nil || fs.Type != unix.PROC_SUPER_MAGIC || st.Ino != procRoot {
		f.Close()
		return nil, errors.Join(errors.New("/proc: not a procfs"), err)
	}
	return f, nil
}

// emptyNS is the empty mount namespace, made when it is first needed.
func (r *Runtime) emptyNS() (*os.File, error) {
	r.emptyOnce.Do(func() { r.empty, r.emptyErr = kernel.NewEmptyMountNS() })
	return r.empty, r.emptyErr
}

// openNull opens /dev/null and checks that it is the null device (invariant I3).
func openNull() (*os.File, error) {
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/null: %w", err)
	}
	f := os.NewFile(uintptr(fd), "/dev/null")
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		f.Close()
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
		f.Close()
		return nil, errors.New("/dev/null: not the null device")
	}
	return f, nil
}

// Close releases what New made. Containers stay.
func (r *Runtime) Close() error {
	var err error
	r.close.Do(func() {
		r.emptyOnce.Do(func() { r.emptyErr = os.ErrClosed })
		for _, f := range []*os.File{r.proc, r.empty, r.pidNS, r.null} {
			if f != nil {
				err = errors.Join(err, f.Close())
			}
		}
	})
	return err
}

// Create implements oci.Runtime.
func (r *Runtime) Create(ctx context.Context, req oci.CreateRequest) (_ oci.Container, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if r.plain {
		return nil, fmt.Errorf("create container: without CAP_SYS_ADMIN: run as root, or in a user namespace (see RunInUserNS): %w", errdefs.ErrPermissionDenied)
	}
	p, err := r.plan(req)
	if err != nil {
		return nil, err
	}
	c := &Container{rt: r, id: req.ID, bundle: req.Bundle, plan: p, podInit: req.PodInit, warnings: p.warnings}
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("create container: %w", err), u.Run())
		}
	}()
	u.Push(c.closeFiles)
	// The root's overlay and the cgroups are the two dear parts of a create (0.5
	// ms each) and know nothing of each other; nor does the empty mount namespace,
	// the first time.
	root := r.openRootAside(req, p)
	if hasRoot(req) && p.ownMounts() && !p.hostTree() {
		go r.emptyNS() // Close waits for it
	}
	u.Push(root.discard)
	if p.cgroupPath != "" {
		cg, warnings, err := r.cgroups.Create(p.cgroupPath, p.spec.Linux.Resources)
		if err != nil {
			return nil, err
		}
		c.cgroup = cg
		c.warnings = append(c.warnings, warnings...)
		u.Push(cg.Delete)
		if cg.NeedsProcess() {
			if err := c.standInFor(cg); err != nil {
				return nil, err
			}
		}
		if c.joinDir, err = cg.JoinDir(); err != nil {
			return nil, err
		}
		if c.joinFiles, err = cg.JoinFiles(); err != nil {
			return nil, err
		}
	}
	if err := c.joinRDT(&u); err != nil {
		return nil, err
	}
	if err := c.assemble(req, root); err != nil {
		return nil, err
	}
	for _, w := range c.warnings {
		r.log.Warn("container spec is only partly applied", "container", string(req.ID), "reason", w)
	}
	u.Release()
	return c, nil
}

// standInFor puts a process in a cgroup that is not there without one, until the
// container's own comes.
func (c *Container) standInFor(cg *cgroup.Cgroup) (err error) {
	if c.standIn, err = c.rt.idle(); err != nil {
		return err
	}
	warnings, err := cg.Adopt(c.standIn.Pid)
	c.warnings = append(c.warnings, warnings...)
	return err
}

// joinRDT makes the container's group of resctrl.
func (c *Container) joinRDT(u *undo.Stack) (err error) {
	if c.plan.spec.Linux.IntelRdt == nil {
		return nil
	}
	if c.rdt, err = openRDT(c.id, c.plan.spec.Linux.IntelRdt); err != nil {
		return err
	}
	u.Push(c.rdt.delete)
	files, err := c.rdt.taskFiles()
	c.joinFiles = append(c.joinFiles, files...)
	return err
}

// rootAside is a container's root that is being opened on a goroutine of its own.
type rootAside struct {
	done chan struct{}
	file *os.File
	err  error
}

// openRootAside starts to open the root of a request; nil when it has none.
func (r *Runtime) openRootAside(req oci.CreateRequest, p *plan) *rootAside {
	if !hasRoot(req) {
		return nil
	}
	if !p.ownMounts() {
		// It stays where it is; whether it is there is seen when it is entered.
		done := make(chan struct{})
		close(done)
		aside := &rootAside{done: done}
		if p.spec.Root == nil || p.spec.Root.Path == "" {
			aside.err = invalid("root.path: missing")
		}
		return aside
	}
	path := ""
	if p.spec.Root != nil {
		path = p.spec.Root.Path
	}
	aside := &rootAside{done: make(chan struct{})}
	go func() {
		defer close(aside.done)
		user, err := r.layersUser(req, p)
		if err != nil {
			aside.err = err
			return
		}
		if user != nil {
			defer user.Close()
		}
		if len(req.Rootfs.Lowers) == 0 && path != "" && p.propagate.Propagation == unix.MS_SLAVE {
			aside.file, aside.err = cloneRoot("root.path", path, 0, unix.MS_SLAVE) // of the host's, which must not be cut first
			return
		}
		aside.file, aside.err = openRootfs(req.Rootfs, path, user)
		if errors.Is(aside.err, unix.EINVAL) && req.Rootfs.Reuse() {
			aside.file, aside.err = openRootfs(req.Rootfs, path, user)
		}
	}()
	return aside
}

// take waits for the root and gives it away.
func (r *rootAside) take() (*os.File, error) {
	<-r.done
	f := r.file
	r.file = nil
	return f, r.err
}

// discard waits for the root and closes it unless it was taken.
func (r *rootAside) discard() error {
	if r == nil {
		return nil
	}
	<-r.done
	if r.file == nil {
		return nil
	}
	return r.file.Close()
}

// hasRoot tells a container from a pod's init that stays on the empty tmpfs.
func hasRoot(req oci.CreateRequest) bool { return !req.PodInit || len(req.Rootfs.Lowers) > 0 }
