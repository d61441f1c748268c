package builtin

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/test/pace"
)

// world is a throwaway node (a network namespace standing for the host's) and a
// neighbour outside, joined by a link: node 192.0.2.1/24 2001:db8::1/64,
// outside 192.0.2.2/24 2001:db8::2/64.
type world struct {
	t             testing.TB
	host, outside *os.File
}

func newWorld(t testing.TB) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	mk := func() *os.File {
		f, err := kernel.NewNamespaces([]kernel.Namespace{kernel.NetNS}, func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return netlink.LinkSetUp(lo)
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f[0].Close() })
		return f[0]
	}
	w := &world{t: t, host: mk(), outside: mk()}
	w.in(w.host, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "uplink"
		peer := netlink.NsFd(int(w.outside.Fd()))
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "uplink", PeerNamespace: peer}); err != nil {
			return err
		}
		return addresses("192.0.2.1/24", "2001:db8::1/64")
	})
	w.in(w.outside, func() error { return addresses("192.0.2.2/24", "2001:db8::2/64") })
	w.in(w.host, func() error {
		l, err := netlink.LinkByName("uplink")
		if err != nil {
			return err
		}
		for _, gw := range []string{"192.0.2.2", "2001:db8::2"} {
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP(gw)}); err != nil {
				return err
			}
		}
		return nil
	})
	return w
}

func addresses(cidrs ...string) error {
	l, err := netlink.LinkByName("uplink")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return err
	}
	for _, c := range cidrs {
		a, err := netlink.ParseAddr(c)
		if err != nil {
			return err
		}
		a.Flags = 0x02 // IFA_F_NODAD
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) in(ns *os.File, f func() error) {
	w.t.Helper()
	if err := kernel.In(kernel.NetNS, ns, f); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) open(cfg Config) *Network {
	w.t.Helper()
	cfg.NetNS = w.host
	if cfg.StateDir == "" {
		cfg.StateDir = w.t.TempDir()
	}
	n, err := Open(context.Background(), cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := n.Close(); err != nil {
			w.t.Errorf("close: %v", err)
		}
	})
	if err := n.Ready(); err != nil {
		w.t.Fatal(err)
	}
	return n
}

// pod is an attached pod.
type pod struct {
	cni.Pod
	cni.Attachment
	ns *os.File
	n  *Network
}

func (w *world) pod(n *Network, ports ...cni.PortMapping) *pod {
	w.t.Helper()
	p := cni.Pod{ID: id.NewPod(), Name: "p", Namespace: "test", PortMappings: ports}
	a, ns, err := n.Attach(context.Background(), p)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { ns.Close() })
	return &pod{p, a, ns, n}
}

func (p *pod) detach(t testing.TB) {
	t.Helper()
	if err := p.n.Detach(context.Background(), p.Pod, p.Attachment, p.ns); err != nil {
		t.Fatal(err)
	}
	p.ns.Close()
}

// serve answers each connection or datagram to addr in ns with "<tag> <client address>".
func (w *world) serve(ns *os.File, network, addr, tag string) {
	w.t.Helper()
	w.in(ns, func() error {
		if strings.HasPrefix(network, "udp") {
			c, err := net.ListenPacket(network, addr)
			if err != nil {
				return err
			}
			w.t.Cleanup(func() { c.Close() })
			go func() {
				buf := make([]byte, 100)
				for {
					_, from, err := c.ReadFrom(buf)
					if err != nil {
						return
					}
					_, _ = c.WriteTo(fmt.Appendf(nil, "%s %s\n", tag, host(from)), from)
				}
			}()
			return nil
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			return err
		}
		w.t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "%s %s\n", tag, host(c.RemoteAddr()))
				c.Close()
			}
		}()
		return nil
	})
}

func host(a net.Addr) string {
	h, _, _ := net.SplitHostPort(a.String())
	return h
}

