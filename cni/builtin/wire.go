package builtin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// The pod's side of the wire. Every pod has the same gateway, reachable over
// its own link only; nobody owns these addresses, permanent neighbour entries
// stand for them.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
	nodeMAC  = [6]byte{0x02, 'b', 'e', 'r', 't', 'h'} // host end of every pod's link
)

// podIfindex is eth0's index in the pod. Fallback tunnel devices (sit0, tunl0)
// may own the first ones, so it is chosen, not guessed.
const podIfindex = 64

// loIndex is the index of lo in every network namespace.
const loIndex = 1

// wiring says what one pod's link looks like.
type wiring struct {
	link  string // host end
	index int    // host end's ifindex; chosen by us so that one batch can name it
	ips   []netip.Addr
	src   map[bool]netip.Addr // node's address towards the pod, by Is4
	mtu   int
	ipv6  bool     // the kernel has IPv6
	own   *os.File // namespace to wire; nil: a new one
}

func (w wiring) has6() bool {
	for _, ip := range w.ips {
		if ip.Is6() {
			return true
		}
	}
	return false
}

// podMAC is derived from the pod's primary address.
func podMAC(ip netip.Addr) [6]byte {
	b := ip.AsSlice()
	mac := [6]byte{0x0a, 'b'}
	copy(mac[2:], b[len(b)-4:])
	return mac
}

// linkID names the host end of the link of a pod with these addresses: name and
// ifindex follow from the primary address. The kernel refuses a second link of
// the same name or index, so an address cannot be wired again while a dying
// namespace, or one forgotten by a crash, still holds it.
func linkID(prefix string, primary netip.Addr) (name string, index int) {
	b := primary.AsSlice()
	low := binary.BigEndian.Uint32(b[len(b)-4:])
	if primary.Is4() {
		return fmt.Sprintf("%s%08x", prefix, low), int(1<<24 | low&(1<<24-1))
	}
	return fmt.Sprintf("%sv%08x", prefix, low), int(1<<25 | low&(1<<24-1))
}

// threads runs functions on OS threads that live in the host's network
// namespace and may visit others.
type threads struct {
	host *os.File // nil: the namespace the process is in
	work chan func(*thread) bool
	wg   sync.WaitGroup
}

// thread is one of them; it is used by one function at a time.
type thread struct {
	home int // fd of the host network namespace
	rt   int // route socket in it
}

// newThreads starts n threads.
func newThreads(host *os.File, n int) (*threads, error) {
	t := &threads{host: host, work: make(chan func(*thread) bool)}
	for range n {
		if err := t.start(); err != nil {
			t.close()
			return nil, err
		}
	}
	return t, nil
}

func (t *threads) start() error {
	ready := make(chan error, 1)
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		// Never unlocked: the OS thread ends with the goroutine, so a namespace it
		// could not leave dies with it.
		runtime.LockOSThread()
		th, err := t.open()
		ready <- err
		if err != nil {
			return
		}
		defer unix.Close(th.rt)
		defer unix.Close(th.home)
		for f := range t.work {
			if !f(th) {
				_ = t.start() // this thread is lost in a foreign namespace
				return
			}
		}
	}()
	return <-ready
}

func (t *threads) open() (*thread, error) {
	if t.host != nil {
		if err := unix.Setns(int(t.host.Fd()), unix.CLONE_NEWNET); err != nil {
			return nil, fmt.Errorf("join host network namespace: %w", err)
		}
	}
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open host network namespace: %w", err)
	}
	rt, err := routeSocket()
	if err != nil {
		unix.Close(home)
		return nil, err
	}
	return &thread{home: home, rt: rt}, nil
}

func (t *threads) close() {
	close(t.work)
	t.wg.Wait()
}

// do runs f on a thread in the host namespace. f must leave it there.
func (t *threads) do(f func(*thread) error) error {
	done := make(chan error, 1)
	t.work <- func(th *thread) bool {
		err := f(th)
		done <- err
		return !errors.Is(err, errLost)
	}
	return <-done
}

// errLost is wrapped by errors after which a thread is not in the host namespace.
var errLost = errors.New("thread could not return to the host network namespace")

// pod makes a network namespace, or takes w.own, and wires it as w says. On error
// a new namespace is closed, and the kernel takes down what was built; one of the
// pod's own is emptied for the next try.
func (th *thread) pod(w wiring) (*os.File, error) {
	// A look that costs 3 us and no lock, before a namespace is made in vain and
	// adds to the teardown that is being waited for. The kernel has the last word.
	if _, err := os.Stat("/proc/sys/net/ipv4/conf/" + w.link); err == nil {
		return nil, fmt.Errorf("wire pod link %s: is still there: %w", w.link, unix.EEXIST)
	}
	ns, rt, err := th.newNamespace(w)
	if err != nil {
		return nil, err
	}
	defer unix.Close(rt)
	fail := func(what string, err error) (*os.File, error) {
		ns.Close()
		if w.own != nil {
			// Through the pod's end: a link of the node's with this name may be another's.
			var m batch
			m.add("delete link", unix.RTM_DELLINK, request, func() { m.ifinfo(podIfindex, 0) })
			if e := m.send(rt); e != nil && !errors.Is(e, unix.ENODEV) {
				err = errors.Join(err, e)
			}
		}
		return nil, fmt.Errorf("wire pod link %s: %s: %w", w.link, what, err)
	}
	if err := th.hostSide(w, int(ns.Fd())); err != nil {
		return fail("node side", err)
	}
	if err := podSide(w, rt); err != nil {
		return fail("pod side", err)
	}
	var settle batch
	settle.settle(w.index)
	if err := settle.send(th.rt); err != nil {
		return fail("node side", err)
	}
	if w.ipv6 {
		// CVE-2020-10749, CVE-2020-13401: a pod's router advertisement must never
		// become a route of the node. The pod does not run yet.
		if err := sysctl("net/ipv6/conf/"+w.link+"/accept_ra", "0"); err != nil {
			return fail("node side", err)
		}
	}
	return ns, nil
}

