package embedded

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

// layersDetached reports whether overlayfs takes layers whose mounts are in no
// mount namespace (Linux 6.15).
var layersDetached = sync.OnceValue(func() bool {
	if !lowerByLower() {
		return false
	}
	opts := []kernel.FSOption{{Key: "source", Value: "overlay"}}
	for range 2 { // a read-only overlay has two layers at least
		l, err := kernel.NewFS("tmpfs", []kernel.FSOption{{Key: "size", Value: "4096"}}, 0)
		if err != nil {
			return false
		}
		defer l.Close()
		opts = append(opts, kernel.FSOption{Key: "lowerdir+", Value: fmt.Sprintf("/proc/self/fd/%d", l.Fd())})
	}
	m, err := kernel.NewFS("overlay", opts, 0)
	if err != nil {
		return false
	}
	m.Close()
	return true
})

// idmapLayer shows the files of the detached mount m with the ids of the user
// namespace user.
func idmapLayer(m, user *os.File) error {
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(user.Fd())}
	if err := kernel.SetMountAttr(m, false, attr); err != nil {
		return fmt.Errorf("idmap: the file system of the image's layers may not support it: %w", err)
	}
	return nil
}

// idmappedLayer is a detached, idmapped mount of a layer.
func idmappedLayer(path string, user *os.File) (*os.File, error) {
	m, err := kernel.CloneTree(unix.AT_FDCWD, path, false)
	if err == nil {
		if err = idmapLayer(m, user); err == nil {
			return m, nil
		}
		m.Close()
	}
	return nil, fmt.Errorf("rootfs.lowers %q: %w", path, err)
}

// attachedOverlay makes an overlay of idmapped layers where layers must be in the
// mount namespace of their user: they are mounted in a copy of the namespace that
// dies with its thread. The overlay has clones of its own.
func attachedOverlay(r oci.Rootfs, user *os.File) (m *os.File, err error) {
	err = kernel.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		if r.Lowers, err = attachLayers(r.Lowers, user); err != nil {
			return err
		}
		opts, files, err := overlayOptions(r)
		defer closeLayers(files)
		if err != nil {
			return err
		}
		if len(opts[0].Value) <= maxFSString {
			m, err = kernel.NewFS("overlay", append(opts, kernel.FSOption{Key: "source", Value: "overlay"}), 0)
			return err
		}
		m, err = mountByData("overlay", opts)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("rootfs: %w", err)
	}
	return m, nil
}

// attachLayers mounts the layers, idmapped, in a small filesystem over /sys, which
// is not needed by this thread, and returns where they are.
func attachLayers(layers []string, user *os.File) ([]string, error) {
	at, err := kernel.NewFS("tmpfs", []kernel.FSOption{{Key: "mode", Value: "700"}}, 0)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	if err := unix.MoveMount(int(at.Fd()), "", unix.AT_FDCWD, "/sys", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, fmt.Errorf("move_mount: %w", err)
	}
	out := make([]string, len(layers))
	for i, l := range layers {
		name := strconv.Itoa(i)
		if err := unix.Mkdirat(int(at.Fd()), name, 0o700); err != nil {
			return nil, fmt.Errorf("mkdir: %w", err)
		}
		m, err := idmappedLayer(l, user)
		if err != nil {
			return nil, err
		}
		err = unix.MoveMount(int(m.Fd()), "", int(at.Fd()), name, unix.MOVE_MOUNT_F_EMPTY_PATH)
		m.Close()
		if err != nil {
			return nil, fmt.Errorf("rootfs.lowers %q: move_mount: %w", l, err)
		}
		out[i] = "/sys/" + name
	}
	return out, nil
}

// fsName names the filesystem that path lies on, for errors.
func fsName(path string) string {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &st); err != nil {
		return "the filesystem"
	}
	table, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return "the filesystem"
	}
	id := strconv.FormatUint(st.Mnt_id, 10) + " "
	for line := range strings.Lines(string(table)) {
		if _, tail, ok := strings.Cut(line, " - "); ok && strings.HasPrefix(line, id) {
			name, _, _ := strings.Cut(tail, " ")
			return "the filesystem (" + name + ")"
		}
	}
	return "the filesystem"
}

// layersUser opens the user namespace that a request's layers are idmapped with;
// nil when they are not.
func (r *Runtime) layersUser(req oci.CreateRequest, p *plan) (*os.File, error) {
	if !req.Rootfs.Idmap {
		return nil, nil
	}
	if f := req.Namespaces[specs.UserNamespace]; f != nil {
		return kernel.Dup(f)
	}
	switch n := p.ns[specs.UserNamespace]; n.mode {
	case nsNew:
		return r.userNSFor(p.maps)
	case nsJoin:
		return openNSPath(specs.UserNamespace, n.path)
	}
	return nil, invalid("rootfs.idmap: set, but linux.namespaces has no user namespace")
}

// NewUserNamespace implements oci.UserNamespaces.
func (r *Runtime) NewUserNamespace(req oci.UserNamespaceRequest) (out []*os.File, err error) {
	if err := errors.Join(checkRanges("uids", req.UIDs), checkRanges("gids", req.GIDs)); err != nil {
		return nil, err
	}
	flags := 0
	for _, t := range req.Kinds {
		switch t {
		case specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace:
			flags |= kernelNames[t].CloneFlag()
		default:
			return nil, invalid("kinds: %q is not made without a process; want network, ipc or uts", t)
		}
	}
	h, err := r.hold(nil, idMaps{req.UIDs, req.GIDs}, flags)
	if err != nil {
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	defer func() {
		if err = errors.Join(err, h.end()); err != nil {
			closeLayers(out)
			out = nil
		}
	}()
	for _, t := range append([]specs.LinuxNamespaceType{specs.UserNamespace}, req.Kinds...) {
		f, err := h.open("ns/"+string(kernelNames[t]), unix.O_RDONLY)
		if err != nil {
			return out, err
		}
		out = append(out, f)
	}
	if len(req.Layers) == 0 {
		return out, nil
	}
	m, err := openRootfs(oci.Rootfs{Lowers: req.Layers}, "", out[0])
	if err != nil {
		return out, fmt.Errorf("idmapped root of %v: %w", req.Layers, err)
	}
	return out, m.Close()
}
