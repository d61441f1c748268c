package embedded

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

func TestCheckNetDevices(t *testing.T) {
	type devs = map[string]specs.LinuxNetDevice
	for _, ok := range []devs{
		nil,
		{"eth0": {}},
		{"eth0": {Name: "eth1"}, "eth1": {Name: "eth0"}},
		{"eth0": {Name: "port%d"}, "eth1": {Name: "port%d"}},
		{"fifteen-bytes-x": {Name: "a@b"}},
	} {
		if err := checkNetDevices(ok); err != nil {
			t.Errorf("%v: %v", ok, err)
		}
	}
	for name, bad := range map[string]devs{
		"eth0":   {"eth0": {Name: "x"}, "eth1": {}, "x": {Name: "eth1"}}, // named below
		"a":      {"a": {Name: ".."}},
		"b":      {"b": {Name: "sixteen-bytes-xx"}},
		"c":      {"c": {Name: "x%dy%d"}},
		"d":      {"d": {Name: "x%s"}},
		"e":      {"e": {Name: "x%"}},
		"f":      {"f": {Name: "x y"}},
		"g":      {"g": {Name: "x:y"}},
		"":       {"": {}},
		".":      {".": {}},
		"a/b":    {"a/b": {}},
		"a\nb":   {"a\nb": {}},
		"p%d":    {"p%d": {}},
		"\u00e0": {"\u00e0": {}}, // the second byte is a space to the kernel
	} {
		if name == "eth0" {
			name = "x" // sorted, it is the second that would be called eth1
		}
		refused(t, checkNetDevices(bad), "linux.netDevices["+name+"]")
	}
}

// netPair is a host's and a container's network namespace.
type netPair struct {
	*testing.T
	host, inside *os.File
	wire         *os.File // holds the other ends of the devices
}

func newNetPair(t *testing.T) netPair {
	needRoot(t)
	p := netPair{T: t}
	for _, to := range []**os.File{&p.host, &p.inside, &p.wire} {
		ns, err := kernel.NewNamespaces([]kernel.Namespace{kernel.NetNS}, nil)
		if err != nil {
			t.Fatal(err)
		}
		*to = ns[0]
		t.Cleanup(func() { ns[0].Close() }) // and with it the devices
	}
	return p
}

func (p netPair) in(ns *os.File, f func() error) {
	p.Helper()
	if err := kernel.In(kernel.NetNS, ns, f); err != nil {
		p.Fatal(err)
	}
}

func (p netPair) move(devs map[string]specs.LinuxNetDevice) error {
	return kernel.In(kernel.NetNS, p.host, func() error { return moveNetDevices(devs, p.inside) })
}

// device makes a veth device with MTU 1789 and a known hardware address. Its
// other end is elsewhere and up.
func (p netPair) device(ns *os.File, name string, addrs ...netlink.Addr) {
	p.Helper()
	peer := fmt.Sprintf("peer%d", serial.Add(1))
	p.in(ns, func() error {
		l := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name, MTU: 1789, HardwareAddr: mac}, PeerName: peer, PeerNamespace: netlink.NsFd(p.wire.Fd()),
		}
		if err := netlink.LinkAdd(l); err != nil {
			return fmt.Errorf("new veth: %w", err)
		}
		for _, a := range addrs {
			if err := netlink.AddrAdd(l, &a); err != nil {
				return fmt.Errorf("%s: %w", a, err)
			}
		}
		return nil
	})
	p.in(p.wire, func() error { return setUp(peer) })
}

var mac = net.HardwareAddr{2, 0, 0, 0, 0, 7}

func address(t *testing.T, s string, change ...func(*netlink.Addr)) netlink.Addr {
	t.Helper()
	a, err := netlink.ParseAddr(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(a)
	}
	return *a
}

