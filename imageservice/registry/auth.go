package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

const maxTokenBody = 64 << 10

// authorize adds what the host is known to want.
func (e *endpoint) authorize(req *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.token != "" && (e.until.IsZero() || time.Now().Before(e.until)):
		req.Header.Set("Authorization", "Bearer "+e.token)
	case e.creds != nil && e.creds.RegistryToken != "":
		req.Header.Set("Authorization", "Bearer "+e.creds.RegistryToken)
	case e.basic:
		req.SetBasicAuth(e.creds.Username, e.creds.Password)
	}
}

func (e *endpoint) tokenNow() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.token
}

// answer prepares e for the challenge in a 401. It reports whether asking again
// can help.
func (e *endpoint) answer(ctx context.Context, resp *http.Response) (bool, error) {
	sent := resp.Request.Header.Get("Authorization")
	if e.creds != nil && e.creds.RegistryToken != "" {
		return false, nil // the user's token is used as it is or not at all
	}
	challenges := parseChallenges(resp.Header.Values("WWW-Authenticate"))
	find := func(scheme string) *challenge {
		if i := slices.IndexFunc(challenges, func(c challenge) bool { return c.scheme == scheme }); i >= 0 {
			return &challenges[i]
		}
		return nil
	}
	if c := find("bearer"); c != nil {
		if now := e.tokenNow(); now != "" && sent != "Bearer "+now {
			return true, nil // another request of this pull has fetched a newer one
		}
		return true, e.fetchToken(ctx, c)
	}
	if find("basic") != nil && e.creds != nil && e.creds.Username != "" && sent == "" {
		e.mu.Lock()
		e.basic = true
		e.mu.Unlock()
		return true, nil
	}
	return false, nil
}

// checkRealm decides whether the token service that a registry announces may
// see the user's credentials: over https, or on the registry's own host when
// the registry is plain HTTP by configuration. Link-local addresses (instance
// metadata services) are never asked.
func (e *endpoint) checkRealm(realm string) (*url.URL, error) {
	refuse := func(why string) (*url.URL, error) {
		return nil, fmt.Errorf("registry %s: token service refused: %s: %w", e.host.base.Host, why, errdefs.ErrPermissionDenied)
	}
	u, err := url.Parse(realm)
	if err != nil || u.Host == "" || u.User != nil {
		return refuse("its address is malformed")
	}
	e.mu.Lock()
	own := e.base
	e.mu.Unlock()
	sameHost := u.Hostname() == own.Hostname()
	if a, err := netip.ParseAddr(u.Hostname()); err == nil && a.IsLinkLocalUnicast() && !sameHost {
		return refuse("its address is link-local")
	}
	switch {
	case u.Scheme == "https":
	case u.Scheme == "http" && own.Scheme == "http" && sameHost:
	default:
		return refuse("it is on another host and not https: " + u.Scheme + "://" + u.Host)
	}
	return u, nil
}

// fetchToken gets a bearer token from the service that c names.
func (e *endpoint) fetchToken(ctx context.Context, c *challenge) error {
	realm, err := e.checkRealm(c.params["realm"])
	if err != nil {
		return err
	}
	scope := c.params["scope"]
	if scope == "" {
		scope = "repository:" + e.repo + ":pull"
	}
	tr := e.client.plain
	if realm.Host == e.host.base.Host {
		tr = e.transport // the TLS settings of a host are for that host only
	}
	var last error
	for try := range e.client.cfg.Attempts {
		if try > 0 {
			if err := sleep(ctx, e.backoff(try-1)); err != nil {
				return fmt.Errorf("%w: %w", last, err)
			}
		}
		req, err := e.tokenRequest(ctx, realm, c.params["service"], scope)
		if err != nil {
			return err
		}
		if last = e.exchange(ctx, tr, req); last == nil || !errdefs.IsUnavailable(last) {
			return last
		}
	}
	return last
}

func (e *endpoint) tokenRequest(ctx context.Context, realm *url.URL, service, scope string) (*http.Request, error) {
	u := *realm
	if e.creds != nil && e.creds.IdentityToken != "" {
		form := url.Values{
			"grant_type": {"refresh_token"}, "refresh_token": {e.creds.IdentityToken},
			"client_id": {"berth"}, "scope": {scope}, "service": {service},
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(form.Encode()))
		if err != nil {
			return nil, fmt.Errorf("registry %s: malformed token service: %w", e.host.base.Host, errdefs.ErrInvalidArgument)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		return req, nil
	}
	q := u.Query()
	if service != "" {
		q.Set("service", service)
	}
	q.Del("scope")
	for s := range strings.FieldsSeq(scope) {
		q.Add("scope", s)
	}
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("registry %s: malformed token service: %w", e.host.base.Host, errdefs.ErrInvalidArgument)
	}
	if e.creds != nil && e.creds.Username != "" {
		req.SetBasicAuth(e.creds.Username, e.creds.Password)
	}
	return req, nil
}

// exchange sends a token request and keeps the token. It follows no redirect:
// the request carries the user's credentials.
func (e *endpoint) exchange(ctx context.Context, tr *http.Transport, req *http.Request) error {
	ctx, cancel := context.WithTimeout(ctx, 2*e.client.cfg.HeaderTimeout)
	defer cancel()
	req = req.WithContext(ctx)
	req.Header.Set("User-Agent", e.client.cfg.UserAgent)
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return e.netError(context.WithoutCancel(ctx), req.URL, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("token service %s: %w", req.URL.Host, e.statusError(resp))
	}
	defer drop(resp)
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenBody+1))
	if err != nil {
		return e.netError(context.WithoutCancel(ctx), req.URL, err)
	}
	var doc struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int    `json:"expires_in"`
	}
	if len(body) > maxTokenBody || json.Unmarshal(body, &doc) != nil {
		return fmt.Errorf("token service %s: malformed answer: %w", req.URL.Host, errdefs.ErrInvalidArgument)
	}
	if doc.Token == "" {
		doc.Token = doc.AccessToken
	}
	if doc.Token == "" || strings.ContainsAny(doc.Token, "\r\n") {
		return fmt.Errorf("token service %s: answer without token: %w", req.URL.Host, errdefs.ErrInvalidArgument)
	}
	e.mu.Lock()
	e.token = doc.Token
	e.until = time.Time{}
	if doc.ExpiresIn > 0 {
		e.until = time.Now().Add(time.Duration(doc.ExpiresIn) * time.Second)
	}
	e.mu.Unlock()
	return nil
}
