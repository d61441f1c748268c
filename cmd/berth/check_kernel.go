package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// The probes ask the kernel for the thing itself and never for its version:
// distributions carry features back, and sandboxes take them away.

func rootUser(context.Context, *env) (string, error) {
	if uid := os.Geteuid(); uid != 0 {
		return "", remedy(fmt.Errorf("running as uid %d", uid), "run as root")
	}
	return "uid 0", nil
}

func kernelCalls(context.Context, *env) (string, error) {
	for _, c := range []struct {
		name  string
		since string
		call  func() error
	}{
		{"openat2", "5.6", func() error {
			fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
			return closing(fd, err)
		}},
		{"pidfd_open", "5.3", func() error { return closing(unix.PidfdOpen(os.Getpid(), 0)) }},
		{"close_range", "5.9", func() error { return unix.CloseRange(1<<30, 1<<30, 0) }},
		{"memfd_create", "3.17", func() error { return closing(unix.MemfdCreate("berth-check", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)) }},
		{"open_tree", "5.2", func() error {
			return closing(unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLOEXEC))
		}},
		{"mount_setattr", "5.12", func() error {
			// A descriptor that is none: EBADF comes from the call itself.
			if err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); !errors.Is(err, unix.EBADF) {
				return err
			}
			return nil
		}},
	} {
		if err := c.call(); err != nil {
			return "", remedy(fmt.Errorf("%s: %w", c.name, err), "use a kernel from %s on, and no seccomp filter around the daemon", c.since)
		}
	}
	return release(), nil
}

func closing(fd int, err error) error {
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown release"
	}
	return "kernel " + unix.ByteSliceToString(u.Release[:])
}

// detachedMounts tells whether mounts can be assembled on a tree that is
// attached nowhere (kernel 6.15): without it each start does that work itself.
func detachedMounts(context.Context, *env) (string, error) {
	tmp, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return "", remedy(fmt.Errorf("fsopen: %w", err), "run as root on a kernel from 5.2 on")
	}
	defer unix.Close(tmp)
	if err := unix.FsconfigCreate(tmp); err != nil {
		return "", remedy(fmt.Errorf("tmpfs: %w", err), "run as root")
	}
	base, err := unix.Fsmount(tmp, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return "", remedy(fmt.Errorf("fsmount: %w", err), "run as root")
	}
	defer unix.Close(base)
	if err := unix.Mkdirat(base, "d", 0o700); err != nil {
		return "", err
	}
	tree, err := unix.OpenTree(base, "", unix.OPEN_TREE_CLOEXEC|unix.OPEN_TREE_CLONE|unix.AT_EMPTY_PATH)
	if err == nil {
		defer unix.Close(tree)
		err = unix.MoveMount(tree, "", base, "d", unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	if err != nil {
		return "", remedy(errors.New("not offered by this kernel"), "starts are slower; kernels from 6.15 on have it")
	}
	return "trees are assembled ahead of a start", nil
}

// pidfdInfo tells whether the exit code of a process that is not our child can
// be read: it is how codes survive a crash of the supervisor.
func pidfdInfo(context.Context, *env) (string, error) {
	// A process of which we know that it was reaped: ourselves once more.
	fd := -1
	self := exec.Command("/proc/self/exe", "--version")
	self.SysProcAttr = &syscall.SysProcAttr{PidFD: &fd}
	err := self.Run()
	if fd >= 0 {
		defer unix.Close(fd)
	}
	if err != nil && self.ProcessState == nil {
		return "", err
	}
	if _, ok, err := kernel.ExitStatus(fd); err != nil || !ok {
		return "", remedy(errors.Join(errors.New("the exit status of another's child cannot be read"), err), "containers that end while the supervisor is down report exit code 255; kernels from 6.15 on have it")
	}
	return "readable", nil
}

func namespaces(context.Context, *env) (string, error) {
	for _, n := range []string{"mnt", "net", "pid", "ipc", "uts", "cgroup"} {
		if _, err := os.Stat("/proc/self/ns/" + n); err != nil {
			return "", remedy(fmt.Errorf("no %s namespaces", n), "use a kernel with them (CONFIG_NAMESPACES)")
		}
	}
	return "mnt net pid ipc uts cgroup", nil
}

func cgroups(context.Context, *env) (string, error) {
	const dir = "/sys/fs/cgroup"
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", remedy(fmt.Errorf("%s: %w", dir, err), "mount cgroup2 there")
	}
	wanted := []string{"cpu", "memory", "pids", "cpuset"}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			return "", err
		}
		have := strings.Fields(string(b))
		for _, w := range wanted {
			if !slices.Contains(have, w) {
				return "", remedy(fmt.Errorf("cgroup v2 without controller %s", w), "boot with it enabled (cgroup_enable=%s)", w)
			}
		}
		return "v2 with " + strings.Join(have, " "), nil
	}
	for _, w := range append(wanted, "freezer", "devices") {
		if err := unix.Statfs(filepath.Join(dir, w), &st); err != nil || st.Type != unix.CGROUP_SUPER_MAGIC {
			return "", remedy(fmt.Errorf("cgroup v1 without controller %s", w), "mount it at %s, or boot with cgroup v2", filepath.Join(dir, w))
		}
	}
	return "v1; v2 is preferred (systemd.unified_cgroup_hierarchy=1)", nil
}

