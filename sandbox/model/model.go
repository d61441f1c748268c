// Package model holds the values of the engine: what pods and containers are
// asked to be (configs) and what they are (statuses). It is data only; both the
// front doors and the parts below the engine speak it.
package model

import (
	"io"
	"time"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/id"
)

// PodMeta is the identity that the kubelet gives a pod sandbox: retries carry
// the same one.
type PodMeta struct {
	Name      string `json:"name"`
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Attempt   uint32 `json:"attempt"`
}

// ContainerMeta is the identity of a container inside its pod sandbox.
type ContainerMeta struct {
	Name    string `json:"name"`
	Attempt uint32 `json:"attempt"`
}

// NamespaceMode is CRI's NamespaceMode; the numbers are CRI's.
type NamespaceMode int32

// Modes.
const (
	NamespacePod       NamespaceMode = 0
	NamespaceContainer NamespaceMode = 1
	NamespaceNode      NamespaceMode = 2
	NamespaceTarget    NamespaceMode = 3
)

// Namespaces is CRI's NamespaceOption.
type Namespaces struct {
	Network  NamespaceMode  `json:"network"`
	PID      NamespaceMode  `json:"pid"`
	IPC      NamespaceMode  `json:"ipc"`
	TargetID id.Container   `json:"targetID,omitempty"`
	User     *UserNamespace `json:"user,omitempty"` // nil: the node's
}

// IDMapping maps the Length ids of a user namespace from Container on to those of
// the host from Host on.
type IDMapping struct {
	Container uint32 `json:"container"`
	Host      uint32 `json:"host"`
	Length    uint32 `json:"length"`
}

// Has reports whether the user namespace has the id.
func (m IDMapping) Has(id uint32) bool {
	return id >= m.Container && uint64(id) < uint64(m.Container)+uint64(m.Length)
}

// UserNamespace is a user namespace of a pod's own: one range of users and one
// of groups, each beginning with the pod's root.
type UserNamespace struct {
	UIDs IDMapping `json:"uids"`
	GIDs IDMapping `json:"gids"`
}

// Root returns the ids that the pod's root has on the host; 0 with the node's
// user namespace, which is nil.
func (u *UserNamespace) Root() (uid, gid uint32) {
	if u == nil {
		return 0, 0
	}
	return u.UIDs.Host, u.GIDs.Host
}

// Same reports whether both are the same mapping, or both the node's.
func (u *UserNamespace) Same(o *UserNamespace) bool {
	return u == o || u != nil && o != nil && *u == *o
}

// ProfileType says where a seccomp or AppArmor profile comes from; the numbers are CRI's.
type ProfileType int32

// Profile types.
const (
	ProfileRuntimeDefault ProfileType = 0
	ProfileUnconfined     ProfileType = 1
	ProfileLocalhost      ProfileType = 2
)

// Profile is a seccomp or AppArmor profile. Ref is an absolute file path for
// seccomp and a loaded profile's name for AppArmor, with ProfileLocalhost only.
type Profile struct {
	Type ProfileType `json:"type"`
	Ref  string      `json:"ref,omitempty"`
}

// SELinux is a process label in parts.
type SELinux struct {
	User  string `json:"user,omitempty"`
	Role  string `json:"role,omitempty"`
	Type  string `json:"type,omitempty"`
	Level string `json:"level,omitempty"`
}

// DNS is the content of a pod's resolv.conf. A nil *DNS means the host's file.
type DNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// PodConfig is what RunPod is asked for (CRI PodSandboxConfig).
type PodConfig struct {
	Meta           PodMeta           `json:"meta"`
	Hostname       string            `json:"hostname,omitempty"`
	LogDirectory   string            `json:"logDirectory,omitempty"`
	DNS            *DNS              `json:"dns,omitempty"`
	PortMappings   []cni.PortMapping `json:"portMappings,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`
	Annotations    map[string]string `json:"annotations,omitempty"`
	CgroupParent   string            `json:"cgroupParent,omitempty"`
	Sysctls        map[string]string `json:"sysctls,omitempty"` // dotted keys
	Namespaces     Namespaces        `json:"namespaces"`
	Privileged     bool              `json:"privileged,omitempty"`
	ReadonlyRootfs bool              `json:"readonlyRootfs,omitempty"`
	RunAsUser      *int64            `json:"runAsUser,omitempty"`
	RunAsGroup     *int64            `json:"runAsGroup,omitempty"`
	SELinux        *SELinux          `json:"selinux,omitempty"`
	Seccomp        *Profile          `json:"seccomp,omitempty"` // nil: unconfined
	AppArmor       *Profile          `json:"apparmor,omitempty"`
	Overhead       *Resources        `json:"overhead,omitempty"`
	Resources      *Resources        `json:"resources,omitempty"`
	// Handler is the runtime handler's name; "" is the default.
	Handler string `json:"handler,omitempty"`
}

