package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
	"github.com/berth-runtime/berth/sandbox/podfiles"
	"github.com/berth-runtime/berth/sandbox/spec"
)

// shmSize is the size of a pod's /dev/shm: what the field gives, 64 MiB.
const shmSize = "65536k"

// RunPod makes a pod sandbox and returns when it is ready. A call with the
// identity of one that is being made or is ready returns that one's id. On
// error nothing is left, or a pod that is not ready and can be removed.
func (e *Engine) RunPod(ctx context.Context, c *PodConfig) (id.Pod, error) {
	if err := e.checkPod(c); err != nil {
		return "", err
	}
	m := c.Meta
	key := fmt.Sprintf("run pod sandbox %s/%s (uid %s, attempt %d)", m.Namespace, m.Name, m.UID, m.Attempt)
	v, err := e.do(ctx, key, func(ctx context.Context) (any, error) {
		for _, p := range e.view.Load().pods {
			rec := p.record()
			if rec.Config.Meta != m {
				continue
			}
			if rec.State == lifecycle.Creating {
				if err := e.unmade(ctx, p); err != nil {
					return id.Pod(""), err
				}
				rec = p.record()
			}
			if rec.State == lifecycle.None {
				continue
			}
			if rec.State != lifecycle.Ready {
				return id.Pod(""), fmt.Errorf("pod sandbox %s/%s attempt %d: exists as %s and is stopped; remove it, or ask for the next attempt: %w",
					m.Namespace, m.Name, m.Attempt, id.Short(p.id), errdefs.ErrAlreadyExists)
			}
			return p.id, nil
		}
		return e.runPod(ctx, c)
	})
	if err != nil {
		return "", err
	}
	return v.(id.Pod), nil
}

// unmade returns when a pod that an operation, or a daemon, has left half-made is
// gone, or is listed as not ready because something of it cannot be freed. A pod
// with its identity must not be made while its network and cgroup are still there.
func (e *Engine) unmade(ctx context.Context, p *pod) error {
	release, err := p.slot.take(ctx)
	if err != nil {
		return fmt.Errorf("pod sandbox %s: is left half-made and still being taken down: %w", id.Short(p.id), err)
	}
	defer release()
	if p.record().State != lifecycle.Creating {
		return nil
	}
	tell(e.unmakePod(ctx, p), "Half-made pod", "pod", p.id)
	return nil
}

func (e *Engine) checkPod(c *PodConfig) error {
	switch {
	case c.Meta.Name == "" || c.Meta.Namespace == "" || c.Meta.UID == "":
		return fmt.Errorf("config.metadata: name, namespace and uid must be set: %w", errdefs.ErrInvalidArgument)
	case c.RunAsGroup != nil && c.RunAsUser == nil:
		return fmt.Errorf("linux.security_context.run_as_group: set without run_as_user; set both: %w", errdefs.ErrInvalidArgument)
	case strings.HasSuffix(c.CgroupParent, ".slice"):
		return fmt.Errorf("linux.cgroup_parent %q: is a systemd slice, and this node uses the cgroupfs driver; set the kubelet's cgroupDriver to cgroupfs: %w", c.CgroupParent, errdefs.ErrInvalidArgument)
	case c.CgroupParent != "" && path.Clean("/"+c.CgroupParent) != "/"+strings.Trim(c.CgroupParent, "/"):
		return fmt.Errorf("linux.cgroup_parent %q: is not a clean path: %w", c.CgroupParent, errdefs.ErrInvalidArgument)
	case c.LogDirectory != "" && !filepath.IsAbs(c.LogDirectory):
		return fmt.Errorf("config.log_directory %q: is not an absolute path: %w", c.LogDirectory, errdefs.ErrInvalidArgument)
	}
	if err := e.checkHandler(c.Handler); err != nil {
		return err
	}
	if c.Hostname != "" {
		if err := podfiles.ValidHostname(c.Hostname); err != nil {
			return fmt.Errorf("config.hostname: %w", err)
		}
	}
	if err := spec.CheckSELinux(c.SELinux); err != nil {
		return err
	}
	if err := e.checkUserNamespace(c); err != nil {
		return err
	}
	_, err := sysctlsOf(c)
	return err
}

func (e *Engine) checkHandler(name string) error {
	if name == "" || name == version.Name {
		return nil
	}
	known := version.Name
	for _, h := range e.cfg.Handlers {
		if h.Name == name {
			return nil
		}
		known += ", " + h.Name
	}
	return fmt.Errorf("runtime_handler %q: is not configured; configured besides the default: %s; add a table [runtimes.%s] to the daemon's configuration: %w",
		name, known, name, errdefs.ErrInvalidArgument)
}

