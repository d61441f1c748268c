package imageservice

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/berth-runtime/berth/imageservice/registry"
	"github.com/berth-runtime/berth/test/pace"
)

// hub is a registry on loopback with a place to inject faults.
type hub struct {
	*httptest.Server
	fault atomic.Pointer[func(w http.ResponseWriter, r *http.Request) bool] // true: answered
	blobs atomic.Int64                                                      // GETs of blobs
}

func newHub(t testing.TB) *hub {
	h := &hub{}
	inner := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	h.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f := h.fault.Load(); f != nil && (*f)(w, r) {
			return
		}
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			h.blobs.Add(1)
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(h.Close)
	return h
}

func (h *hub) host() string { return strings.TrimPrefix(h.URL, "http://") }

func (h *hub) inject(f func(w http.ResponseWriter, r *http.Request) bool) { h.fault.Store(&f) }

func isBlob(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
}

func tarOf(t testing.TB, files map[string]string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for n, c := range files {
		if err := w.WriteHeader(&tar.Header{Name: n, Mode: 0o644, Size: int64(len(c)), ModTime: time.Unix(1e9, 0)}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, c); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// rawLayer is a layer whose blob and diff ID are given, not computed.
type rawLayer struct {
	v1.Layer
	diff v1.Hash
}

func (l rawLayer) DiffID() (v1.Hash, error) { return l.diff, nil }

func compressed(t testing.TB, kind string, raw []byte) v1.Layer {
	var b bytes.Buffer
	mt := types.OCIUncompressedLayer
	switch kind {
	case "gzip":
		w := gzip.NewWriter(&b)
		_, _ = w.Write(raw)
		_ = w.Close()
		mt = types.DockerLayer
	case "zstd":
		w, err := zstd.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = w.Write(raw)
		_ = w.Close()
		mt = types.OCILayerZStd
	default:
		b.Write(raw)
	}
	diff, _, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	return rawLayer{static.NewLayer(b.Bytes(), mt), diff}
}

func imageOf(t testing.TB, layers ...v1.Layer) v1.Image {
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", runtime.GOARCH
	cfg.Config.Env = []string{"A=b"}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	return img
}

func push(t testing.TB, ref string, img v1.Image) {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, img); err != nil {
		t.Fatal(err)
	}
}

func newService(t testing.TB, root string) *Service {
	t.Helper()
	s, err := open(t.Context(), Config{Root: root}, registry.Config{
		HeaderTimeout: pace.Wait(500 * time.Millisecond), IdleTimeout: pace.Wait(300 * time.Millisecond), Attempts: 3, Backoff: time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// nothingLeft asserts that the store holds no layer, no staging and no record.
func nothingLeft(t testing.TB, root string) {
	t.Helper()
	for _, d := range []string{"layers", "staging", "index"} {
		es, err := os.ReadDir(filepath.Join(root, d))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			t.Errorf("left behind: %s/%s", d, e.Name())
		}
	}
}

func content(t testing.TB, img *Image, file string) string {
	t.Helper()
	for _, d := range img.Layers {
		if b, err := os.ReadFile(filepath.Join(d, file)); err == nil {
			return string(b)
		}
	}
	t.Fatalf("no %s in %v", file, img.Layers)
	return ""
}

func TestPull(t *testing.T) {
	h := newHub(t)
	root := t.TempDir()
	s := newService(t, root)
	ref := h.host() + "/a/b:v1"
	push(t, ref, imageOf(t,
		compressed(t, "gzip", tarOf(t, map[string]string{"one": "1"})),
		compressed(t, "zstd", tarOf(t, map[string]string{"two": "2"})),
		compressed(t, "", tarOf(t, map[string]string{"dir/three": "3"}))))
	var mu sync.Mutex
	var last Progress
	img, err := s.Pull(t.Context(), PullRequest{Ref: ref, Progress: func(p Progress) { mu.Lock(); last = p; mu.Unlock() }})
	if err != nil {
		t.Fatal(err)
	}
	if !last.Complete || last.Layer != "" {
		t.Errorf("last progress %+v", last)
	}
	if len(img.Layers) != 3 || content(t, img, "one")+content(t, img, "two")+content(t, img, "dir/three") != "123" {
		t.Errorf("layers %v", img.Layers)
	}
	if !strings.HasSuffix(filepath.Dir(img.Layers[0]), strings.TrimPrefix(img.Config.RootFS.DiffIDs[2].Encoded(), "")) {
		t.Errorf("layers not top first: %v", img.Layers)
	}
	if !slices.Equal(img.Tags, []string{ref}) || len(img.Digests) != 1 || img.Size <= 0 || img.Config.Config.Env[0] != "A=b" {
		t.Errorf("image %+v", img)
	}
	for _, r := range []string{ref, img.ID.String(), img.ID.Encoded(), img.ID.Encoded()[:12], img.Digests[0]} {
		if got, err := s.Status(r); err != nil || got != img {
			t.Errorf("Status(%q) = %v, %v", r, got, err)
		}
		if l := s.List(r); len(l) != 1 {
			t.Errorf("List(%q) = %v", r, l)
		}
	}
	if got, err := s.Status("nosuch"); got != nil || err != nil {
		t.Errorf("missing image: %v, %v", got, err)
	}
	if u := s.FsUsage(); u.Bytes == 0 || u.Inodes == 0 || u.At.IsZero() {
		t.Errorf("usage %+v", u)
	}

	// Again: the registry is asked, nothing is fetched.
	n := h.blobs.Load()
	if again, err := s.Pull(t.Context(), PullRequest{Ref: ref}); err != nil || again.ID != img.ID || h.blobs.Load() != n {
		t.Errorf("second pull: %v, %v, %d blobs", again, err, h.blobs.Load()-n)
	}

	// A restart finds it.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = newService(t, root)
	if got, err := s.Status(ref); err != nil || got == nil || got.ID != img.ID || !got.PulledAt.Equal(img.PulledAt) {
		t.Errorf("after restart: %+v, %v", got, err)
	}
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if len(s.List("")) != 0 {
		t.Error("removed image is listed")
	}
	if err := s.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, root)
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Errorf("removing a missing image: %v", err)
	}
}

func TestPullFaults(t *testing.T) {
	l := compressed(t, "gzip", tarOf(t, map[string]string{"f": strings.Repeat("content ", 1000)}))
	digest, err := l.Digest()
	if err != nil {
		t.Fatal(err)
	}
	isLayer := func(r *http.Request) bool { return isBlob(r) && strings.Contains(r.URL.Path, digest.Hex) }
	text := func(code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(code); return true }
	}
	blobBytes := func(change func([]byte) []byte) func(h *hub) func(http.ResponseWriter, *http.Request) bool {
		return func(h *hub) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				if !isLayer(r) {
					return false
				}
				rec := httptest.NewRecorder()
				off := h.fault.Swap(nil)
				h.Config.Handler.ServeHTTP(rec, r)
				h.fault.Store(off)
				b := change(rec.Body.Bytes())
				_, _ = w.Write(b)
				return true
			}
		}
	}
	for _, tt := range []struct {
		name  string
		fault func(h *hub) func(http.ResponseWriter, *http.Request) bool
		want  func(error) bool
	}{
		{"404", func(*hub) func(http.ResponseWriter, *http.Request) bool { return text(404) }, errdefs.IsNotFound},
		{"401", func(*hub) func(http.ResponseWriter, *http.Request) bool { return text(401) }, errdefs.IsUnauthorized},
		{"403", func(*hub) func(http.ResponseWriter, *http.Request) bool { return text(403) }, errdefs.IsPermissionDenied},
		{"500", func(*hub) func(http.ResponseWriter, *http.Request) bool { return text(500) }, errdefs.IsUnavailable},
		{"flipped bit", blobBytes(func(b []byte) []byte { b = bytes.Clone(b); b[len(b)/2] ^= 1; return b }), errdefs.IsDataLoss},
		{"truncated", blobBytes(func(b []byte) []byte { return b[:len(b)-1] }), func(err error) bool { return err != nil }},
		{"too long", blobBytes(func(b []byte) []byte { return append(bytes.Clone(b), 0) }), func(err error) bool { return err != nil }},
		{"hang before the header", func(*hub) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true }
		}, errdefs.IsUnavailable},
		{"hang in the body", func(*hub) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				if !isLayer(r) {
					return false
				}
				w.WriteHeader(200)
				w.(http.Flusher).Flush()
				<-r.Context().Done()
				return true
			}
		}, errdefs.IsUnavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHub(t)
			root := t.TempDir()
			s := newService(t, root)
			ref := h.host() + "/x:v1"
			push(t, ref, imageOf(t, l))
			h.inject(tt.fault(h))
			_, err := s.Pull(t.Context(), PullRequest{Ref: ref})
			t.Log(err)
			if err == nil || !tt.want(err) {
				t.Errorf("error %v", err)
			}
			if len(s.List("")) != 0 {
				t.Error("image visible")
			}
			nothingLeft(t, root)
			h.fault.Store(nil)
			if _, err := s.Pull(t.Context(), PullRequest{Ref: ref}); err != nil {
				t.Errorf("after the fault: %v", err)
			}
		})
	}
}

