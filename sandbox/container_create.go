package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/sandbox/identity"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
	"github.com/berth-runtime/berth/sandbox/spec"
)

// CreateContainer makes a container in a ready pod sandbox; no program runs. A
// call with the identity of an existing container returns that one's id.
func (e *Engine) CreateContainer(ctx context.Context, podRef string, c *ContainerConfig) (id.Container, error) {
	p, err := e.findPod(podRef)
	if err != nil {
		return "", err
	}
	if c.Meta.Name == "" {
		return "", fmt.Errorf("config.metadata.name: must be set: %w", errdefs.ErrInvalidArgument)
	}
	key := fmt.Sprintf("create container %s (attempt %d) in pod sandbox %s", c.Meta.Name, c.Meta.Attempt, id.Short(p.id))
	v, err := e.do(ctx, key, func(ctx context.Context) (any, error) {
		for _, other := range e.containersOf(p) {
			s := other.status.Load()
			if s == nil || s.Config.Meta != c.Meta {
				continue
			}
			if other.record().State == lifecycle.Removing {
				return id.Container(""), fmt.Errorf("container %s attempt %d: exists as %s and is being removed; call again, or ask for the next attempt: %w",
					c.Meta.Name, c.Meta.Attempt, id.Short(other.id), errdefs.ErrFailedPrecondition)
			}
			return other.id, nil
		}
		return e.createContainer(ctx, p, c)
	})
	if err != nil {
		return "", err
	}
	return v.(id.Container), nil
}

func (e *Engine) createContainer(ctx context.Context, p *pod, cfg *ContainerConfig) (id.Container, error) {
	prec := p.record()
	if prec.State != lifecycle.Ready {
		return "", fmt.Errorf("pod sandbox %s: is not ready; run a new one: %w", id.Short(p.id), errdefs.ErrFailedPrecondition)
	}
	at := e.created()
	c := &container{id: id.NewContainer(), pod: p, created: at.UnixNano(), slot: newSlot(containerSlot), exited: make(chan struct{})}
	b := &containerBuild{e: e, p: p, c: c, pod: prec, config: cfg}
	if err := b.check(); err != nil {
		return "", err
	}
	img, err := e.cfg.Images.Acquire(cfg.Image.Image, string(c.id))
	if err != nil {
		return "", fmt.Errorf("config.image: %w", err)
	}
	b.image = img
	crashpoint.Here("create container", "image", "pinned")
	if err := b.acquireVolumes(); err != nil {
		e.cfg.Images.Release(string(c.id))
		return "", err
	}
	if err := b.describe(); err != nil {
		e.cfg.Images.Release(string(c.id))
		return "", err
	}
	c.rec.CreatedAt = at
	release, err := c.slot.take(ctx)
	if err != nil {
		e.cfg.Images.Release(string(c.id))
		return "", err
	}
	defer release()
	if err := e.stepContainer(c, lifecycle.Ask, nil); err != nil {
		e.cfg.Images.Release(string(c.id))
		return "", err
	}
	e.insertContainer(c)
	undone, err := e.run(ctx, "create container", []step{
		{name: "folders", do: b.folders, undo: func(context.Context) error { return e.removeLayer(c.id) }, partial: true},
		{name: "create", do: b.create, undo: func(ctx context.Context) error { return e.deleteContainer(ctx, c.id, c.rec.Cgroup) }, partial: true},
		{name: "created", do: b.created},
	})
	if err == nil {
		return c.id, nil
	}
	err = fmt.Errorf("container %s: %w", cfg.Meta.Name, err)
	if undone != nil {
		// The supervisor may still have it: it stays on record, unlisted, for the
		// removal of its pod and the next daemon, and its image's layers stay.
		return "", errors.Join(err, undone, e.stepContainer(c, lifecycle.Remove, nil))
	}
	e.cfg.Images.Release(string(c.id))
	err = errors.Join(err, e.stepContainer(c, lifecycle.Failed, nil))
	if rec := p.record(); rec.State == lifecycle.None && rec.OwnCgroup {
		e.removeCgroup(rec.Cgroup) // the pod's removal found it in use
	}
	return "", err
}

// containerBuild is a container being made.
type containerBuild struct {
	e      *Engine
	p      *pod
	c      *container
	pod    podRecord
	config *ContainerConfig
	image  *imageservice.Image
	spec   *specs.Spec
	join   id.Container // whose PID namespace is joined
	// volumes are the images that are mounted, by the name of their source in the spec.
	volumes map[string]oci.Volume
}

