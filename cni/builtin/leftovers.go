package builtin

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/leftover"
)

// Leftovers implements cni.Network: addresses and published ports of pods that are
// gone, and links that belong to nobody: those of pods whose daemon died inside
// Attach, or whose namespace something still holds after Detach. In-use is asked
// after everything was listed, so what is made meanwhile is no finding.
func (n *Network) Leftovers(_ context.Context, use cni.InUse) ([]leftover.Finding, error) {
	if err := n.enter(); err != nil {
		return nil, err
	}
	defer n.calls.Done()
	var names []string
	err := n.threads.do(func(*thread) (err error) {
		names, err = linkNames()
		return err
	})
	if err != nil {
		return nil, err
	}
	var elements []element
	if n.Ready() == nil {
		if elements, err = n.fw.published(); err != nil && !errors.Is(err, unix.ENOENT) { // check puts a lost table back
			return nil, err
		}
	}
	var out []leftover.Finding
	n.mu.Lock()
	var records []*record
	for _, r := range n.pods {
		if !r.attaching {
			records = append(records, r)
		}
	}
	names = slices.DeleteFunc(names, func(name string) bool { _, owned := n.links[name]; return owned })
	n.mu.Unlock()
	for _, r := range records {
		if !use.Pod(r.Pod) {
			out = append(out, r.finding(func() error {
				if use.Pod(r.Pod) {
					return nil
				}
				return n.detach(r.Pod)
			}))
		}
	}
	names = notOf(names, use.IPs())
	if len(names) > 0 {
		err = n.threads.do(func(*thread) error {
			links, err := podLinks()
			for _, name := range names {
				if l, ok := links[name]; ok {
					out = append(out, linkFinding(l, func() error { return n.deleteUnowned(name) }))
				}
			}
			return err
		})
	}
	wanted := n.fw.keys(n.mappings())
	for _, e := range elements {
		if !wanted[e.key()] {
			out = append(out, e.finding(func() error { return n.fw.withdraw(e, n.mappings) }))
		}
	}
	return out, err
}

// mappings are the published ports of all pods, of those under way too.
func (n *Network) mappings() (ms []mapping) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, r := range n.pods {
		ms = append(ms, r.Ports...)
	}
	return ms
}

// deleteUnowned deletes a link unless it has an owner. No pod can get its name, and
// with it the link, meanwhile.
func (n *Network) deleteUnowned(name string) error {
	if !n.reserve(name) {
		return nil
	}
	defer func() {
		n.mu.Lock()
		delete(n.links, name)
		n.mu.Unlock()
	}()
	return n.threads.do(func(*thread) error { return deletePodLink(name) })
}

// Look finds what Leftovers finds while no daemon runs, in the folder stateDir and
// in the network namespace netns (nil: the process's). It changes nothing. Links and
// ports there may be of a daemon with another folder, while one runs: then it fails.
func Look(stateDir string, netns *os.File, use cni.InUse) (out []leftover.Finding, err error) {
	s := &store{dir: stateDir}
	if !s.sameBoot() {
		return nil, nil // the next daemon discards it as a whole
	}
	alone := func(f func() error) error {
		lock, err := lockNode(netns)
		if err != nil {
			return err
		}
		return errors.Join(f(), unlockNode(lock))
	}
	err = alone(func() error {
		out, err = s.look(netns, use)
		return err
	})
	for i := range out {
		if remove := out[i].Remove; remove != nil {
			out[i].Remove = func(ctx context.Context) error { return alone(func() error { return remove(ctx) }) }
		}
	}
	return out, err
}

// look is Look with the namespace locked.
func (s *store) look(netns *os.File, use cni.InUse) (out []leftover.Finding, err error) {
	got, err := s.read()
	if err != nil {
		return nil, fmt.Errorf("network records: %w", err)
	}
	for _, path := range append(got.damaged, got.aside...) {
		out = append(out, leftover.Finding{Kind: leftover.Record, Name: path, Detail: "record of a pod's network that cannot be read",
			Remedy: "remove the file when nobody wants to look into it; the pod's link guards its address"})
	}
	fw := newFirewall(netns, linkPrefix, nil)
	defer fw.close()
	var wanted []*record
	ips := use.IPs()
	for _, r := range got.records {
		if use.Pod(r.Pod) {
			wanted = append(wanted, r)
			ips = append(ips, r.IPs...)
			continue
		}
		out = append(out, r.finding(func() error {
			own := newFirewall(netns, linkPrefix, nil)
			defer own.close()
			if err := own.del(r.Ports); err != nil {
				return err
			}
			return s.remove(r.Pod)
		}))
	}
	inside := func(f func() error) error {
		if netns == nil {
			return f()
		}
		return kernel.In(kernel.NetNS, netns, f)
	}
	err = inside(func() error {
		links, err := podLinks()
		for name, l := range links {
			if len(notOf([]string{name}, ips)) > 0 {
				out = append(out, linkFinding(l, func() error { return inside(func() error { return deletePodLink(name) }) }))
			}
		}
		return err
	})
	if err != nil {
		return out, err
	}
	elements, err := fw.published()
	if errors.Is(err, unix.ENOENT) { // no table
		return out, nil
	}
	if err != nil {
		return out, err
	}
	mappings := func() (ms []mapping) {
		for _, r := range wanted {
			ms = append(ms, r.Ports...)
		}
		return ms
	}
	keys := fw.keys(mappings())
	for _, e := range elements {
		if !keys[e.key()] {
			out = append(out, e.finding(func() error {
				own := newFirewall(netns, linkPrefix, nil)
				defer own.close()
				return own.withdraw(e, mappings)
			}))
		}
	}
	return out, nil
}

