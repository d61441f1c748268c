package builtin

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
)

// emptyNamespace makes a network namespace as a pod with a user namespace brings it.
func emptyNamespace(t *testing.T) *os.File {
	t.Helper()
	f, err := kernel.NewNamespaces([]kernel.Namespace{kernel.NetNS}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f[0].Close() })
	return f[0]
}

func sameFile(t *testing.T, a, b *os.File) bool {
	t.Helper()
	x, err1 := a.Stat()
	y, err2 := b.Stat()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return os.SameFile(x, y)
}

// TestPodWithItsOwnNamespace: it is wired as one from the pool, and stays the
// caller's.
func TestPodWithItsOwnNamespace(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{})
	own := emptyNamespace(t)
	p := cni.Pod{ID: id.NewPod(), Name: "p", Namespace: "test", NetNS: own}
	a, ns, err := n.Attach(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if !sameFile(t, own, ns) || own.Fd() == ns.Fd() {
		t.Error("Attach returns another namespace, or the very descriptor")
	}
	other := w.pod(n)
	w.serve(ns, "tcp", ":80", "own")
	for i, ip := range a.IPs {
		if seen := w.want(other.ns, "tcp", join(ip, 80), "own"); seen != other.IPs[i].String() {
			t.Errorf("source %s, want %s", seen, other.IPs[i])
		}
	}
	if err := n.Detach(context.Background(), p, a, ns); err != nil {
		t.Error(err)
	}
}

// TestOwnNamespaceAfterAFailedTry: what the first try left in the namespace is in
// nobody's way, and a link of that name that is another's stays.
func TestOwnNamespaceAfterAFailedTry(t *testing.T) {
	w := newWorld(t)
	n := w.open(Config{PoolSize: -1})
	own := emptyNamespace(t)
	first, err := n.address()
	if err != nil {
		t.Fatal(err)
	}
	cfg := wiring{link: first.link, index: first.index, ips: first.ips, src: sources(first.subnets), mtu: n.cfg.MTU, ipv6: n.ipv6, own: own}
	count := func(ns *os.File) (links int) {
		w.in(ns, func() error {
			all, err := netlink.LinkList()
			links = len(all)
			return err
		})
		return links
	}
	empty, host := count(own), count(w.host)
	// Another route to the pod's address: the link is made before the kernel says so.
	dst := &netlink.Route{Dst: netlink.NewIPNet(first.ips[0].AsSlice()), Table: unix.RT_TABLE_MAIN}
	w.in(w.host, func() error {
		lo, err := netlink.LinkByName("uplink")
		if err != nil {
			return err
		}
		dst.LinkIndex, dst.Scope = lo.Attrs().Index, netlink.SCOPE_LINK
		return netlink.RouteAdd(dst)
	})
	err = n.threads.do(func(th *thread) error {
		_, err := th.pod(cfg)
		return err
	})
	if !errors.Is(err, unix.EEXIST) {
		t.Errorf("wired although its route is taken: %v", err)
	}
	if count(own) != empty || count(w.host) != host {
		t.Errorf("links left: %d in the pod, %d before; %d on the node, %d before", count(own), empty, count(w.host), host)
	}
	n.free(first)
	a, ns, err := n.Attach(context.Background(), cni.Pod{ID: id.NewPod(), Name: "p", Namespace: "test", NetNS: own})
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	w.serve(ns, "tcp", ":80", "own")
	w.want(w.host, "tcp", join(a.IPs[0], 80), "own")
}
