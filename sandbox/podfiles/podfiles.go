// Package podfiles writes the texts of a pod's /etc/hosts, /etc/hostname and
// /etc/resolv.conf. The texts are built from validated fields only: a control
// byte or a separator in a request would add lines of the requester's choice to
// a file that every program of the pod trusts (invariant I12).
package podfiles

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/sandbox/model"
)

// maxHostname is HOST_NAME_MAX: the kernel refuses a longer name in sethostname(2).
const maxHostname = 64

// maxResolvConf bounds the host's file; real ones are below 4 KiB.
const maxResolvConf = 1 << 20

const (
	hostResolvConf = "/etc/resolv.conf"
	// systemd-resolved writes the real servers here. Its stub 127.0.0.53 listens on
	// the host's loopback, which a pod cannot reach.
	resolvedConf = "/run/systemd/resolve/resolv.conf"
	resolvedStub = "127.0.0.53"
)

// ValidHostname reports whether name can be a pod's host name. Dots are
// allowed: the kubelet sends fully qualified names on request.
func ValidHostname(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("hostname: empty; set it, or use the node's network: %w", errdefs.ErrInvalidArgument)
	case len(name) > maxHostname:
		return fmt.Errorf("hostname %q: longer than %d bytes; shorten it: %w", name, maxHostname, errdefs.ErrInvalidArgument)
	}
	for i := range len(name) {
		c := name[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte("/#:\\", c) >= 0 {
			return fmt.Errorf("hostname %q: byte %q is not allowed; use letters, digits, '-' and '.': %w", name, c, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Hostname returns the text of /etc/hostname.
func Hostname(name string) ([]byte, error) {
	if err := ValidHostname(name); err != nil {
		return nil, err
	}
	return []byte(name + "\n"), nil
}

// Hosts returns the text of /etc/hosts for a pod with the given host name and
// addresses (primary first). A qualified name is followed by its first label.
func Hosts(name string, ips []string) ([]byte, error) {
	if err := ValidHostname(name); err != nil {
		return nil, err
	}
	names := name
	if short, _, dotted := strings.Cut(name, "."); dotted && short != "" {
		names += "\t" + short
	}
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n" +
		"::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"fe00::\tip6-localnet\n" +
		"fe00::\tip6-mcastprefix\n" +
		"fe00::1\tip6-allnodes\n" +
		"fe00::2\tip6-allrouters\n")
	for _, ip := range ips {
		a, err := netip.ParseAddr(ip)
		if err != nil || a.Zone() != "" {
			return nil, fmt.Errorf("pod address %q: not an IP address: %w", ip, errdefs.ErrInvalidArgument)
		}
		fmt.Fprintf(&b, "%s\t%s\n", a, names)
	}
	return b.Bytes(), nil
}

// ResolvConf returns the text of /etc/resolv.conf. A nil dns means the host's
// servers, read at each call; a non-nil empty one means an empty file, which is
// what a pod with DNS policy Default gets from a kubelet with an empty --resolv-conf.
func ResolvConf(dns *model.DNS) ([]byte, error) {
	if dns == nil {
		return fromHost(hostResolvConf, resolvedConf)
	}
	var b bytes.Buffer
	if err := list(&b, "dns_config.searches", "search", dns.Searches); err != nil {
		return nil, err
	}
	for i, s := range dns.Servers {
		if _, err := netip.ParseAddr(s); err != nil {
			return nil, fmt.Errorf("dns_config.servers[%d] %q: not an IP address: %w", i, s, errdefs.ErrInvalidArgument)
		}
		if err := word(s); err != nil { // a zone may hold any byte
			return nil, fmt.Errorf("dns_config.servers[%d] %q: %w", i, s, err)
		}
		b.WriteString("nameserver " + s + "\n")
	}
	if err := list(&b, "dns_config.options", "options", dns.Options); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// list writes one keyword line of words; nothing without words.
func list(b *bytes.Buffer, field, keyword string, words []string) error {
	for i, w := range words {
		if err := word(w); err != nil {
			return fmt.Errorf("%s[%d] %q: %w", field, i, w, err)
		}
	}
	if len(words) > 0 {
		b.WriteString(keyword + " " + strings.Join(words, " ") + "\n")
	}
	return nil
}

// word accepts what is one word of resolv.conf(5).
func word(s string) error {
	if s == "" {
		return fmt.Errorf("empty value: %w", errdefs.ErrInvalidArgument)
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || c == '#' || c == ';' {
			return fmt.Errorf("byte %q is not allowed; remove it: %w", c, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// fromHost reads the host's resolv.conf, or systemd-resolved's real list when
// the host's file names only its stub. A missing file is an empty one.
func fromHost(path, resolved string) ([]byte, error) {
	text, err := read(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("host resolv.conf: %w", err)
	}
	if s := nameservers(text); len(s) != 1 || s[0] != resolvedStub {
		return text, nil
	}
	upstream, err := read(resolved)
	if errors.Is(err, fs.ErrNotExist) {
		return text, nil
	}
	if err != nil {
		return nil, fmt.Errorf("resolv.conf of systemd-resolved: %w", err)
	}
	return upstream, nil
}

func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxResolvConf+1))
	if err == nil && len(b) > maxResolvConf {
		err = fmt.Errorf("%s: larger than %d bytes", path, maxResolvConf)
	}
	return b, err
}

func nameservers(text []byte) []string {
	var out []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "nameserver" {
			out = append(out, f[1])
		}
	}
	return out
}
