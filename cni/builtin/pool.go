package builtin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// fillDelay is how long the pool waits after it was drawn from before it makes
// the next namespace, so that the making does not compete with the rest of the
// pod's start. It is short enough to keep up with pods started one by one.
const fillDelay = 2 * time.Millisecond

// dyingLinks is how long the kernel may take to delete the links of pods that are
// gone: 20 to 100 ms, and seconds when hundreds of namespaces end at once.
const dyingLinks = 10 * time.Second

// namespace returns a wired namespace, from the pool or made now, or own wired.
func (n *Network) namespace(own *os.File) (*ready, error) {
	if own != nil {
		return n.wire(own)
	}
	n.mu.Lock()
	var w *ready
	if len(n.pool) > 0 {
		w = n.pool[0] // the oldest: addresses then go out in order
		n.pool = slices.Delete(n.pool, 0, 1)
	}
	n.mu.Unlock()
	if w != nil {
		n.poke()
		return w, nil
	}
	return n.wire(nil)
}

// wire makes a namespace with fresh addresses, or gives own such. An address that the kernel says
// is still on a link (of a dying namespace, or of a pod whose record was lost)
// is passed over.
func (n *Network) wire(own *os.File) (*ready, error) {
	begin := time.Now()
	for try := 0; try < attempts || time.Since(begin) < dyingLinks; try++ {
		if try >= attempts/4 { // a small subnet, and links of pods just gone
			time.Sleep(20 * time.Millisecond)
		}
		w, err := n.address()
		if err != nil {
			return nil, err
		}
		cfg := wiring{link: w.link, index: w.index, ips: w.ips, src: sources(w.subnets), mtu: n.cfg.MTU, ipv6: n.ipv6, own: own}
		err = n.threads.do(func(th *thread) (err error) {
			w.ns, err = th.pod(cfg)
			return err
		})
		if err == nil {
			return w, nil
		}
		n.free(w)
		if !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("pod address: for %s all addresses tried are held by links that are not known here; remove stale %s* links: %w", dyingLinks, linkPrefix, errdefs.ErrUnavailable)
}

// address takes one address of each subnet and the link name that goes with them.
func (n *Network) address() (*ready, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for range attempts {
		w := &ready{subnets: n.subnets}
		for _, s := range n.subnets {
			ip, err := s.take()
			if err != nil {
				n.freeLocked("", w.ips)
				return nil, err
			}
			w.ips = append(w.ips, ip)
		}
		// The IPv4 address names the link if there is one: it is the scarcer.
		byName := w.ips[0]
		if i := slices.IndexFunc(w.ips, netip.Addr.Is4); i >= 0 {
			byName = w.ips[i]
		}
		w.link, w.index = linkID(linkPrefix, byName)
		if _, taken := n.links[w.link]; taken {
			n.freeLocked("", w.ips)
			continue
		}
		n.links[w.link] = struct{}{}
		return w, nil
	}
	return nil, fmt.Errorf("pod address: the links of %d addresses in a row are still being deleted: %w", attempts, errdefs.ErrUnavailable)
}

// free gives back what address took, but for what Restore found to be a pod's
// meanwhile: the link that w could not have is that pod's.
func (n *Network) free(w *ready) {
	n.mu.Lock()
	defer n.mu.Unlock()
	link, ips := w.link, slices.Clone(w.ips)
	for _, r := range n.pods {
		if r.Link == link {
			link = ""
		}
		ips = slices.DeleteFunc(ips, func(ip netip.Addr) bool { return slices.Contains(r.IPs, ip) })
	}
	n.freeLocked(link, ips)
}

// discard closes namespaces that got no pod.
func (n *Network) discard(pool []*ready) {
	for _, w := range pool {
		w.ns.Close()
		n.free(w)
	}
}

// poke wakes fill.
func (n *Network) poke() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// fill keeps the pool full, one namespace at a time.
func (n *Network) fill(ctx context.Context) {
	retry := time.Second
	for {
		for n.wanting() {
			if n.Ready() != nil {
				break
			}
			w, err := n.wire(nil)
			if err != nil {
				klog.ErrorS(err, "Network: cannot prepare a pod namespace", "retry", retry)
				if !sleep(ctx, retry) {
					return
				}
				retry = min(2*retry, time.Minute)
				continue
			}
			retry = time.Second
			n.keep(w)
			if !sleep(ctx, fillDelay) {
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		}
		if !sleep(ctx, fillDelay) {
			return
		}
	}
}

func (n *Network) wanting() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.pool) < n.cfg.PoolSize
}

// keep puts w into the pool, unless SetPodCIDR outdated it meanwhile.
func (n *Network) keep(w *ready) {
	n.mu.Lock()
	current := len(w.subnets) > 0 && len(n.subnets) > 0 && w.subnets[0] == n.subnets[0]
	if current {
		n.pool = append(n.pool, w)
	}
	n.mu.Unlock()
	if !current {
		n.discard([]*ready{w})
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
