package testimage

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Registry is an OCI registry in memory, on plain HTTP.
type Registry struct {
	addr   string
	server *http.Server
	done   chan struct{}
	inside http.Handler
}

// Serve starts a registry on addr ("127.0.0.1:0" takes a free port). wrap, when
// not nil, sees every request of a client before the registry does: tests add
// authentication and faults there. Push does not go through it.
func Serve(addr string, wrap func(http.Handler) http.Handler) (*Registry, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	r := &Registry{
		addr:   l.Addr().String(),
		done:   make(chan struct{}),
		inside: registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(true)),
	}
	h := r.inside
	if wrap != nil {
		h = wrap(h)
	}
	r.server = &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: time.Minute}
	go func() {
		defer close(r.done)
		r.server.Serve(l)
	}()
	return r, nil
}

// Addr is host:port of the registry.
func (r *Registry) Addr() string { return r.addr }

// Ref is the reference of a repository ("web:1") in this registry.
func (r *Registry) Ref(repository string) string { return r.addr + "/" + repository }

// Push stores img under repository ("web:1") and returns its full reference.
func (r *Registry) Push(ctx context.Context, repository string, img v1.Image) (string, error) {
	ref, err := name.ParseReference(r.Ref(repository), name.Insecure)
	if err != nil {
		return "", err
	}
	if err := remote.Write(ref, img, r.options(ctx)...); err != nil {
		return "", fmt.Errorf("push %s: %w", ref, err)
	}
	return ref.String(), nil
}

// PushIndex stores an index with all its images under repository.
func (r *Registry) PushIndex(ctx context.Context, repository string, idx v1.ImageIndex) (string, error) {
	ref, err := name.ParseReference(r.Ref(repository), name.Insecure)
	if err != nil {
		return "", err
	}
	if err := remote.WriteIndex(ref, idx, r.options(ctx)...); err != nil {
		return "", fmt.Errorf("push %s: %w", ref, err)
	}
	return ref.String(), nil
}

func (r *Registry) options(ctx context.Context) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithTransport(direct{r.inside})}
}

// Close stops the registry and waits for its goroutine.
func (r *Registry) Close() error {
	err := r.server.Close()
	<-r.done
	return err
}

// direct hands requests to a handler without a network between.
type direct struct{ h http.Handler }

func (d direct) RoundTrip(req *http.Request) (*http.Response, error) {
	w := &answer{header: http.Header{}, code: http.StatusOK}
	if req.Body == nil {
		req.Body = http.NoBody
	}
	req = req.Clone(req.Context())
	req.RequestURI = req.URL.RequestURI()
	d.h.ServeHTTP(w, req)
	return w.response(req), nil
}
