package builtin

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/leftover"
	"github.com/berth-runtime/berth/test/pace"
)

func inUse(pods ...*pod) cni.InUse {
	return cni.InUse{
		Pod: func(p id.Pod) bool { return slices.ContainsFunc(pods, func(q *pod) bool { return q.ID == p }) },
		IPs: func() (ips []netip.Addr) {
			for _, p := range pods {
				ips = append(ips, p.IPs...)
			}
			return ips
		},
	}
}

func kinds(found []leftover.Finding) (out []string) {
	for _, f := range found {
		out = append(out, string(f.Kind)+" "+f.Name)
	}
	slices.Sort(out)
	return out
}

// plantLink makes a veth as a crash leaves it, with the other end in a namespace of
// its own, which the caller closes.
func (w *world) plantLink(name string, index int) *os.File {
	w.t.Helper()
	other := emptyNamespace(w.t.(*testing.T))
	w.in(w.host, func() error {
		a := netlink.NewLinkAttrs()
		a.Name, a.Index = name, index
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: a, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(other.Fd()))})
	})
	return other
}

func (w *world) hasLink(name string) (ok bool) {
	w.in(w.host, func() error {
		_, err := netlink.LinkByName(name)
		ok = err == nil
		return nil
	})
	return ok
}

// TestLeftovers plants what a crash can leave beside live pods and another
// program's links: each is found by the running network and by a look while none
// runs, looking changes nothing, and removing takes away that alone.
func TestLeftovers(t *testing.T) {
	for _, mode := range []string{"running", "offline"} {
		t.Run(mode, func(t *testing.T) {
			w := newWorld(t)
			dir := t.TempDir()
			n := w.open(Config{PoolSize: -1, StateDir: dir})
			live := w.pod(n, cni.PortMapping{ContainerPort: 80, HostPort: 8081})
			dead := w.pod(n, cni.PortMapping{ContainerPort: 80, HostPort: 8080})
			ours, index := linkID(linkPrefix, netip.MustParseAddr("10.164.200.7"))
			w.plantLink(ours, index)
			theirs := []string{"bertha0a400c8", "berth0a400c9", "berth0aa4ffff", "berthlink"}
			for _, name := range theirs {
				w.plantLink(name, 0)
			}
			if err := n.fw.transact(func(c *nftables.Conn) error {
				return c.SetAddElements(n.fw.v4.ports, []nftables.SetElement{{Key: append([]byte{6, 0, 0, 0}, padPort(9999)...), Val: append([]byte{10, 164, 200, 7}, padPort(80)...)}})
			}); err != nil {
				t.Fatal(err)
			}
			use := inUse(live)
			look := func() []leftover.Finding {
				found, err := n.Leftovers(context.Background(), use)
				if mode == "offline" {
					found, err = Look(dir, w.host, use)
				}
				if err != nil {
					t.Fatal(err)
				}
				return found
			}
			if mode == "offline" {
				if err := n.Close(); err != nil {
					t.Fatal(err)
				}
			}
			deadLink, _ := linkID(linkPrefix, dead.IPs[0])
			want := []string{"address " + dead.IPs[0].String() + "," + dead.IPs[1].String(), "link " + ours, "port TCP port 9999 on all addresses, ports4"}
			found := look()
			if mode == "offline" { // nothing owns the link of a record that is a leftover itself
				want = append(want, "link "+deadLink, "port TCP port 8080 on all addresses, ports4", "port TCP port 8080 on all addresses, ports6",
					"port masquerade of "+dead.IPs[0].String(), "port masquerade of "+dead.IPs[1].String())
				slices.Sort(want)
			}
			for range 2 {
				if got := kinds(look()); !slices.Equal(got, want) {
					t.Errorf("found\n%q, want\n%q", got, want)
				}
			}
			if !w.hasLink(ours) {
				t.Fatal("looking removed a link")
			}
			leftover.Sort(found)
			for _, f := range found {
				if err := f.Remove(context.Background()); err != nil {
					t.Errorf("%s %s: %v", f.Kind, f.Name, err)
				}
			}
			// The dead pod's own link is nobody's now: it goes at the next look.
			for deadline := time.Now().Add(pace.Wait(5 * time.Second)); ; time.Sleep(10 * time.Millisecond) {
				left := look()
				for _, f := range left {
					if err := f.Remove(context.Background()); err != nil {
						t.Error(err)
					}
				}
				if len(left) == 0 {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("left: %q", kinds(left))
				}
			}
			if w.hasLink(ours) || w.hasLink(deadLink) {
				t.Error("a link of nobody is still there")
			}
			for _, name := range theirs {
				if !w.hasLink(name) {
					t.Errorf("link %s of another program is gone", name)
				}
			}
			if mode == "offline" {
				n = w.open(Config{PoolSize: -1, StateDir: dir})
			}
			w.serve(live.ns, "tcp", ":80", "live")
			w.want(w.host, "tcp", join(live.IPs[0], 80), "live")
			w.want(w.outside, "tcp", "192.0.2.1:8081", "live")
			w.pod(n, dead.PortMappings...) // the port is free
			for range 2 {
				if err := n.Detach(context.Background(), dead.Pod, cni.Attachment{}, nil); err != nil {
					t.Errorf("detach of a pod that was cleared away: %v", err)
				}
			}
		})
	}
}