// ask connects from ns and returns the answer's tag and the client address seen.
func (w *world) ask(ns *os.File, network, addr string) (tag, seen string, err error) {
	err = kernel.In(kernel.NetNS, ns, func() error {
		c, err := net.DialTimeout(network, addr, pace.Wait(time.Second))
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(pace.Wait(time.Second)))
		if strings.HasPrefix(network, "udp") {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		tag, seen, _ = strings.Cut(strings.TrimSpace(line), " ")
		return nil
	})
	return tag, seen, err
}

func (w *world) want(ns *os.File, network, addr, tag string) string {
	w.t.Helper()
	got, seen, err := w.ask(ns, network, addr)
	if err != nil || got != tag {
		w.t.Errorf("ask %s %s: got %q, %v; want %q", network, addr, got, err, tag)
	}
	return seen
}

func (w *world) wantNot(ns *os.File, network, addr string) {
	w.t.Helper()
	if got, _, err := w.ask(ns, network, addr); err == nil {
		w.t.Errorf("ask %s %s: answered %q; want no answer", network, addr, got)
	}
}

func join(a netip.Addr, port int) string { return netip.AddrPortFrom(a, uint16(port)).String() }

func TestPodsHostAndOutside(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	a, b := w.pod(n), w.pod(n)
	if len(a.IPs) != 2 || !a.IPs[0].Is4() || !a.IPs[1].Is6() {
		t.Fatalf("addresses %v: want one of each family, IPv4 first", a.IPs)
	}
	w.serve(a.ns, "tcp", ":80", "a")
	w.serve(w.host, "tcp", ":81", "host")
	w.serve(w.outside, "tcp", ":82", "out")
	for i, ip := range a.IPs {
		if seen := w.want(b.ns, "tcp", join(ip, 80), "a"); seen != b.IPs[i].String() {
			t.Errorf("pod to pod: source %s, want %s", seen, b.IPs[i])
		}
		w.want(a.ns, "tcp", join(ip, 80), "a")
		if seen := w.want(w.host, "tcp", join(ip, 80), "a"); seen != n.subnets[i].gateway.String() {
			t.Errorf("host to pod: source %s, want %s", seen, n.subnets[i].gateway)
		}
		if seen := w.want(a.ns, "tcp", join(n.subnets[i].gateway, 81), "host"); seen != ip.String() {
			t.Errorf("pod to host: source %s, want %s", seen, ip)
		}
	}
	for addr, want := range map[string]string{"192.0.2.2:82": "192.0.2.1", "[2001:db8::2]:82": "2001:db8::1"} {
		if seen := w.want(a.ns, "tcp", addr, "out"); seen != want {
			t.Errorf("pod to outside %s: source %s, want the node's %s", addr, seen, want)
		}
	}
}

