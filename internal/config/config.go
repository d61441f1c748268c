// Package config holds the daemon's configuration: built-in defaults, then the
// TOML file, then flags. Every value knows where it came from. An unknown key is
// an error, because a mistyped one would otherwise be a silent default.
package config

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/version"
)

// DefaultFile is where the daemon looks for its file when no flag names one;
// there it may be absent.
const DefaultFile = "/etc/berth/config.toml"

// DefaultSocket is where clients find the daemon.
const DefaultSocket = "/run/berth/berth.sock"

// Config is everything that an operator can set. The toml tags are the keys of
// the file; a key at the top level is a flag of the same name too, with dashes.
type Config struct {
	// Root keeps what must survive a reboot: images and writable layers.
	Root string `toml:"root"`
	// State keeps what dies with the boot: records, sockets.
	State string `toml:"state"`
	// Socket is the unix socket that CRI is served on.
	Socket string `toml:"socket"`
	// CNIConfDir and CNIBinDir hold CNI configurations and plugins. Without a
	// configuration pods are on the built-in network.
	CNIConfDir string `toml:"cni_conf_dir"`
	CNIBinDir  string `toml:"cni_bin_dir"`
	// RegistryConfigDir holds <host>/hosts.toml files.
	RegistryConfigDir string `toml:"registry_config_dir"`
	// LogLevel is error, warn, info, debug or trace.
	LogLevel string `toml:"log_level"`
	// MetricsAddress is the TCP address of the Prometheus endpoint; "" is none.
	MetricsAddress string `toml:"metrics_address"`

	Network   Network   `toml:"network"`
	Runtime   Runtime   `toml:"runtime"`
	Images    Images    `toml:"images"`
	Streaming Streaming `toml:"streaming"`

	// Runtimes are the external OCI runtimes by handler name: what a RuntimeClass
	// names as its handler.
	Runtimes map[string]External `toml:"runtimes"`
}

// External is an OCI runtime that is called by its command line.
type External struct {
	// Path is the runtime's program, an absolute path.
	Path string `toml:"path"`
	// Args are global flags, before those that Berth gives (--root, --log, --log-format).
	Args []string `toml:"args"`
	// Timeout is how long one command may take ("30s"); 0 is 30 seconds. Then it is killed.
	Timeout Duration `toml:"timeout"`
}

// Network configures the built-in network, and how long CNI plugins may take.
type Network struct {
	// Subnets are the ranges that pods get addresses from: at most one of each
	// family. The node's pod CIDR, once the kubelet tells it, takes their place.
	Subnets []string `toml:"subnets"`
	// Unmasked lists destinations outside the node that see a pod's own address,
	// such as the cluster's pod network when other nodes have routes to it.
	Unmasked []string `toml:"unmasked"`
	// MTU of pod links in bytes; 0 is that of the device with the default route.
	MTU int `toml:"mtu"`
	// Pool is how many wired network namespaces are kept ready for the next pods.
	Pool int `toml:"pool"`
	// PluginTimeout is how long all CNI plugins together may take for one ADD or one
	// DEL ("50s"). Then they are killed. An ADD that is killed is followed by a DEL:
	// twice this should be below the two minutes that the kubelet waits.
	PluginTimeout Duration `toml:"plugin_timeout"`
}

// Runtime configures how containers are run.
type Runtime struct {
	// Supervisor is the berth-supervisor binary; "" looks beside the daemon's
	// own binary and then in PATH.
	Supervisor string `toml:"supervisor"`
	// Reconcile is how often leftovers are looked for ("1m").
	Reconcile Duration `toml:"reconcile"`
}

// Images configures the image service.
type Images struct {
	// Platform chooses from multi-platform images, "os/arch[/variant]"; "" is
	// the node's own.
	Platform string `toml:"platform"`
}

// Streaming configures exec, attach and port-forward connections.
type Streaming struct {
	// Address is the TCP address to serve on; port 0 takes a free one.
	Address string `toml:"address"`
	// IdleTimeout closes a connection without traffic ("4h").
	IdleTimeout Duration `toml:"idle_timeout"`
}

// Duration is a time.Duration written as text.
type Duration struct{ time.Duration }

// UnmarshalText reads Go's form of a duration.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	d.Duration = v
	return err
}

// MarshalText writes Go's form of a duration.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Default is the configuration of a node where nothing is set.
func Default() *Config {
	return &Config{
		Root:              "/var/lib/berth",
		State:             "/run/berth",
		Socket:            DefaultSocket,
		CNIConfDir:        "/etc/cni/net.d",
		CNIBinDir:         "/opt/cni/bin",
		RegistryConfigDir: "/etc/berth/certs.d",
		LogLevel:          "info",
		Network:           Network{Subnets: []string{"10.164.0.0/16", "fd62:6572:7468::/64"}, Unmasked: []string{}, Pool: 8, PluginTimeout: Duration{50 * time.Second}},
		Runtime:           Runtime{Reconcile: Duration{time.Minute}},
		Runtimes:          map[string]External{},
		Streaming:         Streaming{Address: "127.0.0.1:0", IdleTimeout: Duration{4 * time.Hour}},
	}
}

