// Package builtin is the default pod network, in-process: no plugin, no bridge
// and no configuration needed.
//
// Each pod has a veth link of its own, and the node routes: /32 and /128 routes
// lead to the pods, the pod's default route leads to a gateway address that is
// the same on every link. A bridge was rejected: it takes at most 1,024 ports
// (1,023 pods per node), floods broadcasts to all of them and learns addresses
// from whatever pods send. With permanent neighbour entries on both ends there
// is no ARP, no neighbour discovery and no limit by the kernel's neighbour
// table, and nothing to wait for: a pod's first packet leaves at once.
//
// Published ports are elements of maps in one nftables table, masquerading is
// one rule for all pods. Without nftables no pod is attached: the table also
// holds the rules that keep pods away from the node's loopback.
//
// A few network namespaces are kept ready, wired and addressed, because making
// one costs a millisecond and much more while the kernel tears others down.
// Links are never deleted on the path of a request: the kernel deletes a pod's
// link with its namespace.
//
// Lock order: Network.mu is a leaf and not held across system calls;
// firewall.mu is a leaf.
package builtin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/undo"
)

// Name is the Attachment.Network of pods attached here.
const Name = "builtin"

// Config of the network. Only StateDir is required.
type Config struct {
	StateDir string // records; on a tmpfs in production

	// Subnets to give pods addresses of: one IPv4, one IPv6 prefix, or both,
	// primary first. SetPodCIDR overrides them. Default DefaultSubnets.
	Subnets []netip.Prefix
	// Unmasked lists destinations outside the node that see the pod's own address,
	// such as the cluster's pod network when other nodes have routes to it.
	Unmasked []netip.Prefix
	// MTU of pod links in bytes. Default: that of the device with the default route.
	MTU int
	// PoolSize is how many wired namespaces are kept ready. Default 8; negative: none.
	PoolSize int
	// NetNS is the network namespace to use as the host's. Default: the process's.
	NetNS *os.File
}

// DefaultSubnets are used unless configured otherwise.
var DefaultSubnets = []netip.Prefix{netip.MustParsePrefix("10.164.0.0/16"), netip.MustParsePrefix("fd62:6572:7468::/64")}

// linkPrefix starts the name of the host end of every pod link.
const linkPrefix = "berth"

const (
	wireThreads = 4  // namespaces wired at once
	attempts    = 64 // addresses tried when the kernel says they are in use
)

// Network implements cni.Network.
type Network struct {
	cfg      Config
	ipv6     bool
	threads  *threads
	fw       *firewall
	store    *store
	lock     *os.File // this network is the only one in its namespace
	notReady atomic.Pointer[error]

	mu      sync.Mutex
	subnets []*subnet           // guarded by mu; replaced as a whole by SetPodCIDR
	pods    map[id.Pod]*record  // guarded by mu; Attach under way included
	links   map[string]struct{} // guarded by mu; names of links in use, pool included
	ports   claims              // guarded by mu
	pool    []*ready            // guarded by mu; newest last
	closed  bool                // guarded by mu
	calls   sync.WaitGroup      // Attach, Detach, Leftovers under way
	stale   []mapping           // guarded by mu; UDP ports whose flows must be forgotten
	wake    chan struct{}       // tells fill that the pool shrank
	flush   chan struct{}       // tells forgetFlows of stale
	stop    context.CancelFunc
	owned   sync.WaitGroup // fill, check and forgetFlows
}

var (
	_ cni.Network  = (*Network)(nil)
	_ cni.Restorer = (*Network)(nil)
)

// ready is a wired namespace without a pod.
type ready struct {
	ns      *os.File
	link    string
	index   int // ifindex of link
	ips     []netip.Addr
	subnets []*subnet // those the addresses came from
}

