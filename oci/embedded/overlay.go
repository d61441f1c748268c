package embedded

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

// lowerByLower reports whether overlayfs takes its layers one by one
// ("lowerdir+", Linux 6.7). Before 6.5 fsconfig(2) takes any key for overlayfs
// and only the mount fails; a key that cannot exist shows that.
var lowerByLower = sync.OnceValue(func() bool {
	takes := func(key string) bool {
		fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
		if err != nil {
			return false
		}
		defer unix.Close(fd)
		return unix.FsconfigSetString(fd, key, "/") == nil
	}
	return takes("lowerdir+") && !takes("no_such_option")
})

// olderOverlay makes the overlay on kernels before 6.7, where all layers are one
// option of at most 255 bytes. So they are named by their descriptors' numbers,
// relative to /proc/self/fd as the working directory: room for 60 layers. More
// than that are mounted with mount(2), which has room for a page of options.
func olderOverlay(r oci.Rootfs) (m *os.File, err error) {
	err = kernel.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare CLONE_FS: %w", err)
		}
		opts, files, err := overlayOptions(r)
		defer func() { closeLayers(files) }()
		if err != nil {
			return err
		}
		if len(opts[0].Value) <= maxFSString {
			m, err = kernel.NewFS("overlay", append(opts, kernel.FSOption{Key: "source", Value: "overlay"}), 0)
			return err
		}
		// The mount is made in a copy of the mount namespace that dies with its
		// thread, and cloned out of it.
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		closeLayers(files) // overlayfs takes only layers of the current mount namespace
		if opts, files, err = overlayOptions(r); err != nil {
			return err
		}
		m, err = mountByData("overlay", opts)
		return err
	})
	return m, err
}

func closeLayers(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// overlayOptions opens the layers and names them by descriptor; the calling
// thread's working directory becomes /proc/self/fd.
func overlayOptions(r oci.Rootfs) (opts []kernel.FSOption, files []*os.File, err error) {
	name := func(p string) string {
		f, oerr := os.OpenFile(p, unix.O_PATH|unix.O_DIRECTORY, 0)
		if oerr != nil {
			err = errors.Join(err, oerr)
			return ""
		}
		files = append(files, f)
		return strconv.Itoa(int(f.Fd()))
	}
	lowers := make([]string, len(r.Lowers))
	for i, l := range r.Lowers {
		lowers[i] = name(l)
	}
	opts = []kernel.FSOption{{Key: "lowerdir", Value: strings.Join(lowers, ":")}}
	if r.Upper != "" {
		opts = append(opts, kernel.FSOption{Key: "upperdir", Value: name(r.Upper)}, kernel.FSOption{Key: "workdir", Value: name(r.Work)})
		if r.Volatile {
			opts = append(opts, kernel.FSOption{Key: "volatile", Flag: true})
		}
	}
	if err == nil {
		err = unix.Chdir("/proc/self/fd")
	}
	return opts, files, err
}

// newMount is kernel.NewFS for options of any length: those that fsconfig(2)
// does not take go through mount(2).
func newMount(fstype string, opts []kernel.FSOption, attrs int) (m *os.File, err error) {
	if !slices.ContainsFunc(opts, func(o kernel.FSOption) bool { return len(o.Value) > maxFSString }) {
		return kernel.NewFS(fstype, opts, attrs)
	}
	err = kernel.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		m, err = mountByData(fstype, opts)
		return err
	})
	if err == nil {
		if err = kernel.SetMountAttr(m, false, &unix.MountAttr{Attr_set: uint64(attrs)}); err != nil {
			m.Close()
		}
	}
	return m, err
}

// mountByData makes a detached mount through mount(2), in the mount namespace of
// the calling thread, which is to end with it.
func mountByData(fstype string, opts []kernel.FSOption) (*os.File, error) {
	source, flags := fstype, uintptr(0)
	var all []string
	for _, o := range opts {
		switch {
		case o.Key == "source":
			source = o.Value
		case o.Flag && o.Key == "sync":
			flags |= unix.MS_SYNCHRONOUS
		case o.Flag && o.Key == "dirsync":
			flags |= unix.MS_DIRSYNC
		case o.Flag:
			all = append(all, o.Key)
		default:
			all = append(all, o.Key+"="+o.Value)
		}
	}
	data := strings.Join(all, ",")
	if len(data) >= os.Getpagesize() {
		return nil, invalid("options of %d bytes, the kernel takes %d", len(data), os.Getpagesize()-1)
	}
	// Any directory serves; /sys is not needed by this thread.
	if err := unix.Mount(source, "/sys", fstype, flags, data); err != nil {
		return nil, fmt.Errorf("mount %s: %w", fstype, err)
	}
	return kernel.CloneTree(unix.AT_FDCWD, "/sys", false)
}