// minReconcile is the shortest time between two looks for leftovers.
const minReconcile = 100 * time.Millisecond

// LogLevels are the values of log_level, the quietest first.
var LogLevels = []string{"error", "warn", "info", "debug", "trace"}

// Validate checks every value; the error names the key and the remedy.
func (c *Config) Validate() error {
	for _, p := range []struct{ key, path string }{
		{"root", c.Root}, {"state", c.State}, {"socket", c.Socket},
		{"cni_conf_dir", c.CNIConfDir}, {"cni_bin_dir", c.CNIBinDir}, {"registry_config_dir", c.RegistryConfigDir},
	} {
		if !filepath.IsAbs(p.path) {
			return wrong(p.key, "%q is not an absolute path", p.path)
		}
	}
	// sun_path has 108 bytes, with a NUL at the end.
	if len(c.Socket) > 107 {
		return wrong("socket", "%d bytes; the kernel takes at most 107, choose a shorter path", len(c.Socket))
	}
	if c.Runtime.Supervisor != "" && !filepath.IsAbs(c.Runtime.Supervisor) {
		return wrong("runtime.supervisor", "%q is not an absolute path", c.Runtime.Supervisor)
	}
	if c.Runtime.Reconcile.Duration < minReconcile {
		return wrong("runtime.reconcile", "%s; use %s or more, for example 1m", c.Runtime.Reconcile, minReconcile)
	}
	if !slices.Contains(LogLevels, c.LogLevel) {
		return wrong("log_level", "%q; use one of %s", c.LogLevel, strings.Join(LogLevels, ", "))
	}
	for _, a := range []struct{ key, address string }{{"metrics_address", c.MetricsAddress}, {"streaming.address", c.Streaming.Address}} {
		if a.address == "" && a.key == "metrics_address" {
			continue
		}
		if _, _, err := net.SplitHostPort(a.address); err != nil {
			return wrong(a.key, "%q is not host:port, for example 127.0.0.1:9100", a.address)
		}
	}
	if c.Streaming.IdleTimeout.Duration < 0 {
		return wrong("streaming.idle_timeout", "%s is negative", c.Streaming.IdleTimeout)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Runtimes)) {
		if err := c.Runtimes[name].validate(name); err != nil {
			return err
		}
	}
	return c.Network.validate()
}

// handlerName is what Kubernetes takes as a handler: a DNS label.
var handlerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

func (e External) validate(name string) error {
	key := "runtimes." + name
	switch {
	case !handlerName.MatchString(name):
		return wrong(key, "%q is no handler name; use at most 63 of a-z, 0-9 and, inside, -", name)
	case name == version.Name:
		return wrong(key, "%q is the built-in runtime; choose another name", name)
	case e.Path == "":
		return wrong(key+".path", "missing; set the absolute path of the runtime's program, for example /usr/sbin/runc")
	case !filepath.IsAbs(e.Path):
		return wrong(key+".path", "%q is not an absolute path; the search in PATH is not done for programs that run as root", e.Path)
	case e.Timeout.Duration < 0:
		return wrong(key+".timeout", "%s is negative", e.Timeout)
	}
	return nil
}

func (n *Network) validate() error {
	var v4, v6 int
	for _, s := range n.Subnets {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return wrong("network.subnets", "%q is not a CIDR, for example 10.164.0.0/16", s)
		}
		if p.Addr().Is4() {
			v4++
		} else {
			v6++
		}
	}
	if v4 > 1 || v6 > 1 || v4+v6 == 0 {
		return wrong("network.subnets", "%d IPv4 and %d IPv6 ranges; give one of one family or one of each", v4, v6)
	}
	for _, s := range n.Unmasked {
		if _, err := netip.ParsePrefix(s); err != nil {
			return wrong("network.unmasked", "%q is not a CIDR, for example 10.0.0.0/8", s)
		}
	}
	if n.MTU != 0 && (n.MTU < 1280 || n.MTU > 65535) {
		return wrong("network.mtu", "%d; use 1280 to 65535, or 0 for the default route's", n.MTU)
	}
	if n.PluginTimeout.Duration <= 0 {
		return wrong("network.plugin_timeout", "%s; use a time such as 50s", n.PluginTimeout)
	}
	if n.Pool < 0 || n.Pool > 256 {
		return wrong("network.pool", "%d; use 0 to 256", n.Pool)
	}
	return nil
}

func wrong(key, format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", key, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}