func (e *Engine) runPod(ctx context.Context, c *PodConfig) (id.Pod, error) {
	at := e.created()
	p := &pod{id: id.NewPod(), created: at.UnixNano(), slot: newSlot(podSlot)}
	p.rec = podRecord{ID: p.id, BootID: e.bootID, Config: c, CreatedAt: at, Cgroup: path.Clean("/" + c.CgroupParent)}
	if c.CgroupParent == "" {
		p.rec.Cgroup, p.rec.OwnCgroup = path.Join(defaultCgroupParent, string(p.id)), true
	}
	release, err := p.slot.take(ctx)
	if err != nil {
		return "", err
	}
	defer release()
	if err := e.stepPod(p, lifecycle.Ask, nil); err != nil {
		return "", err
	}
	e.insertPod(p)
	b := &podBuild{e: e, p: p, config: c}
	steps := []step{
		// A network that could not attach may want a Detach all the same.
		{name: "network", do: b.attach, undo: b.detach, partial: true},
		// The network namespace stays open for the network's way back.
		{name: "namespaces", do: b.namespaces, undo: func(context.Context) error { p.closeFiles("net"); return nil }, partial: true},
		{name: "keep", do: b.hold, undo: func(ctx context.Context) error { return e.dropHeld(ctx, p) }, partial: true},
		{name: "files", do: b.files, undo: func(context.Context) error { return os.RemoveAll(e.podDir(p.id)) }, partial: true},
		{name: "init", do: b.init, undo: b.removeInit, partial: true},
		{name: "ready", do: b.ready},
	}
	if c.Namespaces.User != nil {
		first := step{name: "user namespace", do: b.userNamespace, undo: func(context.Context) error { b.closeMade(); p.closeFiles("net"); return nil }, partial: true}
		steps = append([]step{first}, steps...)
	}
	undone, err := e.run(ctx, "run pod sandbox", steps)
	b.closeMade()
	if err == nil {
		return p.id, nil
	}
	err = fmt.Errorf("pod sandbox %s/%s: %w", c.Meta.Namespace, c.Meta.Name, err)
	if undone != nil {
		// Something could not be taken back (a plugin's DEL, say): the pod stays
		// listed as not ready, and stopping it tries again.
		return "", errors.Join(err, undone, e.stepPod(p, lifecycle.Stop, func(r *podRecord) { r.Reason = undone.Error() }))
	}
	if r := p.record(); r.OwnCgroup {
		e.removeCgroup(r.Cgroup)
	}
	crashpoint.Here("run pod sandbox", "cgroup", "removed")
	return "", errors.Join(err, e.stepPod(p, lifecycle.Failed, nil))
}

// podBuild is a pod being made.
type podBuild struct {
	e      *Engine
	p      *pod
	config *PodConfig
	// made are the namespaces that were made with a user namespace, until they are
	// put to use.
	made map[kernel.Namespace]*os.File
}

func (b *podBuild) onHostNetwork() bool { return b.config.Namespaces.Network == NamespaceNode }

func (b *podBuild) attach(ctx context.Context) error {
	if b.onHostNetwork() {
		return nil
	}
	rec := b.p.record()
	net := rec.network()
	net.NetNS = b.made[kernel.NetNS]
	a, ns, err := b.e.cfg.Network.Attach(ctx, net)
	if err != nil {
		return err
	}
	b.p.keep("net", ns)
	b.p.mu.Lock()
	b.p.rec.Attachment = a // reaches the journal with the next event; recovery detaches by pod id before that
	b.p.mu.Unlock()
	return nil
}

func (b *podBuild) detach(ctx context.Context) error {
	if b.onHostNetwork() {
		return nil
	}
	if err := b.e.detach(ctx, b.p); err != nil {
		return err
	}
	b.p.closeFiles()
	return nil
}