// TestALivePodWhoseRecordIsLost: its link stays, since the engine knows its address.
func TestALivePodWhoseRecordIsLost(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	n := w.open(Config{PoolSize: -1, StateDir: dir})
	p := w.pod(n)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(n.store.path(p.ID)); err != nil {
		t.Fatal(err)
	}
	n = w.open(Config{PoolSize: -1, StateDir: dir})
	if found, err := n.Leftovers(context.Background(), inUse(p)); err != nil || len(found) > 0 {
		t.Errorf("found %q, %v", kinds(found), err)
	}
	if found, err := n.Leftovers(context.Background(), inUse()); err != nil || len(found) != 1 || found[0].Kind != leftover.Link {
		t.Errorf("without the pod: found %q, %v", kinds(found), err)
	}
}

// TestLookBesideAnotherDaemon: what one with another folder has is not called left over.
func TestLookBesideAnotherDaemon(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	n := w.open(Config{PoolSize: -1, StateDir: dir})
	w.pod(n)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	found, err := Look(dir, w.host, inUse())
	if err != nil || len(found) == 0 {
		t.Fatalf("found %q, %v", kinds(found), err)
	}
	other := w.open(Config{PoolSize: -1})
	p := w.pod(other, cni.PortMapping{ContainerPort: 80, HostPort: 8080})
	w.serve(p.ns, "tcp", ":80", "p")
	if found, err := Look(dir, w.host, inUse()); err == nil || len(found) > 0 {
		t.Errorf("found %q, %v", kinds(found), err)
	}
	for _, f := range found { // of before it was started
		if err := f.Remove(context.Background()); err == nil {
			t.Errorf("%s %s: removed", f.Kind, f.Name)
		}
	}
	w.want(w.outside, "tcp", "192.0.2.1:8080", "p")
}

func TestLinkIndexIsTheInverse(t *testing.T) {
	for _, a := range []string{"10.164.0.2", "192.168.255.254", "fd62:6572:7468::abcd:1"} {
		name, want := linkID(linkPrefix, netip.MustParseAddr(a))
		if got, ours := linkIndex(name); !ours || got != want {
			t.Errorf("%s (%s): index %d, %v, want %d", name, a, got, ours, want)
		}
	}
	for _, name := range []string{"berth", "berth0a4", "berth0a4000022", "berthx0a40002", "bertha0a400c8x", "Berth0aa40002", "berth0AA40002", "berth-0aa4000", "eth0"} {
		if _, ours := linkIndex(name); ours {
			t.Errorf("%q counts as ours", name)
		}
	}
}
