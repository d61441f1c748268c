package pulls

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	digest "github.com/opencontainers/go-digest"

	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/pullapi"
)

type puller func(context.Context, imageservice.PullRequest) (*imageservice.Image, error)

func (p puller) Pull(ctx context.Context, r imageservice.PullRequest) (*imageservice.Image, error) {
	return p(ctx, r)
}

func serve(t *testing.T, p puller) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(p)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	return socket
}

func TestPull(t *testing.T) {
	want := digest.FromString("config")
	layer := digest.FromString("layer")
	socket := serve(t, func(_ context.Context, r imageservice.PullRequest) (*imageservice.Image, error) {
		if r.Ref != "example.org/a b:1" {
			t.Errorf("ref %q", r.Ref)
		}
		for i := range int64(1000) { // far more than is sent
			r.Progress(imageservice.Progress{Layer: layer, Done: i + 1, Total: 1000, Complete: i == 999})
		}
		return &imageservice.Image{ID: want}, nil
	})
	var got []pullapi.Message
	id, err := pullapi.Pull(t.Context(), socket, "example.org/a b:1", func(m pullapi.Message) { got = append(got, m) })
	if err != nil || id != want.String() {
		t.Fatalf("%q, %v", id, err)
	}
	if n := len(got); n == 0 || n > 10 || got[n-1] != (pullapi.Message{Layer: layer.String(), Done: 1000, Total: 1000, Complete: true}) {
		t.Errorf("progress %v", got)
	}
}

func TestPullErrors(t *testing.T) {
	socket := serve(t, func(context.Context, imageservice.PullRequest) (*imageservice.Image, error) {
		return nil, errors.New("manifest unknown")
	})
	if _, err := pullapi.Pull(t.Context(), socket, "x", nil); err == nil || err.Error() != "manifest unknown" {
		t.Errorf("got %v", err)
	}
	if _, err := pullapi.Pull(t.Context(), socket, "", nil); err == nil {
		t.Error("an empty reference must fail")
	}
	if _, err := pullapi.Pull(t.Context(), filepath.Join(t.TempDir(), "none"), "x", nil); !errors.Is(err, pullapi.ErrNoServer) {
		t.Errorf("got %v, want ErrNoServer", err)
	}
}

func TestPullEndsWithTheClient(t *testing.T) {
	ended := make(chan struct{})
	socket := serve(t, func(ctx context.Context, _ imageservice.PullRequest) (*imageservice.Image, error) {
		defer close(ended)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := pullapi.Pull(ctx, socket, "x", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("the pull goes on without its client")
	}
}

func TestSocketFor(t *testing.T) {
	if got := pullapi.SocketFor("/run/berth/berth.sock"); got != "/run/berth/berth-api.sock" {
		t.Error(got)
	}
}
