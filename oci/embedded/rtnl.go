package embedded

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// Numbers that golang.org/x/sys/unix does not name.
const (
	ifaProto     = 11     // IFA_PROTO
	extSkipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS
)

// rtnl is a route socket. It speaks for the network namespace of the thread that
// opened it, whichever thread uses it.
type rtnl struct{ fd int }

// rtLink is a network device.
type rtLink struct {
	index  int
	name   string
	up     bool
	master uint32 // index, or 0
}

// rtAddress is an address as the kernel described it, ready to be set again.
type rtAddress struct {
	family, prefix, scope byte
	flags                 uint32
	attrs                 map[uint16][]byte
}

func openRtnl() (rtnl, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return rtnl{}, fmt.Errorf("open rtnetlink socket: %w", err)
	}
	// Errors without the request but with the kernel's own words.
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1), unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1))
	if err != nil {
		unix.Close(fd)
		return rtnl{}, fmt.Errorf("set NETLINK_CAP_ACK, NETLINK_EXT_ACK: %w", err)
	}
	return rtnl{fd}, nil
}

func (r rtnl) close() { unix.Close(r.fd) }

// namespace opens the socket's network namespace.
func (r rtnl) namespace() (*os.File, error) {
	fd, err := unix.IoctlRetInt(r.fd, unix.SIOCGSKNS)
	if err != nil {
		return nil, fmt.Errorf("ioctl SIOCGSKNS: %w", err)
	}
	return os.NewFile(uintptr(fd), "network namespace"), nil
}

func (r rtnl) linkByName(name string) (l rtLink, err error) {
	m := newLinkRequest(unix.RTM_GETLINK, 0, 0)
	m.attr(unix.IFLA_IFNAME, append([]byte(name), 0))
	m.attrU32(unix.IFLA_EXT_MASK, extSkipStats)
	err = r.ask(m, func(typ uint16, b []byte) {
		if typ != unix.RTM_NEWLINK || len(b) < unix.SizeofIfInfomsg {
			return
		}
		l.index = int(int32(binary.NativeEndian.Uint32(b[4:])))
		l.up = binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP != 0
		attrs := rtAttrs(b[unix.SizeofIfInfomsg:])
		l.name = unix.ByteSliceToString(attrs[unix.IFLA_IFNAME])
		if v := attrs[unix.IFLA_MASTER]; len(v) == 4 {
			l.master = binary.NativeEndian.Uint32(v)
		}
	})
	if err == nil && l.index == 0 {
		err = errors.New("rtnetlink: an answer without a link")
	}
	return l, err
}

// addresses returns the permanent IPv4 and IPv6 addresses of a link.
func (r rtnl) addresses(index int) ([]rtAddress, error) {
	var all []rtAddress
	one := func(typ uint16, b []byte) {
		if typ != unix.RTM_NEWADDR || len(b) < unix.SizeofIfAddrmsg || int(binary.NativeEndian.Uint32(b[4:])) != index {
			return
		}
		a := rtAddress{family: b[0], prefix: b[1], flags: uint32(b[2]), scope: b[3], attrs: rtAttrs(b[unix.SizeofIfAddrmsg:])}
		if v := a.attrs[unix.IFA_FLAGS]; len(v) == 4 {
			a.flags = binary.NativeEndian.Uint32(v)
		}
		if a.flags&unix.IFA_F_PERMANENT != 0 && (a.family == unix.AF_INET || a.family == unix.AF_INET6) {
			all = append(all, a)
		}
	}
	for range 10 {
		m := newRtRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
		m.b = append(m.b, unix.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0)
		all = nil
		err := r.ask(m, one)
		if err != errDumpInterrupted {
			return all, err
		}
	}
	return nil, fmt.Errorf("addresses: %w", errDumpInterrupted)
}

