package builtin

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/internal/id"
)

func TestSubnetRoundRobin(t *testing.T) {
	s, err := newSubnet(netip.MustParsePrefix("10.0.0.0/29")) // .1 is the node's, .2 to .6 pods'
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	take := func() netip.Addr {
		a, err := s.take()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, a.String())
		return a
	}
	first := take()
	take()
	s.release(first)
	for range 4 {
		take() // .2 comes back only after .4, .5, .6
	}
	if want := "10.0.0.2 10.0.0.3 10.0.0.4 10.0.0.5 10.0.0.6 10.0.0.2"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
	if _, err := s.take(); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a full subnet: got %v, want resource exhausted", err)
	}
	if s.gateway.String() != "10.0.0.1" {
		t.Errorf("gateway %s", s.gateway)
	}
}

func TestSubnetClaim(t *testing.T) {
	s, err := newSubnet(netip.MustParsePrefix("fd00::/64"))
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"fd00::2", "fd00::3", "fd01::9"} {
		s.claim(netip.MustParseAddr(a))
	}
	if a, err := s.take(); err != nil || a.String() != "fd00::4" {
		t.Errorf("got %s, %v; want fd00::4", a, err)
	}
	if len(s.used) != 3 {
		t.Errorf("used %v: an address of another subnet was claimed", s.used)
	}
}

func TestExpand(t *testing.T) {
	both := []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}
	ip := netip.MustParseAddr
	for name, tc := range map[string]struct {
		in    cni.PortMapping
		ips   []netip.Addr
		count int
		field string // of the error
	}{
		"both families":     {cni.PortMapping{ContainerPort: 80, HostPort: 1}, both, 2, ""},
		"no host port":      {cni.PortMapping{ContainerPort: 80}, both, 0, ""},
		"all IPv4":          {cni.PortMapping{ContainerPort: 80, HostPort: 1, HostIP: ip("0.0.0.0")}, both, 1, ""},
		"all IPv6":          {cni.PortMapping{ContainerPort: 80, HostPort: 1, HostIP: ip("::")}, both, 1, ""},
		"mapped IPv4":       {cni.PortMapping{ContainerPort: 80, HostPort: 1, HostIP: ip("::ffff:127.0.0.1")}, both, 1, ""},
		"sctp":              {cni.PortMapping{Protocol: cni.SCTP, ContainerPort: 80, HostPort: 1}, both, 2, ""},
		"family not there":  {cni.PortMapping{ContainerPort: 80, HostPort: 1, HostIP: ip("::1")}, both[:1], 0, "port_mappings[0].host_ip"},
		"multicast":         {cni.PortMapping{ContainerPort: 80, HostPort: 1, HostIP: ip("224.0.0.1")}, both, 0, "port_mappings[0].host_ip"},
		"zone":              {cni.PortMapping{ContainerPort: 80, HostPort: 1, HostIP: ip("fe80::1%eth0")}, both, 0, "port_mappings[0].host_ip"},
		"protocol":          {cni.PortMapping{Protocol: "icmp", ContainerPort: 80, HostPort: 1}, both, 0, "port_mappings[0].protocol"},
		"no container port": {cni.PortMapping{HostPort: 1}, both, 0, "port_mappings[0].container_port"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := expand([]cni.PortMapping{tc.in}, tc.ips)
			if tc.field != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.field) {
					t.Fatalf("got %v, want invalid argument naming %s", err, tc.field)
				}
				return
			}
			if err != nil || len(got) != tc.count {
				t.Errorf("got %v, %v; want %d mappings", got, err, tc.count)
			}
		})
	}
}

func TestClaims(t *testing.T) {
	c := claims{}
	m := func(host string, port uint16) mapping {
		out := mapping{Proto: 6, HostPort: port, Pod: netip.MustParseAddr("10.0.0.2"), PodPort: 80}
		if host != "" {
			out.HostIP = netip.MustParseAddr(host)
		}
		return out
	}
	if got, err := c.add("a", []mapping{m("127.0.0.1", 1), m("127.0.0.1", 1), m("", 2)}); err != nil || len(got) != 2 {
		t.Fatalf("got %v, %v; want the twice given mapping once", got, err)
	}
	if _, err := c.add("b", []mapping{m("127.0.0.2", 1)}); err != nil {
		t.Errorf("another address: %v", err)
	}
	if _, err := c.add("b", []mapping{m("", 3), m("", 1)}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("all addresses over one: got %v, want already exists", err)
	}
	if _, err := c.add("d", []mapping{m("", 3)}); err != nil {
		t.Errorf("a refused claim kept its first port: %v", err)
	}
	c.remove("b", []mapping{m("", 2)}) // not b's
	if _, err := c.add("e", []mapping{m("", 2)}); err == nil {
		t.Error("a pod gave up another one's port")
	}
	c.remove("a", []mapping{m("127.0.0.1", 1), m("", 2)})
	if _, err := c.add("e", []mapping{m("", 2)}); err != nil {
		t.Error(err)
	}
}

func TestLinkIDFitsAndDiffers(t *testing.T) {
	seen := map[string]bool{}
	for _, a := range []string{"10.164.0.2", "10.165.0.2", "255.255.255.254", "fd00::2", "fd00::ffff:fffe"} {
		name, index := linkID(linkPrefix, netip.MustParseAddr(a))
		if len(name) > 15 || index <= podIfindex || seen[name] {
			t.Errorf("%s: link %q, index %d", a, name, index)
		}
		seen[name] = true
	}
}

func TestStoreDiscardsAnotherBootAndTornRecords(t *testing.T) {
	dir := t.TempDir()
	s, err := openStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	good := &record{Version: recordVersion, Pod: id.NewPod(), Link: "berth0a000002", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.2")}}
	if err := s.write(good); err != nil {
		t.Fatal(err)
	}
	torn := id.NewPod()
	for path, content := range map[string]string{s.path(torn): `{"version":1,"po`, filepath.Join(s.pods(), ".x.tmp-1"): "{"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if s, err = openStore(dir); err != nil {
		t.Fatal(err)
	}
	got, err := s.load()
	if err != nil || len(got) != 1 || got[0].Pod != good.Pod {
		t.Fatalf("got %v, %v; want the good record only", got, err)
	}
	if _, err := os.Stat(s.path(torn) + ".bad"); err != nil {
		t.Errorf("the torn record was not kept aside: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "boot_id"), []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err = openStore(dir); err != nil {
		t.Fatal(err)
	}
	if got, err := s.load(); err != nil || len(got) != 0 {
		t.Errorf("after a reboot: %v, %v; want no records", got, err)
	}
}

func FuzzParseRecord(f *testing.F) {
	pod := id.Pod(strings.Repeat("a", 64))
	good, _ := json.Marshal(record{Version: 1, Pod: pod, Link: "l", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.2")}, Ports: []mapping{{Proto: 6, HostPort: 1, Pod: netip.MustParseAddr("10.0.0.2"), PodPort: 2}}})
	f.Add(good)
	f.Add([]byte(`{"version":1}`))
	fw := newFirewall(nil, linkPrefix, nil)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b, pod)
		if err != nil {
			return
		}
		fw.split(r.Ports) // must not panic
	})
}

func FuzzParsePodCIDR(f *testing.F) {
	f.Add("10.0.0.0/24,fd00::/64")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parsePodCIDR(s)
		if err != nil {
			return
		}
		subnets, err := newSubnets(p)
		if err != nil {
			return
		}
		for _, s := range subnets {
			if a, err := s.take(); err == nil && !s.prefix.Contains(a) {
				t.Fatalf("%s is not in %s", a, s.prefix)
			}
		}
	})
}