func TestPullDiffIDMismatch(t *testing.T) {
	h := newHub(t)
	root := t.TempDir()
	s := newService(t, root)
	l := compressed(t, "gzip", tarOf(t, map[string]string{"f": "x"})).(rawLayer)
	l.diff.Hex = strings.Repeat("0", 64)
	push(t, h.host()+"/x:v1", imageOf(t, l))
	if _, err := s.Pull(t.Context(), PullRequest{Ref: h.host() + "/x:v1"}); !errdefs.IsDataLoss(err) {
		t.Errorf("error %v", err)
	}
	nothingLeft(t, root)
}

// TestPullResumes breaks every blob connection after 100 KiB.
func TestPullResumes(t *testing.T) {
	h := newHub(t)
	s := newService(t, t.TempDir())
	raw := make([]byte, 1<<20)
	for i := range raw {
		raw[i] = byte(i * i >> 3)
	}
	layer := tarOf(t, map[string]string{"big": string(raw)})
	ref := h.host() + "/x:v1"
	push(t, ref, imageOf(t, compressed(t, "", layer)))
	var ranges atomic.Int64
	h.inject(func(w http.ResponseWriter, r *http.Request) bool {
		if !isBlob(r) {
			return false
		}
		var from int
		if v := r.Header.Get("Range"); v != "" {
			ranges.Add(1)
			_, _ = fmt.Sscanf(v, "bytes=%d-", &from)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(layer)-1, len(layer)))
		}
		rest := layer[from:]
		w.Header().Set("Content-Length", fmt.Sprint(len(rest)))
		if from > 0 {
			w.WriteHeader(206)
		}
		_, _ = w.Write(rest[:min(len(rest), len(layer)/2)])
		return true
	})
	// The config is a blob, too.
	inner := *h.fault.Load()
	cfgAware := func(w http.ResponseWriter, r *http.Request) bool {
		hash, _, _ := v1.SHA256(bytes.NewReader(layer))
		return strings.Contains(r.URL.Path, hash.Hex) && inner(w, r)
	}
	h.fault.Store(&cfgAware)
	img, err := s.Pull(t.Context(), PullRequest{Ref: ref})
	if err != nil {
		t.Fatal(err)
	}
	if content(t, img, "big") != string(raw) || ranges.Load() == 0 {
		t.Errorf("content differs or no range was asked for (%d)", ranges.Load())
	}
}