// Open prepares the node, restores what pods of this boot hold, and starts to
// fill the pool. A node that lacks what the network needs is not an error of
// Open: Ready says it.
func Open(ctx context.Context, cfg Config) (*Network, error) {
	if cfg.StateDir == "" {
		return nil, fmt.Errorf("network state dir: is not set: %w", errdefs.ErrInvalidArgument)
	}
	if cfg.PoolSize == 0 {
		cfg.PoolSize = 8
	}
	if len(cfg.Subnets) == 0 {
		cfg.Subnets = DefaultSubnets
	}
	st, err := openStore(cfg.StateDir)
	if err != nil {
		return nil, fmt.Errorf("network state dir: %w", err)
	}
	lock, err := lockNode(cfg.NetNS)
	if err != nil {
		return nil, err
	}
	th, err := newThreads(cfg.NetNS, wireThreads)
	if err != nil {
		return nil, errors.Join(err, unlockNode(lock))
	}
	n := &Network{
		lock: lock,
		cfg:  cfg, threads: th, store: st, fw: newFirewall(cfg.NetNS, linkPrefix, cfg.Unmasked),
		pods: map[id.Pod]*record{}, links: map[string]struct{}{}, ports: claims{}, wake: make(chan struct{}, 1), flush: make(chan struct{}, 1),
	}
	if err := n.restore(); err != nil {
		th.close()
		return nil, errors.Join(err, unlockNode(lock))
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	n.stop = stop
	n.owned.Go(func() { n.fill(run) })
	n.owned.Go(func() { n.check(run) })
	n.owned.Go(func() { n.forgetFlows(run) })
	return n, nil
}

// restore brings the network's memory, the node and the table in line with the records.
func (n *Network) restore() error {
	prefixes := n.cfg.Subnets
	if p, err := n.store.podCIDR(); err != nil {
		klog.ErrorS(err, "Network: the node's pod CIDR is damaged and set aside; pods get addresses of the configured subnets until the kubelet tells it again", "subnets", prefixes)
		if err := os.Rename(n.store.podCIDRPath(), n.store.podCIDRPath()+".bad"); err != nil {
			return err
		}
	} else if p != nil {
		prefixes = p
	}
	_ = n.threads.do(func(*thread) error {
		n.ipv6 = hasIPv6()
		if n.cfg.MTU == 0 {
			n.cfg.MTU = uplinkMTU()
		}
		return nil
	})
	if _, err := newSubnets(prefixes); err != nil {
		return err
	}
	subnets, err := newSubnets(n.usable(prefixes))
	if err != nil {
		return fmt.Errorf("subnets %v: this kernel has IPv6 switched off: %w", prefixes, errdefs.ErrFailedPrecondition)
	}
	records, err := n.store.load()
	if err != nil {
		return fmt.Errorf("network records: %w", err)
	}
	n.subnets = subnets
	for _, r := range records {
		if err := n.own(r); err != nil {
			klog.ErrorS(err, "Network record claims a port that another one has", "pod", r.Pod)
		}
	}
	n.assert()
	return nil
}

// usable leaves out IPv6 when the kernel has none.
func (n *Network) usable(prefixes []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool { return p.Addr().Is6() && !n.ipv6 })
}

// assert makes the node and the table as they must be, and publishes the outcome.
func (n *Network) assert() {
	n.mu.Lock()
	subnets := n.subnets
	var ms []mapping
	for _, r := range n.pods {
		ms = append(ms, r.Ports...)
	}
	n.mu.Unlock()
	err := n.threads.do(func(th *thread) error {
		if err := enableForwarding(n.ipv6); err != nil {
			return err
		}
		for _, s := range subnets {
			if err := prepareSubnet(th, s); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		if err = n.fw.replace(ms); err != nil {
			err = fmt.Errorf("%w; load the kernel's nf_tables, nft_nat, nft_masq and nft_fib_inet, or put a CNI configuration into the conf dir", err)
		}
	}
	if err != nil {
		err = fmt.Errorf("built-in network: %w: %w", err, errdefs.ErrUnavailable)
		n.notReady.Store(&err)
		return
	}
	n.notReady.Store(nil)
	n.poke() // fill waits while the node is not ready
}

// Ready implements cni.Network.
func (n *Network) Ready() error {
	if p := n.notReady.Load(); p != nil {
		return *p
	}
	return nil
}

// enter registers a call; leave is n.calls.Done.
func (n *Network) enter() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fmt.Errorf("built-in network: is closed: %w", errdefs.ErrUnavailable)
	}
	n.calls.Add(1)
	return nil
}