func (b *containerBuild) check() error {
	cfg := b.config
	bad := func(format string, args ...any) error {
		return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	if cfg.LogPath != "" && b.pod.Config.LogDirectory != "" {
		if rel := filepath.Clean(cfg.LogPath); filepath.IsAbs(rel) || rel == ".." || strings.HasPrefix(rel, "../") {
			return bad("config.log_path %q: leads out of the pod's log directory", cfg.LogPath)
		}
	}
	ns := cfg.Security.Namespaces
	if !ns.User.Same(b.pod.Config.Namespaces.User) {
		return bad("namespace_options.userns_options: differs from the pod sandbox's; a container has its pod's user namespace")
	}
	switch ns.PID {
	case NamespacePod:
		// A container that asks for the pod's PID namespace in a pod without one gets
		// its own: older kubelets leave the field empty.
		if b.pod.Init != "" {
			b.join = b.pod.Init
		}
	case NamespaceTarget:
		t, err := b.e.findContainer(string(ns.TargetID))
		if err != nil || t.pod != b.p {
			return bad("namespace_options.target_id %q: no such target container in this pod sandbox", ns.TargetID)
		}
		rec := t.record()
		if rec.State != lifecycle.Running {
			return bad("namespace_options.target_id %q: the target container is not running", ns.TargetID)
		}
		if rec.Config.Security.Namespaces.PID != NamespaceContainer {
			return bad("namespace_options.target_id %q: the target container has no PID namespace of its own", ns.TargetID)
		}
		b.join = t.id
	}
	_, err := signalOf(cfg.StopSignal)
	if err != nil {
		return fmt.Errorf("config.stop_signal: %w", err)
	}
	return nil
}

// acquireVolumes pins the images that are mounted: they count as in use as the
// container's own does, and one Release drops all.
func (b *containerBuild) acquireVolumes() error {
	for i, m := range b.config.Mounts {
		if m.Image == "" {
			continue
		}
		img, err := b.e.cfg.Images.Acquire(m.Image, string(b.c.id))
		if err != nil {
			// The prefix tells the kubelet's users which of two images is meant.
			return fmt.Errorf("ImageVolumeMountFailed: config.mounts[%d].image: %w", i, err)
		}
		if b.volumes == nil {
			b.volumes = map[string]oci.Volume{}
		}
		b.volumes[strconv.Itoa(i)] = oci.Volume{Lowers: img.Layers, SubPath: m.ImageSubPath, Idmap: b.pod.Config.Namespaces.User != nil}
		// What the status says of the mount: which image it turned out to be.
		b.config.Mounts[i].ImageRef = string(img.ID)
	}
	return nil
}

// describe builds spec and record; it makes nothing.
func (b *containerBuild) describe() error {
	e, cfg, pc := b.e, b.config, b.pod.Config
	who, home, err := identity.Resolve(b.image.Layers, b.image.Config.Config.User, cfg.Security)
	if err != nil {
		return err
	}
	ns := cfg.Security.Namespaces
	if ns.PID == NamespacePod && b.join == "" {
		ns.PID = NamespaceContainer
		if pc.Namespaces.PID == NamespaceNode {
			ns.PID = NamespaceNode
		}
	}
	in := spec.Input{
		ID: b.c.id, PodID: b.p.id, Pod: pc, Container: cfg, Image: b.image.Config.Config, Identity: who, Home: home,
		Namespaces: ns, CgroupPath: b.pod.containerIn(b.c.id), Hostname: pc.Hostname,
		Shm: "fd:shm", Policy: e.cfg.Policy, Host: *e.cfg.Host,
	}
	for _, h := range e.cfg.Handlers {
		if h.Name == pc.Handler { // what its runtime cannot do would be left out without a word
			in.Host.RecursiveReadonly = in.Host.RecursiveReadonly && h.RecursiveReadonly.Load()
		}
	}
	dir := e.podDir(b.p.id)
	in.HostsPath, in.HostnamePath, in.ResolvConfPath = filepath.Join(dir, "hosts"), filepath.Join(dir, "hostname"), filepath.Join(dir, "resolv.conf")
	in.ImageVolumes = map[int]string{}
	for i, m := range cfg.Mounts {
		if m.Image != "" {
			in.ImageVolumes[i] = "image:" + strconv.Itoa(i)
		}
	}
	if b.spec, err = spec.Build(in); err != nil {
		return err
	}
	if len(cfg.CDIDevices) > 0 {
		if err := spec.InjectCDI(b.spec, cfg.CDIDevices); err != nil {
			return err
		}
	}
	stop := cfg.StopSignal
	if stop == "" {
		stop = b.image.Config.Config.StopSignal
	}
	if _, err := signalOf(stop); err != nil {
		stop = "" // an image's nonsense is no reason not to run it
	}
	if stop == "" {
		stop = "SIGTERM"
	}
	process := *b.spec.Process
	process.Args, process.Terminal, process.ConsoleSize = nil, false, nil
	b.c.rec = containerRecord{
		ID: b.c.id, Pod: b.p.id, BootID: e.bootID, Config: cfg, ImageID: string(b.image.ID), ImageName: imageName(b.image),
		Resources: cfg.Resources, Identity: who, StopSignal: canonicalSignal(stop), Cgroup: in.CgroupPath, Process: &process,
		RawEnv: rawEnv(process.Env),
	}
	if pc.LogDirectory != "" && cfg.LogPath != "" {
		b.c.rec.LogPath = filepath.Join(pc.LogDirectory, cfg.LogPath)
	}
	return nil
}

// rawEnv is env as bytes when some of it is not UTF-8, which a record in JSON
// would not keep.
func rawEnv(env []string) [][]byte {
	if !slices.ContainsFunc(env, func(kv string) bool { return !utf8.ValidString(kv) }) {
		return nil
	}
	raw := make([][]byte, len(env))
	for i, kv := range env {
		raw[i] = []byte(kv)
	}
	return raw
}

func imageName(i *imageservice.Image) string {
	switch {
	case len(i.Tags) > 0:
		return i.Tags[0]
	case len(i.Digests) > 0:
		return i.Digests[0]
	}
	return string(i.ID)
}

func (b *containerBuild) folders(ctx context.Context) error {
	if err := b.podFiles(ctx); err != nil {
		return err
	}
	dir := b.e.containerDir(b.c.id)
	for _, d := range []string{dir, filepath.Join(dir, "upper"), filepath.Join(dir, "work")} {
		mode := os.FileMode(0o755) // the upper's mode is the mode of the container's "/"
		if d == dir {
			mode = 0o710
		}
		if err := os.Mkdir(d, mode); err != nil {
			return err
		}
		crashpoint.Here("create container", "folders", "one made")
	}
	if b.spec.Hooks != nil {
		if err := b.bundle(dir); err != nil {
			return err
		}
	}
	uid, gid := b.pod.Config.Namespaces.User.Root()
	if uid == 0 && gid == 0 {
		return nil
	}
	return os.Chown(filepath.Join(dir, "upper"), int(uid), int(gid))
}

// podFiles makes the pod's files again when somebody wiped the state folder.
func (b *containerBuild) podFiles(ctx context.Context) error {
	dir := b.e.podDir(b.p.id)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		return nil
	}
	err := (&podBuild{e: b.e, p: b.p, config: b.pod.Config}).files(ctx)
	// A stop changes the state before it removes the folder: either it finds ours,
	// or we see that it came.
	if s := b.p.record().State; s != lifecycle.Ready {
		return errors.Join(fmt.Errorf("pod sandbox %s: was stopped meanwhile: %w", id.Short(b.p.id), errdefs.ErrFailedPrecondition), os.RemoveAll(dir))
	}
	return err
}

