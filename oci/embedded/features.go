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
	yes := true
	options := slices.Concat([]string{"bind", "rbind", "defaults", "idmap", "ridmap", "remount", "tmpcopyup"}, superFlags, superOff)
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
		Hooks:         []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"},
		MountOptions:  options,
		Linux: &features.Linux{
			Namespaces:      []string{"cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"},
			Capabilities:    slices.Sorted(maps.Keys(capNumbers)),
			Cgroup:          &features.Cgroup{V1: &yes, V2: &yes, Systemd: &yes, SystemdUser: &yes, Rdma: &yes},
			Seccomp:         seccomp.Features(),
			Apparmor:        &features.Apparmor{Enabled: &yes},
			Selinux:         &features.Selinux{Enabled: &yes},
			IntelRdt:        &features.IntelRdt{Enabled: &yes, Schemata: &yes, Monitoring: &yes},
			MemoryPolicy:    &features.MemoryPolicy{Modes: names(memoryModes), Flags: names(memoryFlags)},
			MountExtensions: &features.MountExtensions{IDMap: &features.IDMap{Enabled: &yes}},
			NetDevices:      &features.NetDevices{Enabled: &yes},
		},
	}
}

// names are the keys of a table, sorted.
func names[K ~string, V any](table map[K]V) []string {
	var out []string
	for k := range table {
		out = append(out, string(k))
	}
	slices.Sort(out)
	return out
}