// shown describes every device of ns but lo, with its addresses except the
// link-local ones that the kernel makes.
func (p netPair) shown(ns *os.File) (out []string) {
	p.Helper()
	p.in(ns, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			a := l.Attrs()
			if a.Name == "lo" {
				continue
			}
			s := a.Name
			if a.Flags&net.FlagUp != 0 {
				s += " up"
			}
			if a.MTU != 1789 || a.HardwareAddr.String() != mac.String() {
				s += fmt.Sprintf(" mtu %d %s", a.MTU, a.HardwareAddr)
			}
			if a.MasterIndex != 0 {
				s += " enslaved"
			}
			addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			var list []string
			for _, x := range addrs {
				if x.IP.IsLinkLocalUnicast() && x.IP.To4() == nil {
					continue
				}
				one := x.IPNet.String()
				if x.Peer != nil && x.Peer.String() != one {
					one += "-" + x.Peer.String()
				}
				if x.Broadcast != nil {
					one += " brd " + x.Broadcast.String()
				}
				if x.Scope != unix.RT_SCOPE_UNIVERSE {
					one += fmt.Sprintf(" scope %d", x.Scope)
				}
				for flag, name := range map[int]string{unix.IFA_F_NOPREFIXROUTE: " noprefixroute", unix.IFA_F_TENTATIVE: " tentative", unix.IFA_F_DEPRECATED: " deprecated"} {
					if x.Flags&flag != 0 {
						one += name
					}
				}
				if x.ValidLft > 0 && x.ValidLft < 1<<31-1 {
					one += " temporary"
				}
				list = append(list, one)
			}
			slices.Sort(list)
			out = append(out, s+" ["+strings.Join(list, ", ")+"]")
		}
		slices.Sort(out)
		return nil
	})
	return out
}

