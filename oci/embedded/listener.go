package embedded

import (
	"errors"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/oci/embedded/seccomp"
)

// sendFilter gives the listener of a process's filter, its descriptor n, to the
// agent of the spec (runtime-spec, "Container Process State").
func (c *Container) sendFilter(pidfd *os.File, pid, n int) error {
	f, err := seccomp.TakeFD(pidfd, n)
	if err != nil {
		return err
	}
	s := c.plan.spec
	st := specs.ContainerProcessState{
		Version: specs.Version, Pid: pid, Metadata: s.Linux.Seccomp.ListenerMetadata,
		State: specs.State{Version: specs.Version, ID: string(c.id), Status: specs.StateCreating, Pid: c.pid, Bundle: c.bundle, Annotations: s.Annotations},
	}
	if c.pid != 0 {
		st.State.Status = specs.StateRunning
	} else {
		st.State.Pid = pid
	}
	return errors.Join(seccomp.SendListener(s.Linux.Seccomp.ListenerPath, f, st), f.Close())
}
