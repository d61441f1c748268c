// Package pulls serves the pull socket (internal/pullapi): pulls that a local
// client can watch.
package pulls

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"time"

	"github.com/berth-runtime/berth/cri"
	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/pullapi"
)

// Puller is the image service.
type Puller interface {
	Pull(ctx context.Context, r imageservice.PullRequest) (*imageservice.Image, error)
}

// interval is how often progress is sent at most.
const interval = 100 * time.Millisecond

// NewServer serves pulls of p.
func NewServer(p Puller) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/pull", func(w http.ResponseWriter, r *http.Request) { servePull(w, r, p) })
	return &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
}

func servePull(w http.ResponseWriter, r *http.Request, p Puller) {
	ref := r.URL.Query().Get("ref")
	if ref == "" {
		http.Error(w, "query parameter ref: missing", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/jsonl")
	s := &sender{enc: json.NewEncoder(w), flush: http.NewResponseController(w).Flush, pending: map[string]pullapi.Message{}}
	stop := make(chan struct{})
	var sending sync.WaitGroup
	sending.Go(func() { s.run(stop) })
	img, err := p.Pull(r.Context(), imageservice.PullRequest{Ref: ref, Progress: s.progress})
	close(stop)
	sending.Wait()
	last := pullapi.Message{}
	if err != nil {
		last.Error = cri.Message(err)
	} else {
		last.Image = img.ID.String()
	}
	_ = s.enc.Encode(last)
}

// sender collects progress, which comes faster than anybody reads, and sends
// the newest of each layer.
type sender struct {
	enc   *json.Encoder
	flush func() error

	mu      sync.Mutex
	pending map[string]pullapi.Message
}

func (s *sender) progress(p imageservice.Progress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	layer := p.Layer.String()
	s.pending[layer] = pullapi.Message{Layer: layer, Done: p.Done, Total: p.Total, Complete: p.Complete}
}

func (s *sender) run(stop <-chan struct{}) {
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			s.send()
		case <-stop:
			s.send()
			return
		}
	}
}

// send writes without the lock: a client that does not read must not hold up
// the pull, which may have other callers.
func (s *sender) send() {
	s.mu.Lock()
	batch := s.pending
	s.pending = map[string]pullapi.Message{}
	s.mu.Unlock()
	for _, m := range batch {
		if s.enc.Encode(m) != nil {
			return
		}
	}
	if len(batch) > 0 {
		_ = s.flush()
	}
}
