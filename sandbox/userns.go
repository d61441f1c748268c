package sandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// probeMapping is the mapping that the engine tries user namespaces with.
var probeMapping = UserNamespace{UIDs: IDMapping{Host: 1 << 16, Length: 1 << 16}, GIDs: IDMapping{Host: 1 << 16, Length: 1 << 16}}

// UserNamespaces returns nil when pods can have user namespaces here, else why not.
func (e *Engine) UserNamespaces() error {
	if err := e.noUserNS.Load(); err != nil {
		return *err
	}
	return nil
}

// probeWait is how long Open waits to learn whether pods can have user namespaces.
const probeWait = 400 * time.Millisecond

// firstProbe probes, and goes on without the answer when it does not come soon.
func (e *Engine) firstProbe() {
	err := fmt.Errorf("user namespaces of pods: not known yet whether this node has them: %w", errdefs.ErrUnavailable)
	e.noUserNS.Store(&err)
	done := make(chan struct{})
	e.owned.Go(func() {
		e.probeUserNamespaces(e.ctx)
		close(done)
	})
	select {
	case <-done:
	case <-time.After(probeWait):
	}
}

// probeUserNamespaces makes what a pod with a user namespace needs and throws it
// away: the namespaces, and a root of idmapped layers on the file system of the images.
func (e *Engine) probeUserNamespaces(ctx context.Context) {
	files, err := e.cfg.Runtime.UserNamespace(ctx, userNamespace(&probeMapping,
		[]kernel.Namespace{kernel.NetNS, kernel.IPCNS, kernel.UTSNS}, e.containersDir(), filepath.Join(e.cfg.Root, "sandboxes")))
	wire.CloseFiles(files)
	if err == nil {
		e.noUserNS.Store(nil)
		return
	}
	err = fmt.Errorf("user namespaces of pods are not possible on this node: %w: %w", err, errdefs.ErrFailedPrecondition)
	if old := e.noUserNS.Swap(&err); old == nil || (*old).Error() != err.Error() {
		klog.InfoS("User namespaces of pods are not offered", "reason", err)
	}
}

var ociKinds = map[kernel.Namespace]specs.LinuxNamespaceType{
	kernel.NetNS: specs.NetworkNamespace, kernel.IPCNS: specs.IPCNamespace, kernel.UTSNS: specs.UTSNamespace,
}

func userNamespace(u *UserNamespace, kinds []kernel.Namespace, layers ...string) wire.UserNamespace {
	r := wire.UserNamespace{
		UIDs:   []specs.LinuxIDMapping{{ContainerID: u.UIDs.Container, HostID: u.UIDs.Host, Size: u.UIDs.Length}},
		GIDs:   []specs.LinuxIDMapping{{ContainerID: u.GIDs.Container, HostID: u.GIDs.Host, Size: u.GIDs.Length}},
		Layers: layers,
	}
	for _, k := range kinds {
		r.Kinds = append(r.Kinds, ociKinds[k])
	}
	return r
}

// checkUserNamespace refuses a pod that asks for a user namespace which it cannot have.
func (e *Engine) checkUserNamespace(c *PodConfig) error {
	if c.Namespaces.User == nil {
		return nil
	}
	const field = "namespace_options.userns_options"
	if c.Handler != "" && c.Handler != version.Name {
		return fmt.Errorf("%s: handler %q is an external runtime, which gets no user namespaces; use the default one or mode NODE: %w", field, c.Handler, errdefs.ErrInvalidArgument)
	}
	if c.Namespaces.PID == NamespaceNode {
		return fmt.Errorf("%s: not possible together with pid mode NODE; use POD or CONTAINER for pid: %w", field, errdefs.ErrInvalidArgument)
	}
	if err := e.UserNamespaces(); err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	return nil
}

// userNamespace makes the pod's user namespace and, belonging to it, the other
// namespaces of the pod's own.
func (b *podBuild) userNamespace(ctx context.Context) error {
	var kinds []kernel.Namespace
	if !b.onHostNetwork() {
		kinds = append(kinds, kernel.NetNS, kernel.UTSNS)
	}
	if b.config.Namespaces.IPC != NamespaceNode {
		kinds = append(kinds, kernel.IPCNS)
	}
	files, err := b.e.cfg.Runtime.UserNamespace(ctx, userNamespace(b.config.Namespaces.User, kinds))
	if err != nil {
		return err
	}
	b.p.keep(string(kernel.UserNS), files[0])
	b.made = map[kernel.Namespace]*os.File{}
	for i, k := range kinds {
		b.made[k] = files[i+1]
	}
	return nil
}

// enterMade moves the calling thread into the IPC and UTS namespaces that were
// made with the pod's user namespace, if there are such.
func (b *podBuild) enterMade() error {
	for _, k := range []kernel.Namespace{kernel.IPCNS, kernel.UTSNS} {
		f, ok := b.made[k]
		if !ok {
			continue
		}
		if err := unix.Setns(int(f.Fd()), k.CloneFlag()); err != nil {
			return fmt.Errorf("join %s namespace: %w", k, err)
		}
	}
	return nil
}

// keepMade gives the namespaces of the given kinds to the pod.
func (b *podBuild) keepMade(kinds []kernel.Namespace) {
	for _, k := range kinds {
		b.p.keep(string(k), b.made[k])
		delete(b.made, k)
	}
}

// closeMade closes what was not put to use, or is held by the pod as a copy.
func (b *podBuild) closeMade() {
	for k, f := range b.made {
		f.Close()
		delete(b.made, k)
	}
}

// pingRange is the sysctl that holds ids of groups.
const pingRange = "net/ipv4/ping_group_range"

// hostPingRange translates a range of the pod's groups to the host's: the sysctl
// is written from outside the pod's user namespace. Groups beyond the mapping do
// not exist in the pod, so the end is cut; a range that is empty stays so.
func hostPingRange(value string, gids IDMapping) (string, error) {
	bad := fmt.Errorf("%q: want the first and the last group, two numbers: %w", value, errdefs.ErrInvalidArgument)
	f := strings.Fields(value)
	if len(f) != 2 {
		return "", bad
	}
	first, err1 := strconv.ParseUint(f[0], 10, 32)
	last, err2 := strconv.ParseUint(f[1], 10, 32)
	switch {
	case err1 != nil || err2 != nil:
		return "", bad
	case first > last:
		return "1 0", nil // nobody; the kernel's default
	case first >= uint64(gids.Length):
		return "", fmt.Errorf("%q: group %d is not in the pod's user namespace, which has %d groups: %w", value, first, gids.Length, errdefs.ErrInvalidArgument)
	}
	last = min(last, uint64(gids.Length)-1)
	return fmt.Sprintf("%d %d", uint64(gids.Host)+first, uint64(gids.Host)+last), nil
}