func TestHostPorts(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	p := w.pod(n,
		cni.PortMapping{Protocol: cni.TCP, ContainerPort: 80, HostPort: 8080},
		cni.PortMapping{Protocol: cni.UDP, ContainerPort: 53, HostPort: 8053},
		cni.PortMapping{Protocol: cni.TCP, ContainerPort: 80, HostPort: 8081, HostIP: netip.MustParseAddr("127.0.0.1")},
		cni.PortMapping{Protocol: cni.TCP, ContainerPort: 80, HostPort: 8082, HostIP: netip.MustParseAddr("192.0.2.1")},
		cni.PortMapping{Protocol: cni.TCP, ContainerPort: 80, HostPort: 8083, HostIP: netip.MustParseAddr("0.0.0.0")},
		cni.PortMapping{Protocol: cni.TCP, ContainerPort: 80},
	)
	other := w.pod(n)
	w.serve(p.ns, "tcp", ":80", "p")
	w.serve(p.ns, "udp4", p.IPs[0].String()+":53", "p")
	w.serve(p.ns, "udp6", "["+p.IPs[1].String()+"]:53", "p")
	for _, from := range []*os.File{w.host, w.outside, other.ns, p.ns} {
		for _, addr := range []string{"192.0.2.1", "[2001:db8::1]"} {
			w.want(from, "tcp", addr+":8080", "p")
			w.want(from, "udp", addr+":8053", "p")
		}
		w.want(from, "tcp", "192.0.2.1:8082", "p")
		w.want(from, "tcp", "192.0.2.1:8083", "p")
		w.wantNot(from, "tcp", "[2001:db8::1]:8083")
		w.wantNot(from, "tcp", "192.0.2.1:8081")
	}
	w.want(w.host, "tcp", "127.0.0.1:8080", "p")
	w.want(w.host, "udp", "127.0.0.1:8053", "p")
	w.want(w.host, "tcp", "127.0.0.1:8081", "p")
	w.wantNot(w.host, "tcp", "127.0.0.1:8082")
	w.want(w.host, "tcp", "[::1]:8080", "p")
	w.want(w.host, "udp", "[::1]:8053", "p")
	w.wantNot(w.host, "tcp", "[::1]:8083")
	w.serve(w.host, "tcp", "[::1]:9000", "host")
	w.want(w.host, "tcp", "[::1]:9000", "host") // the node's own ::1 is not disturbed
	if seen := w.want(w.outside, "tcp", "192.0.2.1:8080", "p"); seen != "192.0.2.2" {
		t.Errorf("outside to host port: source %s, want the client's own", seen)
	}
	if seen := w.want(other.ns, "tcp", "192.0.2.1:8080", "p"); seen != other.IPs[0].String() {
		t.Errorf("pod to host port: source %s, want %s", seen, other.IPs[0])
	}
	p.detach(t)
	w.wantNot(w.host, "tcp", "127.0.0.1:8080")
	w.wantNot(w.outside, "tcp", "192.0.2.1:8080")
}

func TestHostPortConflict(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	first := w.pod(n, cni.PortMapping{Protocol: cni.TCP, ContainerPort: 80, HostPort: 8080})
	second := cni.Pod{ID: id.NewPod(), PortMappings: []cni.PortMapping{{Protocol: cni.TCP, ContainerPort: 81, HostPort: 8080, HostIP: netip.MustParseAddr("127.0.0.1")}}}
	_, _, err := n.Attach(context.Background(), second)
	if !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), id.Short(first.ID)) {
		t.Fatalf("got %v, want an error that names pod %s", err, id.Short(first.ID))
	}
	first.detach(t)
	a, ns, err := n.Attach(context.Background(), second)
	if err != nil {
		t.Fatalf("after the first pod left: %v", err)
	}
	ns.Close()
	if err := n.Detach(context.Background(), second, a, nil); err != nil {
		t.Fatal(err)
	}
}

// A client that keeps its source port must reach the new owner of a UDP port.
func TestUDPFlowsFollowThePort(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	port := cni.PortMapping{Protocol: cni.UDP, ContainerPort: 53, HostPort: 8053}
	var c net.Conn
	w.in(w.outside, func() (err error) {
		c, err = net.Dial("udp", "192.0.2.1:8053")
		return err
	})
	defer c.Close()
	for _, tag := range []string{"one", "two"} {
		p := w.pod(n, port)
		w.serve(p.ns, "udp4", p.IPs[0].String()+":53", tag)
		buf, k := make([]byte, 100), 0
		for deadline := time.Now().Add(pace.Wait(2 * time.Second)); !strings.HasPrefix(string(buf[:k]), tag+" "); {
			if time.Now().After(deadline) {
				t.Fatalf("the client's last answer is %q; want %q", buf[:k], tag)
			}
			if _, err := c.Write([]byte("?")); err != nil {
				continue // the last owner's ICMP errors
			}
			_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			k, _ = c.Read(buf)
		}
		if err := n.Detach(context.Background(), p.Pod, p.Attachment, p.ns); err != nil {
			t.Fatal(err)
		}
	}
}