func (r *record) finding(remove func() error) leftover.Finding {
	var ips []string
	for _, ip := range r.IPs {
		ips = append(ips, ip.String())
	}
	return leftover.Finding{Kind: leftover.Address, Name: strings.Join(ips, ","),
		Detail: fmt.Sprintf("allocated to pod sandbox %s (%s), which is not on record", r.Pod, r.Name),
		Remove: func(context.Context) error { return remove() }}
}

func linkFinding(l netlink.Link, remove func() error) leftover.Finding {
	return leftover.Finding{Kind: leftover.Link, Name: l.Attrs().Name, Detail: "host end of a pod's link, and no pod has the address it is named for",
		Remove: func(context.Context) error { return remove() }}
}

// notOf leaves out the links of pods with the given addresses.
func notOf(names []string, ips []netip.Addr) []string {
	return slices.DeleteFunc(names, func(name string) bool {
		return slices.ContainsFunc(ips, func(ip netip.Addr) bool {
			link, _ := linkID(linkPrefix, ip)
			return link == name
		})
	})
}

// linkIndex is the ifindex of the pod link with this name; false for a name that is
// none of ours. It is the inverse of linkID.
func linkIndex(name string) (index int, ours bool) {
	digits, ok := strings.CutPrefix(name, linkPrefix)
	if !ok {
		return 0, false
	}
	family := 1 << 24
	if v6, ok := strings.CutPrefix(digits, "v"); ok {
		digits, family = v6, 1<<25
	}
	low, err := strconv.ParseUint(digits, 16, 32)
	if err != nil || len(digits) != 8 || strings.ToLower(digits) != digits {
		return 0, false
	}
	return family | int(low&(1<<24-1)), true
}

// linkNames lists the links in the calling thread's namespace whose names are ours.
// It costs microseconds where a list over netlink costs milliseconds.
func linkNames() (out []string, err error) {
	d, err := os.Open("/proc/sys/net/ipv4/conf")
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	defer d.Close()
	all, err := d.Readdirnames(-1)
	for _, name := range all {
		if _, ours := linkIndex(name); ours {
			out = append(out, name)
		}
	}
	return out, err
}

// podLinks lists the host ends of pod links by name, in the calling thread's
// namespace. Name, kind and index must all be what wire gives them: a link of
// another program, whatever it is called, is none.
func podLinks() (map[string]netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list links: %w", err)
	}
	out := map[string]netlink.Link{}
	for _, l := range links {
		if index, ours := linkIndex(l.Attrs().Name); ours && l.Type() == "veth" && l.Attrs().Index == index {
			out[l.Attrs().Name] = l
		}
	}
	return out, nil
}

// deletePodLink deletes the pod link with this name, if there is one.
func deletePodLink(name string) error {
	links, err := podLinks()
	if err != nil {
		return err
	}
	l, ok := links[name]
	if !ok {
		return nil
	}
	if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// element is an element of one of the table's sets.
type element struct {
	set *nftables.Set
	nftables.SetElement
}

func (e element) key() string { return e.set.Name + " " + string(e.Key) }

func (f *firewall) sets() []*nftables.Set {
	return []*nftables.Set{f.v4.ports, f.v4.addrPorts, f.v4.self, f.v6.ports, f.v6.addrPorts, f.v6.self}
}

// published lists the elements of all sets.
func (f *firewall) published() (out []element, err error) {
	err = f.transact(func(c *nftables.Conn) error {
		for _, s := range f.sets() {
			elems, err := c.GetSetElements(s)
			if err != nil {
				return err
			}
			for _, e := range elems {
				out = append(out, element{s, e})
			}
		}
		return nil
	})
	return out, err
}

// keys are the elements that ms are made of.
func (f *firewall) keys(ms []mapping) map[string]bool {
	out := map[string]bool{}
	for _, part := range f.split(ms) {
		for _, e := range part.elems {
			out[element{part.set, e}.key()] = true
		}
	}
	return out
}

// withdraw deletes an element unless it belongs to wanted. Attach enters its ports
// into the memory before it adds them to the table, and f.mu keeps the two apart.
func (f *firewall) withdraw(e element, wanted func() []mapping) error {
	err := f.transact(func(c *nftables.Conn) error {
		if f.keys(wanted())[e.key()] {
			return nil
		}
		return c.SetDeleteElements(e.set, []nftables.SetElement{{Key: e.Key, Val: e.Val}})
	})
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func (e element) finding(remove func() error) leftover.Finding {
	name, addr := "", 4
	if strings.HasSuffix(e.set.Name, "6") {
		addr = 16
	}
	switch key := bytes.Clone(e.Key); {
	case strings.HasPrefix(e.set.Name, "self"):
		ip, _ := netip.AddrFromSlice(key[:addr])
		name = "masquerade of " + ip.String()
	default:
		on := "all addresses"
		if strings.HasPrefix(e.set.Name, "address") {
			ip, _ := netip.AddrFromSlice(key[:addr])
			on, key = ip.String(), key[addr:]
		}
		name = fmt.Sprintf("%s port %d on %s, %s", protoName[key[0]], binary.BigEndian.Uint16(key[4:]), on, e.set.Name)
	}
	return leftover.Finding{Kind: leftover.Port, Name: name, Detail: fmt.Sprintf("in table inet %s, and no pod published it", TableName),
		Remove: func(context.Context) error { return remove() }}
}

// sameBoot reports whether the records are of this boot.
func (s *store) sameBoot() bool {
	now, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return false
	}
	then, err := os.ReadFile(filepath.Join(s.dir, "boot_id"))
	return err == nil && bytes.Equal(now, then)
}
