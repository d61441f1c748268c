package builtin

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
)

// subnet hands out the addresses of one prefix, round robin: an address comes
// back as late as possible, so that peers' caches and conntrack have forgotten
// its last owner. It is not safe for concurrent use.
type subnet struct {
	prefix  netip.Prefix
	gateway netip.Addr // the node's own address in the prefix, its first
	next    uint64     // host part to try next
	size    uint64     // number of host parts; 0 and 1 (and IPv4 broadcast) are never given out
	used    map[netip.Addr]struct{}
}

// maxHostBits bounds the host part: more addresses than a node can have pods.
const maxHostBits = 32

func newSubnet(p netip.Prefix) (*subnet, error) {
	if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || !p.Addr().IsGlobalUnicast() {
		return nil, fmt.Errorf("subnet %q: want a unicast network such as 10.1.0.0/24 or fd00:1::/64: %w", p, errdefs.ErrInvalidArgument)
	}
	host := p.Addr().BitLen() - p.Bits()
	if host < 2 {
		return nil, fmt.Errorf("subnet %q: has no room for pods, want /30 (IPv4) or /126 (IPv6) or larger: %w", p, errdefs.ErrInvalidArgument)
	}
	s := &subnet{prefix: p, next: 2, size: 1 << min(host, maxHostBits), used: map[netip.Addr]struct{}{}}
	if p.Addr().Is4() {
		s.size-- // broadcast
	}
	s.gateway = s.at(1)
	return s, nil
}

func (s *subnet) at(n uint64) netip.Addr {
	if s.prefix.Addr().Is4() {
		b := s.prefix.Addr().As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
		return netip.AddrFrom4(b)
	}
	b := s.prefix.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])+n)
	return netip.AddrFrom16(b)
}

// take returns an unused address, or an error when all are in use.
func (s *subnet) take() (netip.Addr, error) {
	if uint64(len(s.used)) >= s.size-2 {
		return netip.Addr{}, fmt.Errorf("subnet %s: all %d addresses are in use; remove pods or give the node a larger pod CIDR: %w", s.prefix, s.size-2, errdefs.ErrResourceExhausted)
	}
	for {
		a := s.at(s.next)
		if s.next++; s.next >= s.size {
			s.next = 2
		}
		if _, ok := s.used[a]; !ok {
			s.used[a] = struct{}{}
			return a, nil
		}
	}
}

// claim marks a as used if it belongs to the subnet, and moves the round
// robin behind it.
func (s *subnet) claim(a netip.Addr) {
	if !s.prefix.Contains(a) {
		return
	}
	s.used[a] = struct{}{}
	for n := s.next; n < s.size && n < s.next+uint64(len(s.used)); n++ {
		if s.at(n) == a {
			s.next = n + 1
			break
		}
	}
	if s.next >= s.size {
		s.next = 2
	}
}

func (s *subnet) release(a netip.Addr) { delete(s.used, a) }

// parsePodCIDR reads one prefix, or one of each family separated by a comma.
func parsePodCIDR(cidr string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for part := range strings.SplitSeq(cidr, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("pod_cidr %q: want prefixes such as 10.1.0.0/24,fd00:1::/64: %w", cidr, errdefs.ErrInvalidArgument)
		}
		out = append(out, p)
	}
	return out, nil
}

// newSubnets makes at most one subnet per family, IPv4 and IPv6 in the given order.
func newSubnets(prefixes []netip.Prefix) ([]*subnet, error) {
	var out []*subnet
	for _, p := range prefixes {
		s, err := newSubnet(p)
		if err != nil {
			return nil, err
		}
		if len(out) > 0 && out[0].prefix.Addr().BitLen() == p.Addr().BitLen() || len(out) == 2 {
			return nil, fmt.Errorf("subnets %v: want at most one IPv4 and one IPv6 prefix: %w", prefixes, errdefs.ErrInvalidArgument)
		}
		out = append(out, s)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("subnets: none given: %w", errdefs.ErrInvalidArgument)
	}
	return out, nil
}
