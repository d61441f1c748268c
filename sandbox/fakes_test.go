package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/internal/ranked"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// world is everything outside the engine that outlives it: the supervisor, the
// network and the images. Engines see it through a link each.
type world struct {
	mu         sync.Mutex
	containers map[id.Container]*fakeContainer
	fds        map[string]*os.File
	attached   map[id.Pod]bool
	pins       map[string]bool
	signals    []wire.Signal
	detaches   []cni.Attachment
	acquired   []string // images, as they were asked for
	next       byte
	link       *link // gets the exits
	// hook is called at the beginning ("create") and the end ("create!") of each
	// call; its error is the call's.
	hook  func(op, key string) error
	layer string
}

type fakeContainer struct {
	info   wire.Info
	create wire.Create
	execs  map[id.Exec]int // process group
}

func newWorld(t testing.TB) *world {
	w := &world{containers: map[id.Container]*fakeContainer{}, fds: map[string]*os.File{}, attached: map[id.Pod]bool{},
		pins: map[string]bool{}, layer: t.TempDir()}
	t.Cleanup(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, f := range w.fds {
			f.Close()
		}
	})
	return w
}

func (w *world) set(hook func(op, key string) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hook = hook
}

// failing makes the given call fail n times.
func (w *world) failing(op string, n int) *atomic.Int32 {
	var left atomic.Int32
	left.Store(int32(n))
	w.set(func(o, _ string) error {
		if o == op && left.Add(-1) >= 0 {
			return fmt.Errorf("%s: made to fail: %w", op, errdefs.ErrUnavailable)
		}
		return nil
	})
	return &left
}

// blocking makes the given call wait until release is called; reached says that it does.
func (w *world) blocking(op string) (reached <-chan struct{}, release func()) {
	r, free := make(chan struct{}), make(chan struct{})
	var once sync.Once
	w.set(func(o, _ string) error {
		if o == op {
			once.Do(func() { close(r) })
			<-free
		}
		return nil
	})
	return r, sync.OnceFunc(func() { close(free) })
}

// holds counts what the world keeps for somebody.
func (w *world) holds() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return fmt.Sprintf("containers %d, descriptors %d, attachments %d, pins %d", len(w.containers), len(w.fds), len(w.attached), len(w.pins))
}

const holdsNothing = "containers 0, descriptors 0, attachments 0, pins 0"

func (w *world) sent(c id.Container) (out []int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.signals {
		if s.ID == c {
			out = append(out, s.Signal)
		}
	}
	return out
}

// link is one engine's connection to the world. A dead one never returns: its
// engine was killed.
type link struct {
	w      *world
	dead   atomic.Bool
	exits  chan wire.Exit
	resync chan struct{}
}

func (w *world) connect() *link {
	l := &link{w: w, exits: make(chan wire.Exit, 4096), resync: make(chan struct{}, 1)}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.link = l
	return l
}

