package builtin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TableName is the nftables table (family inet) that holds all of the network's
// rules. Nothing outside it is ever read or changed.
const TableName = "berth"

// Elements per netlink message: an attribute list is at most 64 KiB long, and
// its 16-bit length must not wrap.
const elementsPerMessage = 500

// Registers of the port lookups: key from reg 8 on, result from reg 16 on, both
// in 32-bit units (NFT_REG32_00 = 8).
const (
	keyReg    = 8
	resultReg = 16
)

// family is the IPv4 or IPv6 half of the table.
type family struct {
	proto     byte // NFPROTO_*
	bits      int
	src, dst  uint32        // offsets in the IP header
	ports     *nftables.Set // proto . port -> pod . port, on every node address
	addrPorts *nftables.Set // address . proto . port -> pod . port
	self      *nftables.Set // pod . pod, of pods with published ports
}

// firewall owns the table. mu serializes the use of its one netlink socket and
// is a leaf lock: a transaction takes 0.03 to 0.3 ms.
type firewall struct {
	netns    int // fd of the host namespace; 0: the process's
	prefix   string
	unmasked []netip.Prefix
	mu       sync.Mutex
	conn     *nftables.Conn // guarded by mu; nil after an error
	table    *nftables.Table
	v4, v6   *family
}

func newFirewall(host *os.File, prefix string, unmasked []netip.Prefix) *firewall {
	t := &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}
	half := func(suffix string, proto byte, bits int, src, dst uint32, addr nftables.SetDatatype) *family {
		target := nftables.MustConcatSetType(addr, nftables.TypeInetService)
		ports := nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
		addrPorts := nftables.MustConcatSetType(addr, nftables.TypeInetProto, nftables.TypeInetService)
		pair := nftables.MustConcatSetType(addr, addr)
		return &family{
			proto: proto, bits: bits, src: src, dst: dst,
			ports:     &nftables.Set{Table: t, Name: "ports" + suffix, IsMap: true, Concatenation: true, KeyType: ports, DataType: target},
			addrPorts: &nftables.Set{Table: t, Name: "address_ports" + suffix, IsMap: true, Concatenation: true, KeyType: addrPorts, DataType: target},
			self:      &nftables.Set{Table: t, Name: "self" + suffix, Concatenation: true, KeyType: pair},
		}
	}
	f := &firewall{
		prefix: prefix, unmasked: unmasked, table: t,
		v4: half("4", unix.NFPROTO_IPV4, 32, 12, 16, nftables.TypeIPAddr),
		v6: half("6", unix.NFPROTO_IPV6, 128, 8, 24, nftables.TypeIP6Addr),
	}
	if host != nil {
		f.netns = int(host.Fd())
	}
	return f
}

// transact queues with fill and commits. After an error the socket is thrown
// away: unread acknowledgements must not answer a later transaction.
func (f *firewall) transact(fill func(*nftables.Conn) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conn == nil {
		opts := []nftables.ConnOption{nftables.AsLasting()}
		if f.netns != 0 {
			opts = append(opts, nftables.WithNetNSFd(f.netns))
		}
		c, err := nftables.New(opts...)
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		f.conn = c
	}
	err := fill(f.conn)
	if err == nil {
		err = f.conn.Flush()
	}
	if err != nil {
		_ = f.conn.CloseLasting()
		f.conn = nil
	}
	return err
}

// close closes the socket; the rules stay.
func (f *firewall) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conn != nil {
		_ = f.conn.CloseLasting()
		f.conn = nil
	}
}

// replace makes the table anew with the given mappings, replacing an older one
// in the same transaction.
func (f *firewall) replace(ms []mapping) error {
	err := f.transact(func(c *nftables.Conn) error {
		c.AddTable(f.table) // so that the delete cannot miss
		c.DelTable(f.table)
		c.AddTable(f.table)
		for _, h := range []*family{f.v4, f.v6} {
			for _, s := range []*nftables.Set{h.ports, h.addrPorts, h.self} {
				if err := c.AddSet(s, nil); err != nil {
					return err
				}
			}
		}
		f.addChains(c)
		return nil
	})
	if err != nil {
		return fmt.Errorf("nftables table inet %s: %w", TableName, err)
	}
	// A node's whole set of ports may not fit the socket buffer at once.
	for len(ms) > 0 {
		n := min(len(ms), elementsPerMessage)
		if err := f.elements(ms[:n], (*nftables.Conn).SetAddElements); err != nil {
			return err
		}
		ms = ms[n:]
	}
	return nil
}

// remove deletes the table.
func (f *firewall) remove() error {
	return f.transact(func(c *nftables.Conn) error {
		c.AddTable(f.table)
		c.DelTable(f.table)
		return nil
	})
}

// add publishes ms.
func (f *firewall) add(ms []mapping) error {
	return f.elements(ms, (*nftables.Conn).SetAddElements)
}

