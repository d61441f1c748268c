// Package cni attaches pods to networks: through libcni and the plugins of a
// conf dir when it holds a configuration, otherwise through the built-in
// default network (cni/builtin). A Network makes the pod's network namespace
// itself, so that an implementation may keep some ready.
package cni

import (
	"context"
	"net/netip"
	"os"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/leftover"
)

// Protocol of a port mapping.
type Protocol string

// Protocols.
const (
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

// PortMapping publishes a container port on the host. An unset HostIP means all
// addresses of both families, loopback included. HostPort 0 maps nothing.
type PortMapping struct {
	Protocol      Protocol   `json:"protocol"`
	ContainerPort uint16     `json:"containerPort"`
	HostPort      uint16     `json:"hostPort"`
	HostIP        netip.Addr `json:"hostIP,omitzero"`
}

// Pod is what a network must know of a pod sandbox.
type Pod struct {
	ID                   id.Pod            `json:"id"`
	Name, Namespace, UID string            `json:",omitempty"`
	Labels               map[string]string `json:"labels,omitempty"`
	Annotations          map[string]string `json:"annotations,omitempty"`
	CgroupParent         string            `json:"cgroupParent,omitempty"`
	PortMappings         []PortMapping     `json:"portMappings,omitempty"`
	// NetNS is an empty network namespace for Attach to use, which belongs to the
	// pod's user namespace; nil: the network makes one. It stays the caller's.
	NetNS *os.File `json:"-"`
}

// Attachment is the durable result of Attach; the engine journals it and hands
// it back to Detach, also after a restart or a reboot. NetNSPath is set only
// where a plugin must remember a path; State is opaque to everyone but the
// Network that made it.
type Attachment struct {
	Network   string       `json:"network"`
	IPs       []netip.Addr `json:"ips"` // primary first
	NetNSPath string       `json:"netnsPath,omitempty"`
	State     []byte       `json:"state,omitempty"`
}

// Network attaches pods. Calls for different pods run concurrently; calls for
// one pod do not.
type Network interface {
	// Attach makes a network namespace, or takes the pod's, wires it and returns it
	// open. On error nothing is left behind, or a Detach with a zero Attachment
	// cleans it; a pod's own namespace is not to be used again.
	Attach(ctx context.Context, p Pod) (Attachment, *os.File, error)
	// Detach releases addresses, ports and the namespace. netns may be nil (gone,
	// as after a reboot). It is idempotent; after an error it can be called again.
	Detach(ctx context.Context, p Pod, a Attachment, netns *os.File) error
	// Ready returns nil when pods can be attached, else the reason and remedy.
	Ready() error
	// Leftovers looks for what belongs to no pod that is in use. It asks after it
	// has listed what there is; what Attach and Detach have under way is none.
	Leftovers(ctx context.Context, use InUse) ([]leftover.Finding, error)
}

// InUse says what the pods on record use, at the moment of the call.
type InUse struct {
	// Pod reports whether a pod is attached, or being attached or detached.
	Pod func(id.Pod) bool
	// IPs are the addresses of all pods on record.
	IPs func() []netip.Addr
}

// Restorer is a Network with records of its own, which may be lost or damaged
// while pods run: a state folder that was wiped, a flipped bit.
type Restorer interface {
	// Restore makes good what is missing of the record of a pod that Attach attached
	// in this boot. For a pod whose record is whole it does nothing.
	Restore(ctx context.Context, p Pod, a Attachment) error
}
