package builtin

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/durable"
)

// SetPodCIDR makes pods attached from now on take their addresses from cidr:
// one prefix or an IPv4 and an IPv6 one separated by a comma, primary first.
// Pods that run keep theirs. An empty cidr changes nothing. The setting
// survives restarts of the daemon.
func (n *Network) SetPodCIDR(cidr string) error {
	if cidr == "" {
		return nil
	}
	prefixes, err := parsePodCIDR(cidr)
	if err != nil {
		return err
	}
	if _, err := newSubnets(prefixes); err != nil {
		return err
	}
	subnets, err := newSubnets(n.usable(prefixes))
	if err != nil {
		return fmt.Errorf("pod_cidr %q: this node has IPv6 switched off: %w", cidr, errdefs.ErrFailedPrecondition)
	}
	if err := n.enter(); err != nil {
		return err
	}
	defer n.calls.Done()
	n.mu.Lock()
	same := slices.EqualFunc(n.subnets, subnets, func(a, b *subnet) bool { return a.prefix == b.prefix })
	n.mu.Unlock()
	if same {
		return nil
	}
	err = n.threads.do(func(th *thread) error {
		for _, s := range subnets {
			if err := prepareSubnet(th, s); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = n.store.writePodCIDR(cidr)
	}
	if err != nil {
		return fmt.Errorf("pod_cidr %q: %w", cidr, err)
	}
	n.mu.Lock()
	for _, r := range n.pods {
		for _, s := range subnets {
			for _, ip := range r.IPs {
				s.claim(ip)
			}
		}
	}
	old := n.pool
	n.subnets, n.pool = subnets, nil
	n.mu.Unlock()
	n.discard(old)
	n.poke()
	return nil
}

// writePodCIDR keeps the setting.
func (s *store) writePodCIDR(cidr string) error {
	b, err := durable.Seal(cidr)
	if err == nil {
		err = os.MkdirAll(s.dir, 0o700) // the state folder may have been wiped
	}
	if err != nil {
		return err
	}
	return durable.WriteFile(s.podCIDRPath(), b, 0o600, false)
}

// podCIDR is the setting; nil when there is none.
func (s *store) podCIDR() ([]netip.Prefix, error) {
	b, err := os.ReadFile(s.podCIDRPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var cidr string
	if err == nil {
		err = durable.Unseal(b, &cidr)
	}
	if err != nil {
		// The kubelet tells it once: what an earlier version wrote, the text alone,
		// must not be lost in an upgrade.
		if old, perr := parsePodCIDR(string(b)); perr == nil {
			return old, nil
		}
		return nil, fmt.Errorf("%s: %w", s.podCIDRPath(), err)
	}
	return parsePodCIDR(cidr)
}
