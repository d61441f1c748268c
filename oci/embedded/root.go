package embedded

import (
	"fmt"
	"os"
	"path"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

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
	beside := a.userNS != nil || a.rt.nested
	if beside {
		if err := a.placeWitness(hidden); err != nil {
			return err
		}
	}
	if beside && !a.plan.hostTree() {
		if at, err = kernel.OpenInRoot(hidden, kernel.EmptyRoot, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err != nil {
			return err
		}
		defer at.Close()
	}
	if err := kernel.Attach(a.rootfs, at); err != nil {
		return fmt.Errorf("rootfs: %w", err)
	}
	a.root = a.rootfs
	if a.plan.hostTree() || beside {
		if a.rootDir, err = kernel.Dup(a.root); err != nil {
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
			return fmt.Errorf("%s %q: %w", a.mounts[i].field, a.mounts[i].dest, err)
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
		empty, err := a.rt.emptyNS()
		if err != nil {
			return nil, err
		}
		if err := unix.Setns(int(empty.Fd()), unix.CLONE_NEWNS); err != nil {
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
	at, err := kernel.OpenInRoot(hidden, kernel.EmptyProc, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer at.Close()
	if a.rt.nested { // it may make no procfs of the PID namespace it is in
		return kernel.Attach(a.proc, at)
	}
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
	return kernel.Attach(w, at)
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
