package main

import (
	"os"

	"github.com/berth-runtime/berth/cri"
	"github.com/berth-runtime/berth/internal/config"
	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/sandbox"
	"github.com/berth-runtime/berth/sandbox/spec"
)

// node answers for the node as a whole (cri.Node).
type node struct {
	cfg      *config.Config
	handlers []sandbox.Handler
	host     spec.Host
	engine   interface {
		Ready() error
		UserNamespaces() error
	}
	network interface{ Ready() error }
	pods    interface{ SetPodCIDR(string) error }
}

// RuntimeReady is nil when containers can be run.
func (n *node) RuntimeReady() error { return n.engine.Ready() }

// NetworkReady is nil when pods can be attached.
func (n *node) NetworkReady() error { return n.network.Ready() }

// SetPodCIDR gives the built-in network the ranges that the cluster chose for
// this node. A CNI configuration has its own.
func (n *node) SetPodCIDR(cidr string) error { return n.pods.SetPodCIDR(cidr) }

// CgroupDriverSystemd is false: the engine makes cgroups itself, below the
// parents that the kubelet names as paths.
func (n *node) CgroupDriverSystemd() bool { return false }

// Handlers are the default handler, the same one under its name, and the
// configured external runtimes.
func (n *node) Handlers() []cri.Handler {
	rro, userns := n.host.RecursiveReadonly, n.engine.UserNamespaces() == nil
	out := []cri.Handler{{RecursiveReadOnlyMounts: rro, UserNamespaces: userns}, {Name: version.Name, RecursiveReadOnlyMounts: rro, UserNamespaces: userns}}
	for _, h := range n.handlers {
		out = append(out, cri.Handler{Name: h.Name, RecursiveReadOnlyMounts: rro && h.RecursiveReadonly.Load()})
	}
	return out
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
