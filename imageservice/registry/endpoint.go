package registry

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	maxRedirects  = 10
	maxErrorBody  = 64 << 10
	maxRetryAfter = 2 * time.Minute
)

// endpoint is one host as a place of one repository.
type endpoint struct {
	client    *Client
	host      hostConfig
	repo      string
	ns        string // what a mirror is asked to stand in for
	creds     *Credentials
	transport *http.Transport

	mu    sync.Mutex
	base  url.URL
	basic bool      // the host asked for basic authentication
	token string    // bearer token
	until time.Time // of the token
}

func (e *endpoint) url(kind, name string) *url.URL {
	e.mu.Lock()
	u := e.base
	e.mu.Unlock()
	u.Path += "/" + e.repo + "/" + kind + "/" + name
	if e.ns != "" {
		u.RawQuery = url.Values{"ns": {e.ns}}.Encode()
	}
	return &u
}

// do sends a GET or HEAD with retries and returns an answer with a 2xx status.
// The caller closes its body.
func (e *endpoint) do(ctx context.Context, method, kind, name string, header http.Header, attempts int) (*http.Response, error) {
	var err error
	for try := 0; ; try++ {
		if err = e.client.gate(ctx, e.host.base.Host); err != nil {
			return nil, err
		}
		var resp *http.Response
		var pause time.Duration
		resp, err = e.authorized(ctx, method, kind, name, header)
		if err == nil {
			if resp.StatusCode/100 == 2 {
				return resp, nil
			}
			pause = retryAfter(resp)
			err = e.statusError(resp)
			if resp.StatusCode == http.StatusTooManyRequests {
				if pause == 0 {
					pause = e.backoff(try)
				}
				e.client.closeGate(e.host.base.Host, pause)
			}
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if !errdefs.IsUnavailable(err) && !errdefs.IsResourceExhausted(err) || try+1 >= attempts {
			return nil, err
		}
		if werr := sleep(ctx, max(pause, e.backoff(try))); werr != nil {
			return nil, fmt.Errorf("%w: %w", err, werr)
		}
	}
}

// backoff doubles from the configured start to 10 s; half of it is random so
// that a herd of nodes does not come back together.
func (e *endpoint) backoff(try int) time.Duration {
	d := min(e.client.cfg.Backoff<<min(try, 10), 10*time.Second)
	return d/2 + rand.N(d/2+1)
}

func retryAfter(resp *http.Response) time.Duration {
	v := resp.Header.Get("Retry-After")
	if s, err := strconv.Atoi(v); err == nil && s > 0 {
		return min(time.Duration(s)*time.Second, maxRetryAfter)
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(0, min(time.Until(t), maxRetryAfter))
	}
	return 0
}

// authorized sends one request, once more when the host asks for credentials
// or no longer accepts the token.
func (e *endpoint) authorized(ctx context.Context, method, kind, name string, header http.Header) (*http.Response, error) {
	resp, err := e.roundTrip(ctx, method, e.url(kind, name), header)
	var notTLS tls.RecordHeaderError
	if errors.As(err, &notTLS) && e.downgrade() {
		resp, err = e.roundTrip(ctx, method, e.url(kind, name), header)
	}
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusUnauthorized {
		return resp, nil
	}
	again, err := e.answer(ctx, resp)
	if err != nil {
		drop(resp)
		return nil, err
	}
	if !again {
		return resp, nil
	}
	drop(resp)
	return e.roundTrip(ctx, method, e.url(kind, name), header)
}

// downgrade switches a loopback host without configuration to plain HTTP.
func (e *endpoint) downgrade() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.host.guessScheme {
		return false
	}
	e.base.Scheme = "http"
	return true
}

