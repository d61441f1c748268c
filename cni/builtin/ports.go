package builtin

import (
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/id"
)

// mapping is one published port of one address family.
type mapping struct {
	Proto    uint8      `json:"proto"`           // IPPROTO_*
	HostIP   netip.Addr `json:"hostIP,omitzero"` // unset: all node addresses of Pod's family
	HostPort uint16     `json:"hostPort"`
	Pod      netip.Addr `json:"pod"`
	PodPort  uint16     `json:"podPort"`
}

func (m mapping) String() string {
	host := "all IPv4 addresses"
	if m.Pod.Is6() {
		host = "all IPv6 addresses"
	}
	if m.HostIP.IsValid() {
		host = m.HostIP.String()
	}
	return fmt.Sprintf("%s port %d on %s", protoName[m.Proto], m.HostPort, host)
}

// onLoopback6 reports whether m is published on ::1.
func (m mapping) onLoopback6() bool {
	return m.Pod.Is6() && (!m.HostIP.IsValid() || m.HostIP.IsLoopback())
}

var protoName = map[uint8]string{unix.IPPROTO_TCP: "TCP", unix.IPPROTO_UDP: "UDP", unix.IPPROTO_SCTP: "SCTP"}

var protoNumber = map[cni.Protocol]uint8{"": unix.IPPROTO_TCP, cni.TCP: unix.IPPROTO_TCP, cni.UDP: unix.IPPROTO_UDP, cni.SCTP: unix.IPPROTO_SCTP}

// expand turns the port mappings of a pod with the given addresses into one
// mapping per family. An unset host IP means every family the pod has, an
// unspecified one (0.0.0.0, ::) all addresses of its family.
func expand(pms []cni.PortMapping, ips []netip.Addr) ([]mapping, error) {
	var out []mapping
	for i, pm := range pms {
		if pm.HostPort == 0 {
			continue
		}
		proto, ok := protoNumber[pm.Protocol]
		if !ok {
			return nil, fmt.Errorf("port_mappings[%d].protocol %q: want tcp, udp or sctp: %w", i, pm.Protocol, errdefs.ErrInvalidArgument)
		}
		if pm.ContainerPort == 0 {
			return nil, fmt.Errorf("port_mappings[%d].container_port: want 1 to 65535: %w", i, errdefs.ErrInvalidArgument)
		}
		host, found := pm.HostIP.Unmap(), false
		for _, ip := range ips {
			m := mapping{Proto: proto, HostPort: pm.HostPort, Pod: ip, PodPort: pm.ContainerPort}
			switch {
			case host.IsValid() && host.Is4() != ip.Is4():
				continue
			case host.IsValid() && !host.IsUnspecified():
				if host.Zone() != "" || host.IsMulticast() {
					return nil, fmt.Errorf("port_mappings[%d].host_ip %s: want a unicast address without zone: %w", i, host, errdefs.ErrInvalidArgument)
				}
				m.HostIP = host
			}
			out, found = append(out, m), true
		}
		if !found {
			return nil, fmt.Errorf("port_mappings[%d].host_ip %s: the pod has no address of that family (%v); use another host_ip or a pod CIDR of both families: %w", i, host, ips, errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}

// slot is what two mappings must share to be able to conflict.
type slot struct {
	v6    bool
	proto uint8
	port  uint16
}

type claim struct {
	mapping
	pod id.Pod
}

// claims is the table of published ports. It is not safe for concurrent use.
type claims map[slot][]claim

func (m mapping) slot() slot { return slot{v6: m.Pod.Is6(), proto: m.Proto, port: m.HostPort} }

// add claims all of ms for pod, or none of them. A mapping that the same pod
// asks for twice is dropped; the distinct ones are returned.
func (c claims) add(pod id.Pod, ms []mapping) ([]mapping, error) {
	var added []mapping
next:
	for _, m := range ms {
		for _, have := range c[m.slot()] {
			if have.pod == pod && have.mapping == m {
				continue next
			}
			if !have.HostIP.IsValid() || !m.HostIP.IsValid() || have.HostIP == m.HostIP {
				c.remove(pod, added)
				return nil, fmt.Errorf("host port: %s is already in use by pod sandbox %s: %w", m, id.Short(have.pod), errdefs.ErrAlreadyExists)
			}
		}
		c[m.slot()] = append(c[m.slot()], claim{m, pod})
		added = append(added, m)
	}
	return added, nil
}

// remove gives up those of ms that pod holds.
func (c claims) remove(pod id.Pod, ms []mapping) {
	for _, m := range ms {
		s := m.slot()
		rest := c[s][:0]
		for _, have := range c[s] {
			if have.pod != pod || have.mapping != m {
				rest = append(rest, have)
			}
		}
		if len(rest) == 0 {
			delete(c, s)
		} else {
			c[s] = rest
		}
	}
}
