package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/berth-runtime/berth/cri"
	"github.com/berth-runtime/berth/internal/config"
	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/sandbox"
	"github.com/berth-runtime/berth/sandbox/spec"
)

// node answers for the node as a whole (cri.Node).
type node struct {
	cfg        *config.Config
	host       spec.Host
	supervisor sandbox.RuntimeFDs
	network    sandbox.Network
	pods       interface{ SetPodCIDR(string) error }
}

// askTimeout is well below the 5 s in which kubelets ask again.
const askTimeout = 2 * time.Second

// RuntimeReady is nil when the supervisor answers, which starts containers.
func (n *node) RuntimeReady() error {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	if _, err := n.supervisor.ListFDs(ctx); err != nil {
		return fmt.Errorf("supervisor: %w", err)
	}
	return nil
}

// NetworkReady is nil when pods can be attached.
func (n *node) NetworkReady() error { return n.network.Ready() }

// SetPodCIDR gives the built-in network the ranges that the cluster chose for
// this node. A CNI configuration has its own.
func (n *node) SetPodCIDR(cidr string) error { return n.pods.SetPodCIDR(cidr) }

// CgroupDriverSystemd is false: the engine makes cgroups itself, below the
// parents that the kubelet names as paths.
func (n *node) CgroupDriverSystemd() bool { return false }

// Handlers is the default handler.
func (n *node) Handlers() []cri.Handler {
	return []cri.Handler{{RecursiveReadOnlyMounts: n.host.RecursiveReadonly}}
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
