// Package registry reads images from OCI distribution and Docker v2 registries.
//
// Trust: a Repository's credentials go to the registry that they belong to and
// to the token service which that registry announces (https, or on the
// registry's own host), and to nobody else: not to mirrors, redirect targets or
// the URLs inside descriptors (invariant I9). Every answer is bounded in size
// and time (I7), and nothing is returned whose digest was not checked, except
// the bytes of a blob, which the reader must hash itself (I8).
package registry

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// Config is how a Client behaves. Zero values mean the defaults.
type Config struct {
	// Dir holds <host>/hosts.toml files; empty means none.
	Dir string
	// HeaderTimeout bounds the wait for the head of an answer: 30 s.
	HeaderTimeout time.Duration
	// IdleTimeout bounds how long a body may bring next to nothing: 60 s.
	IdleTimeout time.Duration
	// Attempts is how often a request that may be repeated is tried: 5.
	Attempts int
	// Backoff is the first pause between attempts; it doubles each time: 250 ms.
	Backoff time.Duration
	// UserAgent names the client to registries.
	UserAgent string
}

// Client makes requests to registries. It is safe for concurrent use.
type Client struct {
	cfg   Config
	plain *http.Transport // for hosts that no configuration speaks about

	mu    sync.Mutex
	trans map[*http.Transport]struct{} // the ones made for configured hosts
	gates map[string]time.Time         // host -> not before, after a 429
}

// New returns a client.
func New(cfg Config) *Client {
	if cfg.HeaderTimeout <= 0 {
		cfg.HeaderTimeout = 30 * time.Second
	}
	if cfg.IdleTimeout <= 0 {
		cfg.IdleTimeout = 60 * time.Second
	}
	if cfg.Attempts <= 0 {
		cfg.Attempts = 5
	}
	if cfg.Backoff <= 0 {
		cfg.Backoff = 250 * time.Millisecond
	}
	if cfg.UserAgent == "" {
		cfg.UserAgent = "berth"
	}
	c := &Client{cfg: cfg, trans: map[*http.Transport]struct{}{}, gates: map[string]time.Time{}}
	c.plain = c.transport()
	return c
}

// Close drops idle connections.
func (c *Client) Close() {
	c.plain.CloseIdleConnections()
	c.mu.Lock()
	defer c.mu.Unlock()
	for t := range c.trans {
		t.CloseIdleConnections()
	}
}

func (c *Client) transport() *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 15 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:   15 * time.Second,
		ResponseHeaderTimeout: c.cfg.HeaderTimeout,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       30 * time.Second,
		ForceAttemptHTTP2:     true,
		// Content-Encoding would put bytes between us and the digest.
		DisableCompression:     true,
		MaxResponseHeaderBytes: 256 << 10,
		ReadBufferSize:         64 << 10,
	}
}

// gate waits until host may be asked again after it answered 429.
func (c *Client) gate(ctx context.Context, host string) error {
	c.mu.Lock()
	wait := time.Until(c.gates[host])
	if wait <= 0 {
		delete(c.gates, host)
	}
	c.mu.Unlock()
	return sleep(ctx, wait)
}

func (c *Client) closeGate(host string, d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if until := time.Now().Add(d); until.After(c.gates[host]) {
		c.gates[host] = until
	}
}

// sleep waits for d, or fails at once if ctx will end before that.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	if end, ok := ctx.Deadline(); ok && time.Until(end) < d {
		return context.DeadlineExceeded
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// Credentials are what a user gave for one registry. At most one of the kinds
// is used, in this order: RegistryToken, IdentityToken, Username and Password.
type Credentials struct {
	Username, Password string
	// IdentityToken is an OAuth2 refresh token.
	IdentityToken string
	// RegistryToken is sent as it is as a bearer token.
	RegistryToken string
}

// Repository is one repository of one registry, with one set of credentials.
// It keeps tokens, so it should live as long as a pull. Safe for concurrent use.
type Repository struct {
	client    *Client
	name      reference.Named
	path      string
	endpoints []*endpoint
}

// Repository prepares access to the repository that ref names. creds (may be
// nil) are used for hosts for which credsFor returns true; the registry that
// ref names is asked about by its domain ("docker.io").
func (c *Client) Repository(ref reference.Named, creds *Credentials, credsFor func(host string) bool) (*Repository, error) {
	domain := reference.Domain(ref)
	hosts, err := hostsFor(c.cfg.Dir, domain)
	if err != nil {
		return nil, err
	}
	r := &Repository{client: c, name: reference.TrimNamed(ref), path: reference.Path(ref)}
	for _, h := range hosts {
		e := &endpoint{client: c, host: h, repo: r.path, base: h.base}
		if !h.server && h.base.Host != domain {
			e.ns = domain
		}
		subject := h.base.Host
		if h.server {
			subject = domain
		}
		if creds != nil && credsFor(subject) {
			e.creds = creds
		}
		if e.transport, err = c.transportFor(&h); err != nil {
			return nil, fmt.Errorf("registry %s: %w", h.base.Host, err)
		}
		r.endpoints = append(r.endpoints, e)
	}
	return r, nil
}

// Close drops the connections that were made for this repository alone.
func (r *Repository) Close() {
	for _, e := range r.endpoints {
		if e.transport != r.client.plain {
			e.transport.CloseIdleConnections()
			r.client.mu.Lock()
			delete(r.client.trans, e.transport)
			r.client.mu.Unlock()
		}
	}
}

func (c *Client) transportFor(h *hostConfig) (*http.Transport, error) {
	if !h.skipVerify && len(h.ca) == 0 && len(h.client) == 0 {
		return c.plain, nil
	}
	cfg, err := h.tlsConfig()
	if err != nil {
		return nil, err
	}
	t := c.transport()
	t.TLSClientConfig = cfg
	c.mu.Lock()
	c.trans[t] = struct{}{}
	c.mu.Unlock()
	return t, nil
}

// each tries f on the endpoints that may do what is asked, mirrors first. The
// error of the registry itself, the last one, is what is reported.
func (r *Repository) each(ctx context.Context, can func(*endpoint) bool, f func(e *endpoint, attempts int) error) error {
	var usable []*endpoint
	for _, e := range r.endpoints {
		if can(e) {
			usable = append(usable, e)
		}
	}
	if len(usable) == 0 {
		return fmt.Errorf("registry %s: no host is configured for this: %w", reference.Domain(r.name), errdefs.ErrFailedPrecondition)
	}
	var errs []error
	for i, e := range usable {
		attempts := 1 // another host is a better second try than the same one
		if i == len(usable)-1 {
			attempts = r.client.cfg.Attempts
		}
		err := f(e, attempts)
		if err == nil || ctx.Err() != nil {
			return err
		}
		errs = append(errs, err)
	}
	last := errs[len(errs)-1]
	if len(errs) > 1 {
		// %v: the kind of the answer is the registry's, not a mirror's.
		return fmt.Errorf("%w (mirrors: %v)", last, errors.Join(errs[:len(errs)-1]...))
	}
	return last
}