// HugepageLimit limits one page size ("2MB").
type HugepageLimit struct {
	PageSize string `json:"pageSize"`
	Limit    uint64 `json:"limit"`
}

// Resources is CRI LinuxContainerResources: 0, "" and nil mean unset, and
// "keep" in an update. CPU quota -1 is unlimited.
type Resources struct {
	CPUPeriod   int64             `json:"cpuPeriod,omitempty"` // microseconds
	CPUQuota    int64             `json:"cpuQuota,omitempty"`  // microseconds per period
	CPUShares   int64             `json:"cpuShares,omitempty"` // cgroup v1 weight
	MemoryLimit int64             `json:"memoryLimit,omitempty"`
	SwapLimit   int64             `json:"swapLimit,omitempty"` // memory + swap, bytes
	OOMScoreAdj int64             `json:"oomScoreAdj,omitempty"`
	CpusetCpus  string            `json:"cpusetCpus,omitempty"`
	CpusetMems  string            `json:"cpusetMems,omitempty"`
	Hugepages   []HugepageLimit   `json:"hugepages,omitempty"`
	Unified     map[string]string `json:"unified,omitempty"` // cgroup v2 files
}

// Propagation is CRI's MountPropagation; the numbers are CRI's.
type Propagation int32

// Propagations.
const (
	PropagationPrivate         Propagation = 0
	PropagationHostToContainer Propagation = 1
	PropagationBidirectional   Propagation = 2
)

// Mount is one requested mount. Image volumes have Image set instead of HostPath.
type Mount struct {
	ContainerPath     string      `json:"containerPath"`
	HostPath          string      `json:"hostPath,omitempty"`
	Readonly          bool        `json:"readonly,omitempty"`
	RecursiveReadonly bool        `json:"recursiveReadonly,omitempty"`
	SELinuxRelabel    bool        `json:"selinuxRelabel,omitempty"`
	Propagation       Propagation `json:"propagation,omitempty"`
	Image             string      `json:"image,omitempty"` // image id
	ImageRef          string      `json:"imageRef,omitempty"`
	ImageUser         string      `json:"imageUser,omitempty"` // user_specified_image of the request
	ImageSubPath      string      `json:"imageSubPath,omitempty"`
	// UIDMappings and GIDMappings show the files with ids of the user namespace;
	// both or none.
	UIDMappings []IDMapping `json:"uidMappings,omitempty"`
	GIDMappings []IDMapping `json:"gidMappings,omitempty"`
}

// Device is a host device (or directory of devices) given to a container.
type Device struct {
	ContainerPath string `json:"containerPath"`
	HostPath      string `json:"hostPath"`
	Permissions   string `json:"permissions"`
}

// Capabilities are changes to the default set; names with or without CAP_, "ALL" allowed.
type Capabilities struct {
	Add        []string `json:"add,omitempty"`
	Drop       []string `json:"drop,omitempty"`
	AddAmbient []string `json:"addAmbient,omitempty"`
}

// Security is CRI LinuxContainerSecurityContext.
type Security struct {
	Capabilities       Capabilities `json:"capabilities,omitzero"`
	Privileged         bool         `json:"privileged,omitempty"`
	Namespaces         Namespaces   `json:"namespaces"`
	SELinux            *SELinux     `json:"selinux,omitempty"`
	RunAsUser          *int64       `json:"runAsUser,omitempty"`
	RunAsUsername      string       `json:"runAsUsername,omitempty"`
	RunAsGroup         *int64       `json:"runAsGroup,omitempty"`
	ReadonlyRootfs     bool         `json:"readonlyRootfs,omitempty"`
	SupplementalGroups []int64      `json:"supplementalGroups,omitempty"`
	StrictGroups       bool         `json:"strictGroups,omitempty"` // SupplementalGroupsPolicy Strict
	NoNewPrivs         bool         `json:"noNewPrivs,omitempty"`
	MaskedPaths        []string     `json:"maskedPaths,omitempty"`
	ReadonlyPaths      []string     `json:"readonlyPaths,omitempty"`
	Seccomp            *Profile     `json:"seccomp,omitempty"` // nil: unconfined
	AppArmor           *Profile     `json:"apparmor,omitempty"`
}

// KeyValue is an environment variable; Value is raw bytes (not always UTF-8).
type KeyValue struct {
	Key   string `json:"key"`
	Value []byte `json:"value,omitempty"`
}

// ImageSpec is the image as a request named it; returned unaltered in statuses.
type ImageSpec struct {
	Image          string            `json:"image"`
	UserSpecified  string            `json:"userSpecified,omitempty"`
	RuntimeHandler string            `json:"runtimeHandler,omitempty"`
	Annotations    map[string]string `json:"annotations,omitempty"`
}

