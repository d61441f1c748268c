package spec

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/pkg/parser"
)

// CDI finds devices in the Container Device Interface's spec files.
type CDI struct{ cache *cdi.Cache }

// NewCDI reads spec files from dirs; none means /etc/cdi and /var/run/cdi.
func NewCDI(dirs ...string) (*CDI, error) {
	// No auto refresh: it would be a goroutine and a file watch for files that are
	// read in microseconds when a container asks for a device.
	options := []cdi.Option{cdi.WithAutoRefresh(false)}
	if len(dirs) > 0 {
		options = append(options, cdi.WithSpecDirs(dirs...))
	}
	cache, err := cdi.NewCache(options...)
	if err != nil {
		return nil, fmt.Errorf("cdi devices: %w", err)
	}
	return &CDI{cache: cache}, nil
}

var nodeCDI = sync.OnceValues(func() (*CDI, error) { return NewCDI() })

// InjectCDI adds the named CDI devices ("vendor.com/class=name") of the node to
// s; see CDI.Inject.
func InjectCDI(s *specs.Spec, names []string) error {
	if len(names) == 0 {
		return nil
	}
	c, err := nodeCDI()
	if err != nil {
		return err
	}
	return c.Inject(s, names)
}

// Inject adds the named devices to s: environment, device nodes, mounts, groups,
// hooks. Hooks run as root on the node: who may write a spec file there may do as
// much anyway. A name may be repeated. A malformed or unknown name is
// errdefs.ErrInvalidArgument. After an error s is not usable.
func (c *CDI) Inject(s *specs.Spec, names []string) error {
	var unique []string
	seen := map[string]bool{}
	for i, n := range names {
		if !parser.IsQualifiedName(n) {
			return fmt.Errorf("cdi_devices[%d] %q: not of the form vendor/class=name: %w", i, n, errdefs.ErrInvalidArgument)
		}
		if !seen[n] {
			seen[n] = true
			unique = append(unique, n)
		}
	}
	if len(unique) == 0 {
		return nil
	}
	// Plugins write their files just before the kubelet names a device of theirs.
	refreshed := c.cache.Refresh()
	if missing, err := c.cache.InjectDevices(s, unique...); len(missing) > 0 {
		// A broken file may be why, but not every broken file matters.
		return fmt.Errorf("cdi_devices: no spec file in %s describes %s: %w", strings.Join(c.cache.GetSpecDirectories(), ", "), strings.Join(missing, ", "), errors.Join(errdefs.ErrInvalidArgument, refreshed))
	} else if err != nil {
		return fmt.Errorf("cdi_devices: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}
