package builtin

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Netlink attribute numbers that golang.org/x/sys/unix does not name.
const (
	vethInfoPeer         = 1      // VETH_INFO_PEER
	iflaInetConf         = 1      // IFLA_INET_CONF
	iflaInet6AddrGenMode = 8      // IFLA_INET6_ADDR_GEN_MODE
	addrGenNone          = 1      // IN6_ADDR_GEN_MODE_NONE
	extSkipStats         = 1 << 3 // RTEXT_FILTER_SKIP_STATS
	devconfRouteLocalnet = 26     // IPV4_DEVCONF_ROUTE_LOCALNET
)

const (
	request = unix.NLM_F_REQUEST | unix.NLM_F_ACK
	create  = request | unix.NLM_F_CREATE | unix.NLM_F_EXCL
)

// batch is a list of rtnetlink requests sent in one system call. The kernel
// runs them in order and acknowledges each; it does not stop at an error, so
// only the first error of a batch means something.
type batch struct {
	b     []byte
	names []string // what each request does, for the error text
}

func (m *batch) u16(v uint16) { m.b = binary.NativeEndian.AppendUint16(m.b, v) }
func (m *batch) u32(v uint32) { m.b = binary.NativeEndian.AppendUint32(m.b, v) }

func (m *batch) attr(t uint16, v []byte) {
	m.u16(uint16(4 + len(v)))
	m.u16(t)
	m.b = append(m.b, v...)
	for len(m.b)%4 != 0 {
		m.b = append(m.b, 0)
	}
}

func (m *batch) attrString(t uint16, s string) { m.attr(t, append([]byte(s), 0)) }

func (m *batch) attrU32(t uint16, v uint32) {
	m.u16(8)
	m.u16(t)
	m.u32(v)
}

func (m *batch) nest(t uint16, f func()) {
	at := len(m.b)
	m.u16(0)
	m.u16(t)
	f()
	binary.NativeEndian.PutUint16(m.b[at:], uint16(len(m.b)-at))
}

// add appends one request; f writes its body.
func (m *batch) add(name string, typ, flags uint16, f func()) {
	at := len(m.b)
	m.u32(0)
	m.u16(typ)
	m.u16(flags)
	m.u32(uint32(len(m.names)))
	m.u32(0)
	f()
	binary.NativeEndian.PutUint32(m.b[at:], uint32(len(m.b)-at))
	m.names = append(m.names, name)
}

func (m *batch) ifinfo(index int, flags uint32) {
	m.u32(0) // family, pad, type
	m.u32(uint32(index))
	m.u32(flags)
	m.u32(flags) // change mask
}

func (m *batch) up(index int) {
	m.add("link up", unix.RTM_NEWLINK, request, func() { m.ifinfo(index, unix.IFF_UP) })
}

// settle asks for the link. Since 6.8 that makes the kernel finish a pending
// carrier change first: until then it drops what is sent over a link whose peer
// has just come up, which would cost a pod its first packets.
func (m *batch) settle(index int) {
	m.add("settle link", unix.RTM_GETLINK, request, func() {
		m.ifinfo(index, 0)
		m.attrU32(unix.IFLA_EXT_MASK, extSkipStats)
	})
}

// ipv6Quiet stops the kernel from making a link-local address (and from
// probing for duplicates of it). It must come before the link is up.
func (m *batch) ipv6Quiet() {
	m.nest(unix.AF_INET6, func() { m.attr(iflaInet6AddrGenMode, []byte{addrGenNone}) })
}

func (m *batch) address(index int, ip []byte) {
	m.addressRequest("address", unix.RTM_NEWADDR, create, index, ip)
}

func (m *batch) delAddress(index int, ip []byte) {
	m.addressRequest("delete address", unix.RTM_DELADDR, request, index, ip)
}

func (m *batch) addressRequest(name string, typ, flags uint16, index int, ip []byte) {
	m.add(name, typ, flags, func() {
		family, flags := byte(unix.AF_INET), byte(0)
		if len(ip) == 16 {
			// No duplicate detection: we alone hand out these addresses, and a
			// tentative address could not be used for a second.
			family, flags = unix.AF_INET6, unix.IFA_F_NODAD
		}
		m.b = append(m.b, family, byte(len(ip)*8), flags, unix.RT_SCOPE_UNIVERSE)
		m.u32(uint32(index))
		m.attr(unix.IFA_LOCAL, ip)
		m.attr(unix.IFA_ADDRESS, ip)
	})
}