// links, mappings and tables left in the node.
func (w *world) leftovers() (links []string, tables int) {
	w.in(w.host, func() error {
		l, err := podLinks()
		for name := range l {
			links = append(links, name)
		}
		return err
	})
	c, err := nftables.New(nftables.WithNetNSFd(int(w.host.Fd())))
	if err != nil {
		w.t.Fatal(err)
	}
	ts, err := c.ListTables()
	if err != nil {
		w.t.Fatal(err)
	}
	return links, len(ts)
}

// waitTurn waits until the kernel has ended all namespaces closed so far. It
// ends them in turn, so those of the next test would wait for them.
func (w *world) waitTurn() {
	w.t.Helper()
	ns, err := kernel.NewNamespaces([]kernel.Namespace{kernel.NetNS}, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "last"
	w.in(w.host, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "last", PeerNamespace: netlink.NsFd(int(ns[0].Fd()))})
	})
	ns[0].Close()
	for deadline, there := time.Now().Add(pace.Wait(20*time.Second)), true; there; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatal("namespaces closed are still not ended")
		}
		w.in(w.host, func() error {
			_, err := netlink.LinkByName("last")
			there = err == nil
			return nil
		})
	}
}

func (w *world) waitGone() {
	w.t.Helper()
	for deadline := time.Now().Add(pace.Wait(10 * time.Second)); ; time.Sleep(20 * time.Millisecond) {
		links, tables := w.leftovers()
		if len(links) == 0 && tables == 0 {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("left behind: links %v, %d nft tables", links, tables)
		}
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	p := w.pod(n, cni.PortMapping{ContainerPort: 80, HostPort: 8080})
	p.detach(t)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	w.waitGone()
	w.in(w.host, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(lo, netlink.FAMILY_ALL)
		if err != nil || len(addrs) != 2 {
			t.Errorf("addresses of lo: %v, %v; want 127.0.0.1 and ::1", addrs, err)
		}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Type: 7}, netlink.RT_FILTER_TYPE)
		for _, r := range routes {
			if r.Priority == 1<<20 {
				t.Errorf("route %v is left", r)
			}
		}
		return err
	})
}

func TestRestart(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	small := []netip.Prefix{netip.MustParsePrefix("10.9.8.0/28")} // 13 pods
	n := w.open(Config{StateDir: dir, Subnets: small, PoolSize: 2})
	a := w.pod(n, cni.PortMapping{ContainerPort: 80, HostPort: 8080})
	b := w.pod(n, cni.PortMapping{ContainerPort: 80, HostPort: 8081})
	w.serve(a.ns, "tcp", ":80", "a")
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	w.want(w.host, "tcp", "127.0.0.1:8080", "a") // pods do not notice
	n = w.open(Config{StateDir: dir, Subnets: small, PoolSize: 2})
	w.want(w.host, "tcp", "127.0.0.1:8080", "a")
	if _, _, err := n.Attach(context.Background(), a.Pod); !errdefs.IsAlreadyExists(err) {
		t.Errorf("attach of an attached pod: got %v, want already exists", err)
	}
	if _, _, err := n.Attach(context.Background(), cni.Pod{ID: id.NewPod(), PortMappings: b.PortMappings}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("conflict after a restart: got %v, want already exists", err)
	}
	seen := []netip.Addr{a.IPs[0], b.IPs[0]}
	for range 3 {
		p := w.pod(n)
		if slices.Contains(seen, p.IPs[0]) {
			t.Fatalf("address %s was handed out twice", p.IPs[0])
		}
		seen = append(seen, p.IPs[0])
	}
	// The records are lost, the pods are not: their links guard the addresses.
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "pods")); err != nil {
		t.Fatal(err)
	}
	n = w.open(Config{StateDir: dir, Subnets: small, PoolSize: -1})
	for range 13 - len(seen) {
		p := w.pod(n)
		if slices.Contains(seen, p.IPs[0]) {
			t.Fatalf("address %s of a live link was handed out", p.IPs[0])
		}
		seen = append(seen, p.IPs[0])
	}
	if _, _, err := n.Attach(context.Background(), cni.Pod{ID: id.NewPod()}); err == nil {
		t.Fatal("attached more pods than the subnet has addresses")
	}
}