func (p netPair) expect(ns *os.File, where string, want ...string) {
	p.Helper()
	slices.Sort(want)
	if got := p.shown(ns); !slices.Equal(got, want) {
		p.Errorf("%s:\n%s\nwant\n%s", where, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func setUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

func TestMoveNetDevices(t *testing.T) {
	p := newNetPair(t)
	flags := func(f int) func(*netlink.Addr) { return func(a *netlink.Addr) { a.Flags = f } }
	scope := func(s int) func(*netlink.Addr) { return func(a *netlink.Addr) { a.Scope = s } }
	nodad := flags(unix.IFA_F_NODAD)
	p.device(p.host, "eth0",
		address(t, "10.7.0.1/24", func(a *netlink.Addr) { a.Broadcast = net.IPv4(10, 7, 0, 200).To4() }),
		address(t, "10.7.0.2/24"), // secondary
		address(t, "10.8.0.1/32", func(a *netlink.Addr) {
			a.Peer = &net.IPNet{IP: net.IPv4(10, 8, 0, 9), Mask: net.CIDRMask(32, 32)}
		}),
		address(t, "10.9.0.1/24", flags(unix.IFA_F_NOPREFIXROUTE)),
		address(t, "169.254.7.7/16", scope(unix.RT_SCOPE_LINK)),
		address(t, "10.10.0.1/24", scope(unix.RT_SCOPE_HOST)),
		address(t, "10.11.0.1/24", func(a *netlink.Addr) { a.ValidLft, a.PreferedLft = 1000, 1000 }),
		address(t, "2001:db8:7::1/64", nodad),
		address(t, "2001:db8:7::2/128", nodad, func(a *netlink.Addr) { a.ValidLft, a.PreferedLft = 1000, 1000 }),
	)
	p.device(p.host, "eth1")
	p.device(p.host, "eth2")
	p.device(p.host, "eth3")
	p.device(p.host, "stays")
	p.in(p.host, func() error { return setUp("eth0") }) // its IPv6 addresses would not outlive "down"
	// Both the index and the old name of eth0 are taken inside.
	p.device(p.inside, "eth0")
	p.in(p.inside, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetAlias(l, "the container's own")
	})
	p.device(p.inside, "port0")
	devs := map[string]specs.LinuxNetDevice{"eth0": {Name: "net0"}, "eth1": {}, "eth2": {Name: "port%d"}, "eth3": {Name: "port%d"}}
	if err := checkNetDevices(devs); err != nil {
		t.Fatal(err)
	}
	if err := p.move(devs); err != nil {
		t.Fatal(err)
	}
	p.expect(p.host, "host", "stays []")
	p.expect(p.inside, "container", "eth0 []", "port0 []", "eth1 up []", "port1 up []", "port2 up []",
		"net0 up [10.7.0.1/24 brd 10.7.0.200, 10.7.0.2/24 brd 10.7.0.255, 10.8.0.1/32-10.8.0.9/32, 10.9.0.1/24 brd 10.9.0.255 noprefixroute, 2001:db8:7::1/64]")
	if err := moveNetDevices(nil, nil); err != nil {
		t.Errorf("no devices: %v", err)
	}
}

// TestMoveNetDevicesRefused: what can be seen before is an error that leaves
// every device as it is.
func TestMoveNetDevicesRefused(t *testing.T) {
	p := newNetPair(t)
	p.device(p.host, "eth0", address(t, "10.7.0.1/24"))
	p.device(p.host, "eth1")
	p.device(p.inside, "taken")
	p.in(p.host, func() error {
		l, err := netlink.LinkByName("eth1")
		if err != nil {
			return err
		}
		return netlink.LinkAddAltName(l, "other-name")
	})
	for name, c := range map[string]struct {
		to   string
		kind error
	}{
		"none":       {"", errdefs.ErrFailedPrecondition},
		"eth1":       {"taken", errdefs.ErrInvalidArgument},
		"other-name": {"", errdefs.ErrInvalidArgument},
	} {
		err := p.move(map[string]specs.LinuxNetDevice{"eth0": {}, name: {Name: c.to}})
		if !errors.Is(err, c.kind) || !strings.HasPrefix(err.Error(), "linux.netDevices["+name+"]: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	same := kernel.In(kernel.NetNS, p.host, func() error {
		return moveNetDevices(map[string]specs.LinuxNetDevice{"eth0": {}}, p.host)
	})
	refused(t, same, "linux.netDevices")
	p.expect(p.host, "host", "eth0 [10.7.0.1/24 brd 10.7.0.255]", "eth1 []")
	p.expect(p.inside, "container", "taken []")
}

// TestMoveNetDevicesBack: a failure half way returns what has been moved.
func TestMoveNetDevicesBack(t *testing.T) {
	p := newNetPair(t)
	p.device(p.host, "eth0", address(t, "10.7.0.1/24"), address(t, "169.254.7.7/16", func(a *netlink.Addr) { a.Scope = unix.RT_SCOPE_LINK }),
		address(t, "2001:db8:7::1/64", func(a *netlink.Addr) { a.Flags = unix.IFA_F_NODAD }))
	p.device(p.host, "eth1", address(t, "10.8.0.1/24"))
	p.in(p.host, func() error {
		if err := setUp("eth0"); err != nil {
			return err
		}
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0", MTU: 1789, HardwareAddr: mac}}
		if err := netlink.LinkAdd(br); err != nil {
			return fmt.Errorf("new bridge: %w", err)
		}
		l, err := netlink.LinkByName("eth1")
		if err != nil {
			return err
		}
		return netlink.LinkSetMaster(l, br)
	})
	before := p.shown(p.host)
	for name, c := range map[string]struct {
		devs map[string]specs.LinuxNetDevice
		want error
	}{
		// Which devices may not move is only seen when it is tried.
		"lo": {map[string]specs.LinuxNetDevice{"eth0": {Name: "a"}, "eth1": {Name: "z%d"}, "lo": {Name: "b"}}, errdefs.ErrFailedPrecondition},
		// checkNetDevices would refuse this: here the second rename fails.
		"eth1": {map[string]specs.LinuxNetDevice{"eth0": {Name: "same"}, "eth1": {Name: "same"}}, unix.EEXIST},
	} {
		err := p.move(c.devs)
		if !errors.Is(err, c.want) || !strings.HasPrefix(err.Error(), "linux.netDevices["+name+"]: ") || strings.Contains(err.Error(), "move back") {
			t.Errorf("%s: %v", name, err)
		}
		p.expect(p.host, "host", before...)
		p.expect(p.inside, "container")
	}
	// Addresses fail on a device that is renamed already.
	p.in(p.inside, func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
	})
	err := p.move(map[string]specs.LinuxNetDevice{"eth0": {Name: "a"}})
	if !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "linux.netDevices[eth0]: address 2001:db8:7::1/64: ") || strings.Contains(err.Error(), "move back") {
		t.Errorf("IPv6 disabled: %v", err)
	}
	p.expect(p.host, "host", before...)
	p.expect(p.inside, "container")
}
