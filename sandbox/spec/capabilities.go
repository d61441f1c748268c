package spec

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/sandbox/model"
)

// defaultCapabilities is the set that container runtimes have agreed on; images
// depend on it.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

var knownCapabilities = sync.OnceValue(func() map[string]bool {
	m := map[string]bool{}
	for _, c := range capability.ListKnown() {
		m["CAP_"+strings.ToUpper(c.String())] = true
	}
	return m
})

const allCapabilities = "ALL"

// capabilities computes the sets: the default one, or all with "ALL" added, or
// none with "ALL" dropped; then the names added, then the names dropped. All
// are bounded by what the daemon may give. The inheritable and ambient sets are
// empty unless ambient capabilities are asked for (invariant I6).
func capabilities(sec model.Security, bounding []string) (*specs.LinuxCapabilities, error) {
	add, addAll, err := capabilityNames("add_capabilities", sec.Capabilities.Add)
	if err != nil {
		return nil, err
	}
	drop, dropAll, err := capabilityNames("drop_capabilities", sec.Capabilities.Drop)
	if err != nil {
		return nil, err
	}
	ambient, ambientAll, err := capabilityNames("add_ambient_capabilities", sec.Capabilities.AddAmbient)
	if err != nil {
		return nil, err
	}
	if sec.Privileged {
		set := sorted(bounding)
		return &specs.LinuxCapabilities{Bounding: set, Effective: slices.Clone(set), Permitted: slices.Clone(set)}, nil
	}
	set := map[string]bool{}
	switch {
	case dropAll:
	case addAll:
		set = setOf(bounding)
	default:
		for _, c := range defaultCapabilities {
			set[c] = slices.Contains(bounding, c)
		}
	}
	for _, c := range append(add, ambient...) {
		if !slices.Contains(bounding, c) {
			return nil, fmt.Errorf("capabilities: %s is not among those that this node can give; run the daemon with it, or do not ask for it: %w", c, errdefs.ErrFailedPrecondition)
		}
		set[c] = true
	}
	for _, c := range drop {
		set[c] = false
	}
	list := fromSet(set)
	out := &specs.LinuxCapabilities{Bounding: list, Effective: slices.Clone(list), Permitted: slices.Clone(list)}
	if ambientAll {
		ambient = list
	}
	for _, c := range sorted(ambient) {
		if set[c] { // a dropped one is dropped from every set
			out.Ambient = append(out.Ambient, c)
			out.Inheritable = append(out.Inheritable, c) // the kernel keeps ambient within inheritable
		}
	}
	return out, nil
}

// capabilityNames normalises names ("net_admin" is CAP_NET_ADMIN) and takes ALL out.
func capabilityNames(field string, names []string) (out []string, all bool, err error) {
	for i, n := range names {
		c := strings.ToUpper(n)
		if strings.TrimPrefix(c, "CAP_") == allCapabilities {
			all = true
			continue
		}
		if !strings.HasPrefix(c, "CAP_") {
			c = "CAP_" + c
		}
		if !knownCapabilities()[c] {
			return nil, false, fmt.Errorf("capabilities.%s[%d] %q: no such capability: %w", field, i, n, errdefs.ErrInvalidArgument)
		}
		out = append(out, c)
	}
	return out, all, nil
}

func setOf(names []string) map[string]bool {
	m := map[string]bool{}
	for _, n := range names {
		m[n] = true
	}
	return m
}

func fromSet(m map[string]bool) []string {
	var out []string
	for c, in := range m {
		if in {
			out = append(out, c)
		}
	}
	slices.Sort(out)
	return out
}

func sorted(names []string) []string { return fromSet(setOf(names)) }