// TestRecordsOfAnEarlierVersion have no checksum. A pod keeps its port and its
// address across the upgrade, and the node its pod CIDR.
func TestRecordsOfAnEarlierVersion(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	n := w.open(Config{StateDir: dir, PoolSize: -1})
	if err := n.SetPodCIDR("10.7.0.0/24"); err != nil {
		t.Fatal(err)
	}
	p := w.pod(n, cni.PortMapping{ContainerPort: 80, HostPort: 8080})
	w.serve(p.ns, "tcp", ":80", "p")
	old, err := json.Marshal(n.pods[p.ID])
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{n.store.path(p.ID): string(old), n.store.podCIDRPath(): "10.7.0.0/24"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n = w.open(Config{StateDir: dir, PoolSize: -1})
	if err := n.Restore(context.Background(), p.Pod, cni.Attachment{Network: Name, IPs: p.IPs}); err != nil {
		t.Fatal(err)
	}
	w.want(w.outside, "tcp", "192.0.2.1:8080", "p")
	if _, _, err := n.Attach(context.Background(), cni.Pod{ID: id.NewPod(), PortMappings: p.PortMappings}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second pod with the port: got %v, want already exists", err)
	}
	if q := w.pod(n); !netip.MustParsePrefix("10.7.0.0/24").Contains(q.IPs[0]) || q.IPs[0] == p.IPs[0] {
		t.Errorf("address %v beside %v of the pod that runs", q.IPs, p.IPs)
	}
	if aside, _ := filepath.Glob(filepath.Join(dir, "*", "*.bad")); len(aside) > 0 {
		t.Errorf("set aside: %q", aside)
	}
}

// TestRestoreWhileThePoolTriesItsAddress: the pod whose record was lost keeps it when
// the pool, which was there first, gives it back.
func TestRestoreWhileThePoolTriesItsAddress(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	small := []netip.Prefix{netip.MustParsePrefix("10.9.8.0/29"), netip.MustParsePrefix("fd00:9::/64")}
	n := w.open(Config{StateDir: dir, Subnets: small, PoolSize: -1})
	p := w.pod(n)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "pods")); err != nil {
		t.Fatal(err)
	}
	n = w.open(Config{StateDir: dir, Subnets: small, PoolSize: -1})
	tried, err := n.address()
	if err != nil || !slices.Equal(tried.ips, p.IPs) {
		t.Fatalf("tried %+v, %v", tried, err)
	}
	if err := n.Restore(context.Background(), p.Pod, p.Attachment); err != nil {
		t.Fatal(err)
	}
	n.free(tried)
	for range 4 { // all that are left
		got, err := n.address()
		if err != nil || slices.ContainsFunc(got.ips, func(ip netip.Addr) bool { return slices.Contains(p.IPs, ip) }) {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	if got, err := n.address(); err == nil {
		t.Errorf("%v of %v was given out again", got.ips, p.IPs)
	}
}

func TestTableComesBack(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	p := w.pod(n, cni.PortMapping{ContainerPort: 80, HostPort: 8080})
	w.serve(p.ns, "tcp", ":80", "p")
	w.serve(p.ns, "tcp", ":81", "q")
	flush := func() {
		c, err := nftables.New(nftables.WithNetNSFd(int(w.host.Fd())))
		if err != nil {
			t.Fatal(err)
		}
		c.FlushRuleset()
		if err := c.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if !n.fw.intact() {
		t.Fatal("a fresh table is not intact")
	}
	flush()
	if n.fw.intact() {
		t.Fatal("no table, yet it is called intact")
	}
	w.pod(n, cni.PortMapping{ContainerPort: 81, HostPort: 8081}) // restores it on the way
	w.want(w.outside, "tcp", "192.0.2.1:8080", "p")
	flush()
	p.detach(t) // withdrawing from a table that is gone succeeds
}

func TestSetPodCIDR(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	old := w.pod(n)
	w.serve(old.ns, "tcp", ":80", "old")
	for _, bad := range []string{"10.0.0.0", "10.0.0.1/24", "10.1.0.0/24,10.2.0.0/24", "127.0.0.0/8", "10.0.0.0/31", "224.0.0.0/4"} {
		if err := n.SetPodCIDR(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("pod CIDR %q: got %v, want invalid argument", bad, err)
		}
	}
	for _, good := range []string{"", "10.7.0.0/24", "10.7.0.0/24", "fd00:7::/64, 10.7.1.0/24"} {
		if err := n.SetPodCIDR(good); err != nil {
			t.Fatalf("pod CIDR %q: %v", good, err)
		}
	}
	p := w.pod(n)
	if len(p.IPs) != 2 || !netip.MustParsePrefix("fd00:7::/64").Contains(p.IPs[0]) || !netip.MustParsePrefix("10.7.1.0/24").Contains(p.IPs[1]) {
		t.Fatalf("addresses %v: want the new subnets', in their order", p.IPs)
	}
	w.want(p.ns, "tcp", join(old.IPs[0], 80), "old")
}

func TestCVE_2024_32473_NoIPv6UnlessAssigned(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{Subnets: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}})
	p := w.pod(n)
	w.in(p.ns, func() error {
		addrs, err := netlink.AddrList(nil, netlink.FAMILY_V6)
		if len(addrs) != 0 {
			t.Errorf("IPv6 addresses %v in an IPv4-only pod", addrs)
		}
		return err
	})
}

