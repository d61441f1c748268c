package sandbox

import "github.com/berth-runtime/berth/sandbox/model"

// The engine's values live in package model, below the engine; these are their
// names for its callers.
type (
	PodMeta         = model.PodMeta
	ContainerMeta   = model.ContainerMeta
	NamespaceMode   = model.NamespaceMode
	Namespaces      = model.Namespaces
	IDMapping       = model.IDMapping
	UserNamespace   = model.UserNamespace
	ProfileType     = model.ProfileType
	Profile         = model.Profile
	SELinux         = model.SELinux
	DNS             = model.DNS
	PodConfig       = model.PodConfig
	HugepageLimit   = model.HugepageLimit
	Resources       = model.Resources
	Propagation     = model.Propagation
	Mount           = model.Mount
	Device          = model.Device
	Capabilities    = model.Capabilities
	Security        = model.Security
	KeyValue        = model.KeyValue
	ImageSpec       = model.ImageSpec
	ContainerConfig = model.ContainerConfig
	PodState        = model.PodState
	ContainerState  = model.ContainerState
	PodStatus       = model.PodStatus
	Identity        = model.Identity
	ContainerStatus = model.ContainerStatus
	PodFilter       = model.PodFilter
	ContainerFilter = model.ContainerFilter
	ExecResult      = model.ExecResult
	TermSize        = model.TermSize
	PSI             = model.PSI
	Pressure        = model.Pressure
	Stats           = model.Stats
	ContainerStats  = model.ContainerStats
	StreamIO        = model.StreamIO
)

// Constants of package model.
const (
	NamespacePod               = model.NamespacePod
	NamespaceContainer         = model.NamespaceContainer
	NamespaceNode              = model.NamespaceNode
	NamespaceTarget            = model.NamespaceTarget
	ProfileRuntimeDefault      = model.ProfileRuntimeDefault
	ProfileUnconfined          = model.ProfileUnconfined
	ProfileLocalhost           = model.ProfileLocalhost
	PropagationPrivate         = model.PropagationPrivate
	PropagationHostToContainer = model.PropagationHostToContainer
	PropagationBidirectional   = model.PropagationBidirectional
	PodReady                   = model.PodReady
	PodNotReady                = model.PodNotReady
	ContainerCreated           = model.ContainerCreated
	ContainerRunning           = model.ContainerRunning
	ContainerExited            = model.ContainerExited
	ContainerUnknown           = model.ContainerUnknown
)