func (l *link) call(ctx context.Context, op, key string, effect func() error) error {
	ranked.Waits(objectRank, op)
	for i, o := range []string{op, op + "!"} {
		if l.dead.Load() {
			runtime.Goexit()
		}
		l.w.mu.Lock()
		hook := l.w.hook
		l.w.mu.Unlock()
		if hook != nil {
			if err := hook(o, key); err != nil {
				return err
			}
		}
		if l.dead.Load() {
			runtime.Goexit()
		}
		if i == 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			l.w.mu.Lock()
			err := effect()
			l.w.mu.Unlock()
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *link) find(c id.Container) (*fakeContainer, error) {
	if f := l.w.containers[c]; f != nil {
		return f, nil
	}
	return nil, fmt.Errorf("container %s: %w", id.Short(c), errdefs.ErrNotFound)
}

func (l *link) Create(ctx context.Context, r wire.Create) error {
	return l.call(ctx, "create", string(r.ID), func() error {
		for _, key := range r.Namespaces {
			if l.w.fds[key] == nil {
				return fmt.Errorf("descriptor %s: %w", key, errdefs.ErrNotFound)
			}
		}
		if r.JoinPID != "" {
			if f, err := l.find(r.JoinPID); err != nil || f.info.State != wire.Running {
				return errors.Join(errdefs.ErrFailedPrecondition, err)
			}
		}
		l.w.containers[r.ID] = &fakeContainer{info: wire.Info{ID: r.ID, State: wire.Created}, create: r, execs: map[id.Exec]int{}}
		return nil
	})
}

// Start runs the "program", which is named by the first argument: run ends by
// any signal, deaf only by SIGKILL, undead by none, exit at once with the code given.
func (l *link) Start(ctx context.Context, r wire.Start) (reply wire.StartReply, err error) {
	err = l.call(ctx, "start", string(r.ID), func() error {
		f, err := l.find(r.ID)
		if err != nil {
			return err
		}
		if f.info.State != wire.Created {
			return errdefs.ErrFailedPrecondition
		}
		args := f.create.Spec.Process.Args
		if args[0] == "broken" {
			return fmt.Errorf("exec %q: no such file: %w", args[0], errdefs.ErrInvalidArgument)
		}
		reply = wire.StartReply{Pid: 4242, StartedAt: time.Now()}
		f.info.State, f.info.Pid, f.info.StartedAt = wire.Running, reply.Pid, reply.StartedAt
		if args[0] == "exit" {
			var x wire.Exit
			_, _ = fmt.Sscan(args[1], &x.Code)
			x.OOMKilled = len(args) > 2 && args[2] == "oom"
			l.w.end(f, x)
		}
		return nil
	})
	return reply, err
}

// end is the end of a container's first process. w.mu is held.
func (w *world) end(f *fakeContainer, x wire.Exit) {
	x.ID, x.Pid, x.FinishedAt = f.info.ID, f.info.Pid, time.Now()
	f.info.State, f.info.Exit = wire.Exited, &x
	if w.link != nil && !w.link.dead.Load() {
		w.link.exits <- x
	}
}

func (l *link) Signal(ctx context.Context, s wire.Signal) error {
	return l.call(ctx, "signal", fmt.Sprintf("%s %d", s.ID, s.Signal), func() error {
		l.w.signals = append(l.w.signals, s)
		f, err := l.find(s.ID)
		if err != nil {
			return err
		}
		if s.Exec != "" {
			if pg := f.execs[s.Exec]; pg != 0 {
				return unix.Kill(-pg, unix.Signal(s.Signal))
			}
			return errdefs.ErrNotFound
		}
		if f.info.State != wire.Running {
			return errdefs.ErrFailedPrecondition
		}
		if name := f.create.Spec.Process.Args[0]; name != "undead" && (s.Signal == 9 || name != "deaf") {
			l.w.end(f, wire.Exit{Code: 128 + s.Signal, Signal: s.Signal})
		}
		return nil
	})
}

func (l *link) Delete(ctx context.Context, c id.Container) error {
	return l.call(ctx, "delete", string(c), func() error {
		if f := l.w.containers[c]; f != nil && f.info.State == wire.Running {
			l.w.end(f, wire.Exit{Code: 137, Signal: 9})
		}
		delete(l.w.containers, c)
		return nil
	})
}

func (l *link) Update(ctx context.Context, r wire.Update) error {
	return l.call(ctx, "update", string(r.ID), func() error { return nil })
}

func (l *link) ReopenLog(ctx context.Context, r wire.ReopenLog) error {
	return l.call(ctx, "reopen", r.Path, func() error { return nil })
}

func (l *link) List(ctx context.Context) (out []wire.Info, err error) {
	err = l.call(ctx, "list", "", func() error {
		for _, f := range l.w.containers {
			out = append(out, f.info)
		}
		return nil
	})
	return out, err
}

// UserNamespace hands out real namespaces; a process is needed to make them.
func (l *link) UserNamespace(ctx context.Context, r wire.UserNamespace) (out []*os.File, err error) {
	err = l.call(ctx, "userns", "", func() error {
		c := exec.Command("sleep", "60")
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, Pdeathsig: unix.SIGKILL, GidMappingsEnableSetgroups: true}
		for _, m := range r.UIDs {
			c.SysProcAttr.UidMappings = append(c.SysProcAttr.UidMappings, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
		}
		for _, m := range r.GIDs {
			c.SysProcAttr.GidMappings = append(c.SysProcAttr.GidMappings, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
		}
		names := []kernel.Namespace{kernel.UserNS}
		for kind, k := range map[kernel.Namespace]specs.LinuxNamespaceType{kernel.NetNS: specs.NetworkNamespace, kernel.IPCNS: specs.IPCNamespace, kernel.UTSNS: specs.UTSNamespace} {
			if slices.Contains(r.Kinds, k) {
				c.SysProcAttr.Unshareflags |= uintptr(kind.CloneFlag())
			}
		}
		for _, k := range r.Kinds {
			names = append(names, map[specs.LinuxNamespaceType]kernel.Namespace{specs.NetworkNamespace: kernel.NetNS, specs.IPCNamespace: kernel.IPCNS, specs.UTSNamespace: kernel.UTSNS}[k])
		}
		if err := c.Start(); err != nil {
			return err
		}
		defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
		for _, n := range names {
			f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", c.Process.Pid, n))
			if err != nil {
				closeAll(out...)
				return err
			}
			out = append(out, f)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (l *link) Exits() <-chan wire.Exit { return l.exits }
func (l *link) Resync() <-chan struct{} { return l.resync }

func (l *link) PutFDs(ctx context.Context, keys []string, files []*os.File) error {
	return l.call(ctx, "put", keys[0], func() error {
		for i, k := range keys {
			if f := l.w.fds[k]; f != nil {
				f.Close()
			}
			l.w.fds[k] = dupFile(files[i])
		}
		return nil
	})
}

func dupFile(f *os.File) *os.File {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		panic(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

func (l *link) GetFDs(ctx context.Context, keys []string) (out []*os.File, err error) {
	err = l.call(ctx, "get", keys[0], func() error {
		for _, k := range keys {
			f := l.w.fds[k]
			if f == nil {
				closeAll(out...)
				out = nil
				return errdefs.ErrNotFound
			}
			out = append(out, dupFile(f))
		}
		return nil
	})
	return out, err
}

func (l *link) DropFDs(ctx context.Context, keys []string) error {
	return l.call(ctx, "drop", keys[0], func() error {
		for _, k := range keys {
			if f := l.w.fds[k]; f != nil {
				f.Close()
				delete(l.w.fds, k)
			}
		}
		return nil
	})
}

// KeptBy is not needed: the world keeps what it was given.
func (l *link) KeptBy(func(put func(keys []string, files []*os.File))) {}

func (l *link) ListFDs(ctx context.Context) (keys []string, err error) {
	err = l.call(ctx, "listfd", "", func() error {
		for k := range l.w.fds {
			keys = append(keys, k)
		}
		return nil
	})
	return keys, err
}

// Attach hands out a real network namespace.
func (l *link) Attach(ctx context.Context, p cni.Pod) (a cni.Attachment, ns *os.File, err error) {
	err = l.call(ctx, "attach", string(p.ID), func() error {
		files, err := kernel.NewNamespaces([]kernel.Namespace{kernel.NetNS}, nil)
		if err != nil {
			return err
		}
		ns = files[0]
		if p.NetNS != nil {
			ns.Close()
			ns = dupFile(p.NetNS)
		}
		l.w.next++
		l.w.attached[p.ID] = true
		a = cni.Attachment{Network: "fake", IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, l.w.next})}, State: []byte("state")}
		return nil
	})
	if err != nil && ns != nil {
		ns.Close()
	}
	return a, ns, err
}

func (l *link) Detach(ctx context.Context, p cni.Pod, a cni.Attachment, _ *os.File) error {
	return l.call(ctx, "detach", string(p.ID), func() error {
		l.w.detaches = append(l.w.detaches, a)
		delete(l.w.attached, p.ID)
		return nil
	})
}

func (l *link) Leftovers(ctx context.Context, use cni.InUse) (out []leftover.Finding, err error) {
	var attached []id.Pod
	err = l.call(ctx, "leftovers", "", func() error {
		for p := range l.w.attached {
			attached = append(attached, p)
		}
		return nil
	})
	for _, p := range attached {
		if !use.Pod(p) {
			out = append(out, leftover.Finding{Kind: leftover.Address, Name: string(p), Remove: func(ctx context.Context) error {
				return l.call(ctx, "release address", string(p), func() error { delete(l.w.attached, p); return nil })
			}})
		}
	}
	return out, err
}

func (l *link) Ready() error { return nil }

func (l *link) Acquire(ref, owner string) (*imageservice.Image, error) {
	if ref == "missing" {
		return nil, fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
	}
	err := l.call(context.Background(), "acquire", owner, func() error {
		l.w.pins[owner] = true
		l.w.acquired = append(l.w.acquired, ref)
		return nil
	})
	return &imageservice.Image{ID: digest.FromString("image"), Tags: []string{"example/image:1"}, Layers: []string{l.w.layer}}, err
}

func (l *link) Release(owner string) {
	_ = l.call(context.Background(), "release", owner, func() error { delete(l.w.pins, owner); return nil })
}