// ContainerConfig is what CreateContainer is asked for (CRI ContainerConfig).
type ContainerConfig struct {
	Meta        ContainerMeta     `json:"meta"`
	Image       ImageSpec         `json:"image"`
	Command     []string          `json:"command,omitempty"`
	Args        []string          `json:"args,omitempty"`
	WorkingDir  string            `json:"workingDir,omitempty"`
	Env         []KeyValue        `json:"env,omitempty"`
	Mounts      []Mount           `json:"mounts,omitempty"`
	Devices     []Device          `json:"devices,omitempty"`
	CDIDevices  []string          `json:"cdiDevices,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	LogPath     string            `json:"logPath,omitempty"` // relative to the pod's LogDirectory
	Stdin       bool              `json:"stdin,omitempty"`
	StdinOnce   bool              `json:"stdinOnce,omitempty"`
	TTY         bool              `json:"tty,omitempty"`
	Resources   Resources         `json:"resources,omitzero"`
	Security    Security          `json:"security"`
	StopSignal  string            `json:"stopSignal,omitempty"` // "SIGTERM"; "" is the image's, then SIGTERM
}

// PodState is what CRI can say of a pod sandbox.
type PodState int

// Pod states.
const (
	PodReady PodState = iota
	PodNotReady
)

// ContainerState is what CRI can say of a container. Unknown is computed and never stored.
type ContainerState int

// Container states; the numbers are CRI's.
const (
	ContainerCreated ContainerState = iota
	ContainerRunning
	ContainerExited
	ContainerUnknown
)

// PodStatus is an immutable view of a pod sandbox, published through an atomic
// pointer: readers share it and must not change it.
type PodStatus struct {
	ID        id.Pod
	Config    *PodConfig
	State     PodState
	CreatedAt time.Time
	IPs       []string // primary first; empty on the host network
	Reason    string   // why it is not ready or cannot be removed; "" when well
	CgroupDir string   // the pod's cgroup, as a path below each hierarchy's root
}

// Identity is the user of a container's first process.
type Identity struct {
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"` // includes GID
}

// ContainerStatus is an immutable view of a container (see PodStatus).
type ContainerStatus struct {
	ID         id.Container
	Pod        id.Pod
	Config     *ContainerConfig
	State      ContainerState
	CreatedAt  time.Time
	StartedAt  time.Time
	FinishedAt time.Time
	ExitCode   int32
	Reason     string // "Completed", "Error", "OOMKilled", "StartError", "Unknown"
	Message    string
	ImageID    string // digest of the image config
	ImageRef   string // the same identity, as PullImage returned it
	ImageName  string // a tag or digest reference of the image, for people; may be ImageID
	LogPath    string // absolute; "" when the container has no log
	Resources  Resources
	Identity   Identity
	StopSignal string // effective, "SIGTERM"
	Pid        int    // of the first process; 0 unless running
	CgroupDir  string
}

// PodFilter selects pods; zero fields match all, the rest is ANDed.
type PodFilter struct {
	ID     string // full id or unique prefix
	State  *PodState
	Labels map[string]string
}

// ContainerFilter selects containers; zero fields match all, the rest is ANDed.
type ContainerFilter struct {
	ID     string
	Pod    string
	State  *ContainerState
	Labels map[string]string
}

// ExecResult is the outcome of ExecSync. Output beyond the cap is discarded.
type ExecResult struct {
	Stdout, Stderr []byte
	ExitCode       int32
}

// TermSize is a terminal size in character cells.
type TermSize struct{ Width, Height uint16 }

// PSI is a pressure-stall reading: averages in percent, Total in nanoseconds.
type PSI struct {
	Avg10, Avg60, Avg300 float64
	Total                uint64
}

// Pressure is the some and full lines of one resource.
type Pressure struct{ Some, Full *PSI }

// Stats is one reading of a container's or pod's cgroup. Pointers are nil where
// the kernel or the limit gives no value.
type Stats struct {
	At              time.Time
	CPUNanoseconds  uint64  // cumulative
	CPUNanocores    *uint64 // from a real window
	MemoryUsage     uint64
	WorkingSet      uint64
	MemoryAvailable *uint64 // limit - working set; nil when unlimited
	RSS             uint64
	PageFaults      uint64
	MajorPageFaults uint64
	SwapUsage       *uint64
	SwapAvailable   *uint64
	CPUPressure     *Pressure
	MemoryPressure  *Pressure
	IOPressure      *Pressure
	Pids            uint64
}

// ContainerStats is Stats with the container's identity and writable layer.
type ContainerStats struct {
	Container *ContainerStatus
	Stats
	WritableBytes, WritableInodes uint64
	WritableAt                    time.Time
	FsMountpoint                  string
}

// StreamIO is the client's side of an exec or attach: nil streams are not
// connected. Resize is read until it closes; nil without a terminal.
type StreamIO struct {
	Stdin          io.Reader
	Stdout, Stderr io.WriteCloser
	TTY            bool
	Resize         <-chan TermSize
}
