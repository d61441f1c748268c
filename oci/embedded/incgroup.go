package embedded

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// CgroupPaths returns what Saved.Cgroups will be of a container with
// linux.cgroupsPath path, for a record that is written before it is created. A
// cgroup with processes is refused: they would be killed with the container.
func (r *Runtime) CgroupPaths(path string) (map[string]string, error) {
	if path == "" {
		return nil, nil
	}
	cg, err := r.cgroups.Open(path)
	if err != nil {
		return nil, err
	}
	pids, err := cg.Processes()
	if err != nil {
		return nil, err
	}
	if len(pids) > 0 {
		return nil, fmt.Errorf("linux.cgroupsPath %q: container's cgroup is not empty: %d process(es) found: %w", path, len(pids), errdefs.ErrFailedPrecondition)
	}
	frozen, err := cg.Frozen()
	if frozen {
		return nil, fmt.Errorf("linux.cgroupsPath %q: container's cgroup unexpectedly frozen: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errdefs.IsFailedPrecondition(err) {
		return nil, err
	}
	return cg.Paths(), nil
}

// Stats reads the counters of the container's cgroup.
func (c *Container) Stats() (*cgroup.Stats, error) {
	cg, err := c.cgroupOrErr()
	if err != nil {
		return nil, err
	}
	return cg.Stats()
}

// ExecBelow has the processes of Exec join a cgroup below the container's, named
// as for cgroup.Sub. It must exist.
func (c *Container) ExecBelow(paths ...string) error {
	cg, err := c.cgroupOrErr()
	if err != nil {
		return err
	}
	sub, err := cg.Sub(paths...)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	errs := []error{closeAll(&c.joinDir)}
	for i := range c.joinFiles {
		errs = append(errs, closeAll(&c.joinFiles[i]))
	}
	c.joinFiles = nil
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if c.joinDir, err = sub.JoinDir(); err != nil {
		return err
	}
	c.joinFiles, err = sub.JoinFiles()
	return err
}
