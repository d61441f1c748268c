package registry

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// maxHostsFile bounds a hosts.toml file and each certificate file it names.
const maxHostsFile = 1 << 20

// hostConfig is one place to fetch from: a mirror or the registry itself.
type hostConfig struct {
	// base is scheme, host and the path that repository paths are appended to.
	base url.URL
	// server marks the registry itself: the credentials of a pull are for it.
	server bool
	// guessScheme permits plain HTTP when the host answers so: loopback names
	// that no configuration speaks about.
	guessScheme   bool
	resolve, pull bool
	skipVerify    bool
	header        map[string][]string
	ca            []string
	client        [][2]string // certificate and key files; the key may be in the first
}

// fileHost is the part of hosts.toml that a mirror and the server share.
type fileHost struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   bool           `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
}

type hostsFile struct {
	fileHost
	Server string              `toml:"server"`
	Host   map[string]fileHost `toml:"host"`
}

// hostsFor lists where images of the registry domain are fetched from, in
// order: the mirrors of the configuration, then the registry itself.
func hostsFor(configDir, domain string) ([]hostConfig, error) {
	if configDir == "" {
		return []hostConfig{defaultHost(domain)}, nil
	}
	for _, name := range configNames(domain) {
		dir := filepath.Join(configDir, name)
		data, err := readBounded(filepath.Join(dir, "hosts.toml"))
		switch {
		case err == nil:
			hosts, err := parseHosts(data, dir, domain)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", filepath.Join(dir, "hosts.toml"), err)
			}
			return hosts, nil
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("registry configuration: %w", err)
		}
		h, ok, err := certDir(dir, domain)
		if err != nil {
			return nil, err
		}
		if ok {
			return []hostConfig{h}, nil
		}
	}
	return []hostConfig{defaultHost(domain)}, nil
}

// configNames are the directories that may describe domain. A colon is not
// allowed in every file system's names, hence the second form.
func configNames(domain string) []string {
	names := []string{domain}
	if i := strings.LastIndexByte(domain, ':'); i >= 0 && !strings.HasSuffix(domain, "]") {
		names = append(names, domain[:i]+"_"+domain[i+1:]+"_")
	}
	if domain == "docker.io" {
		names = append(names, dockerHubHost)
	}
	return append(names, "_default")
}

const dockerHubHost = "registry-1.docker.io"

func defaultHost(domain string) hostConfig {
	host := domain
	if host == "docker.io" || host == "index.docker.io" {
		host = dockerHubHost
	}
	return hostConfig{
		base:   url.URL{Scheme: "https", Host: host, Path: "/v2"},
		server: true, resolve: true, pull: true,
		guessScheme: loopback(host),
	}
}

// loopback reports whether host[:port] is a loopback literal or "localhost".
// Names are never resolved for this: a DNS answer must not switch TLS off.
func loopback(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

// certDir reads the older layout of a directory without hosts.toml: *.crt are
// authorities, *.cert with *.key are client certificates.
func certDir(dir, domain string) (hostConfig, bool, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return hostConfig{}, false, nil
	}
	if err != nil {
		return hostConfig{}, false, fmt.Errorf("registry configuration: %w", err)
	}
	h := defaultHost(domain)
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		switch filepath.Ext(p) {
		case ".crt":
			h.ca = append(h.ca, p)
		case ".cert":
			h.client = append(h.client, [2]string{p, strings.TrimSuffix(p, ".cert") + ".key"})
		}
	}
	return h, len(h.ca)+len(h.client) > 0, nil
}

// parseHosts reads one hosts.toml. dir is what relative file names start from.
func parseHosts(data []byte, dir, domain string) ([]hostConfig, error) {
	var f hostsFile
	if err := toml.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	order, err := mirrorOrder(data)
	if err != nil {
		return nil, err
	}
	var hosts []hostConfig
	for _, name := range order {
		h := hostConfig{}
		if err := h.fill(name, f.Host[name], dir); err != nil {
			return nil, fmt.Errorf("host %q: %w", name, err)
		}
		hosts = append(hosts, h)
	}
	srv := defaultHost(domain)
	server := f.Server
	if server == "" {
		server = srv.base.Host
	} else {
		srv.guessScheme = false
	}
	if err := srv.fill(server, f.fileHost, dir); err != nil {
		return nil, fmt.Errorf("server %q: %w", server, err)
	}
	return append(hosts, srv), nil
}

// fill sets h from its table. name is a URL or host[:port].
func (h *hostConfig) fill(name string, f fileHost, dir string) error {
	if !strings.Contains(name, "://") {
		name = "https://" + name
	}
	u, err := url.Parse(name)
	if err != nil || u.Host == "" || u.User != nil || (u.Scheme != "https" && u.Scheme != "http") {
		return fmt.Errorf("want an http or https URL without user: %w", errdefs.ErrInvalidArgument)
	}
	h.base = url.URL{Scheme: u.Scheme, Host: u.Host, Path: strings.TrimRight(u.Path, "/")}
	if h.base.Host == "docker.io" {
		h.base.Host = dockerHubHost
	}
	// The registry API lives below /v2 wherever a mirror is mounted, unless told otherwise.
	if !f.OverridePath && !strings.HasSuffix(h.base.Path, "/v2") {
		h.base.Path += "/v2"
	}
	h.skipVerify = f.SkipVerify
	h.resolve, h.pull = len(f.Capabilities) == 0, len(f.Capabilities) == 0
	for _, c := range f.Capabilities {
		switch c {
		case "pull":
			h.pull = true
		case "resolve":
			h.resolve = true
		case "push", "referrers":
		default:
			return fmt.Errorf("capability %q: want pull, resolve or push: %w", c, errdefs.ErrInvalidArgument)
		}
	}
	h.header = map[string][]string{}
	for k, v := range f.Header {
		if h.header[k], err = stringList(v); err != nil {
			return fmt.Errorf("header %q: %w", k, err)
		}
	}
	if h.ca, err = stringList(f.CA); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	if h.client, err = certPairs(f.Client); err != nil {
		return fmt.Errorf("client: %w", err)
	}
	for i := range h.ca {
		h.ca[i] = below(dir, h.ca[i])
	}
	for i := range h.client {
		h.client[i] = [2]string{below(dir, h.client[i][0]), below(dir, h.client[i][1])}
	}
	return nil
}

func below(dir, p string) string {
	if p == "" || filepath.IsAbs(p) {
		return p
	}
	return filepath.Join(dir, p)
}

func stringList(v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		var out []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("want a string or a list of strings: %w", errdefs.ErrInvalidArgument)
			}
			out = append(out, s)
		}
		return out, nil
	}
	return nil, fmt.Errorf("want a string or a list of strings: %w", errdefs.ErrInvalidArgument)
}

// certPairs accepts "file", ["file", ...] and [["cert", "key"], ...].
func certPairs(v any) ([][2]string, error) {
	if list, ok := v.([]any); ok {
		var out [][2]string
		for _, e := range list {
			pair, err := stringList(e)
			if err != nil {
				return nil, err
			}
			switch len(pair) {
			case 1:
				out = append(out, [2]string{pair[0], ""})
			case 2:
				out = append(out, [2]string{pair[0], pair[1]})
			default:
				return nil, fmt.Errorf("want certificate and key: %w", errdefs.ErrInvalidArgument)
			}
		}
		return out, nil
	}
	one, err := stringList(v)
	if err != nil || len(one) == 0 {
		return nil, err
	}
	return [][2]string{{one[0], ""}}, nil
}

// mirrorOrder lists the keys of the "host" table as they stand in the file: the
// order of mirrors is their priority, and a decoded map has lost it.
func mirrorOrder(data []byte) ([]string, error) {
	var order []string
	add := func(keys []string) {
		if len(keys) >= 2 && keys[0] == "host" && !slices.Contains(order, keys[1]) {
			order = append(order, keys[1])
		}
	}
	var p unstable.Parser
	p.Reset(data)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		keys := nodeKeys(e.Key())
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = keys
			add(table)
		case unstable.KeyValue:
			full := append(slices.Clone(table), keys...)
			add(full)
			if len(full) == 1 && full[0] == "host" && e.Value().Kind == unstable.InlineTable {
				for it := e.Value().Children(); it.Next(); {
					add(append([]string{"host"}, nodeKeys(it.Node().Key())...))
				}
			}
		}
	}
	if err := p.Error(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return order, nil
}

func nodeKeys(it unstable.Iterator) []string {
	var keys []string
	for it.Next() {
		keys = append(keys, string(it.Node().Data))
	}
	return keys
}

// tlsConfig builds the client side of TLS for h.
func (h *hostConfig) tlsConfig() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: h.skipVerify}
	if len(h.ca) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		for _, p := range h.ca {
			pem, err := readBounded(p)
			if err != nil {
				return nil, fmt.Errorf("ca: %w", err)
			}
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("ca %s: no certificate in PEM form: %w", p, errdefs.ErrInvalidArgument)
			}
		}
		c.RootCAs = pool
	}
	for _, pair := range h.client {
		cert, err := readBounded(pair[0])
		if err != nil {
			return nil, fmt.Errorf("client: %w", err)
		}
		key := cert
		if pair[1] != "" {
			if key, err = readBounded(pair[1]); err != nil {
				return nil, fmt.Errorf("client: %w", err)
			}
		}
		kp, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("client %s: %w: %w", pair[0], err, errdefs.ErrInvalidArgument)
		}
		c.Certificates = append(c.Certificates, kp)
	}
	return c, nil
}

func readBounded(p string) ([]byte, error) {
	st, err := os.Stat(p)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxHostsFile {
		return nil, fmt.Errorf("%s: want a regular file of at most %d bytes: %w", p, maxHostsFile, errdefs.ErrInvalidArgument)
	}
	return os.ReadFile(p)
}
