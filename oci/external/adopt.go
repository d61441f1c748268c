package external

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

var (
	_ oci.Heritable = (*Container)(nil)
	_ oci.Adopter   = (*Runtime)(nil)
)

// Bequeath implements oci.Heritable: all there is to know is the bundle's mount
// namespace, which the commands about the container run in.
func (c *Container) Bequeath() (json.RawMessage, []*os.File, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.mounts == nil {
		return nil, nil, fmt.Errorf("container %s: deleted: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	ns, err := kernel.Dup(c.mounts)
	if err != nil {
		return nil, nil, err
	}
	return nil, []*os.File{ns}, nil
}

// Adopt implements oci.Adopter.
func (r *Runtime) Adopt(_ context.Context, h oci.Heritage) (_ oci.Container, err error) {
	req := h.Request
	if err := check(req); err != nil {
		return nil, err
	}
	if len(h.Files) != 1 {
		return nil, fmt.Errorf("adopt container %s: %d descriptors, want its mount namespace: %w", req.ID, len(h.Files), errdefs.ErrInvalidArgument)
	}
	c := &Container{rt: r, id: req.ID, dir: filepath.Join(r.bundles(), string(req.ID)), cgroupPath: req.Spec.Linux.CgroupsPath,
		spec: req.Spec, made: true, started: true, pid: h.Pid}
	if c.mounts, err = kernel.Dup(h.Files[0]); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("adopt container %s: handler %q: %w", req.ID, r.cfg.Handler, err), c.mounts.Close())
		}
	}()
	if c.cgroupPath != "" {
		if c.cgroup, err = r.cgroups.Open(c.cgroupPath); err != nil {
			return nil, err
		}
	}
	if h.PidFD != nil {
		if gone, err := kernel.Exited(int(h.PidFD.Fd())); err == nil && !gone {
			if c.init, err = kernel.Dup(h.PidFD); err != nil {
				return nil, err
			}
		}
	}
	return c, nil
}
