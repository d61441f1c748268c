package convert

import (
	"net/netip"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/sandbox"
)

// PodConfig reads the request of RunPodSandbox. Windows fields are ignored.
func PodConfig(c *runtimeapi.PodSandboxConfig, handler string) (*sandbox.PodConfig, error) {
	if c == nil {
		return nil, Required("config")
	}
	m := c.Metadata
	switch {
	case m == nil:
		return nil, Required("config.metadata")
	case m.Name == "":
		return nil, Required("config.metadata.name")
	case m.Namespace == "":
		return nil, Required("config.metadata.namespace")
	case m.Uid == "":
		return nil, Required("config.metadata.uid")
	}
	if len(c.Hostname) > 64 {
		return nil, invalid("config.hostname", "%d bytes; the kernel takes at most 64", len(c.Hostname))
	}
	if c.LogDirectory != "" && !strings.HasPrefix(c.LogDirectory, "/") {
		return nil, invalid("config.log_directory", "%q is not an absolute path", c.LogDirectory)
	}
	out := &sandbox.PodConfig{
		Meta:         sandbox.PodMeta{Name: m.Name, UID: m.Uid, Namespace: m.Namespace, Attempt: m.Attempt},
		Hostname:     c.Hostname,
		LogDirectory: c.LogDirectory,
		Labels:       c.Labels,
		Annotations:  c.Annotations,
		Handler:      handler,
	}
	if d := c.DnsConfig; d != nil {
		out.DNS = &sandbox.DNS{Servers: d.Servers, Searches: d.Searches, Options: d.Options}
	}
	for i, p := range c.PortMappings {
		pm, err := portMapping("config.port_mappings["+itoa(i)+"]", p)
		if err != nil {
			return nil, err
		}
		out.PortMappings = append(out.PortMappings, pm)
	}
	if err := podLinux(out, c.Linux); err != nil {
		return nil, err
	}
	if out.Hostname == "" && out.Namespaces.Network != sandbox.NamespaceNode {
		// Only the kubelet leaves it out for pods on the host network; other
		// clients get a pod that is named after itself.
		out.Hostname = hostname(m.Name)
	}
	return out, nil
}

// hostname makes a host name of a pod's name.
func hostname(name string) string {
	if len(name) > 63 {
		name = name[:63]
	}
	return strings.TrimRight(name, "-.")
}

func podLinux(out *sandbox.PodConfig, l *runtimeapi.LinuxPodSandboxConfig) error {
	if l == nil {
		return nil
	}
	var err error
	out.CgroupParent = l.CgroupParent
	if out.Sysctls, err = sysctls(l.Sysctls); err != nil {
		return err
	}
	if out.Overhead, err = Resources("config.linux.overhead", l.Overhead); err != nil {
		return err
	}
	if out.Resources, err = Resources("config.linux.resources", l.Resources); err != nil {
		return err
	}
	s := l.SecurityContext
	if s == nil {
		return nil
	}
	const field = "config.linux.security_context"
	if out.Namespaces, err = namespaces(field+".namespace_options", s.NamespaceOptions, false); err != nil {
		return err
	}
	if out.RunAsUser, err = userID(field+".run_as_user", s.RunAsUser); err != nil {
		return err
	}
	if out.RunAsGroup, err = userID(field+".run_as_group", s.RunAsGroup); err != nil {
		return err
	}
	if out.RunAsGroup != nil && out.RunAsUser == nil {
		return invalid(field+".run_as_group", "given without a user; set run_as_user too")
	}
	//lint:ignore SA1019 older clients send only this one
	if out.Seccomp, err = profile(field+".seccomp", s.Seccomp, s.SeccompProfilePath, true); err != nil {
		return err
	}
	if out.AppArmor, err = profile(field+".apparmor", s.Apparmor, "", false); err != nil {
		return err
	}
	out.Privileged = s.Privileged
	out.ReadonlyRootfs = s.ReadonlyRootfs
	out.SELinux = selinux(s.SelinuxOptions)
	return nil
}

// sysctls brings keys to the dotted form: "net/ipv4/ip_forward" is legal too,
// and in that form a dot belongs to an interface's name.
func sysctls(in map[string]string) (map[string]string, error) {
	if len(in) == 0 {
		return nil, nil
	}
	out := make(map[string]string, len(in))
	for k, v := range in {
		key := k
		if i := strings.IndexAny(k, "./"); i >= 0 && k[i] == '/' {
			key = strings.NewReplacer("/", ".", ".", "/").Replace(k)
		}
		if key == "" || strings.Contains(key, "..") || strings.Contains(key, "//") || key[0] == '.' || key[0] == '/' {
			return nil, invalid("config.linux.sysctls", "key %q is not a sysctl name such as net.ipv4.ip_forward", k)
		}
		out[key] = v
	}
	return out, nil
}