func TestCVE_2020_10749_RouterAdvertisementsIgnored(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	p := w.pod(n)
	n.mu.Lock()
	link := n.pods[p.ID].Link
	n.mu.Unlock()
	for ns, conf := range map[*os.File]string{w.host: link, p.ns: "eth0"} {
		w.in(ns, func() error {
			b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + conf + "/accept_ra")
			if string(b) != "0\n" {
				t.Errorf("accept_ra of %s is %q", conf, b)
			}
			return err
		})
	}
	w.in(p.ns, func() error {
		addrs, err := netlink.AddrList(nil, netlink.FAMILY_V6)
		for _, a := range addrs {
			if a.Flags&0x40 != 0 {
				t.Errorf("address %v is tentative", a)
			}
		}
		return err
	})
}

// A pod that sends to 127.0.0.0/8 over its link must not reach the node's
// loopback, though the link has route_localnet set.
func TestCVE_2020_8558_LoopbackStaysPrivate(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	p := w.pod(n)
	w.serve(w.host, "tcp4", "127.0.0.1:9000", "secret")
	w.in(p.ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetDown(lo); err != nil {
			return err
		}
		for _, s := range []string{"all", "eth0"} {
			if err := sysctl("net/ipv4/conf/"+s+"/route_localnet", "1"); err != nil {
				return err
			}
		}
		out, err := exec.Command("ip", "route", "add", "127.0.0.1/32", "via", "169.254.1.1", "dev", "eth0", "onlink").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w", out, err)
		}
		return nil
	})
	w.wantNot(p.ns, "tcp", "127.0.0.1:9000")
}

// Traffic that only passes through the node to another address is not captured.
func TestCVE_2025_67499_OnlyLocalDestinations(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	p := w.pod(n, cni.PortMapping{ContainerPort: 80, HostPort: 8080})
	other := w.pod(n)
	w.serve(p.ns, "tcp", ":80", "p")
	w.serve(w.outside, "tcp", ":8080", "out")
	w.want(other.ns, "tcp", "192.0.2.2:8080", "out")
	w.want(w.host, "tcp", "192.0.2.2:8080", "out")
}