// Attach implements cni.Network. The namespace comes from the pool if it holds
// one; those of the pool belong to the node's user namespace, so a pod with one of
// its own brings the namespace along and has it wired. It fails with ErrAlreadyExists when a host port is taken, naming the pod
// that has it, and when the pod is attached already.
func (n *Network) Attach(ctx context.Context, p cni.Pod) (cni.Attachment, *os.File, error) {
	var none cni.Attachment
	if err := id.Valid(string(p.ID)); err != nil {
		return none, nil, err
	}
	if err := ctx.Err(); err != nil {
		return none, nil, err
	}
	if err := n.enter(); err != nil {
		return none, nil, err
	}
	defer n.calls.Done()
	if err := n.Ready(); err != nil {
		return none, nil, err
	}
	r := &record{Version: recordVersion, Pod: p.ID, Name: p.Namespace + "/" + p.Name}
	if err := n.begin(r); err != nil {
		return none, nil, err
	}
	var u undo.Stack
	u.Push(func() error { n.forget(r); return nil })
	w, err := n.namespace(p.NetNS)
	crashpoint.Here("built-in network", "namespace", "wired")
	if err == nil {
		u.Push(w.ns.Close)
		err = n.bind(r, w, p, &u)
	}
	if err != nil {
		return none, nil, errors.Join(fmt.Errorf("attach pod %s/%s: %w", p.Namespace, p.Name, err), u.Run())
	}
	n.mu.Lock()
	r.attaching = false
	n.mu.Unlock()
	state, err := json.Marshal(r) // for Restore
	if err != nil {
		return none, nil, errors.Join(err, u.Run())
	}
	return cni.Attachment{Network: Name, IPs: r.IPs, State: state}, w.ns, nil
}

// Restore implements cni.Restorer: without its record a pod's address could be
// given out again, and its link would be taken for one that nobody has.
func (n *Network) Restore(_ context.Context, p cni.Pod, a cni.Attachment) error {
	if err := n.enter(); err != nil {
		return err
	}
	defer n.calls.Done()
	n.mu.Lock()
	_, known := n.pods[p.ID]
	n.mu.Unlock()
	if known || a.Network != Name || len(a.State) == 0 {
		return nil
	}
	r := &record{}
	if err := json.Unmarshal(a.State, r); err != nil {
		return fmt.Errorf("network attachment of pod %s: %w: %w", id.Short(p.ID), err, errdefs.ErrDataLoss)
	}
	if err := r.check(p.ID); err != nil {
		return err
	}
	klog.InfoS("Network: a pod's record was lost and is made again", "pod", p.ID, "ips", r.IPs)
	if err := n.own(r); err != nil {
		return err
	}
	if len(r.Ports) > 0 {
		n.assert() // the table was made without them
	}
	return n.store.write(r)
}

// own enters the record of an attached pod into the memory.
func (n *Network) own(r *record) (err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pods[r.Pod] = r
	n.links[r.Link] = struct{}{}
	for _, s := range n.subnets {
		for _, ip := range r.IPs {
			s.claim(ip)
		}
	}
	if r.Ports, err = n.ports.add(r.Pod, r.Ports); err != nil {
		return fmt.Errorf("network record of pod %s: %w", id.Short(r.Pod), err)
	}
	return nil
}

// begin enters r into the memory, so that the pod counts as live from here on.
func (n *Network) begin(r *record) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.pods[r.Pod]; ok {
		return fmt.Errorf("pod sandbox %s: is already attached; detach it first: %w", id.Short(r.Pod), errdefs.ErrAlreadyExists)
	}
	r.attaching = true
	n.pods[r.Pod] = r
	return nil
}

