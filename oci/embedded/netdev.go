package embedded

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// targetName is the name of a device inside the container. One with "%d" is a
// template: the kernel puts the first free number there.
func targetName(name string, d specs.LinuxNetDevice) string {
	if d.Name != "" {
		return d.Name
	}
	return name
}

// checkNetDevices checks linux.netDevices by itself: names that the kernel takes,
// and no two devices for one name.
func checkNetDevices(devs map[string]specs.LinuxNetDevice) error {
	taken := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(devs)) {
		if !isDeviceName(name) || strings.Contains(name, "%") {
			return invalid("linux.netDevices[%s]: want 1 to 15 bytes of a device's name, without spaces, \"/\", \":\" and \"%%\"", name)
		}
		target := targetName(name, devs[name])
		template := strings.Contains(target, "%")
		switch {
		case !isDeviceName(target):
			return invalid("linux.netDevices[%s].name %q: want 1 to 15 bytes without spaces, \"/\" and \":\"", name, target)
		case template && (strings.Count(target, "%") != 1 || !strings.Contains(target, "%d")):
			return invalid("linux.netDevices[%s].name %q: a template has one %%d and no other %%", name, target)
		case !template && taken[target] != "":
			return invalid("linux.netDevices[%s]: would be called %q inside, and so would %q; set another name", name, target, taken[target])
		}
		taken[target] = name
	}
	return nil
}

// isDeviceName is the kernel's rule for names of network devices. Its isspace()
// knows Latin-1, where the byte 0xa0 is one.
func isDeviceName(s string) bool {
	return s != "" && len(s) < unix.IFNAMSIZ && s != "." && s != ".." && !strings.ContainsAny(s, "/: \t\n\v\f\r\x00") && strings.IndexByte(s, 0xa0) < 0
}

// netDevice is a device of linux.netDevices.
type netDevice struct {
	name, target string
	host         rtLink      // as it was
	addrs        []rtAddress // permanent ones of any scope
	inside       int         // index in the container; 0: not there
}

// netMover moves devices between two network namespaces.
type netMover struct {
	host, inside     rtnl
	hostNS, insideNS *os.File
}

// moveNetDevices moves the devices of linux.netDevices from the network namespace
// of the calling thread into ns and brings them up there (runtime-spec 1.3,
// config-linux.md, "Network Devices"). The kernel keeps a moved device's MTU,
// hardware address, queue length and alias; its permanent global addresses are
// taken along here. It drops routes, queueing disciplines and the settings below
// /proc/sys/net. At a failure every device goes back to its name, addresses,
// master and state; routes over it stay lost. Nothing is done when the container
// ends: the kernel returns physical devices and destroys virtual ones with ns.
func moveNetDevices(devs map[string]specs.LinuxNetDevice, ns *os.File) error {
	if len(devs) == 0 {
		return nil
	}
	m := netMover{insideNS: ns}
	var err error
	if m.host, err = openRtnl(); err != nil {
		return fmt.Errorf("linux.netDevices: %w", err)
	}
	defer m.host.close()
	if m.hostNS, err = m.host.namespace(); err != nil {
		return fmt.Errorf("linux.netDevices: %w", err)
	}
	defer m.hostNS.Close()
	if same, err := sameFile(m.hostNS, ns); err != nil {
		return fmt.Errorf("linux.netDevices: %w", err)
	} else if same {
		return invalid("linux.netDevices: the container has the host's network namespace; add a network namespace to linux.namespaces")
	}
	if err := kernel.In(kernel.NetNS, ns, func() error { m.inside, err = openRtnl(); return err }); err != nil {
		return fmt.Errorf("linux.netDevices: %w", err)
	}
	defer m.inside.close()

	// All checks come before the first move: a way back costs a device its routes.
	var list []netDevice
	for _, name := range slices.Sorted(maps.Keys(devs)) {
		d, err := m.look(name, targetName(name, devs[name]))
		if err != nil {
			return fmt.Errorf("linux.netDevices[%s]: %w", name, err)
		}
		list = append(list, d)
	}
	for i := range list {
		if err := m.moveIn(&list[i]); err != nil {
			errs := []error{fmt.Errorf("linux.netDevices[%s]: %w", list[i].name, err)}
			for _, d := range slices.Backward(list[:i+1]) {
				if err := m.moveBack(d); err != nil {
					errs = append(errs, fmt.Errorf("linux.netDevices[%s]: move back: %w", d.name, err))
				}
			}
			return errors.Join(errs...)
		}
	}
	return nil
}