// addAddress sets an address of another link or time. The label, which holds the
// name of the other link, becomes the default one.
func (r rtnl) addAddress(index int, a rtAddress) error {
	m := newRtRequest(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	m.b = append(m.b, a.family, a.prefix, 0, a.scope)
	m.u32(uint32(index))
	for _, t := range []uint16{unix.IFA_ADDRESS, unix.IFA_LOCAL, unix.IFA_BROADCAST, unix.IFA_CACHEINFO, unix.IFA_RT_PRIORITY, ifaProto} {
		if v := a.attrs[t]; v != nil {
			m.attr(t, v)
		}
	}
	flags := a.flags & (unix.IFA_F_NODAD | unix.IFA_F_HOMEADDRESS | unix.IFA_F_MANAGETEMPADDR | unix.IFA_F_NOPREFIXROUTE | unix.IFA_F_MCAUTOJOIN)
	if a.family == unix.AF_INET6 && a.flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 {
		// It was found unique on this link before; asking again would make it
		// unusable for the first second.
		flags |= unix.IFA_F_NODAD
	}
	m.attrU32(unix.IFA_FLAGS, flags)
	if err := r.ask(m, nil); err != nil {
		ip, _ := netip.AddrFromSlice(a.attrs[unix.IFA_ADDRESS])
		return fmt.Errorf("address %s/%d: %w", ip, a.prefix, err)
	}
	return nil
}

func (r rtnl) moveLink(index int, ns *os.File, name string) error {
	m := newLinkRequest(unix.RTM_NEWLINK, index, 0)
	m.attr(unix.IFLA_IFNAME, append([]byte(name), 0))
	m.attrU32(unix.IFLA_NET_NS_FD, uint32(ns.Fd()))
	return r.ask(m, nil)
}

func (r rtnl) rename(index int, name string) error {
	m := newLinkRequest(unix.RTM_NEWLINK, index, 0)
	m.attr(unix.IFLA_IFNAME, append([]byte(name), 0))
	return r.ask(m, nil)
}

func (r rtnl) enslave(index int, master uint32) error {
	m := newLinkRequest(unix.RTM_NEWLINK, index, 0)
	m.attrU32(unix.IFLA_MASTER, master)
	if err := r.ask(m, nil); err != nil {
		return fmt.Errorf("set the master device: %w", err)
	}
	return nil
}

func (r rtnl) up(index int) error {
	if err := r.ask(newLinkRequest(unix.RTM_NEWLINK, index, unix.IFF_UP), nil); err != nil {
		return fmt.Errorf("bring up: %w", err)
	}
	return nil
}

var errDumpInterrupted = errors.New("the list changed while the kernel wrote it")

// ask sends one request and calls each, which may be nil, with every message of
// the answer, until the kernel's acknowledgement or the end of a dump.
func (r rtnl) ask(m *rtRequest, each func(typ uint16, body []byte)) error {
	binary.NativeEndian.PutUint32(m.b, uint32(len(m.b)))
	if err := unix.Sendto(r.fd, m.b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to rtnetlink: %w", err)
	}
	interrupted := false
	buf := make([]byte, 32<<10) // the most a dump puts in one datagram
	for {
		n, _, err := unix.Recvfrom(r.fd, buf, unix.MSG_TRUNC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("receive from rtnetlink: %w", err)
		}
		if n > len(buf) {
			return fmt.Errorf("receive from rtnetlink: a message of %d bytes", n)
		}
		for b := buf[:n]; len(b) >= unix.SizeofNlMsghdr; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.SizeofNlMsghdr || size > len(b) {
				return errors.New("receive from rtnetlink: a message of wrong size")
			}
			typ, flags, body := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:]), b[unix.SizeofNlMsghdr:size]
			interrupted = interrupted || flags&unix.NLM_F_DUMP_INTR != 0
			switch typ {
			case unix.NLMSG_ERROR, unix.NLMSG_DONE:
				if err := ackError(flags, body); err != nil {
					return err
				}
				if interrupted {
					return errDumpInterrupted
				}
				return nil
			}
			if each != nil {
				each(typ, body)
			}
			b = b[min(len(b), (size+3)&^3):]
		}
	}
}

// ackError reads an acknowledgement: an errno, for errors the header of the
// request, then attributes with the kernel's explanation.
func ackError(flags uint16, body []byte) error {
	if len(body) < 4 {
		return nil
	}
	code := int32(binary.NativeEndian.Uint32(body))
	if code == 0 {
		return nil
	}
	if at := 4 + unix.SizeofNlMsghdr; flags&unix.NLM_F_ACK_TLVS != 0 && len(body) > at {
		if text := unix.ByteSliceToString(rtAttrs(body[at:])[unix.NLMSGERR_ATTR_MSG]); text != "" {
			return fmt.Errorf("%w (%s)", unix.Errno(-code), text)
		}
	}
	return unix.Errno(-code)
}

// rtAttrs are the attributes of a message, copied.
func rtAttrs(b []byte) map[uint16][]byte {
	out := map[uint16][]byte{}
	for len(b) >= unix.SizeofRtAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			break
		}
		typ := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		out[typ] = append([]byte{}, b[unix.SizeofRtAttr:size]...)
		b = b[min(len(b), (size+3)&^3):]
	}
	return out
}

// rtRequest is one message to rtnetlink; ask fills in its length.
type rtRequest struct{ b []byte }

func newRtRequest(typ, flags uint16) *rtRequest {
	m := &rtRequest{b: make([]byte, 4, 128)}
	m.b = binary.NativeEndian.AppendUint16(m.b, typ)
	m.b = binary.NativeEndian.AppendUint16(m.b, flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	m.b = append(m.b, make([]byte, 8)...) // sequence number and port: one request at a time
	return m
}

// newLinkRequest is about one link; linkFlags are set on it.
func newLinkRequest(typ uint16, index int, linkFlags uint32) *rtRequest {
	m := newRtRequest(typ, 0)
	m.u32(0) // family, type
	m.u32(uint32(index))
	m.u32(linkFlags)
	m.u32(linkFlags) // change mask
	return m
}

func (m *rtRequest) u32(v uint32) { m.b = binary.NativeEndian.AppendUint32(m.b, v) }

func (m *rtRequest) attr(t uint16, v []byte) {
	m.b = binary.NativeEndian.AppendUint16(m.b, uint16(unix.SizeofRtAttr+len(v)))
	m.b = binary.NativeEndian.AppendUint16(m.b, t)
	m.b = append(m.b, v...)
	for len(m.b)%4 != 0 {
		m.b = append(m.b, 0)
	}
}

func (m *rtRequest) attrU32(t uint16, v uint32) {
	m.attr(t, binary.NativeEndian.AppendUint32(nil, v))
}
