package embedded

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

// maxFSString is the longest value fsconfig(2) takes.
const maxFSString = 255

// openRootfs makes the container's root as a detached mount: an overlay, a
// read-only bind of a single layer, or a bind of a bundle's directory. user is
// the user namespace that the layers are idmapped with; nil leaves them as they are.
func openRootfs(r oci.Rootfs, path string, user *os.File) (*os.File, error) {
	if len(r.Lowers) == 0 {
		if path == "" {
			return nil, invalid("root.path: missing")
		}
		return cloneRoot("root.path", path, 0, unix.MS_PRIVATE)
	}
	if (r.Upper == "") != (r.Work == "") {
		return nil, invalid("rootfs: upper and work go together")
	}
	if r.Upper == "" && len(r.Lowers) == 1 {
		m, err := cloneRoot("rootfs.lowers", r.Lowers[0], unix.MOUNT_ATTR_RDONLY, unix.MS_PRIVATE)
		if err == nil && user != nil {
			if err = idmapLayer(m, user); err != nil {
				m.Close()
			}
		}
		return m, err
	}
	if user != nil && !layersDetached() {
		return attachedOverlay(r, user)
	}
	if !lowerByLower() {
		return olderOverlay(r)
	}
	var keep []*os.File
	defer func() {
		for _, f := range keep {
			f.Close()
		}
	}()
	// A path that is too long for one option is passed by descriptor.
	short := func(p string) (string, error) {
		if len(p) <= maxFSString {
			return p, nil
		}
		f, err := os.OpenFile(p, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return "", err
		}
		keep = append(keep, f)
		return fmt.Sprintf("/proc/self/fd/%d", f.Fd()), nil
	}
	opts := []kernel.FSOption{{Key: "source", Value: "overlay"}}
	for _, l := range r.Lowers {
		if user != nil {
			f, err := idmappedLayer(l, user)
			if err != nil {
				return nil, err
			}
			keep = append(keep, f)
			l = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
		}
		l, err := short(l)
		if err != nil {
			return nil, fmt.Errorf("rootfs.lowers: %w", err)
		}
		opts = append(opts, kernel.FSOption{Key: "lowerdir+", Value: l})
	}
	if r.Upper != "" {
		upper, err1 := short(r.Upper)
		work, err2 := short(r.Work)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("rootfs.upper, rootfs.work: %w", err)
		}
		opts = append(opts, kernel.FSOption{Key: "upperdir", Value: upper}, kernel.FSOption{Key: "workdir", Value: work})
		if r.Volatile {
			opts = append(opts, kernel.FSOption{Key: "volatile", Flag: true})
		}
	}
	m, err := kernel.NewFS("overlay", opts, 0)
	if err != nil {
		return nil, fmt.Errorf("rootfs: %w", err)
	}
	return m, nil
}

// openVolume makes a detached read-only mount of an image, or of a path inside
// it, which is resolved without leaving the image (invariant I1). user is that of
// openRootfs.
func openVolume(empty *os.File, v oci.Volume, user *os.File) (*os.File, error) {
	if len(v.Lowers) == 0 {
		return nil, invalid("volume: has no layers")
	}
	m, err := openRootfs(oci.Rootfs{Lowers: v.Lowers}, "", user)
	if err != nil {
		return nil, err
	}
	if v.SubPath == "" {
		return m, nil
	}
	defer m.Close()
	sub, err := kernel.OpenInRoot(m, v.SubPath, unix.O_PATH, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, invalid("sub path %q: not in the image", v.SubPath)
	}
	if err != nil {
		return nil, err
	}
	defer sub.Close()
	return kernel.CloneDetached(empty, m, sub)
}

func cloneRoot(field, path string, set, propagation uint64) (*os.File, error) {
	m, err := kernel.CloneTree(unix.AT_FDCWD, path, true)
	if err != nil {
		return nil, fmt.Errorf("%s %q: %w: %w", field, path, err, errdefs.ErrInvalidArgument)
	}
	attr := &unix.MountAttr{Attr_set: set, Propagation: propagation}
	if err := kernel.SetMountAttr(m, true, attr); err != nil {
		m.Close()
		return nil, fmt.Errorf("%s %q: %w", field, path, err)
	}
	return m, nil
}
