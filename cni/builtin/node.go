package builtin

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// hasIPv6 reports whether the kernel has IPv6 and it is not switched off.
func hasIPv6() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "0"
}

// enableForwarding switches on routing between interfaces where it is off. It
// stays on: other software on the node may have come to rely on it.
func enableForwarding(ipv6 bool) error {
	set := func(name string) error {
		if v, err := os.ReadFile("/proc/sys/" + name); err == nil && strings.TrimSpace(string(v)) == "1" {
			return nil
		}
		klog.InfoS("Network: switching on forwarding", "sysctl", strings.ReplaceAll(name, "/", "."))
		return sysctl(name, "1")
	}
	if err := set("net/ipv4/ip_forward"); err != nil {
		return fmt.Errorf("switch on net.ipv4.ip_forward: %w", err)
	}
	const all = "net/ipv6/conf/all/forwarding"
	if v, err := os.ReadFile("/proc/sys/" + all); !ipv6 || err == nil && strings.TrimSpace(string(v)) == "1" {
		return nil // and no look at each of a thousand interfaces at every start
	}
	// A forwarding kernel ignores router advertisements unless accept_ra is 2: a
	// node that got its own address from them would lose it.
	confs, _ := filepath.Glob("/proc/sys/net/ipv6/conf/*/accept_ra")
	for _, c := range confs {
		name := filepath.Base(filepath.Dir(c))
		forwarding, _ := os.ReadFile(filepath.Join(filepath.Dir(c), "forwarding"))
		if v, err := os.ReadFile(c); err == nil && strings.TrimSpace(string(v)) == "1" && strings.TrimSpace(string(forwarding)) == "0" && name != "all" && name != "default" && name != "lo" {
			if err := sysctl("net/ipv6/conf/"+name+"/accept_ra", "2"); err != nil {
				return fmt.Errorf("keep router advertisements on %s: %w", name, err)
			}
		}
	}
	if err := set(all); err != nil {
		return fmt.Errorf("switch on net.ipv6.conf.all.forwarding: %w", err)
	}
	return nil
}

// worstMetric ranks routes of ours behind any other route to the same prefix.
const worstMetric = 1 << 20

// prepareSubnet gives the node its address in s, on lo because not every kernel
// has dummy devices: it is the stable source of host processes towards pods.
// Pod addresses without a pod become unreachable, instead of being sent to the
// default gateway.
func prepareSubnet(th *thread, s *subnet) error {
	var addr batch
	addr.address(loIndex, s.gateway.AsSlice())
	var route batch
	route.unreachable(s.prefix, unix.RTM_NEWROUTE, create)
	for _, m := range []*batch{&addr, &route} {
		if err := m.send(th.rt); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("subnet %s: %w", s.prefix, err)
		}
	}
	return nil
}

// forgetSubnet undoes prepareSubnet.
func forgetSubnet(th *thread, s *subnet) error {
	var errs []error
	var addr batch
	addr.delAddress(loIndex, s.gateway.AsSlice())
	var route batch
	route.unreachable(s.prefix, unix.RTM_DELROUTE, request)
	for _, m := range []*batch{&addr, &route} {
		if err := m.send(th.rt); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("subnet %s: %w", s.prefix, err))
		}
	}
	return errors.Join(errs...)
}

// uplinkMTU is the MTU of the device with the default route, so that pods send
// no packet the node must fragment; 1500 without one.
func uplinkMTU() int {
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := netlink.RouteList(nil, fam)
		if err != nil {
			continue
		}
		for _, r := range routes {
			if r.Dst != nil {
				if ones, _ := r.Dst.Mask.Size(); ones != 0 {
					continue
				}
			}
			if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil && link.Attrs().MTU >= 1280 && link.Attrs().Flags&unix.IFF_LOOPBACK == 0 {
				return link.Attrs().MTU
			}
		}
	}
	return 1500
}

// sources are the node's addresses towards pods of the given subnets.
func sources(subnets []*subnet) map[bool]netip.Addr {
	out := map[bool]netip.Addr{}
	for _, s := range subnets {
		out[s.gateway.Is4()] = s.gateway
	}
	return out
}