func TestPullRetries(t *testing.T) {
	for _, code := range []int{500, 429} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			h := newHub(t)
			s := newService(t, t.TempDir())
			ref := h.host() + "/x:v1"
			push(t, ref, imageOf(t, compressed(t, "gzip", tarOf(t, map[string]string{"f": "x"}))))
			var n atomic.Int64
			h.inject(func(w http.ResponseWriter, r *http.Request) bool {
				if n.Add(1) > 1 {
					return false
				}
				w.Header().Set("Retry-After", "1")
				w.WriteHeader(code)
				return true
			})
			start := time.Now()
			if _, err := s.Pull(t.Context(), PullRequest{Ref: ref}); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(start); d < time.Second {
				t.Errorf("asked again after %v, Retry-After was 1 s", d)
			}
		})
	}
}

func TestPullCancel(t *testing.T) {
	h := newHub(t)
	root := t.TempDir()
	s := newService(t, root)
	ref := h.host() + "/x:v1"
	push(t, ref, imageOf(t, compressed(t, "gzip", tarOf(t, map[string]string{"f": "x"}))))
	gone := make(chan struct{}, 10)
	h.inject(func(w http.ResponseWriter, r *http.Request) bool {
		<-r.Context().Done()
		gone <- struct{}{}
		return true
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Pull(ctx, PullRequest{Ref: ref}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	select {
	case <-gone:
	case <-time.After(pace.Wait(250 * time.Millisecond)):
		t.Error("the request went on after the last caller left")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, root)
}

func TestConcurrentPullsShareLayers(t *testing.T) {
	h := newHub(t)
	root := t.TempDir()
	s := newService(t, root)
	shared := compressed(t, "gzip", tarOf(t, map[string]string{"shared": strings.Repeat("s", 1<<20)}))
	const images = 6
	for i := range images {
		push(t, fmt.Sprintf("%s/x%d:v1", h.host(), i), imageOf(t, shared,
			compressed(t, "gzip", tarOf(t, map[string]string{"own": fmt.Sprint(i)}))))
	}
	hash, _ := shared.Digest()
	var n atomic.Int64
	h.inject(func(w http.ResponseWriter, r *http.Request) bool {
		if isBlob(r) && strings.Contains(r.URL.Path, hash.Hex) {
			n.Add(1)
			time.Sleep(100 * time.Millisecond)
		}
		return false
	})
	var wg sync.WaitGroup
	for i := range images * 2 {
		wg.Go(func() {
			img, err := s.Pull(t.Context(), PullRequest{Ref: fmt.Sprintf("%s/x%d:v1", h.host(), i%images)})
			if err != nil {
				t.Error(err)
				return
			}
			if got := content(t, img, "own"); got != fmt.Sprint(i%images) {
				t.Errorf("image %d has %q", i, got)
			}
		})
	}
	wg.Wait()
	if n.Load() != 1 {
		t.Errorf("shared layer fetched %d times", n.Load())
	}
	for _, img := range s.List("") {
		if err := s.Remove(t.Context(), img.ID.String()); err != nil {
			t.Error(err)
		}
	}
	nothingLeft(t, root)
	if b, i := s.layers.Usage(); b != 0 || i != 0 {
		t.Errorf("usage after removal: %d bytes, %d inodes", b, i)
	}
}

// TestALayerThatAnotherPullMadeAndRemoved: two pulls share a layer on its way;
// the image of the first is removed before the second is done.
func TestALayerThatAnotherPullMadeAndRemoved(t *testing.T) {
	h, s := newHub(t), newService(t, t.TempDir())
	shared := compressed(t, "gzip", tarOf(t, map[string]string{"shared": "s"}))
	slow := compressed(t, "gzip", tarOf(t, map[string]string{"slow": "s"}))
	one, two := h.host()+"/one:1", h.host()+"/two:1"
	push(t, one, imageOf(t, shared))
	push(t, two, imageOf(t, shared, slow))
	digest, err := slow.Digest()
	if err != nil {
		t.Fatal(err)
	}
	gate := make(chan struct{})
	h.inject(func(_ http.ResponseWriter, r *http.Request) bool {
		if isBlob(r) && strings.Contains(r.URL.Path, digest.Hex) {
			<-gate
		}
		return false
	})
	ctx := context.Background()
	done := make(chan error, 1)
	go func() {
		_, err := s.Pull(ctx, PullRequest{Ref: two})
		done <- err
	}()
	for deadline := time.Now().Add(pace.Wait(10 * time.Second)); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		n := len(s.fetches)
		s.mu.Unlock()
		if n == 2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the second pull fetches nothing")
		}
	}
	if _, err := s.Pull(ctx, PullRequest{Ref: one}); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(ctx, one); err != nil {
		t.Fatal(err)
	}
	close(gate)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	img, err := s.Status(two)
	if err != nil || img == nil || content(t, img, "shared") != "s" {
		t.Fatalf("%v, %v", img, err)
	}
}

func TestMovedTagAndTwoRegistries(t *testing.T) {
	h, h2 := newHub(t), newHub(t)
	root := t.TempDir()
	s := newService(t, root)
	one := imageOf(t, compressed(t, "gzip", tarOf(t, map[string]string{"f": "1"})))
	two := imageOf(t, compressed(t, "gzip", tarOf(t, map[string]string{"f": "2"})))
	ref := h.host() + "/x:v1"
	push(t, ref, one)
	push(t, h2.host()+"/y:v1", one)
	a, err := s.Pull(t.Context(), PullRequest{Ref: ref})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := s.Pull(t.Context(), PullRequest{Ref: h2.host() + "/y:v1"}); err != nil || b.ID != a.ID || len(b.Tags) != 2 || len(b.Digests) != 2 {
		t.Errorf("same image from another registry: %+v, %v", b, err)
	}
	push(t, ref, two)
	c, err := s.Pull(t.Context(), PullRequest{Ref: ref})
	if err != nil || c.ID == a.ID {
		t.Fatalf("moved tag: %v, %v", c, err)
	}
	for range 2 { // in memory, then from disk
		old, _ := s.Status(a.ID.String())
		if old == nil || slices.Contains(old.Tags, ref) || len(old.Digests) != 2 || len(s.List("")) != 2 {
			t.Errorf("old image %+v", old)
		}
		if now, _ := s.Status(ref); now == nil || now.ID != c.ID {
			t.Errorf("tag names %+v", now)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = newService(t, root)
	}
}

func TestPullByDigest(t *testing.T) {
	h := newHub(t)
	s := newService(t, t.TempDir())
	img := imageOf(t) // no layers
	push(t, h.host()+"/x:v1", img)
	d, _ := img.Digest()
	ref := h.host() + "/x@" + d.String()
	got, err := s.Pull(t.Context(), PullRequest{Ref: ref})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Tags) != 0 || !slices.Equal(got.Digests, []string{ref}) || got.Size <= 0 || len(got.Layers) != 1 {
		t.Errorf("image %+v", got)
	}
}

func TestPinnedImageOutlivesRemoval(t *testing.T) {
	h := newHub(t)
	root := t.TempDir()
	s := newService(t, root)
	ref := h.host() + "/x:v1"
	push(t, ref, imageOf(t, compressed(t, "gzip", tarOf(t, map[string]string{"f": "1"}))))
	img, err := s.Pull(t.Context(), PullRequest{Ref: ref})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Acquire(ref, "c1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if got, _ := s.Status(img.ID.String()); got != nil || len(s.List("")) != 0 {
		t.Error("removed image is visible")
	}
	if content(t, img, "f") != "1" {
		t.Error("content lost")
	}
	// The daemon restarts, the container claims its image, then the sweep.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = newService(t, root)
	if _, err := s.Acquire(img.ID.String(), "c1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if content(t, img, "f") != "1" {
		t.Error("content lost in the sweep")
	}
	s.Release("c1")
	if err := s.Close(); err != nil { // waits for the deletion, or the next start does it
		t.Fatal(err)
	}
	s = newService(t, root)
	if err := s.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, root)
	if _, err := s.Acquire(ref, "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("acquire of a missing image: %v", err)
	}
}