// namespaces makes the pod's IPC and UTS namespaces, sets its host name and
// sysctls inside them, and makes its /dev/shm.
func (b *podBuild) namespaces(context.Context) error {
	var kinds []kernel.Namespace
	if b.config.Namespaces.IPC != NamespaceNode {
		kinds = append(kinds, kernel.IPCNS)
	}
	if !b.onHostNetwork() {
		kinds = append(kinds, kernel.UTSNS)
	}
	sysctls, err := sysctlsOf(b.config)
	if err != nil {
		return err
	}
	inside := func() error {
		if err := b.enterMade(); err != nil {
			return err
		}
		if !b.onHostNetwork() && b.config.Hostname != "" {
			if err := unix.Sethostname([]byte(b.config.Hostname)); err != nil {
				return fmt.Errorf("host name %q: %w", b.config.Hostname, err)
			}
		}
		if !b.onHostNetwork() {
			net, err := b.p.dup("net")
			if err != nil {
				return err
			}
			defer net.Close()
			// The thread is thrown away after this: nothing has to be put back.
			if err := unix.Setns(int(net.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("network namespace: %w", err)
			}
		}
		if u := b.config.Namespaces.User; u != nil {
			// The kernel asks for the root of the namespace's owner, not for capabilities.
			if err := kernel.SetEffectiveIDs(u.Root()); err != nil {
				return err
			}
		}
		return writeSysctls(sysctls)
	}
	if b.config.Namespaces.User != nil {
		if err := kernel.OnThread(inside); err != nil {
			return err
		}
		b.keepMade(kinds)
	} else if len(kinds) > 0 {
		files, err := kernel.NewNamespaces(kinds, inside)
		if err != nil {
			return err
		}
		for i, k := range kinds {
			b.p.keep(string(k), files[i])
		}
	}
	if b.config.Namespaces.IPC == NamespaceNode {
		return nil
	}
	uid, gid := b.config.Namespaces.User.Root()
	shm, err := kernel.NewFS("tmpfs", []kernel.FSOption{{Key: "mode", Value: "1777"}, {Key: "size", Value: shmSize},
		{Key: "uid", Value: strconv.FormatUint(uint64(uid), 10)}, {Key: "gid", Value: strconv.FormatUint(uint64(gid), 10)}},
		unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return fmt.Errorf("/dev/shm: %w", err)
	}
	if shm, err = kernel.Hold(b.e.empty, shm); err != nil {
		return fmt.Errorf("/dev/shm: %w", err)
	}
	b.p.keep("shm", shm)
	return nil
}

// hold gives the supervisor a copy of everything that must outlive the daemon.
func (b *podBuild) hold(ctx context.Context) error {
	keys, files := b.p.held()
	if len(keys) == 0 {
		return nil
	}
	return b.e.cfg.FDs.PutFDs(ctx, keys, files)
}

// files writes what is mounted on /etc/hosts, /etc/hostname and /etc/resolv.conf.
func (b *podBuild) files(context.Context) error {
	dir := b.e.podDir(b.p.id)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	hostname := b.config.Hostname
	if b.onHostNetwork() || hostname == "" {
		var err error
		if hostname, err = os.Hostname(); err != nil {
			return err
		}
	}
	hosts, err := b.hosts(hostname)
	if err != nil {
		return err
	}
	name, err := podfiles.Hostname(hostname)
	if err != nil {
		return err
	}
	resolv, err := podfiles.ResolvConf(b.config.DNS)
	if err != nil {
		return fmt.Errorf("config.dns_config: %w", err)
	}
	uid, gid := b.config.Namespaces.User.Root()
	for file, text := range map[string][]byte{"hosts": hosts, "hostname": name, "resolv.conf": resolv} {
		file = filepath.Join(dir, file)
		if err := os.WriteFile(file, text, 0o644); err != nil {
			return err
		}
		if uid != 0 || gid != 0 { // the pod's root may change them, as any pod's may
			if err := os.Chown(file, int(uid), int(gid)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *podBuild) hosts(hostname string) ([]byte, error) {
	if b.onHostNetwork() {
		if text, err := os.ReadFile("/etc/hosts"); err == nil {
			return text, nil
		}
	}
	rec := b.p.record()
	return podfiles.Hosts(hostname, rec.status().IPs)
}

// init starts the first process of the PID namespace that the pod's containers
// share. It is the embedded runtime's, whatever runs the containers.
func (b *podBuild) init(ctx context.Context) error {
	if b.config.Namespaces.PID != NamespacePod {
		return nil
	}
	init := id.NewContainer()
	b.p.mu.Lock()
	b.p.rec.Init = init
	rec := b.p.rec
	b.p.mu.Unlock()
	// On record before it is made: recovery must find it.
	if err := b.e.podBook.Write(string(b.p.id), &rec); err != nil {
		return err
	}
	namespaces := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}}
	join := map[specs.LinuxNamespaceType]string{}
	if b.config.Namespaces.User != nil { // or the containers could not mount the namespace's procfs
		namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		join[specs.UserNamespace] = fdKey(b.p.id, string(kernel.UserNS))
	}
	crashpoint.Here("init", "on record")
	err := b.e.cfg.Runtime.Create(ctx, wire.Create{
		ID: init, PodInit: true, Rootfs: oci.Rootfs{}, Namespaces: join,
		Spec: &specs.Spec{
			Version: specs.Version,
			Process: &specs.Process{Cwd: "/", Args: []string{"init"}, NoNewPrivileges: true},
			Linux: &specs.Linux{
				CgroupsPath: rec.containerIn(init),
				Namespaces:  namespaces,
			},
		},
	})
	if err != nil {
		return err
	}
	crashpoint.Here("init", "created")
	_, err = b.e.cfg.Runtime.Start(ctx, wire.Start{ID: init})
	return err
}

func (b *podBuild) removeInit(ctx context.Context) error {
	if rec := b.p.record(); rec.Init != "" {
		return b.e.deleteContainer(ctx, rec.Init, rec.containerIn(rec.Init))
	}
	return nil
}

func (b *podBuild) ready(context.Context) error { return b.e.stepPod(b.p, lifecycle.Made, nil) }
