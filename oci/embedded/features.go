package embedded

import (
	"maps"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"

	"github.com/berth-runtime/berth/oci/embedded/seccomp"
)

// Features describes what the runtime does (runtime-spec, "Features Structure").
func Features() *features.Features {
	yes, no := true, false
	options := []string{"bind", "rbind"}
	for o := range attrFlags {
		options = append(options, o, "r"+o)
	}
	for o := range propagations {
		options = append(options, o, "r"+o)
	}
	slices.Sort(options)
	return &features.Features{
		OCIVersionMin: "1.0.0",
		OCIVersionMax: specs.Version,
		Hooks:         []string{},
		MountOptions:  options,
		Linux: &features.Linux{
			Namespaces:      []string{"cgroup", "ipc", "mount", "network", "pid", "uts"},
			Capabilities:    slices.Sorted(maps.Keys(capNumbers)),
			Cgroup:          &features.Cgroup{V1: &yes, V2: &yes, Systemd: &no, SystemdUser: &no, Rdma: &no},
			Seccomp:         seccomp.Features(),
			Apparmor:        &features.Apparmor{Enabled: &yes},
			Selinux:         &features.Selinux{Enabled: &yes},
			IntelRdt:        &features.IntelRdt{Enabled: &no},
			MountExtensions: &features.MountExtensions{IDMap: &features.IDMap{Enabled: &no}},
		},
	}
}
