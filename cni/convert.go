package cni

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// podIPs are the addresses of the pod's own interface, in the order of the result.
func podIPs(result types.Result) ([]netip.Addr, error) {
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, fmt.Errorf("plugin result: %w: %w", err, errdefs.ErrUnavailable)
	}
	var ips []netip.Addr
	for _, c := range r.IPs {
		if c == nil {
			continue
		}
		if c.Interface != nil {
			if *c.Interface < 0 || *c.Interface >= len(r.Interfaces) {
				return nil, fmt.Errorf("plugin result: address %s is of interface %d, which the result lacks: %w", c.Address.IP, *c.Interface, errdefs.ErrUnavailable)
			}
			if i := r.Interfaces[*c.Interface]; i == nil || i.Sandbox == "" || i.Name != ifName {
				continue
			}
		}
		if ip, ok := netip.AddrFromSlice(c.Address.IP); ok {
			ips = append(ips, ip.Unmap())
		}
	}
	if len(ips) == 0 {
		return nil, fmt.Errorf("plugin result: has no address for %s; does the network configuration have an ipam section: %w", ifName, errdefs.ErrUnavailable)
	}
	return ips, nil
}

// runtimeConf is what plugins are told of the pod.
func runtimeConf(p Pod) (*libcni.RuntimeConf, error) {
	for field, v := range map[string]string{"name": p.Name, "namespace": p.Namespace, "uid": p.UID} {
		// CNI_ARGS is a list of key=value separated by semicolons.
		if strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r == ';' || r == '=' || r == 0x7f }) {
			return nil, fmt.Errorf("pod metadata.%s %q: must not contain ; = or control characters: %w", field, v, errdefs.ErrInvalidArgument)
		}
	}
	type portMapping struct {
		HostPort      uint16   `json:"hostPort"`
		ContainerPort uint16   `json:"containerPort"`
		Protocol      Protocol `json:"protocol"`
		HostIP        string   `json:"hostIP,omitempty"`
	}
	caps := map[string]any{}
	var ports []portMapping
	for _, m := range p.PortMappings {
		if m.HostPort == 0 {
			continue
		}
		pm := portMapping{HostPort: m.HostPort, ContainerPort: m.ContainerPort, Protocol: m.Protocol}
		if pm.Protocol == "" {
			pm.Protocol = TCP
		}
		if m.HostIP.IsValid() {
			pm.HostIP = m.HostIP.String()
		}
		ports = append(ports, pm)
	}
	if len(ports) > 0 {
		caps["portMappings"] = ports
	}
	if p.CgroupParent != "" {
		caps["cgroupPath"] = p.CgroupParent
	}
	if len(p.Annotations) > 0 {
		caps["io.kubernetes.cri.pod-annotations"] = p.Annotations
	}
	return &libcni.RuntimeConf{
		ContainerID: string(p.ID), IfName: ifName, CapabilityArgs: caps,
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", p.Namespace},
			{"K8S_POD_NAME", p.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", string(p.ID)},
			{"K8S_POD_UID", p.UID},
		},
	}, nil
}