func TestPodCannotSpoof(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	a, b := w.pod(n), w.pod(n)
	w.serve(b.ns, "udp4", ":53", "b")
	w.in(a.ns, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addr, _ := netlink.ParseAddr("10.164.77.77/32")
		return netlink.AddrAdd(eth0, addr)
	})
	got := make(chan string, 1)
	w.in(b.ns, func() error {
		c, err := net.ListenPacket("udp4", ":54")
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(300 * time.Millisecond))
			_, from, err := c.ReadFrom(make([]byte, 10))
			if err != nil {
				got <- ""
				return
			}
			got <- host(from)
		}()
		return nil
	})
	w.in(a.ns, func() error {
		d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP("10.164.77.77")}}
		c, err := d.Dial("udp4", join(b.IPs[0], 54))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("x"))
		return err
	})
	if from := <-got; from != "" {
		t.Errorf("a packet with the false source %s arrived", from)
	}
}

func TestMoreThan1023Pods(t *testing.T) {
	if testing.Short() {
		t.Skip("short: makes 1,100 network namespaces")
	}
	w := newWorld(t)
	t.Cleanup(w.waitTurn)
	n := w.open(Config{PoolSize: -1})
	start := time.Now()
	var first, last *pod
	seen := map[netip.Addr]bool{}
	for i := range 1100 {
		last = w.pod(n)
		if first == nil {
			first = last
		}
		for _, ip := range last.IPs {
			if seen[ip] {
				t.Fatalf("address %s of pod %d is in use", ip, i)
			}
			seen[ip] = true
		}
	}
	t.Logf("1,100 pods attached in %v", time.Since(start))
	w.serve(first.ns, "tcp", ":80", "first")
	for i, ip := range first.IPs {
		if got := w.want(last.ns, "tcp", join(ip, 80), "first"); got != last.IPs[i].String() {
			t.Errorf("source %s, want %s", got, last.IPs[i])
		}
	}
}

func TestChurnLeavesNothing(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{Subnets: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/25"), netip.MustParsePrefix("fd00:9::/64")}})
	errs := make(chan error, 4)
	for worker := range 4 {
		go func() {
			var err error
			for i := range 60 {
				p := cni.Pod{ID: id.NewPod(), PortMappings: []cni.PortMapping{{ContainerPort: 80, HostPort: uint16(9000 + worker)}, {Protocol: cni.UDP, ContainerPort: 53, HostPort: uint16(9000 + worker)}}}
				a, ns, e := n.Attach(context.Background(), p)
				if e != nil {
					err = fmt.Errorf("pod %d: %w", i, e)
					break
				}
				if e := n.Detach(context.Background(), p, a, ns); e != nil {
					err = fmt.Errorf("pod %d: %w", i, e)
				}
				ns.Close()
			}
			errs <- err
		}()
	}
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	c, err := nftables.New(nftables.WithNetNSFd(int(w.host.Fd())))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*nftables.Set{n.fw.v4.ports, n.fw.v4.self, n.fw.v6.ports, n.fw.v6.self} {
		if e, err := c.GetSetElements(s); err != nil || len(e) != 0 {
			t.Errorf("set %s: %d elements, %v; want none", s.Name, len(e), err)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if len(n.pods)+len(n.links)+len(n.ports)+len(n.subnets[0].used)+len(n.subnets[1].used) != 0 {
		t.Errorf("memory: %d pods, %d links, %d ports, addresses %v %v; want none", len(n.pods), len(n.links), len(n.ports), n.subnets[0].used, n.subnets[1].used)
	}
	files, err := os.ReadDir(n.store.pods())
	if err != nil || len(files) != 0 {
		t.Errorf("records: %v, %v; want none", files, err)
	}
	w.waitGone()
}
