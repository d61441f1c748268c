package cri

import (
	"context"
	"io"
	"time"

	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/sandbox"
)

// Pods is what the front door asks of the engine about pod sandboxes. Mutating
// calls are idempotent operations detached from ctx: when ctx ends first the
// work goes on and the next call with the same identity joins it. Ids may be
// unique prefixes.
type Pods interface {
	RunPod(ctx context.Context, c *sandbox.PodConfig) (id.Pod, error)
	StopPod(ctx context.Context, pod string) error   // missing: nil
	RemovePod(ctx context.Context, pod string) error // missing: nil
	Pod(pod string) (*sandbox.PodStatus, error)      // missing: errdefs.ErrNotFound
	ListPods(f sandbox.PodFilter) []*sandbox.PodStatus
}

// Containers is what the front door asks of the engine about containers.
type Containers interface {
	CreateContainer(ctx context.Context, pod string, c *sandbox.ContainerConfig) (id.Container, error)
	StartContainer(ctx context.Context, container string) error
	StopContainer(ctx context.Context, container string, grace time.Duration) error // missing: nil
	RemoveContainer(ctx context.Context, container string) error                    // missing: nil
	Container(container string) (*sandbox.ContainerStatus, error)
	ListContainers(f sandbox.ContainerFilter) []*sandbox.ContainerStatus
	UpdateContainer(ctx context.Context, container string, r *sandbox.Resources) error
	ReopenLog(ctx context.Context, container string) error
}

// Stats is what the front door asks of the engine about resource use.
type Stats interface {
	ContainerStats(ctx context.Context, container string) (*sandbox.ContainerStats, error)
	ListContainerStats(ctx context.Context, f sandbox.ContainerFilter) ([]*sandbox.ContainerStats, error)
	// WritableUsage sums the containers' writable layers; it never walks a tree itself.
	WritableUsage() imageservice.FsUsage
}

// Streams runs processes in containers and connects streams to them. They
// return after the streams are done; a non-zero exit of a process is an error
// with an ExitStatus() int method.
type Streams interface {
	// ExecSync returns errdefs-kind DeadlineExceeded (context.DeadlineExceeded) after timeout
	// has killed the process and its descendants; 0 means no timeout.
	ExecSync(ctx context.Context, container string, cmd []string, timeout time.Duration) (*sandbox.ExecResult, error)
	Exec(ctx context.Context, container string, cmd []string, s sandbox.StreamIO) (exitCode int32, err error)
	Attach(ctx context.Context, container string, s sandbox.StreamIO) error
	// PortForward connects stream to the port on the pod's loopback (IPv4, then
	// IPv6) and closes each direction when its source ends.
	PortForward(ctx context.Context, pod string, port int32, stream io.ReadWriteCloser) error
}

// Images is what the front door asks of the image service.
type Images interface {
	Pull(ctx context.Context, r imageservice.PullRequest) (*imageservice.Image, error)
	// Status finds an image by id, id prefix, tag or digest reference; nil when missing.
	Status(ref string) (*imageservice.Image, error)
	List(filter string) []*imageservice.Image
	// Remove removes all names of the image and the image itself; missing: nil.
	Remove(ctx context.Context, ref string) error
	FsUsage() imageservice.FsUsage
}

// Node is what the front door asks about the node as a whole.
type Node interface {
	RuntimeReady() error // nil when well
	NetworkReady() error
	SetPodCIDR(cidr string) error
	CgroupDriverSystemd() bool
	Handlers() []Handler
	// Info is the daemon's configuration and state for verbose Status, as JSON values.
	Info() map[string]any
}

// Handler is one configured runtime handler and what it can do. Name "" is the default.
type Handler struct {
	Name                    string
	RecursiveReadOnlyMounts bool
	UserNamespaces          bool
}

// Engine is everything the front door needs.
type Engine interface {
	Pods
	Containers
	Stats
	Streams
}
