package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/durable"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
)

// PluginNetwork is the Attachment.Network of pods attached by CNI plugins.
const PluginNetwork = "cni"

// ifName is the pod's interface, as every CNI runtime calls it.
const ifName = "eth0"

// Config of a Selector.
type Config struct {
	ConfDir  string // network configurations; watched
	BinDir   string // plugins; several directories are separated by ":"
	StateDir string // pins, results and the journal of attachments
	// Default serves pods while ConfDir holds no configuration. Without it such a
	// node is not ready.
	Default Network
	// Timeout of one ADD or DEL of all plugins. Default 50 s: an ADD and the DEL that
	// takes it back are below the two minutes that the kubelet waits.
	Timeout time.Duration
}

const statusInterval = 10 * time.Second

// Selector attaches pods with the plugins that ConfDir configures, or with the
// default network when it configures none. It implements Network.
type Selector struct {
	cfg   Config
	cni   *libcni.CNIConfig
	pins  pins
	state atomic.Pointer[selection]
	stop  context.CancelFunc
	owned sync.WaitGroup
	// adding is held shared from before an attachment is in the journal until its
	// ADD has ended, and alone by the GC verb.
	adding sync.RWMutex

	mu   sync.Mutex
	busy map[id.Pod]struct{} // guarded by mu: ADD or DEL under way
}

// selection is what the conf dir says at a time; immutable.
type selection struct {
	list *libcni.NetworkConfigList // nil: the default network
	file string
	err  error // why the plugins cannot be used
}

var _ Network = (*Selector)(nil)

// journal is what DEL needs to know of an attachment; it is kept in StateDir
// from before ADD on, and in Attachment.State.
type journal struct {
	Version int             `json:"version"`
	Pod     Pod             `json:"pod"`
	Config  json.RawMessage `json:"config"`
	Result  json.RawMessage `json:"result,omitempty"`
}

// Open reads ConfDir and begins to watch it. A missing or broken configuration
// is not an error of Open: Ready says it.
func Open(ctx context.Context, cfg Config) (*Selector, error) {
	if cfg.StateDir == "" {
		return nil, fmt.Errorf("cni state dir: is not set: %w", errdefs.ErrInvalidArgument)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 50 * time.Second
	}
	s := &Selector{
		cfg: cfg, pins: pins{filepath.Join(cfg.StateDir, "netns")}, busy: map[id.Pod]struct{}{},
		cni: libcni.NewCNIConfigWithCacheDir(filepath.SplitList(cfg.BinDir), filepath.Join(cfg.StateDir, "cache"), newPluginExec()),
	}
	if err := os.MkdirAll(s.journalDir(), 0o700); err != nil {
		return nil, fmt.Errorf("cni state dir: %w", err)
	}
	if err := durable.Clean(s.journalDir()); err != nil {
		klog.ErrorS(err, "Writes of attachments that were cut short are not removed")
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	// A plugin that hangs must not keep the node from answering: Ready says it.
	first := &selection{}
	if first.list, first.file, first.err = loadConf(cfg.ConfDir); first.list != nil {
		first.err = fmt.Errorf("cni network %s: plugins have not told their status yet: %w", first.list.Name, errdefs.ErrUnavailable)
	}
	s.state.Store(first)
	changed, told := make(chan struct{}, 1), make(chan struct{})
	s.owned.Go(func() { watchDir(run, cfg.ConfDir, time.Second, changed) })
	s.owned.Go(func() {
		s.reload(run)
		close(told)
		s.follow(run, changed)
	})
	select {
	case <-told:
	case <-time.After(firstStatus):
	case <-ctx.Done():
	}
	return s, nil
}

// firstStatus is how long Open waits for the plugins' status.
const firstStatus = 400 * time.Millisecond

// Close ends the watch. Attached pods keep their network; Default stays open.
func (s *Selector) Close() error {
	s.stop()
	s.owned.Wait()
	return s.pins.close()
}

// follow keeps the selection current: after changes of the conf dir, and
// regularly because plugins may report another status or be installed late.
func (s *Selector) follow(ctx context.Context, changed <-chan struct{}) {
	t := time.NewTicker(statusInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-t.C:
		}
		s.reload(ctx)
	}
}

// reload reads the conf dir and asks the plugins for their status.
func (s *Selector) reload(ctx context.Context) {
	sel := &selection{}
	sel.list, sel.file, sel.err = loadConf(s.cfg.ConfDir)
	if sel.list != nil {
		sel.err = s.status(ctx, sel.list)
	}
	if ctx.Err() != nil {
		return // the status was cut short
	}
	old := s.state.Swap(sel)
	if old == nil || old.file != sel.file || (old.err == nil) != (sel.err == nil) {
		klog.InfoS("Network: configuration", "file", sel.file, "default", sel.list == nil && sel.err == nil, "err", sel.err)
	}
}