// bundle makes dir the bundle that hooks look for: config.json names the folder
// where the root is while they run.
func (b *containerBuild) bundle(dir string) error {
	root := *b.spec.Root
	root.Path = filepath.Join(dir, "rootfs")
	b.spec.Root = &root
	text, err := json.Marshal(b.spec)
	if err != nil {
		return err
	}
	return errors.Join(os.Mkdir(root.Path, 0o755), os.WriteFile(filepath.Join(dir, "config.json"), text, 0o600))
}

func (b *containerBuild) create(ctx context.Context) error {
	dir := b.e.containerDir(b.c.id)
	r := wire.Create{
		ID: b.c.id, Handler: b.pod.Config.Handler, Spec: b.spec, JoinPID: b.join,
		Rootfs:     oci.Rootfs{Lowers: b.image.Layers, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work"), Volatile: true},
		Namespaces: map[specs.LinuxNamespaceType]string{},
		Stdin:      b.config.Stdin, StdinOnce: b.config.StdinOnce,
		Volumes: b.volumes,
	}
	if b.spec.Hooks != nil {
		r.Bundle = dir
	}
	if b.pod.Config.Namespaces.Network != NamespaceNode {
		r.Namespaces[specs.NetworkNamespace] = fdKey(b.p.id, string(kernel.NetNS))
		r.Namespaces[specs.UTSNamespace] = fdKey(b.p.id, string(kernel.UTSNS))
	}
	if b.pod.Config.Namespaces.IPC != NamespaceNode {
		r.Namespaces[specs.IPCNamespace] = fdKey(b.p.id, string(kernel.IPCNS))
		r.Mounts = map[string]string{"shm": fdKey(b.p.id, "shm")}
	}
	if b.pod.Config.Namespaces.User != nil {
		r.Namespaces[specs.UserNamespace] = fdKey(b.p.id, string(kernel.UserNS))
		r.Rootfs.Idmap = true
	}
	return b.e.cfg.Runtime.Create(ctx, r)
}

func (b *containerBuild) created(context.Context) error {
	// The pod may have been stopped meanwhile: its containers must not outlive it.
	if s := b.p.record().State; s != lifecycle.Ready {
		return fmt.Errorf("pod sandbox %s: was stopped meanwhile: %w", id.Short(b.p.id), errdefs.ErrFailedPrecondition)
	}
	return b.e.stepContainer(b.c, lifecycle.Made, nil)
}

// makeAgain makes a created container, of which nothing has run, in a supervisor
// that does not know it. The container's slot is taken.
func (e *Engine) makeAgain(ctx context.Context, c *container) error {
	rec := c.record()
	config := *rec.Config
	config.Mounts = slices.Clone(config.Mounts)
	for i, m := range config.Mounts {
		if m.ImageRef != "" { // its name may be another image's by now
			config.Mounts[i].Image = m.ImageRef
		}
	}
	b := &containerBuild{e: e, p: c.pod, c: &container{id: c.id}, pod: c.pod.record(), config: &config}
	fail := func(err error) error {
		return fmt.Errorf("container %s: cannot be made again after the loss of the supervisor: %w", rec.Config.Meta.Name, err)
	}
	if b.pod.State != lifecycle.Ready {
		return fail(fmt.Errorf("pod sandbox %s: is not ready: %w", id.Short(c.pod.id), errdefs.ErrFailedPrecondition))
	}
	var err error
	if b.image, err = e.cfg.Images.Acquire(rec.ImageID, string(c.id)); err != nil {
		return fail(err)
	}
	if err := errors.Join(b.check(), b.acquireVolumes(), b.describe()); err != nil {
		return fail(err)
	}
	if b.spec.Hooks != nil { // they were told of the bundle that is there
		root := *b.spec.Root
		root.Path = filepath.Join(e.containerDir(c.id), "rootfs")
		b.spec.Root = &root
	}
	if err := b.create(ctx); err != nil {
		return fail(err)
	}
	return nil
}

// removeLayer removes a container's writable layer.
func (e *Engine) removeLayer(c id.Container) error {
	e.usage.forget(c)
	return os.RemoveAll(e.containerDir(c))
}

// signalOf parses "SIGTERM", "TERM", "15", "SIGRTMIN+3" or "SIGRTMAX-1"; "" is
// SIGTERM. SIGRTMIN is 34, as C libraries leave it to programs.
func signalOf(name string) (unix.Signal, error) {
	const rtmin, rtmax = 34, 64
	bad := fmt.Errorf("%q is no signal: %w", name, errdefs.ErrInvalidArgument)
	if name == "" {
		return unix.SIGTERM, nil
	}
	if n, err := strconv.Atoi(name); err == nil {
		if n < 1 || n > rtmax {
			return 0, bad
		}
		return unix.Signal(n), nil
	}
	up := strings.ToUpper(name)
	if !strings.HasPrefix(up, "SIG") {
		up = "SIG" + up
	}
	if rest, ok := strings.CutPrefix(up, "SIGRTMIN"); ok {
		n, err := strconv.Atoi("0" + strings.TrimPrefix(rest, "+"))
		if err != nil || n > rtmax-rtmin {
			return 0, bad
		}
		return unix.Signal(rtmin + n), nil
	}
	if rest, ok := strings.CutPrefix(up, "SIGRTMAX"); ok {
		n, err := strconv.Atoi("0" + strings.TrimPrefix(rest, "-"))
		if err != nil || n > rtmax-rtmin {
			return 0, bad
		}
		return unix.Signal(rtmax - n), nil
	}
	if s, ok := signalAliases[up]; ok {
		return s, nil
	}
	if s := unix.SignalNum(up); s != 0 {
		return s, nil
	}
	return 0, bad
}

// signalAliases are the second names of signals; CRI has them too.
var signalAliases = map[string]unix.Signal{"SIGCLD": unix.SIGCHLD, "SIGIOT": unix.SIGABRT, "SIGPOLL": unix.SIGIO}

// canonicalSignal is the name that statuses show.
func canonicalSignal(name string) string {
	s, err := signalOf(name)
	if err != nil {
		return "SIGTERM"
	}
	if n := unix.SignalName(s); n != "" {
		return n
	}
	switch n := int(s); {
	case n == 34:
		return "SIGRTMIN"
	case n == 64:
		return "SIGRTMAX"
	case n < 50:
		return fmt.Sprintf("SIGRTMIN+%d", n-34)
	default:
		return fmt.Sprintf("SIGRTMAX-%d", 64-n)
	}
}