func portMapping(field string, p *runtimeapi.PortMapping) (cni.PortMapping, error) {
	var out cni.PortMapping
	switch p.GetProtocol() {
	case runtimeapi.Protocol_TCP:
		out.Protocol = cni.TCP
	case runtimeapi.Protocol_UDP:
		out.Protocol = cni.UDP
	case runtimeapi.Protocol_SCTP:
		out.Protocol = cni.SCTP
	default:
		return out, invalid(field+".protocol", "unknown protocol %d; use TCP, UDP or SCTP", int32(p.GetProtocol()))
	}
	for _, v := range []struct {
		name string
		port int32
	}{{"container_port", p.GetContainerPort()}, {"host_port", p.GetHostPort()}} {
		if v.port < 0 || v.port > 65535 {
			return out, invalid(field+"."+v.name, "%d is not a port; use 0 to 65535", v.port)
		}
	}
	if p.GetHostPort() != 0 && p.GetContainerPort() == 0 {
		return out, invalid(field+".container_port", "missing; host_port %d needs it", p.GetHostPort())
	}
	out.ContainerPort = uint16(p.GetContainerPort())
	out.HostPort = uint16(p.GetHostPort())
	if p.GetHostIp() != "" {
		a, err := netip.ParseAddr(p.GetHostIp())
		if err != nil {
			return out, invalid(field+".host_ip", "%q is not an IP address", p.GetHostIp())
		}
		if !a.IsUnspecified() { // 0.0.0.0 and :: mean all addresses, as no address does
			out.HostIP = a.Unmap()
		}
	}
	return out, nil
}

// PodFilter reads the filter of ListPodSandbox; nil selects all.
func PodFilter(f *runtimeapi.PodSandboxFilter) (sandbox.PodFilter, error) {
	out := sandbox.PodFilter{ID: f.GetId(), Labels: f.GetLabelSelector()}
	if f.GetState() != nil {
		var s sandbox.PodState
		switch f.State.State {
		case runtimeapi.PodSandboxState_SANDBOX_READY:
			s = sandbox.PodReady
		case runtimeapi.PodSandboxState_SANDBOX_NOTREADY:
			s = sandbox.PodNotReady
		default:
			return out, invalid("filter.state", "unknown state %d", int32(f.State.State))
		}
		out.State = &s
	}
	return out, nil
}

// PodState is the pod's state in CRI's words.
func PodState(s sandbox.PodState) runtimeapi.PodSandboxState {
	if s == sandbox.PodReady {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

func podMetadata(m sandbox.PodMeta) *runtimeapi.PodSandboxMetadata {
	return &runtimeapi.PodSandboxMetadata{Name: m.Name, Uid: m.UID, Namespace: m.Namespace, Attempt: m.Attempt}
}

// PodItem is one row of ListPodSandbox.
func PodItem(p *sandbox.PodStatus) *runtimeapi.PodSandbox {
	return &runtimeapi.PodSandbox{
		Id:             string(p.ID),
		Metadata:       podMetadata(p.Config.Meta),
		State:          PodState(p.State),
		CreatedAt:      p.CreatedAt.UnixNano(),
		Labels:         p.Config.Labels,
		Annotations:    p.Config.Annotations,
		RuntimeHandler: p.Config.Handler,
	}
}

// PodStatus is the answer of PodSandboxStatus. It echoes the namespace modes: a
// kubelet that reads another network mode than the pod's replaces the sandbox.
func PodStatus(p *sandbox.PodStatus) *runtimeapi.PodSandboxStatus {
	n := p.Config.Namespaces
	out := &runtimeapi.PodSandboxStatus{
		Id:        string(p.ID),
		Metadata:  podMetadata(p.Config.Meta),
		State:     PodState(p.State),
		CreatedAt: p.CreatedAt.UnixNano(),
		Network:   &runtimeapi.PodSandboxNetworkStatus{},
		Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: &runtimeapi.NamespaceOption{
			Network:  runtimeapi.NamespaceMode(n.Network),
			Pid:      runtimeapi.NamespaceMode(n.PID),
			Ipc:      runtimeapi.NamespaceMode(n.IPC),
			TargetId: string(n.TargetID),

			UsernsOptions: usernsProto(n.User),
		}}},
		Labels:         p.Config.Labels,
		Annotations:    p.Config.Annotations,
		RuntimeHandler: p.Config.Handler,
	}
	for i, ip := range p.IPs {
		if i == 0 {
			out.Network.Ip = ip
			continue
		}
		out.Network.AdditionalIps = append(out.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
	}
	return out
}