// status checks that the plugins exist and, from CNI 1.1 on, asks them.
func (s *Selector) status(ctx context.Context, list *libcni.NetworkConfigList) error {
	for _, p := range list.Plugins {
		if _, err := newPluginExec().FindInPath(p.Network.Type, filepath.SplitList(s.cfg.BinDir)); err != nil {
			return fmt.Errorf("cni network %s: plugin %q is not in %s; install it: %w", list.Name, p.Network.Type, s.cfg.BinDir, errdefs.ErrUnavailable)
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, statusInterval, errors.New("no answer in time"))
	defer cancel()
	if err := s.cni.GetStatusNetworkList(ctx, list); err != nil {
		return fmt.Errorf("cni network %s: %w: %w", list.Name, err, errdefs.ErrUnavailable)
	}
	return nil
}

// Ready implements Network. It answers from memory.
func (s *Selector) Ready() error {
	switch sel := s.state.Load(); {
	case sel.err != nil:
		return sel.err
	case sel.list != nil:
		return nil
	case s.cfg.Default != nil:
		return s.cfg.Default.Ready()
	}
	return s.noNetwork()
}

func (s *Selector) noNetwork() error {
	return fmt.Errorf("pod network: no configuration in %s and no default network; add a .conflist file: %w", s.cfg.ConfDir, errdefs.ErrUnavailable)
}

// Attach implements Network.
func (s *Selector) Attach(ctx context.Context, p Pod) (Attachment, *os.File, error) {
	var none Attachment
	if err := id.Valid(string(p.ID)); err != nil {
		return none, nil, err
	}
	sel := s.state.Load()
	switch {
	case sel.list != nil:
	case sel.err != nil:
		return none, nil, sel.err
	case s.cfg.Default != nil:
		return s.cfg.Default.Attach(ctx, p)
	default:
		return none, nil, s.noNetwork()
	}
	rt, err := runtimeConf(p)
	if err != nil {
		return none, nil, err
	}
	defer s.begin(p.ID)()
	if _, err := os.Stat(s.journalPath(p.ID)); err == nil {
		return none, nil, fmt.Errorf("pod sandbox %s: is already attached; detach it first: %w", id.Short(p.ID), errdefs.ErrAlreadyExists)
	}
	a, ns, err := s.attach(ctx, p, sel.list, rt)
	if err != nil {
		return none, nil, fmt.Errorf("attach pod %s/%s to network %s: %w", p.Namespace, p.Name, sel.list.Name, err)
	}
	return a, ns, nil
}

// begin marks pod busy, so that Leftovers leaves it alone, until the returned function is called.
func (s *Selector) begin(pod id.Pod) func() {
	s.mu.Lock()
	s.busy[pod] = struct{}{}
	s.mu.Unlock()
	return func() {
		s.mu.Lock()
		delete(s.busy, pod)
		s.mu.Unlock()
	}
}

func (s *Selector) attach(ctx context.Context, p Pod, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (Attachment, *os.File, error) {
	var none Attachment
	config, err := encodeList(list)
	if err != nil {
		return none, nil, err
	}
	s.adding.RLock()
	defer s.adding.RUnlock()
	j := journal{Version: 1, Pod: p, Config: config}
	state, err := s.writeJournal(p.ID, j) // before anything exists that DEL must remove
	if err != nil {
		return none, nil, err
	}
	a := Attachment{Network: PluginNetwork, NetNSPath: s.pins.path(p.ID), State: state}
	ns, err := s.namespace(p)
	if err == nil {
		crashpoint.Here("cni", "add", "do")
		a.IPs, j.Result, err = s.add(ctx, list, rt, a.NetNSPath)
		crashpoint.Here("cni", "add", "done")
		if err == nil {
			a.State, err = s.writeJournal(p.ID, j)
		}
	}
	if err != nil {
		// The plugins may have done half of it. If DEL does not work either, journal
		// and pin stay for Detach or Leftovers to try again.
		err = errors.Join(err, s.del(context.WithoutCancel(ctx), p, a, ns))
		if ns != nil {
			ns.Close()
		}
		return none, nil, err
	}
	return a, ns, nil
}

// namespace makes a pinned network namespace with lo up, or pins the pod's own.
func (s *Selector) namespace(p Pod) (*os.File, error) {
	ns, err := openNamespace(p.NetNS)
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	if err := s.pins.add(p.ID, ns); err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

func openNamespace(own *os.File) (*os.File, error) {
	loopback := func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	}
	if own == nil {
		files, err := kernel.NewNamespaces([]kernel.Namespace{kernel.NetNS}, loopback)
		if err != nil {
			return nil, err
		}
		return files[0], nil
	}
	if err := kernel.In(kernel.NetNS, own, loopback); err != nil {
		return nil, err
	}
	return kernel.Dup(own)
}

// add runs ADD and returns the pod's addresses and the raw result.
func (s *Selector) add(ctx context.Context, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf, netns string) ([]netip.Addr, json.RawMessage, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.Timeout, fmt.Errorf("no answer within %v", s.cfg.Timeout))
	defer cancel()
	rt.NetNS = netns
	result, err := s.cni.AddNetworkList(ctx, list, rt)
	if err != nil {
		return nil, nil, err
	}
	if result == nil {
		return nil, nil, fmt.Errorf("plugins gave no result: %w", errdefs.ErrUnavailable)
	}
	ips, err := podIPs(result)
	if err != nil {
		return nil, nil, err
	}
	raw, err := json.Marshal(result)
	return ips, raw, err
}

// Detach implements Network. Pods go back to the network that attached them,
// whatever the conf dir says now.
func (s *Selector) Detach(ctx context.Context, p Pod, a Attachment, netns *os.File) error {
	if err := id.Valid(string(p.ID)); err != nil {
		return err
	}
	switch a.Network {
	case PluginNetwork:
		defer s.begin(p.ID)()
		return s.del(ctx, p, a, netns)
	case "": // Attach did not return: each network knows whether it began
		defer s.begin(p.ID)()
		errs := []error{s.del(ctx, p, a, netns)}
		if s.cfg.Default != nil {
			errs = append(errs, s.cfg.Default.Detach(ctx, p, a, netns))
		}
		return errors.Join(errs...)
	}
	if s.cfg.Default == nil {
		return fmt.Errorf("detach pod %s: was attached by network %q, which is not configured any more: %w", id.Short(p.ID), a.Network, errdefs.ErrFailedPrecondition)
	}
	return s.cfg.Default.Detach(ctx, p, a, netns)
}

// del runs DEL with the configuration and result of the pod's ADD, then drops
// the pin and the journal. Both stay when a plugin fails.
func (s *Selector) del(ctx context.Context, p Pod, a Attachment, netns *os.File) error {
	j, err := s.journalOf(p, a)
	if err == nil && j != nil {
		crashpoint.Here("cni", "del", "do")
		err = s.runDel(ctx, j, netns)
		crashpoint.Here("cni", "del", "done")
	}
	if err != nil {
		return fmt.Errorf("detach pod %s: %w", id.Short(p.ID), err)
	}
	if err := s.pins.remove(p.ID); err != nil {
		return err
	}
	crashpoint.Here("cni", "pin", "removed")
	if err := os.Remove(s.journalPath(p.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cni journal: %w", err)
	}
	return nil
}

// journalOf finds what DEL needs to know: in the pod's file, else in its
// attachment. A damaged file is set aside. When there was a file and nothing is
// left of it, DEL runs with the configuration of now: most plugins want no more
// than the pod's id. Without any of these nothing was attached.
func (s *Selector) journalOf(p Pod, a Attachment) (*journal, error) {
	b, err := os.ReadFile(s.journalPath(p.ID))
	if err == nil {
		var j journal
		// An earlier version wrote it without a checksum.
		if err = durable.UnsealOld(b, &j); err == nil {
			err = j.check(p.ID)
		}
		if err == nil {
			return &j, nil
		}
		klog.ErrorS(err, "CNI journal of a pod is damaged and set aside", "path", s.journalPath(p.ID)+".bad")
		if err := os.Rename(s.journalPath(p.ID), s.journalPath(p.ID)+".bad"); err != nil {
			return nil, fmt.Errorf("cni journal: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cni journal: %w", err)
	}
	if len(a.State) > 0 {
		var j journal
		if err := json.Unmarshal(a.State, &j); err != nil {
			return nil, fmt.Errorf("cni attachment: %w", err)
		}
		return &j, j.check(p.ID)
	}
	sel := s.state.Load()
	if _, err := os.Stat(s.journalPath(p.ID) + ".bad"); err != nil || sel.list == nil {
		return nil, nil
	}
	config, err := encodeList(sel.list)
	return &journal{Version: 1, Pod: p, Config: config}, err
}

func (j *journal) check(pod id.Pod) error {
	if j.Version != 1 || j.Pod.ID != pod {
		return fmt.Errorf("cni journal: version %d of pod %s is not of this release and pod: %w", j.Version, id.Short(j.Pod.ID), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Restore implements Restorer. The journal's copy in the attachment serves DEL;
// the file is what keeps GC from taking the pod for one that nobody has.
func (s *Selector) Restore(ctx context.Context, p Pod, a Attachment) error {
	if err := id.Valid(string(p.ID)); err != nil {
		return err
	}
	if a.Network != PluginNetwork {
		if r, ok := s.cfg.Default.(Restorer); ok {
			return r.Restore(ctx, p, a)
		}
		return nil
	}
	j, err := s.journalOf(p, a)
	if err != nil || j == nil {
		return err
	}
	if _, err := os.Stat(s.journalPath(p.ID)); err == nil {
		return nil
	}
	_, err = s.writeJournal(p.ID, *j)
	return err
}

func (s *Selector) runDel(ctx context.Context, j *journal, netns *os.File) error {
	pod := j.Pod.ID
	list, err := decodeList(j.Config)
	if err != nil {
		return fmt.Errorf("cni journal: %w", err)
	}
	rt, err := runtimeConf(j.Pod)
	if err != nil {
		return err
	}
	switch {
	case s.pins.holds(pod):
		rt.NetNS = s.pins.path(pod)
	case netns != nil:
		rt.NetNS = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), netns.Fd())
	}
	// After a reboot the cached result is gone with the state dir: hand the
	// plugins ours.
	if cached, _ := s.cni.GetNetworkListCachedResult(list, rt); cached == nil && len(j.Result) > 0 {
		var prev map[string]any
		if err := json.Unmarshal(j.Result, &prev); err != nil {
			return fmt.Errorf("cni journal: %w", err)
		}
		for i, plugin := range list.Plugins {
			if list.Plugins[i], err = libcni.InjectConf(plugin, map[string]any{"prevResult": prev}); err != nil {
				return fmt.Errorf("cni journal: %w", err)
			}
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.Timeout, fmt.Errorf("no answer within %v", s.cfg.Timeout))
	defer cancel()
	return s.cni.DelNetworkList(ctx, list, rt)
}

// gcTimeout bounds the GC verb, which no ADD may run beside.
const gcTimeout = 10 * time.Second

// Collect gives the plugins (from CNI 1.1 on) the list of attachments to keep. While
// an ADD is under way it does nothing: what that makes is not on the list yet, and
// the plugins would free it again.
func (s *Selector) Collect(ctx context.Context) error {
	sel := s.state.Load()
	if sel.list == nil || !s.adding.TryLock() {
		return nil
	}
	defer s.adding.Unlock()
	pods, err := s.journalled()
	if err != nil {
		return err
	}
	valid := []types.GCAttachment{}
	for _, pod := range pods {
		valid = append(valid, types.GCAttachment{ContainerID: string(pod), IfName: ifName})
	}
	ctx, cancel := context.WithTimeoutCause(ctx, gcTimeout, fmt.Errorf("no answer within %v", gcTimeout))
	defer cancel()
	if err := s.cni.GCNetworkList(ctx, sel.list, &libcni.GCArgs{ValidAttachments: valid}); err != nil {
		return fmt.Errorf("collect network %s: %w", sel.list.Name, err)
	}
	return nil
}

func (s *Selector) isBusy(pod id.Pod) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.busy[pod]
	return ok
}

func (s *Selector) journalDir() string { return filepath.Join(s.cfg.StateDir, "attachments") }

func (s *Selector) journalPath(pod id.Pod) string {
	return filepath.Join(s.journalDir(), string(pod)+".json")
}

func (s *Selector) writeJournal(pod id.Pod, j journal) ([]byte, error) {
	b, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	text, err := durable.Seal(j)
	if err == nil {
		err = os.MkdirAll(s.journalDir(), 0o700) // the state folder may have been wiped
	}
	if err == nil {
		err = durable.WriteFile(s.journalPath(pod), text, 0o600, false)
	}
	if err != nil {
		return nil, fmt.Errorf("cni journal: %w", err)
	}
	return b, nil
}

// journalled lists the pods that plugins were asked to attach.
func (s *Selector) journalled() ([]id.Pod, error) {
	entries, err := os.ReadDir(s.journalDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cni journal: %w", err)
	}
	var pods []id.Pod
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".json"); ok && id.Valid(name) == nil {
			pods = append(pods, id.Pod(name))
		}
	}
	return pods, nil
}
