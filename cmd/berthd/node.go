package main

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/cri"
	"github.com/berth-runtime/berth/internal/config"
	"github.com/berth-runtime/berth/internal/version"
)

// node answers for the node as a whole (cri.Node).
type node struct {
	cfg     *config.Config
	engine  interface{ Ready() error }
	network interface{ Ready() error }
	pods    interface{ SetPodCIDR(string) error }
}

func newNode(cfg *config.Config, engine, network interface{ Ready() error }, pods interface{ SetPodCIDR(string) error }) *node {
	return &node{cfg: cfg, engine: engine, network: network, pods: pods}
}

// RuntimeReady is nil when containers can be run.
func (n *node) RuntimeReady() error { return n.engine.Ready() }

// NetworkReady is nil when pods can be attached.
func (n *node) NetworkReady() error { return n.network.Ready() }

// SetPodCIDR gives the built-in network the ranges that the cluster chose for
// this node. A CNI configuration has its own.
func (n *node) SetPodCIDR(cidr string) error { return n.pods.SetPodCIDR(cidr) }

// CgroupDriverSystemd is true where systemd manages the one hierarchy: there
// the kubelet names cgroup parents as slices.
func (n *node) CgroupDriverSystemd() bool { return systemdCgroups() }

var systemdCgroups = sync.OnceValue(func() bool {
	// sd_booted(3)
	st, err := os.Lstat("/run/systemd/system")
	if err != nil || !st.IsDir() {
		return false
	}
	var fs unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
})

// recursiveReadOnly is true when mounts can be made read-only with all that is
// below them. The call is probed with a descriptor that is none.
var recursiveReadOnly = sync.OnceValue(func() bool {
	err := unix.MountSetattr(-1, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	return errors.Is(err, unix.EBADF)
})

// Handlers are the default handler and the same under its name.
func (n *node) Handlers() []cri.Handler {
	rro := recursiveReadOnly()
	return []cri.Handler{{Name: "", RecursiveReadOnlyMounts: rro}, {Name: version.Name, RecursiveReadOnlyMounts: rro}}
}

// Info is the daemon's configuration for verbose Status. Tools read stateDir.
func (n *node) Info() map[string]any {
	info := n.cfg.Map()
	info["stateDir"] = n.cfg.State
	info["rootDir"] = n.cfg.Root
	info["version"] = version.String()
	info["pid"] = os.Getpid()
	return info
}
