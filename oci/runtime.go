// Package oci defines what Berth asks of an OCI runtime and finds runtimes by
// their handler name. The embedded runtime (oci/embedded) and command-line
// runtimes (oci/external) implement Runtime; the supervisor is its only caller.
package oci

import (
	"context"
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/id"
)

// Rootfs says how a container's root filesystem is made. Lowers are image
// layers from the top one to the bottom one, absolute paths on the host. With
// Upper and Work the result is a writable overlay; without them a read-only one.
// Volatile skips the syncs of an overlay whose content dies with the container.
// Idmap shows the layers' files with the ids of the container's user namespace:
// what belongs to root on disk belongs to the container's root. Upper is not
// shifted, it belongs to the container's root on disk as well.
type Rootfs struct {
	Lowers   []string `json:"lowers"`
	Upper    string   `json:"upper,omitempty"`
	Work     string   `json:"work,omitempty"`
	Volatile bool     `json:"volatile,omitempty"`
	Idmap    bool     `json:"idmap,omitempty"`
}

// Reuse makes the folders of a volatile overlay fit to be mounted again, and
// reports whether they were not. Overlayfs marks them at a mount and refuses them
// then (EINVAL), because after a crash of the kernel they could hold half-written
// files. After the crash of the process that mounted them they do not.
func (r Rootfs) Reuse() bool {
	mark := filepath.Join(r.Work, "work", "incompat", "volatile")
	if _, err := os.Lstat(mark); !r.Volatile || err != nil {
		return false
	}
	return os.RemoveAll(mark) == nil
}

// Volume is an image mounted into a container: its layers as Rootfs.Lowers has
// them, read-only, and the path inside that is wanted ("" is all of it). Idmap is
// that of Rootfs.
type Volume struct {
	Lowers  []string `json:"lowers"`
	SubPath string   `json:"subPath,omitempty"`
	Idmap   bool     `json:"idmap,omitempty"`
}

// CreateRequest describes a container to be made.
//
// Spec is an OCI runtime-spec 1.3 config. Spec.Root.Path is ignored when Rootfs
// has lowers. Namespaces maps a namespace type to an open fd that is joined
// instead of Spec's path (the fd is borrowed for the life of the container:
// the runtime duplicates what it keeps). A mount whose Source is "fd:NAME" uses
// MountFDs[NAME] as its source: an O_PATH or detached-mount fd, or, before Linux
// 6.15, a mount namespace whose root is the source (kernel.Hold); "image:NAME"
// uses Volumes[NAME].
//
// SeccompDigest is the SHA-256 of the JSON text that Spec.Linux.Seccomp was
// decoded from; zero when it is not known. Requests with one digest share the
// profile, which a runtime only reads.
//
// PodInit asks for the built-in init in place of Spec.Process.Args: pid 1 of a
// PID namespace that the pod's containers share; it reaps and sleeps.
type CreateRequest struct {
	ID         id.Container
	Bundle     string // of the bundle's directory, for the state that hooks read; "" if there is none
	Spec       *specs.Spec
	Rootfs     Rootfs
	Namespaces map[specs.LinuxNamespaceType]*os.File
	MountFDs   map[string]*os.File
	Volumes    map[string]Volume
	PodInit    bool

	SeccompDigest [32]byte
}

// Stdio is the child's side of a process's standard streams; nil means
// /dev/null. The files are borrowed for the duration of the call. With a
// terminal (Process.Terminal) they are unused: the runtime makes a pty inside
// the container and hands back its master in Process.Console.
// Extra files become descriptors 3 and up of the process.
type Stdio struct {
	In, Out, Err *os.File
	Extra        []*os.File
}

// Process is a started process. The caller owns PidFD and Console, closes
// them, and reaps the process with wait4(Pid): it is the caller's child.
type Process struct {
	Pid     int
	PidFD   *os.File
	Console *os.File // pty master; nil without a terminal
}

// Runtime makes containers. Errors carry a kind of containerd/errdefs:
// InvalidArgument names the JSON field of the spec.
type Runtime interface {
	// Create prepares cgroup, root filesystem and namespaces; no user code runs.
	// On error nothing is left behind.
	Create(ctx context.Context, r CreateRequest) (Container, error)
}

// UserNamespaceRequest describes a user namespace that several containers share.
// UIDs and GIDs map its ids to those of the host. Kinds are the namespaces that
// are made with it and belong to it: network, ipc, uts.
//
// Layers are directories that the caller wants to use as layers of a root with
// Rootfs.Idmap: an overlay of them is made and thrown away, so that an error tells
// what this kernel or their file system cannot do.
type UserNamespaceRequest struct {
	UIDs   []specs.LinuxIDMapping
	GIDs   []specs.LinuxIDMapping
	Kinds  []specs.LinuxNamespaceType
	Layers []string
}

// UserNamespaces is a Runtime that makes user namespaces which outlive its containers.
type UserNamespaces interface {
	// NewUserNamespace returns the user namespace, and one of each of r.Kinds in
	// their order. No process is in them; the descriptors, the caller's to close,
	// keep them. A container joins them through CreateRequest.Namespaces.
	NewUserNamespace(r UserNamespaceRequest) ([]*os.File, error)
}

// Container is a created or running container of a Runtime.
// Its methods may be called concurrently, except Start and Delete.
type Container interface {
	// Start runs the user's program. After an error the container can only be deleted.
	Start(ctx context.Context, s Stdio) (Process, error)
	// Exec runs a further process with the identity and limits given in p, inside
	// the container's namespaces and cgroup.
	Exec(ctx context.Context, p *specs.Process, s Stdio) (Process, error)
	// KillAll sends SIGKILL to every process in the container's cgroup,
	// frozen ones included (cgroup.kill on cgroup v2).
	KillAll() error
	// OOMKills returns how many processes of the container's cgroup the kernel's
	// OOM killer has killed so far.
	OOMKills() (uint64, error)
	// Update changes cgroup limits in place; nil or zero fields keep their value.
	// When one write fails the earlier ones are reverted.
	Update(r *specs.LinuxResources) error
	// Pause freezes and Resume thaws all processes.
	Pause() error
	Resume() error
	// Delete removes what Create and Start made (cgroup, mounts, fds). All
	// processes must be dead. It is idempotent.
	Delete() error
}
