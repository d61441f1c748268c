package embedded

import (
	"errors"
	"fmt"
	"io/fs"
	"path"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// protect makes paths read-only or masks them, and the root itself last.
func (a *assembly) protect() error {
	for _, p := range a.plan.spec.Linux.ReadonlyPaths {
		inProc, err := a.protectInProc(path.Clean(p), false)
		if err != nil {
			return fmt.Errorf("linux.readonlyPaths %q: %w", p, err)
		}
		if !inProc {
			if err := a.readonly(p); err != nil {
				return fmt.Errorf("linux.readonlyPaths %q: %w", p, err)
			}
		}
	}
	masked := map[string]bool{}
	for _, p := range a.plan.spec.Linux.MaskedPaths {
		if p = path.Clean(p); masked[p] {
			continue // one mask hides as well as two
		}
		masked[p] = true
		inProc, err := a.protectInProc(p, true)
		if err != nil {
			return fmt.Errorf("linux.maskedPaths %q: %w", p, err)
		}
		if !inProc {
			if err := a.mask(p); err != nil {
				return fmt.Errorf("linux.maskedPaths %q: %w", p, err)
			}
		}
	}
	if a.plan.propagate != (unix.MountAttr{}) {
		if err := kernel.SetMountAttr(a.root, a.plan.recursive, &a.plan.propagate); err != nil {
			return fmt.Errorf("linux.rootfsPropagation: %w", err)
		}
	}
	if r := a.plan.spec.Root; r != nil && r.Readonly {
		if err := kernel.SetMountAttr(a.root, false, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fmt.Errorf("root.readonly: %w", err)
		}
	}
	return nil
}

// protectInProc leaves a path below a procfs to Start.
func (a *assembly) protectInProc(p string, mask bool) (bool, error) {
	for i := range a.procs {
		rel, ok := below(a.procs[i].dest, p)
		if p == a.procs[i].dest {
			rel, ok = ".", true
		}
		if !ok {
			continue
		}
		if !mask {
			a.procs[i].readonly = append(a.procs[i].readonly, rel)
			return true, nil
		}
		isDir, ok := a.rt.procKind(rel)
		if !ok {
			return true, nil
		}
		m := procMask{rel: rel, isDir: isDir}
		if a.userNS != nil {
			// The copied namespace cannot clone what lies outside of it.
			src := a.maskNull
			if isDir {
				src = a.maskDir
			}
			t, err := kernel.CloneTree(int(src.Fd()), "", false)
			if err != nil {
				return true, err
			}
			m.file = t
		}
		a.procs[i].masked = append(a.procs[i].masked, m)
		return true, nil
	}
	return false, nil
}

// procKind says what a path of procfs is, looked up in a procfs of our own.
func (r *Runtime) procKind(rel string) (isDir, exists bool) {
	var st unix.Stat_t
	if err := unix.Fstatat(int(r.proc.Fd()), rel, &st, 0); err != nil {
		return false, false
	}
	return st.Mode&unix.S_IFMT == unix.S_IFDIR, true
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