// roundTrip sends one request and follows redirects itself: the standard
// client's rules would send our header again after a way through another host.
func (e *endpoint) roundTrip(ctx context.Context, method string, u *url.URL, header http.Header) (*http.Response, error) {
	home := true // still on the configured host
	for range maxRedirects {
		req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
		if err != nil {
			return nil, fmt.Errorf("registry %s: malformed address: %w", e.host.base.Host, errdefs.ErrInvalidArgument)
		}
		for k, v := range header {
			req.Header[k] = v
		}
		req.Header.Set("User-Agent", e.client.cfg.UserAgent)
		tr := e.client.plain
		if home {
			tr = e.transport
			for k, v := range e.host.header {
				req.Header[http.CanonicalHeaderKey(k)] = v
			}
			e.authorize(req)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return nil, e.netError(ctx, u, err)
		}
		switch resp.StatusCode {
		case 301, 302, 303, 307, 308:
		default:
			if !home && resp.StatusCode == http.StatusUnauthorized {
				// Not our registry's refusal: never answer it with credentials.
				defer drop(resp)
				return nil, fmt.Errorf("registry %s: %s to which it redirected wants credentials: %w", e.host.base.Host, u.Host, errdefs.ErrPermissionDenied)
			}
			return resp, nil
		}
		next, err := u.Parse(resp.Header.Get("Location"))
		drop(resp)
		if err != nil || next.Host == "" || next.User != nil || (next.Scheme != "https" && next.Scheme != "http") {
			return nil, fmt.Errorf("registry %s: malformed redirect: %w", e.host.base.Host, errdefs.ErrInvalidArgument)
		}
		if u.Scheme == "https" && next.Scheme == "http" {
			return nil, fmt.Errorf("registry %s: redirect from https to http at %s: %w", e.host.base.Host, next.Host, errdefs.ErrPermissionDenied)
		}
		home = home && next.Scheme == u.Scheme && next.Host == u.Host
		u = next
	}
	return nil, fmt.Errorf("registry %s: more than %d redirects: %w", e.host.base.Host, maxRedirects, errdefs.ErrInvalidArgument)
}

// netError is err without the URL, whose query may be a signature.
func (e *endpoint) netError(ctx context.Context, u *url.URL, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	return fmt.Errorf("registry %s: %w: %w", u.Host, err, errdefs.ErrUnavailable)
}

// statusError turns an answer into an error of the right kind and closes it.
func (e *endpoint) statusError(resp *http.Response) error {
	text := http.StatusText(resp.StatusCode)
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	drop(resp)
	var doc struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal(body, &doc) == nil && len(doc.Errors) > 0 {
		text = e.redact(doc.Errors[0].Code + ": " + doc.Errors[0].Message)
	}
	var kind error = errdefs.ErrUnknown
	switch code := resp.StatusCode; {
	case code == http.StatusNotFound:
		kind = errdefs.ErrNotFound
	case code == http.StatusUnauthorized:
		kind = errdefs.ErrUnauthenticated
	case code == http.StatusForbidden:
		kind = errdefs.ErrPermissionDenied
	case code == http.StatusTooManyRequests:
		kind = errdefs.ErrResourceExhausted
	case code == http.StatusRequestTimeout || code >= 500:
		kind = errdefs.ErrUnavailable
	}
	return fmt.Errorf("registry %s: status %d %s: %w", e.host.base.Host, resp.StatusCode, text, kind)
}

// redact makes text from a registry fit for an error: short, printable, and
// without the secrets that the registry was sent and may have echoed.
func (e *endpoint) redact(s string) string {
	secrets := []string{e.tokenNow()}
	if e.creds != nil {
		secrets = append(secrets, e.creds.Password, e.creds.IdentityToken, e.creds.RegistryToken)
	}
	for _, x := range secrets {
		if x != "" {
			s = strings.ReplaceAll(s, x, "***")
		}
	}
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, s)
	if len(s) > 300 {
		s = s[:300]
	}
	return strings.ToValidUTF8(s, "")
}

// drop closes an answer, reading a little so that the connection can be reused.
func drop(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 4<<10)
	_ = resp.Body.Close()
}
