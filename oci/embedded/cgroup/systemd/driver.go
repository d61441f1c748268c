// Package systemd has systemd make the cgroups of containers, as scopes: for
// hosts where it administers the tree and the kubelet or a tool above names
// cgroups as systemd does. It speaks D-Bus, so only who needs it imports it.
//
// systemd makes no scope without a process. A cgroup of this driver is prepared
// by Create and made by its Adopt (see cgroup.Cgroup), and systemd removes it
// when its last process is gone: what a container's cgroup can tell about its
// end, such as OOM kills, must be read before, or is lost.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	sd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// Driver is a cgroup.Manager that asks systemd. It connects when it first has to.
type Driver struct {
	host *cgroup.Host
	user bool
	dial func() (*dbus.Conn, error) // nil: the system's bus, or systemd's own socket

	mu      sync.Mutex
	conn    *sd.Conn
	version int    // of systemd; 0: not asked yet
	base    string // the user's manager's own cgroup; "": not asked yet
}

var _ cgroup.Manager = (*Driver)(nil)

// New returns a driver for the system's manager or, with user, that of the
// calling user, which is asked on the user's session bus and needs cgroup v2.
func New(h *cgroup.Host, user bool) (*Driver, error) {
	d := &Driver{host: h, user: user}
	if user {
		if !h.V2() {
			return nil, fmt.Errorf("systemd cgroups of a user: this host has cgroup v1, which can not be delegated to users: %w", errdefs.ErrFailedPrecondition)
		}
		d.dial = dialUser
	}
	return d, nil
}

// Running reports whether the machine was booted with systemd.
func Running() bool {
	fi, err := os.Lstat("/run/systemd/system")
	return err == nil && fi.IsDir()
}

// Close closes the connection. Units stay.
func (d *Driver) Close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn != nil {
		d.conn.Close()
		d.conn = nil
	}
}

// Check implements cgroup.Manager: a path is "slice:prefix:name".
func (d *Driver) Check(path string) error {
	_, err := parseName(path, d.user)
	return err
}

// Create implements cgroup.Manager: limits are checked, systemd is not asked for
// anything yet. Warnings are those of Adopt.
func (d *Driver) Create(path string, r *specs.LinuxResources) (*cgroup.Cgroup, []string, error) {
	u, at, err := d.unit(path)
	if err != nil {
		return nil, nil, err
	}
	if r == nil {
		r = &specs.LinuxResources{}
	}
	u.resources = r
	c, err := d.host.Managed(at, r, u)
	return c, nil, err
}

// Open implements cgroup.Manager.
func (d *Driver) Open(path string) (*cgroup.Cgroup, error) {
	u, at, err := d.unit(path)
	if err != nil {
		return nil, err
	}
	return d.host.OpenManaged(at, u)
}

// Reopen implements cgroup.Manager: a unit's name says where it is.
func (d *Driver) Reopen(path string, _ map[string]string) (*cgroup.Cgroup, error) {
	return d.Open(path)
}

// unit returns the unit that a cgroups path names, and the path of its cgroup.
func (d *Driver) unit(cgroupsPath string) (*unit, string, error) {
	n, err := parseName(cgroupsPath, d.user)
	if err != nil {
		return nil, "", err
	}
	at := path.Join(n.slicePath, n.scope)
	if d.user {
		base, err := d.userBase()
		if err != nil {
			return nil, "", err
		}
		at = path.Join(base, at)
	}
	return &unit{driver: d, name: n}, at, nil
}

// callWait bounds one call to systemd, and the wait for one of its jobs.
const callWait = 30 * time.Second

// call runs f with a connection. One that was closed, because the bus was
// restarted, is made anew once.
func (d *Driver) call(f func(context.Context, *sd.Conn) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), callWait)
	defer cancel()
	for again := true; ; again = false {
		conn, err := d.connect()
		if err != nil {
			return err
		}
		err = f(ctx, conn)
		if !again || !errors.Is(err, dbus.ErrClosed) {
			return err
		}
		d.mu.Lock()
		if d.conn == conn {
			conn.Close()
			d.conn = nil
		}
		d.mu.Unlock()
	}
}

func (d *Driver) connect() (*sd.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn != nil {
		return d.conn, nil
	}
	var err error
	if d.dial != nil {
		d.conn, err = sd.NewConnection(d.dial)
	} else {
		d.conn, err = sd.NewWithContext(context.Background())
	}
	if err != nil {
		return nil, fmt.Errorf("systemd cgroups: connect to systemd: %w (is it running, and D-Bus with it? Otherwise use the cgroupfs driver): %w", err, errdefs.ErrUnavailable)
	}
	return d.conn, nil
}

// property asks for one of the manager's own properties.
func (d *Driver) property(name string) (string, error) {
	var text string
	err := d.call(func(_ context.Context, c *sd.Conn) (err error) {
		text, err = c.GetManagerProperty(name)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("systemd property %s: %w", name, err)
	}
	if text, err = strconv.Unquote(text); err != nil {
		return "", fmt.Errorf("systemd property %s: %w", name, err)
	}
	return text, nil
}

// atLeast reports whether systemd has that version: unit properties are refused
// by versions that do not know them.
func (d *Driver) atLeast(version int) (bool, error) {
	d.mu.Lock()
	have := d.version
	d.mu.Unlock()
	if have == 0 {
		text, err := d.property("Version")
		if err != nil {
			return false, err
		}
		if have, err = parseVersion(text); err != nil {
			return false, err
		}
		d.mu.Lock()
		d.version = have
		d.mu.Unlock()
	}
	return have >= version, nil
}

// parseVersion reads versions such as "252.5-2~deb12u1" and "v245".
func parseVersion(text string) (int, error) {
	digits := strings.TrimPrefix(text, "v")
	for i, c := range digits {
		if c < '0' || c > '9' {
			digits = digits[:i]
			break
		}
	}
	v, err := strconv.Atoi(digits)
	if err != nil {
		return 0, fmt.Errorf("systemd version %q: %w", text, err)
	}
	return v, nil
}

// userBase is the cgroup of the user's manager, below which its slices are.
func (d *Driver) userBase() (string, error) {
	d.mu.Lock()
	base := d.base
	d.mu.Unlock()
	if base != "" {
		return base, nil
	}
	base, err := d.property("ControlGroup")
	if err != nil {
		return "", err
	}
	d.mu.Lock()
	d.base = base
	d.mu.Unlock()
	return base, nil
}