// neighbour makes a permanent entry: no ARP or ND, and no share of the
// kernel's table limit (gc_thresh3), which 1,024 dynamic entries would fill.
func (m *batch) neighbour(index int, ip []byte, mac [6]byte) {
	m.add("neighbour", unix.RTM_NEWNEIGH, request|unix.NLM_F_CREATE|unix.NLM_F_REPLACE, func() {
		m.b = append(m.b, familyOf(ip), 0, 0, 0)
		m.u32(uint32(index))
		m.u16(unix.NUD_PERMANENT)
		m.b = append(m.b, 0, unix.RTN_UNICAST)
		m.attr(unix.NDA_DST, ip)
		m.attr(unix.NDA_LLADDR, mac[:])
	})
}

// podRoute leads to the pod with address ip over the link index; src is the
// node's source address towards it, if it has one.
func (m *batch) podRoute(index int, ip, src netip.Addr) {
	dst, scope := ip.AsSlice(), byte(unix.RT_SCOPE_LINK)
	if ip.Is6() {
		scope = unix.RT_SCOPE_UNIVERSE
	}
	m.add("route to "+ip.String(), unix.RTM_NEWROUTE, create, func() {
		m.b = append(m.b, familyOf(dst), byte(ip.BitLen()), 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, scope, unix.RTN_UNICAST)
		m.u32(0)
		m.attr(unix.RTA_DST, dst)
		m.attrU32(unix.RTA_OIF, uint32(index))
		if src.IsValid() {
			m.attr(unix.RTA_PREFSRC, src.AsSlice())
		}
	})
}

// loopback6 lets answers for ::1 come in over the link index: the kernel looks
// such destinations up by incoming device, and has no route_localnet for IPv6.
// Only packets that conntrack gave back their ::1 profit; the kernel drops those
// that arrive with it, before anything else.
func (m *batch) loopback6(index int) {
	// Without NLM_F_EXCL, which refuses a second device for the same destination.
	m.add("route to ::1", unix.RTM_NEWROUTE, request|unix.NLM_F_CREATE|unix.NLM_F_APPEND, func() {
		m.b = append(m.b, unix.AF_INET6, 128, 0, 0, unix.RT_TABLE_LOCAL, unix.RTPROT_STATIC, unix.RT_SCOPE_UNIVERSE, unix.RTN_LOCAL)
		m.u32(0)
		m.attr(unix.RTA_DST, netip.IPv6Loopback().AsSlice())
		m.attrU32(unix.RTA_OIF, uint32(index))
		m.attrU32(unix.RTA_PRIORITY, worstMetric)
	})
}

// unreachable makes or deletes (typ) the route that catches unassigned addresses of p.
func (m *batch) unreachable(p netip.Prefix, typ, flags uint16) {
	dst := p.Addr().AsSlice()
	m.add("unreachable "+p.String(), typ, flags, func() {
		m.b = append(m.b, familyOf(dst), byte(p.Bits()), 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNREACHABLE)
		m.u32(0)
		m.attr(unix.RTA_DST, dst)
		m.attrU32(unix.RTA_PRIORITY, worstMetric)
	})
}

// defaultRoute leads through gw, which lies in no network of the link.
func (m *batch) defaultRoute(index int, gw []byte) {
	m.add("default route", unix.RTM_NEWROUTE, create, func() {
		m.b = append(m.b, familyOf(gw), 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST)
		m.u32(unix.RTNH_F_ONLINK)
		m.attr(unix.RTA_GATEWAY, gw)
		m.attrU32(unix.RTA_OIF, uint32(index))
	})
}

func familyOf(ip []byte) byte {
	if len(ip) == 16 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// send runs the batch on the route socket fd and returns its first error.
func (m *batch) send(fd int) error {
	if err := unix.Sendto(fd, m.b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to rtnetlink: %w", err)
	}
	var first error
	var buf [8192]byte
	for got := 0; got < len(m.names); {
		n, _, err := unix.Recvfrom(fd, buf[:], 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("receive from rtnetlink: %w", err)
		}
		for b := buf[:n]; len(b) >= 20; {
			size := binary.NativeEndian.Uint32(b)
			seq := binary.NativeEndian.Uint32(b[8:])
			if binary.NativeEndian.Uint16(b[4:]) == unix.NLMSG_ERROR {
				got++
				if code := int32(binary.NativeEndian.Uint32(b[16:])); code != 0 && first == nil && int(seq) < len(m.names) {
					first = fmt.Errorf("%s: %w", m.names[seq], unix.Errno(-code))
				}
			}
			b = b[min(len(b), max(16, int(size+3)&^3)):]
		}
	}
	return first
}

// routeSocket opens a route socket in the calling thread's network namespace.
func routeSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("set NETLINK_CAP_ACK: %w", err)
	}
	return fd, nil
}
