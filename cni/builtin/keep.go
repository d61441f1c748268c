package builtin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/internal/id"
)

// checkInterval is how soon a vanished table is noticed.
const checkInterval = 15 * time.Second

// GC implements cni.Network. Links nobody owns any more are deleted in the
// background.
func (n *Network) GC(_ context.Context, live func() []id.Pod) error {
	if err := n.enter(); err != nil {
		return err
	}
	defer n.calls.Done()
	held := map[id.Pod]struct{}{}
	n.mu.Lock()
	for p, r := range n.pods {
		if !r.attaching {
			held[p] = struct{}{}
		}
	}
	n.mu.Unlock()
	for _, p := range live() {
		delete(held, p)
	}
	var errs []error
	for p := range held {
		errs = append(errs, n.detach(p))
	}
	n.owned.Go(n.sweep)
	return errors.Join(errs...)
}

// sweep deletes pod links that belong to nobody: those of pods whose daemon
// died inside Attach, or whose namespace something still holds after Detach.
func (n *Network) sweep() {
	err := n.threads.do(func(*thread) error {
		links, err := podLinks(linkPrefix)
		if err != nil {
			return err
		}
		for name, l := range links {
			if !n.reserve(name) {
				continue
			}
			err := deleteLink(l)
			n.mu.Lock()
			delete(n.links, name)
			n.mu.Unlock()
			if err != nil {
				return fmt.Errorf("delete link %s: %w", name, err)
			}
		}
		return nil
	})
	if err != nil {
		klog.ErrorS(err, "Network: leaked pod links remain until the next collection")
	}
}

// reserve makes the link called name ours unless it has an owner, so that no new
// pod gets the name while the old link is being deleted.
func (n *Network) reserve(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, owned := n.links[name]; owned {
		return false
	}
	n.links[name] = struct{}{}
	return true
}

// check puts the table back when another program removed it.
func (n *Network) check(ctx context.Context) {
	t := time.NewTicker(checkInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if n.Ready() != nil || !n.fw.intact() {
				klog.InfoS("Network: restoring the nftables table", "table", "inet "+TableName)
				n.assert()
			}
		}
	}
}

// forgetUDP has the conntrack entries of the UDP ports among ms deleted, after
// the table has changed. It does not wait: conntrack is searched bucket by
// bucket, 20 ms on a node with the usual quarter million of them.
func (n *Network) forgetUDP(ms []mapping) {
	n.mu.Lock()
	before := len(n.stale)
	for _, m := range ms {
		if m.Proto == unix.IPPROTO_UDP {
			n.stale = append(n.stale, m)
		}
	}
	added := len(n.stale) > before
	n.mu.Unlock()
	if added {
		select {
		case n.flush <- struct{}{}:
		default:
		}
	}
}

// forgetFlows does what forgetUDP asks for, for all pods of the meantime at once.
func (n *Network) forgetFlows(ctx context.Context) {
	for done := false; !done; {
		select {
		case <-n.flush:
		case <-ctx.Done():
			done = true // once more, for the last ones
		}
		n.mu.Lock()
		ms := n.stale
		n.stale = nil
		n.mu.Unlock()
		if len(ms) == 0 {
			continue
		}
		if err := n.threads.do(func(*thread) error { return forgetUDP(ms) }); err != nil {
			klog.ErrorS(err, "Network: clients of a UDP host port may go on reaching its last owner until they pause")
		}
	}
}
