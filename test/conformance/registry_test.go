package conformance

import (
	"context"
	"net/http"
	"path"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/berth-runtime/berth/test/testimage"
)

// registry is the suite's image registry on loopback. A test may put a fault
// before a repository: its requests then go to the fault, which may pass them on.
type registry struct {
	*testimage.Registry
	prog  string // reference of the test program's image
	image v1.Image

	mu     sync.Mutex
	faults map[string]func(http.ResponseWriter, *http.Request, http.Handler)
}

func serveImages(string) (*registry, error) {
	r := &registry{faults: map[string]func(http.ResponseWriter, *http.Request, http.Handler){}}
	var err error
	if r.Registry, err = testimage.Serve("127.0.0.1:0", r.wrap); err != nil {
		return nil, err
	}
	bg := context.Background()
	if r.image, err = testimage.Program(bg, "", testimage.Gzip); err != nil {
		return nil, err
	}
	r.prog, err = r.Push(bg, "prog:1", r.image)
	return r, err
}

func (r *registry) close() { _ = r.Close() }

func (r *registry) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.mu.Lock()
		var fault func(http.ResponseWriter, *http.Request, http.Handler)
		for repo, f := range r.faults {
			if strings.HasPrefix(q.URL.Path, path.Join("/v2", repo)+"/") {
				fault = f
			}
		}
		r.mu.Unlock()
		if fault != nil {
			fault(w, q, next)
			return
		}
		next.ServeHTTP(w, q)
	})
}

// fault puts f before repo until the returned function is called.
func (r *registry) fault(repo string, f func(http.ResponseWriter, *http.Request, http.Handler)) (heal func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults[repo] = f
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.faults, repo)
	}
}
