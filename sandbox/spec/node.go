package spec

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
)

// maxProfile bounds a seccomp profile's text; the default one is 20 KiB.
const maxProfile = 4 << 20

// Node are the questions that Build asks the node. A nil function asks the real one.
type Node struct {
	// ReadFile reads a Localhost seccomp profile.
	ReadFile func(path string) ([]byte, error)
	// Resolve follows the symlinks of a host path, which must exist.
	Resolve func(path string) (string, error)
	// Propagation says whether the mount that a resolved host path is on is shared,
	// and whether it is a slave.
	Propagation func(path string) (shared, slave bool, err error)
	// Devices returns the device at a host path (symlinks followed), or all devices
	// below it when it is a directory.
	Devices func(path string) ([]HostDevice, error)
	// SELinuxLabels makes a process and a mount label from "user:", "role:",
	// "type:", "level:" options.
	SELinuxLabels func(options []string) (process, mount string, err error)
}

// HostDevice is a device node of the host. Path is where it was found.
type HostDevice struct {
	Path         string
	Type         string // "c" or "b"
	Major, Minor int64
	Mode         os.FileMode // permission bits
	UID, GID     uint32
}

func (n Node) orReal() Node {
	if n.ReadFile == nil {
		n.ReadFile = readProfile
	}
	if n.Resolve == nil {
		n.Resolve = filepath.EvalSymlinks
	}
	if n.Propagation == nil {
		n.Propagation = propagationOf
	}
	if n.Devices == nil {
		n.Devices = devicesAt
	}
	if n.SELinuxLabels == nil {
		n.SELinuxLabels = label.InitLabels
	}
	return n
}

func readProfile(path string) ([]byte, error) {
	// O_NONBLOCK: a FIFO under the name must not block the create.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxProfile+1))
	if err == nil && len(b) > maxProfile {
		err = fmt.Errorf("%s: larger than %d bytes", path, maxProfile)
	}
	return b, err
}

func propagationOf(path string) (shared, slave bool, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(path))
	if err != nil {
		return false, false, err
	}
	var on *mountinfo.Info
	for _, m := range mounts { // the deepest, and of those at one point the last mounted
		if on == nil || len(m.Mountpoint) >= len(on.Mountpoint) {
			on = m
		}
	}
	if on == nil {
		return false, false, fmt.Errorf("%s: no mount of this namespace holds it", path)
	}
	for _, o := range strings.Fields(on.Optional) {
		shared = shared || strings.HasPrefix(o, "shared:")
		slave = slave || strings.HasPrefix(o, "master:")
	}
	return shared, slave, nil
}

// notDevices are directories of /dev that hold no nodes for a container: its
// own instances are mounted there.
var notDevices = []string{"/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/fd"}

func devicesAt(path string) ([]HostDevice, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Lstat(real, &st); err != nil {
		return nil, &os.PathError{Op: "lstat", Path: real, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		d, ok := device(path, &st)
		if !ok {
			return nil, fmt.Errorf("%s: not a device", path)
		}
		return []HostDevice{d}, nil
	}
	var out []HostDevice
	if err := walkDevices(real, path, &out); err != nil {
		return nil, err
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Path < out[j].Path })
	return out, nil
}

func walkDevices(dir, shown string, out *[]HostDevice) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if unix.Lstat(p, &st) != nil {
			continue // unplugged meanwhile
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			if slices.Contains(notDevices, p) {
				continue
			}
			if err := walkDevices(p, filepath.Join(shown, e.Name()), out); err != nil && !os.IsNotExist(err) {
				return err
			}
			continue
		}
		// Links are left out: what they lead to is listed under its own name.
		if d, ok := device(filepath.Join(shown, e.Name()), &st); ok && p != "/dev/console" {
			*out = append(*out, d)
		}
	}
	return nil
}

func device(path string, st *unix.Stat_t) (HostDevice, bool) {
	d := HostDevice{
		Path: path, Major: int64(unix.Major(uint64(st.Rdev))), Minor: int64(unix.Minor(uint64(st.Rdev))),
		Mode: os.FileMode(st.Mode & 0o777), UID: st.Uid, GID: st.Gid,
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		d.Type = "c"
	case unix.S_IFBLK:
		d.Type = "b"
	default:
		return HostDevice{}, false
	}
	return d, true
}
