package external

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

// Prefixes of bind sources that are no paths: a passed descriptor, an image.
const (
	fdSource    = "fd:"
	imageSource = "image:"
)

// bound is a source of a bind mount that is put in the bundle, because the
// runtime can be told paths only.
type bound struct {
	mount *specs.Mount
	tree  *os.File    // a detached mount, or
	image *oci.Volume // an image that is mounted in the namespace
}

// buildBundle makes the container's mount namespace with everything that the
// runtime is to find at a path, and names those paths in the spec.
func (c *Container) buildBundle(req oci.CreateRequest) (ns *os.File, err error) {
	for _, d := range []string{rootfsDir, mountsDir, nsDir} {
		if err := os.Mkdir(filepath.Join(c.dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	sources, err := c.sources(req)
	defer func() {
		for _, s := range sources {
			if s.tree != nil {
				s.tree.Close()
			}
		}
	}()
	if err != nil {
		return nil, err
	}
	err = kernel.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare mount namespace: %w", err)
		}
		// What we mount stays here; what the host mounts or unmounts comes in.
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return fmt.Errorf("make mounts slaves: %w", err)
		}
		if err := c.mountRoot(req); err != nil {
			return err
		}
		for i, s := range sources {
			if err := c.place(s, strconv.Itoa(i)); err != nil {
				return fmt.Errorf("mount %q: source %q: %w", s.mount.Destination, s.mount.Source, err)
			}
		}
		if err := c.bindNamespaces(req.Namespaces); err != nil {
			return err
		}
		ns, err = kernel.MountNS.OpenCurrent()
		return err
	})
	return ns, err
}

// sources lists the binds whose source must be put in the bundle. Their trees
// are cloned here, in the host's mount namespace: the kernel clones none of
// another namespace, and a clone made here stays in its peer group, where one
// from the container's namespace would be a slave and nothing mounted by the
// container would come out.
func (c *Container) sources(req oci.CreateRequest) (out []bound, err error) {
	for i := range c.spec.Mounts {
		m := &c.spec.Mounts[i]
		rec := slices.Contains(m.Options, "rbind")
		if m.Type != "bind" && !rec && !slices.Contains(m.Options, "bind") {
			continue
		}
		field := fmt.Sprintf("mounts[%d].source %q", i, m.Source)
		var s bound
		if name, ok := strings.CutPrefix(m.Source, imageSource); ok {
			v, ok := req.Volumes[name]
			if !ok || len(v.Lowers) == 0 {
				return out, invalid("%s: no such image was passed", field)
			}
			s = bound{mount: m, image: &v}
		} else if name, ok := strings.CutPrefix(m.Source, fdSource); ok {
			f := req.MountFDs[name]
			if f == nil {
				return out, invalid("%s: no such descriptor was passed", field)
			}
			if s.tree, err = kernel.CloneHeld(f, rec); err != nil {
				return out, fmt.Errorf("%s: %w", field, err)
			}
			s.mount = m
		} else if slices.Contains(m.Options, "rshared") || slices.Contains(m.Options, "shared") {
			if s.tree, err = kernel.CloneTree(unix.AT_FDCWD, m.Source, rec); err != nil {
				return out, fmt.Errorf("%s: %w", field, err)
			}
			s.mount = m
		} else {
			continue
		}
		out = append(out, s)
	}
	return out, nil
}

// place mounts a source at mounts/NAME of the bundle.
func (c *Container) place(s bound, name string) error {
	path := filepath.Join(c.dir, mountsDir, name)
	if s.image != nil {
		whole := filepath.Join(c.dir, mountsDir, name+".image")
		if err := os.Mkdir(whole, 0o755); err != nil {
			return err
		}
		if err := mountLayers(oci.Rootfs{Lowers: s.image.Lowers}, whole); err != nil {
			return err
		}
		tree, err := openInImage(whole, s.image.SubPath)
		if err != nil {
			return err
		}
		defer tree.Close()
		s.tree = tree
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(s.tree.Fd()), &st); err != nil {
		return err
	}
	if err := attach(s.tree, path, st.Mode&unix.S_IFMT == unix.S_IFDIR); err != nil {
		return err
	}
	s.mount.Source = path
	return nil
}

// openInImage clones a path of a mounted image, resolved without leaving it
// (invariant I1).
func openInImage(mounted, sub string) (*os.File, error) {
	root, err := os.OpenFile(mounted, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if sub == "" {
		return kernel.CloneTree(int(root.Fd()), "", false)
	}
	at, err := kernel.OpenInRoot(root, sub, unix.O_PATH, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, invalid("sub path %q: not in the image", sub)
	}
	if err != nil {
		return nil, err
	}
	defer at.Close()
	return kernel.CloneTree(int(at.Fd()), "", false)
}

// attach makes path, a folder or an empty file, and puts the detached mount on it.
func attach(tree *os.File, path string, dir bool) error {
	var err error
	if dir {
		err = os.Mkdir(path, 0o755)
	} else {
		err = os.WriteFile(path, nil, 0o600)
	}
	if err != nil {
		return err
	}
	at, err := os.OpenFile(path, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer at.Close()
	return kernel.Attach(tree, at)
}

// bindNamespaces binds the namespaces that are joined as files: paths that every
// runtime can open, for as long as the container lives.
func (c *Container) bindNamespaces(joined map[specs.LinuxNamespaceType]*os.File) error {
	for kind, f := range joined {
		path := filepath.Join(c.dir, nsDir, string(kind))
		tree, err := kernel.CloneTree(int(f.Fd()), "", false)
		if err == nil {
			err = attach(tree, path, false)
			tree.Close()
		}
		if err != nil {
			return fmt.Errorf("linux.namespaces: %s: %w", kind, err)
		}
		i := slices.IndexFunc(c.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == kind })
		if i < 0 {
			i = len(c.spec.Linux.Namespaces)
			c.spec.Linux.Namespaces = append(c.spec.Linux.Namespaces, specs.LinuxNamespace{Type: kind})
		}
		c.spec.Linux.Namespaces[i].Path = path
	}
	return nil
}

// Names in a bundle.
const (
	rootfsDir  = "rootfs"
	mountsDir  = "mounts"
	nsDir      = "ns"
	configFile = "config.json"
	labelFile  = "berth.json"
)

// label is what a later supervisor needs to take a container down.
type label struct {
	Command oci.Command `json:"command"`
	Cgroup  string      `json:"cgroup,omitempty"`
}

func writeLabel(dir string, l label) error {
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, labelFile), b, 0o600)
}

// removeBundle removes a bundle's folder. It never descends into what could be a
// mount: rmdir and unlink fail there, where a recursive removal would empty a volume.
func removeBundle(dir string) error {
	var errs []error
	remove := func(path string) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	for _, sub := range []string{mountsDir, nsDir} {
		entries, _ := os.ReadDir(filepath.Join(dir, sub)) // missing in a half-made one
		for _, e := range entries {
			remove(filepath.Join(dir, sub, e.Name()))
		}
	}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.Name() != labelFile {
			remove(filepath.Join(dir, e.Name()))
		}
	}
	if len(errs) == 0 { // the label goes last: with it the rest is found again
		remove(filepath.Join(dir, labelFile))
		remove(dir)
	}
	return errors.Join(errs...)
}