// bind gives the wired namespace w to the pod of r: ports, record, table.
func (n *Network) bind(r *record, w *ready, p cni.Pod, u *undo.Stack) error {
	ports, err := expand(p.PortMappings, w.ips)
	n.mu.Lock()
	r.Link, r.IPs = w.link, w.ips
	if err == nil && len(ports) > 0 {
		r.Ports, err = n.ports.add(r.Pod, ports)
	}
	n.mu.Unlock()
	if err != nil {
		return err
	}
	if err := n.store.write(r); err != nil {
		return err
	}
	u.Push(func() error { return n.store.remove(r.Pod) })
	if len(r.Ports) == 0 {
		return nil
	}
	if slices.ContainsFunc(r.Ports, mapping.onLoopback6) {
		var m batch
		m.loopback6(w.index)
		if err := n.threads.do(func(th *thread) error { return m.send(th.rt) }); err != nil {
			return fmt.Errorf("publish ports on ::1: %w", err)
		}
	}
	crashpoint.Here("built-in network", "ports", "do")
	err = n.fw.add(r.Ports)
	if errors.Is(err, unix.ENOENT) { // somebody flushed the ruleset
		n.assert()
		err = n.Ready()
	}
	if err != nil {
		return fmt.Errorf("publish ports: %w", err)
	}
	u.Push(func() error { return n.fw.del(r.Ports) })
	crashpoint.Here("built-in network", "ports", "published")
	n.forgetUDP(r.Ports)
	return nil
}

// forget drops everything the memory holds for r.
func (n *Network) forget(r *record) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ports.remove(r.Pod, r.Ports)
	n.freeLocked(r.Link, r.IPs)
	delete(n.pods, r.Pod)
}

func (n *Network) freeLocked(link string, ips []netip.Addr) {
	delete(n.links, link)
	for _, s := range n.subnets {
		for _, ip := range ips {
			s.release(ip)
		}
	}
}

// Detach implements cni.Network. It withdraws the pod's ports and frees its
// addresses; the link goes with the namespace, when its last holder lets go.
// netns stays open: it is the caller's.
func (n *Network) Detach(_ context.Context, p cni.Pod, _ cni.Attachment, _ *os.File) error {
	if err := n.enter(); err != nil {
		return err
	}
	defer n.calls.Done()
	return n.detach(p.ID)
}

func (n *Network) detach(pod id.Pod) error {
	n.mu.Lock()
	r, ok := n.pods[pod]
	n.mu.Unlock()
	if !ok {
		return nil
	}
	if len(r.Ports) > 0 {
		if err := n.fw.del(r.Ports); err != nil {
			return fmt.Errorf("detach pod %s: %w", id.Short(pod), err)
		}
		n.forgetUDP(r.Ports)
	}
	crashpoint.Here("built-in network", "ports", "withdrawn")
	if err := n.store.remove(pod); err != nil {
		return err
	}
	n.forget(r)
	return nil
}

// Close stops the background work and drops the pool. Attached pods keep their
// network. Without any, the table and the node's addresses are removed too.
func (n *Network) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	n.mu.Unlock()
	n.calls.Wait()
	n.stop()
	n.owned.Wait()
	n.mu.Lock()
	pool, idle := n.pool, len(n.pods) == 0
	n.pool = nil
	n.mu.Unlock()
	n.discard(pool)
	var err error
	if idle && n.Ready() == nil {
		err = errors.Join(n.fw.remove(), n.threads.do(func(th *thread) error {
			var errs []error
			for _, s := range n.subnets {
				errs = append(errs, forgetSubnet(th, s))
			}
			return errors.Join(errs...)
		}))
	}
	n.fw.close()
	n.threads.close()
	return errors.Join(err, unlockNode(n.lock))
}