// del withdraws ms. That some of them are gone already is not an error.
func (f *firewall) del(ms []mapping) error {
	err := f.elements(ms, (*nftables.Conn).SetDeleteElements)
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	// One missing element fails the whole transaction: take them singly.
	var errs []error
	for i := range ms {
		for _, part := range f.split(ms[i : i+1]) {
			err := f.transact(func(c *nftables.Conn) error { return c.SetDeleteElements(part.set, part.elems) })
			if err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("withdraw %s: %w", ms[i], err))
			}
		}
	}
	return errors.Join(errs...)
}

type setElements struct {
	set   *nftables.Set
	elems []nftables.SetElement
}

// split sorts the elements of ms by set.
func (f *firewall) split(ms []mapping) []setElements {
	var out []setElements
	add := func(s *nftables.Set, e nftables.SetElement) {
		for i := range out {
			if out[i].set == s {
				for _, have := range out[i].elems {
					if bytes.Equal(have.Key, e.Key) {
						return // one "self" entry per pod, not per port
					}
				}
				out[i].elems = append(out[i].elems, e)
				return
			}
		}
		out = append(out, setElements{s, []nftables.SetElement{e}})
	}
	for _, m := range ms {
		h := f.v4
		if m.Pod.Is6() {
			h = f.v6
		}
		pod := m.Pod.AsSlice()
		key := append([]byte{m.Proto, 0, 0, 0}, padPort(m.HostPort)...)
		val := append(bytes.Clone(pod), padPort(m.PodPort)...)
		if m.HostIP.IsValid() {
			add(h.addrPorts, nftables.SetElement{Key: append(m.HostIP.AsSlice(), key...), Val: val})
		} else {
			add(h.ports, nftables.SetElement{Key: key, Val: val})
		}
		add(h.self, nftables.SetElement{Key: append(bytes.Clone(pod), pod...)})
	}
	return out
}

func padPort(p uint16) []byte { return binary.BigEndian.AppendUint32(nil, uint32(p)<<16) }

func (f *firewall) elements(ms []mapping, verb func(*nftables.Conn, *nftables.Set, []nftables.SetElement) error) error {
	if len(ms) == 0 {
		return nil
	}
	parts := f.split(ms)
	return f.transact(func(c *nftables.Conn) error {
		for _, p := range parts {
			if err := verb(c, p.set, p.elems); err != nil {
				return err
			}
		}
		return nil
	})
}

// rulesOf is how many rules each chain holds.
var rulesOf = map[string]int{"raw": 6, "prerouting": 4, "output": 4, "postrouting": 5}

// intact reports whether every rule is in place, as it is not after another
// program flushed the ruleset.
func (f *firewall) intact() bool {
	whole := true
	err := f.transact(func(c *nftables.Conn) error {
		for chain, want := range rulesOf {
			rules, err := c.GetRules(f.table, &nftables.Chain{Name: chain, Table: f.table})
			if err != nil {
				return err
			}
			if chain == "postrouting" {
				want += len(f.unmasked)
			}
			whole = whole && len(rules) == want
		}
		return nil
	})
	return err == nil && whole
}

func (f *firewall) addChains(c *nftables.Conn) {
	chain := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, priority nftables.ChainPriority) func(...[]expr.Any) {
		ch := c.AddChain(&nftables.Chain{Name: name, Table: f.table, Type: typ, Hooknum: hook, Priority: &priority})
		return func(parts ...[]expr.Any) {
			var all []expr.Any
			for _, p := range parts {
				all = append(all, p...)
			}
			c.AddRule(&nftables.Rule{Table: f.table, Chain: ch, Exprs: all})
		}
	}
	drop := []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	masquerade := []expr.Any{&expr.Masq{}}
	notLo := name(expr.MetaKeyIIFNAME, expr.CmpOpNeq, "lo\x00")
	fromPod := name(expr.MetaKeyIIFNAME, expr.CmpOpEq, f.prefix)
	notToPod := name(expr.MetaKeyOIFNAME, expr.CmpOpNeq, f.prefix)
	loop4, loop6 := netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")

	// Before conntrack, so that replies to published loopback ports, which get
	// their 127.0.0.1 back later, pass. The links' route_localnet would otherwise
	// let a pod or a neighbour reach the node's loopback (CVE-2020-8558).
	rule := chain("raw", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw)
	rule(notLo, f.v4.in(f.v4.dst, expr.CmpOpEq, loop4), drop)
	rule(notLo, f.v4.in(f.v4.src, expr.CmpOpEq, loop4), drop)
	rule(notLo, f.v6.in(f.v6.dst, expr.CmpOpEq, loop6), drop)
	rule(notLo, f.v6.in(f.v6.src, expr.CmpOpEq, loop6), drop)
	// A pod sends from its own addresses only.
	noReturn := []expr.Any{
		&expr.Fib{Register: 1, ResultOIF: true, FlagSADDR: true, FlagIIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(0)},
	}
	rule(f.v4.only(), fromPod, noReturn, drop)
	rule(f.v6.only(), fromPod, noReturn, drop)

	// After the cluster's service chains, which hook at dstnat (CVE-2019-9946).
	rule = chain("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest+10)
	f.addPublish(rule)
	rule = chain("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, *nftables.ChainPriorityNATDest+10)
	f.addPublish(rule)

	rule = chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource+10)
	// A pod that reaches itself through its published port must see a foreign
	// source, or it would answer itself inside.
	rule(f.v4.toSelf(), masquerade)
	rule(f.v6.toSelf(), masquerade)
	// Loopback sources mean nothing in the pod.
	rule(f.v4.in(f.v4.src, expr.CmpOpEq, loop4), name(expr.MetaKeyOIFNAME, expr.CmpOpEq, f.prefix), masquerade)
	rule(f.v6.in(f.v6.src, expr.CmpOpEq, loop6), name(expr.MetaKeyOIFNAME, expr.CmpOpEq, f.prefix), masquerade)
	for _, p := range f.unmasked {
		h := f.v4
		if p.Addr().Is6() {
			h = f.v6
		}
		rule(h.in(h.dst, expr.CmpOpEq, p), fromPod, accept)
	}
	rule(fromPod, notToPod, masquerade)
}

