package external

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci"
)

// mountRoot mounts the root filesystem in the calling thread's mount namespace
// and names it in the spec.
func (c *Container) mountRoot(req oci.CreateRequest) error {
	if len(req.Rootfs.Lowers) == 0 {
		if !filepath.IsAbs(c.spec.Root.Path) {
			c.spec.Root.Path = filepath.Join(req.Bundle, c.spec.Root.Path)
		}
		return nil
	}
	c.spec.Root.Path = filepath.Join(c.dir, rootfsDir)
	err := mountLayers(req.Rootfs, c.spec.Root.Path)
	if errors.Is(err, unix.EINVAL) && req.Rootfs.Reuse() {
		err = mountLayers(req.Rootfs, c.spec.Root.Path)
	}
	if err != nil {
		return fmt.Errorf("rootfs: %w", err)
	}
	return nil
}

// mountLayers mounts an overlay, or a single read-only layer, on the folder at.
// mount(2) takes one page of options on every kernel. The layers are named in it
// by the numbers of their descriptors, relative to /proc/self/fd as the working
// directory: room for some 800, more than overlayfs takes. The calling thread
// must have its own working directory and be in the namespace of the mount, for
// overlayfs takes no layer of another.
func mountLayers(r oci.Rootfs, at string) (err error) {
	if r.Upper == "" && len(r.Lowers) == 1 {
		return bindReadonly(r.Lowers[0], at)
	}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	name := func(path string) string {
		f, oerr := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if oerr != nil {
			if err == nil {
				err = oerr
			}
			return ""
		}
		files = append(files, f)
		return strconv.Itoa(int(f.Fd()))
	}
	lowers := make([]string, len(r.Lowers))
	for i, l := range r.Lowers {
		lowers[i] = name(l)
	}
	data := "lowerdir=" + strings.Join(lowers, ":")
	if r.Upper != "" {
		data += ",upperdir=" + name(r.Upper) + ",workdir=" + name(r.Work)
		if r.Volatile {
			data += ",volatile"
		}
	}
	if err != nil {
		return err
	}
	if len(data) >= os.Getpagesize() {
		return invalid("lowers: %d layers are more than the kernel takes", len(r.Lowers))
	}
	if err := unix.Chdir("/proc/self/fd"); err != nil {
		return fmt.Errorf("/proc/self/fd: %w", err)
	}
	defer func() { _ = unix.Chdir("/") }() // the thread ends soon, but keeps no proc busy
	if err := unix.Mount("overlay", at, "overlay", 0, data); err != nil {
		return fmt.Errorf("mount overlay: %w", err)
	}
	return nil
}

func bindReadonly(layer, at string) error {
	if err := unix.Mount(layer, at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("layer %q: %w", layer, err)
	}
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(unix.AT_FDCWD, at, unix.AT_RECURSIVE, attr); err != nil {
		return fmt.Errorf("layer %q: mount_setattr: %w", layer, err)
	}
	return nil
}