// TestDamage zeroes and truncates each committed file in turn: it costs only
// the image concerned, which can be pulled again.
func TestDamage(t *testing.T) {
	h := newHub(t)
	for _, pattern := range []string{"index/*.json", "layers/*/layer.json"} {
		for _, size := range []int64{0, 20} {
			root := t.TempDir()
			s := newService(t, root)
			for i := range 2 {
				ref := fmt.Sprintf("%s/x%d:v1", h.host(), i)
				push(t, ref, imageOf(t, compressed(t, "gzip", tarOf(t, map[string]string{"f": fmt.Sprint(i)}))))
				if _, err := s.Pull(t.Context(), PullRequest{Ref: ref}); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			files, _ := filepath.Glob(filepath.Join(root, pattern))
			if len(files) != 2 {
				t.Fatalf("files %v", files)
			}
			if err := os.Truncate(files[0], size); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(filepath.Join(root, "staging/layer-torn/fs"), 0o755); err != nil {
				t.Fatal(err)
			}
			s = newService(t, root)
			if n := len(s.List("")); n != 1 {
				t.Errorf("%s truncated to %d: %d images", pattern, size, n)
			}
			if es, _ := os.ReadDir(filepath.Join(root, "staging")); len(es) != 0 {
				t.Errorf("staging not emptied: %v", es)
			}
			for i := range 2 {
				img, err := s.Pull(t.Context(), PullRequest{Ref: fmt.Sprintf("%s/x%d:v1", h.host(), i)})
				if err != nil || content(t, img, "f") != fmt.Sprint(i) {
					t.Errorf("image %d after damage: %v", i, err)
				}
			}
		}
	}
}

func TestPullBadRequests(t *testing.T) {
	s := newService(t, t.TempDir())
	for _, r := range []PullRequest{
		{Ref: ""}, {Ref: "localhost/UPPER"}, {Ref: "a b"}, {Ref: "x@sha256:12"}, {Ref: "../x"},
		{Ref: "localhost/x", Auth: &Auth{Auth: "%%%secret"}}, {Ref: "localhost/x", Auth: &Auth{Auth: "c2VjcmV0"}},
	} {
		_, err := s.Pull(t.Context(), r)
		if !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%+v: %v", r, err)
		}
	}
}