// newNamespace makes a network namespace, or enters w.own, with its IPv6 defaults
// set and a route socket inside, and comes back.
func (th *thread) newNamespace(w wiring) (ns *os.File, rt int, err error) {
	if w.own != nil {
		err = unix.Setns(int(w.own.Fd()), unix.CLONE_NEWNET)
	} else {
		err = unix.Unshare(unix.CLONE_NEWNET)
	}
	if err != nil {
		return nil, -1, fmt.Errorf("make network namespace: %w", err)
	}
	rt = -1
	err = func() error {
		if ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		if rt, err = routeSocket(); err != nil {
			return err
		}
		if !w.ipv6 {
			return nil
		}
		if !w.has6() {
			// CVE-2024-32473: no IPv6 in a pod that was given none.
			return errors.Join(sysctl("net/ipv6/conf/all/disable_ipv6", "1"), sysctl("net/ipv6/conf/default/disable_ipv6", "1"))
		}
		return errors.Join(sysctl("net/ipv6/conf/all/accept_ra", "0"), sysctl("net/ipv6/conf/default/accept_ra", "0"))
	}()
	if e := unix.Setns(th.home, unix.CLONE_NEWNET); e != nil {
		err = errors.Join(err, fmt.Errorf("%w: %w", errLost, e))
	}
	if err != nil {
		if ns != nil {
			ns.Close()
		}
		if rt >= 0 {
			unix.Close(rt)
		}
		return nil, -1, fmt.Errorf("make network namespace: %w", err)
	}
	return ns, rt, nil
}

// hostSide makes the veth pair, its host end up, and the routes to the pod.
func (th *thread) hostSide(w wiring, ns int) error {
	mac := podMAC(w.ips[0])
	var m batch
	m.add("veth pair", unix.RTM_NEWLINK, create, func() {
		m.ifinfo(w.index, 0)
		m.attrString(unix.IFLA_IFNAME, w.link)
		m.attrU32(unix.IFLA_MTU, uint32(w.mtu))
		m.attr(unix.IFLA_ADDRESS, nodeMAC[:])
		m.nest(unix.IFLA_LINKINFO, func() {
			m.attr(unix.IFLA_INFO_KIND, []byte("veth"))
			m.nest(unix.IFLA_INFO_DATA, func() {
				m.nest(vethInfoPeer, func() {
					// Up here would be ENOTCONN: the ends are not tied yet.
					m.ifinfo(podIfindex, 0)
					m.attrString(unix.IFLA_IFNAME, "eth0")
					m.attrU32(unix.IFLA_MTU, uint32(w.mtu))
					m.attr(unix.IFLA_ADDRESS, mac[:])
					m.attrU32(unix.IFLA_NET_NS_FD, uint32(ns))
				})
			})
		})
	})
	m.add("link settings", unix.RTM_NEWLINK, request, func() {
		m.ifinfo(w.index, 0)
		m.nest(unix.IFLA_AF_SPEC, func() {
			m.nest(unix.AF_INET, func() {
				m.nest(iflaInetConf, func() {
					// 127.0.0.1:hostPort leaves through this link; the table's raw chain
					// drops what a pod sends to 127.0.0.0/8 (CVE-2020-8558).
					m.attrU32(devconfRouteLocalnet, 1)
				})
			})
			if w.ipv6 {
				m.ipv6Quiet()
			}
		})
	})
	m.up(w.index)
	for _, ip := range w.ips {
		m.podRoute(w.index, ip, w.src[ip.Is4()])
		m.neighbour(w.index, ip.AsSlice(), mac)
	}
	return m.send(th.rt)
}

// podSide brings up lo and eth0 and gives the pod its addresses and routes.
func podSide(w wiring, rt int) error {
	var m batch
	m.up(loIndex)
	if w.has6() {
		m.add("eth0 settings", unix.RTM_NEWLINK, request, func() {
			m.ifinfo(podIfindex, 0)
			m.nest(unix.IFLA_AF_SPEC, m.ipv6Quiet)
		})
	}
	m.up(podIfindex)
	for _, ip := range w.ips {
		gw := gateway4
		if ip.Is6() {
			gw = gateway6
		}
		m.address(podIfindex, ip.AsSlice())
		m.neighbour(podIfindex, gw.AsSlice(), nodeMAC)
		m.defaultRoute(podIfindex, gw.AsSlice())
	}
	m.settle(podIfindex)
	return m.send(rt)
}

// sysctl writes value to /proc/sys/<name> of the calling thread's namespaces.
func sysctl(name, value string) error {
	f, err := os.OpenFile("/proc/sys/"+name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