// addPublish adds the rules that lead from published ports to pods. Only
// packets to an address of the node itself are touched (CVE-2025-67499).
func (f *firewall) addPublish(rule func(...[]expr.Any)) {
	for _, h := range []*family{f.v4, f.v6} {
		local := []expr.Any{
			&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagDADDR: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
		}
		words := uint32(h.bits / 32)
		dnat := []expr.Any{&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(h.proto), RegAddrMin: resultReg, RegProtoMin: resultReg + words, Specified: true}}
		rule(h.only(), local, protoPort(keyReg), lookup(h.ports), dnat)
		address := []expr.Any{&expr.Payload{DestRegister: keyReg, Base: expr.PayloadBaseNetworkHeader, Offset: h.dst, Len: words * 4}}
		rule(h.only(), local, address, protoPort(keyReg+words), lookup(h.addrPorts), dnat)
	}
}

func lookup(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: keyReg, DestRegister: resultReg, IsDestRegSet: true, SetName: s.Name, SetID: s.ID}}
}

// protoPort loads the transport protocol and the destination port.
func protoPort(reg uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
		&expr.Payload{DestRegister: reg + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

// name compares an interface name; without a final NUL it is a prefix.
func name(key expr.MetaKey, op expr.CmpOp, want string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: []byte(want)}}
}

// only matches packets of the family.
func (h *family) only() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{h.proto}}}
}

// in matches packets of the family whose address at offset is in p.
func (h *family) in(offset uint32, op expr.CmpOp, p netip.Prefix) []expr.Any {
	n := uint32(h.bits / 8)
	mask := make([]byte, n)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return append(h.only(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()})
}

// toSelf matches packets from a pod with published ports to itself.
func (h *family) toSelf() []expr.Any {
	n := uint32(h.bits / 8)
	return append(h.only(),
		&expr.Payload{DestRegister: keyReg, Base: expr.PayloadBaseNetworkHeader, Offset: h.src, Len: n},
		&expr.Payload{DestRegister: keyReg + n/4, Base: expr.PayloadBaseNetworkHeader, Offset: h.dst, Len: n},
		&expr.Lookup{SourceRegister: keyReg, SetName: h.self.Name, SetID: h.self.ID})
}

// udpFlows selects the conntrack entries of published UDP ports.
type udpFlows []mapping

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (u udpFlows) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	if flow.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	for _, m := range u {
		if m.HostPort != flow.Forward.DstPort {
			continue
		}
		if dst, ok := netip.AddrFromSlice(flow.Forward.DstIP); ok && m.HostIP.IsValid() && dst.Unmap() != m.HostIP {
			continue
		}
		return true
	}
	return false
}

// forgetUDP deletes the conntrack entries of the UDP ports among ms: a client
// that keeps sending would otherwise go on reaching the port's last owner (or
// nobody), because an entry decides before the table does. It runs on a thread in
// the host namespace.
func forgetUDP(ms []mapping) error {
	byFamily := map[netlink.InetFamily]udpFlows{}
	for _, m := range ms {
		if m.Proto == unix.IPPROTO_UDP {
			fam := netlink.InetFamily(familyOf(m.Pod.AsSlice()))
			byFamily[fam] = append(byFamily[fam], m)
		}
	}
	var errs []error
	for fam, flows := range byFamily {
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, fam, flows); err != nil {
			errs = append(errs, fmt.Errorf("conntrack: forget UDP flows: %w", err))
		}
	}
	return errors.Join(errs...)
}