func seccomp(context.Context, *env) (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_avail")
	if err != nil {
		return "", remedy(errors.New("not in this kernel"), "only pods with seccomp Unconfined run; use a kernel with CONFIG_SECCOMP_FILTER")
	}
	return strings.TrimSpace(string(b)), nil
}

func apparmor(context.Context, *env) (string, error) {
	b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	if err != nil || !strings.HasPrefix(string(b), "Y") {
		return "", remedy(errors.New("not enabled"), "pods that name an AppArmor profile fail; boot with apparmor=1 where the kernel has it")
	}
	return "enabled", nil
}

func overlay(context.Context, *env) (string, error) {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return "", remedy(err, "load it: modprobe overlay")
	}
	return "offered", unix.Close(fd)
}

// rootDirectory tells whether layers can be kept under dir, or under the
// nearest directory above it that exists.
func rootDirectory(dir string) (string, error) {
	var st unix.Statfs_t
	at := dir
	for err := unix.Statfs(at, &st); err != nil; err = unix.Statfs(at, &st) {
		if at == filepath.Dir(at) {
			return "", err
		}
		at = filepath.Dir(at)
	}
	names := map[int64]string{
		unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.NFS_SUPER_MAGIC: "nfs", unix.TMPFS_MAGIC: "tmpfs", unix.EXT4_SUPER_MAGIC: "ext4",
		unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
	}
	kind := names[int64(st.Type)]
	switch kind {
	case "overlay", "nfs":
		return "", remedy(fmt.Errorf("%s is on %s, which cannot hold writable layers", at, kind), "put --root on ext4, xfs or btrfs")
	case "":
		kind = fmt.Sprintf("filesystem type 0x%x", st.Type)
	}
	free := st.Bavail * uint64(st.Bsize)
	if free < 1<<30 {
		return "", remedy(fmt.Errorf("%s has only %s free", at, size(free)), "free space, or put --root elsewhere")
	}
	return fmt.Sprintf("%s on %s, %s free", dir, kind, size(free)), nil
}

// podNetwork makes a pair of links in a network namespace of its own, which ends
// with the thread.
func podNetwork(context.Context, *env) (string, error) {
	return "network namespaces and veth", kernel.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return remedy(fmt.Errorf("network namespace: %w", err), "run as root on a kernel with CONFIG_NET_NS")
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "berth0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "berth1"}); err != nil {
			return remedy(fmt.Errorf("veth: %w", err), "load it: modprobe veth")
		}
		return nil
	})
}

func nftablesOffered(context.Context, *env) (string, error) {
	conn, err := nftables.New()
	if err == nil {
		_, err = conn.ListTables()
	}
	if err != nil {
		return "", remedy(err, "load it: modprobe nf_tables; without it pods get no masquerade and no host ports")
	}
	return "offered", nil
}

// forwarding: the built-in network turns it on itself, a CNI chain may not.
func forwarding(path, key string) func(context.Context, *env) (string, error) {
	return func(context.Context, *env) (string, error) {
		b, err := os.ReadFile(path)
		if err != nil {
			return "", remedy(fmt.Errorf("%s: %w", key, err), "pods of this family reach nothing outside the node")
		}
		if strings.TrimSpace(string(b)) != "1" {
			return "", remedy(errors.New("off"), "the built-in network turns it on; with a CNI configuration run: sysctl -w %s=1", key)
		}
		return "on", nil
	}
}