func sameFile(a, b *os.File) (bool, error) {
	var x, y unix.Stat_t
	if err := errors.Join(unix.Fstat(int(a.Fd()), &x), unix.Fstat(int(b.Fd()), &y)); err != nil {
		return false, err
	}
	return x.Dev == y.Dev && x.Ino == y.Ino, nil
}

// look reads a device and checks that its new name is free.
func (m *netMover) look(name, target string) (netDevice, error) {
	d := netDevice{name: name, target: target}
	var err error
	if d.host, err = m.host.linkByName(name); errors.Is(err, unix.ENODEV) {
		return d, fmt.Errorf("the host has no such device: %w", errdefs.ErrFailedPrecondition)
	} else if err != nil {
		return d, err
	}
	if d.host.name != name {
		return d, invalid("is an alternative name; use %q", d.host.name)
	}
	if !strings.Contains(target, "%") {
		_, err := m.inside.linkByName(target)
		if err == nil {
			return d, invalid("name %q: the container's network namespace has a device of that name; set another name", target)
		}
		if !errors.Is(err, unix.ENODEV) {
			return d, err
		}
	}
	d.addrs, err = m.host.addresses(d.host.index)
	return d, err
}

// moveIn puts d into the container. d.inside is set once it is there.
func (m *netMover) moveIn(d *netDevice) error {
	var err error
	if d.inside, err = transfer(m.host, m.inside, m.insideNS, d.host.index, d.target); err != nil {
		return err
	}
	for _, a := range d.addrs {
		if a.scope != unix.RT_SCOPE_UNIVERSE {
			continue
		}
		if err := m.inside.addAddress(d.inside, a); err != nil {
			return err
		}
	}
	return m.inside.up(d.inside)
}

// moveBack undoes moveIn, however far that came.
func (m *netMover) moveBack(d netDevice) error {
	if d.inside == 0 {
		return nil
	}
	index, err := transfer(m.inside, m.host, m.hostNS, d.inside, d.name)
	if index == 0 {
		return err
	}
	errs := []error{err}
	if d.host.master != 0 {
		errs = append(errs, m.host.enslave(index, d.host.master))
	}
	for _, a := range d.addrs {
		errs = append(errs, m.host.addAddress(index, a))
	}
	if d.host.up {
		errs = append(errs, m.host.up(index))
	}
	return errors.Join(errs...)
}

// transfer moves the device index from one namespace into another, where it is
// called name, and returns its index there; 0 with an error means that it has
// not moved. The kernel may change the index, and it moves a device even when
// the wanted name turns out to be taken. So the device travels under a name
// that nobody has, by which it is found, and is renamed where it arrived.
func transfer(from, to rtnl, ns *os.File, index int, name string) (int, error) {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	passing := "mv-" + hex.EncodeToString(b[:])
	if err := from.moveLink(index, ns, passing); errors.Is(err, unix.EINVAL) {
		return 0, fmt.Errorf("move: %w: %w", err, errdefs.ErrFailedPrecondition) // loopback, bridges, some wireless devices
	} else if err != nil {
		return 0, fmt.Errorf("move: %w", err)
	}
	l, err := to.linkByName(passing)
	if err != nil {
		return 0, fmt.Errorf("moved, but not found as %s: %w", passing, err)
	}
	if err := to.rename(l.index, name); err != nil {
		return l.index, fmt.Errorf("rename to %q: %w", name, err)
	}
	return l.index, nil
}
