package imageservice

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/imageservice/index"
	"github.com/berth-runtime/berth/imageservice/layer"
	"github.com/berth-runtime/berth/imageservice/registry"
	"github.com/berth-runtime/berth/internal/crashpoint"
)

// parallelLayers is how many layers of one image are fetched at a time.
const parallelLayers = 3

// pull is one running pull; all callers that want the same image with the same
// credentials wait for it together.
type pull struct {
	reports listeners
	cancel  context.CancelFunc
	waiters int
	done    chan struct{}
	img     *Image
	err     error
}

// listeners are the progress functions of those who wait.
type listeners struct {
	mu   sync.Mutex
	next int
	fs   map[int]func(Progress)
}

func (l *listeners) add(f func(Progress)) (remove func()) {
	if f == nil {
		return func() {}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fs == nil {
		l.fs = map[int]func(Progress){}
	}
	l.next++
	key := l.next
	l.fs[key] = f
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.fs, key)
	}
}

// report holds the lock during the calls, so that nobody is called after remove.
func (l *listeners) report(p Progress) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.fs {
		f(p)
	}
}

// Pull brings an image onto the node. It asks the registry in any case, also
// when the image is here: that is how callers check credentials. Equal calls
// join; the work goes on while anyone waits for it. When ctx ends first the
// error is ctx's. Errors are of the kinds ErrInvalidArgument, ErrNotFound,
// ErrUnauthenticated, ErrPermissionDenied, ErrUnavailable (registry), ErrDataLoss
// (content is not what its digest says) and ErrResourceExhausted (disk, limits,
// rate of requests); they name no secret.
func (s *Service) Pull(ctx context.Context, r PullRequest) (*Image, error) {
	ref, err := normalize(r.Ref)
	if err != nil {
		return nil, err
	}
	creds, err := credentials(r.Auth)
	if err != nil {
		return nil, err
	}
	server := reference.Domain(ref)
	if r.Auth != nil && r.Auth.Server != "" {
		server = hostOf(r.Auth.Server)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("image %q: %w", r.Ref, err)
	}
	p, err := s.join(ref, creds, server)
	if err != nil {
		return nil, err
	}
	defer p.reports.add(r.Progress)()
	select {
	case <-p.done:
	case <-ctx.Done():
		s.leave(pullKey(ref, creds, server), p)
		return nil, fmt.Errorf("image %q: %w", r.Ref, ctx.Err())
	}
	s.leave(pullKey(ref, creds, server), p)
	if p.err != nil {
		return nil, fmt.Errorf("image %q: %w", r.Ref, p.err)
	}
	return p.img, nil
}

// pullKey identifies a pull. Credentials take part by a hash, never in clear.
func pullKey(ref reference.Named, c *registry.Credentials, server string) string {
	if c == nil {
		return ref.String()
	}
	h := sha256.New()
	for _, f := range []string{server, c.Username, c.Password, c.IdentityToken, c.RegistryToken} {
		fmt.Fprintf(h, "%d:%s", len(f), f)
	}
	return ref.String() + " " + hex.EncodeToString(h.Sum(nil))
}

func (s *Service) join(ref reference.Named, creds *registry.Credentials, server string) (*pull, error) {
	key := pullKey(ref, creds, server)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("image %q: image service is closed: %w", ref, errdefs.ErrUnavailable)
	}
	if p := s.pulls[key]; p != nil {
		p.waiters++
		return p, nil
	}
	ctx, cancel := context.WithCancel(s.ctx)
	p := &pull{cancel: cancel, waiters: 1, done: make(chan struct{})}
	s.pulls[key] = p
	s.wg.Go(func() {
		defer cancel()
		p.img, p.err = s.run(ctx, ref, creds, server, p)
		s.mu.Lock()
		if s.pulls[key] == p { // a later caller must ask the registry anew
			delete(s.pulls, key)
		}
		s.mu.Unlock()
		close(p.done)
	})
	return p, nil
}

func (s *Service) leave(key string, p *pull) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.waiters--; p.waiters == 0 {
		if s.pulls[key] == p {
			delete(s.pulls, key)
		}
		p.cancel()
	}
}

// credentials reads what CRI gave. nil means anonymous.
func credentials(a *Auth) (*registry.Credentials, error) {
	if a == nil {
		return nil, nil
	}
	c := registry.Credentials{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}
	if c.Username == "" && a.Auth != "" {
		b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(a.Auth))
		if err != nil {
			// The decoder's own error would show a part of the secret.
			return nil, fmt.Errorf("auth: want base64 of user:password: %w", errdefs.ErrInvalidArgument)
		}
		user, pass, ok := strings.Cut(strings.TrimRight(string(b), "\x00"), ":")
		if !ok {
			return nil, fmt.Errorf("auth: want user:password: %w", errdefs.ErrInvalidArgument)
		}
		c.Username, c.Password = user, pass
	}
	if c == (registry.Credentials{}) {
		return nil, nil
	}
	return &c, nil
}

// run is the work of one pull.
func (s *Service) run(ctx context.Context, ref reference.Named, creds *registry.Credentials, server string, p *pull) (*Image, error) {
	repo, err := s.client.Repository(ref, creds, func(host string) bool { return hostOf(host) == server })
	if err != nil {
		return nil, err
	}
	defer repo.Close()
	if img, err := s.current(ctx, repo, ref); img != nil || err != nil {
		if img != nil {
			p.reports.report(Progress{Done: img.Size, Total: img.Size, Complete: true})
		}
		return img, err
	}
	src, err := repo.Image(ctx, ref, s.platform)
	if err != nil {
		return nil, err
	}
	ids := layerIDs(src)
	for err = layer.ErrSpent; errors.Is(err, layer.ErrSpent); {
		if err = s.layersOf(ctx, repo, src, ids, p); ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	img, err := s.name(ctx, ref, src, ids)
	if err != nil {
		return nil, errors.Join(err, s.layers.Release(ids...))
	}
	p.reports.report(Progress{Done: img.Size, Total: img.Size, Complete: true})
	return img, nil
}

// current returns the local image if it is what the registry has for ref. A
// HEAD request is enough to learn that, and that access is still granted.
func (s *Service) current(ctx context.Context, repo *registry.Repository, ref reference.Named) (*Image, error) {
	v := s.view.Load()
	img := v.byName[ref.String()]
	if img == nil {
		return nil, nil
	}
	top, err := repo.Head(ctx, ref)
	switch {
	case errdefs.IsNotFound(err), errdefs.IsUnauthorized(err), errdefs.IsPermissionDenied(err), errdefs.IsUnavailable(err):
		return nil, err
	case err != nil:
		return nil, ctx.Err() // a registry without HEAD: ask with GET
	}
	if !slices.Contains(img.Digests, reference.TrimNamed(ref).String()+"@"+top) {
		return nil, nil
	}
	// It may have been removed meanwhile; then it is pulled again.
	if now := s.view.Load().byName[ref.String()]; now == nil || now.ID != img.ID {
		return nil, nil
	}
	return img, nil
}

// layerIDs are the diff IDs from bottom to top, each once: overlayfs refuses a
// directory that occurs twice, and of equal layers the topmost decides.
func layerIDs(src *registry.Image) []digest.Digest {
	var ids []digest.Digest
	for i, l := range src.Layers {
		above := src.Layers[i+1:]
		if !slices.ContainsFunc(above, func(o registry.Layer) bool { return o.DiffID == l.DiffID }) {
			ids = append(ids, l.DiffID)
		}
	}
	return ids
}

// layersOf makes all layers of an image visible, each with one Hold for the caller.
func (s *Service) layersOf(ctx context.Context, repo *registry.Repository, src *registry.Image, ids []digest.Digest, p *pull) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var held []digest.Digest
	var got []*fetch
	room := make(chan struct{}, parallelLayers)
	for _, id := range ids {
		i := slices.IndexFunc(src.Layers, func(l registry.Layer) bool { return l.DiffID == id })
		l := src.Layers[i]
		wg.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			if s.layers.Hold(l.DiffID) {
				mu.Lock()
				held = append(held, l.DiffID)
				mu.Unlock()
				p.reports.report(Progress{Layer: l.Blob.Digest, Done: l.Blob.Size, Total: l.Blob.Size, Complete: true})
				return
			}
			f, err := s.fetch(ctx, repo, l, p)
			if err != nil {
				cancel(err)
				return
			}
			mu.Lock()
			got = append(got, f)
			mu.Unlock()
		})
	}
	wg.Wait()
	err := context.Cause(ctx)
	var ready []*layer.Staged
	for _, f := range got {
		ready = append(ready, f.staged)
	}
	crashpoint.Here("pull image", "layers", "staged")
	if err == nil {
		err = s.layers.Commit(ready)
	}
	crashpoint.Here("pull image", "layers", "visible")
	if errors.Is(err, layer.ErrSpent) { // whoever fetches next must not join what is spent
		s.mu.Lock()
		for _, f := range got {
			s.forgetFetch(f)
		}
		s.mu.Unlock()
	}
	for _, f := range got {
		s.drop(f)
	}
	if err != nil {
		return errors.Join(err, s.layers.Release(held...))
	}
	return nil
}

// name gives the image its name; from then on it is there. It takes over the
// caller's holds on the layers.
func (s *Service) name(ctx context.Context, ref reference.Named, src *registry.Image, ids []digest.Digest) (*Image, error) {
	if err := s.lockIndex(ctx); err != nil {
		return nil, err
	}
	defer s.unlockIndex()
	s.mu.Lock()
	old := s.images[src.ID]
	s.seq++
	seq := s.seq
	var rec *index.Record
	if old != nil {
		rec = old.rec.Clone()
	} else {
		rec = &index.Record{ID: src.ID, Config: src.Raw, Layers: ids}
	}
	if old == nil || old.rec.Removed {
		rec.PulledAt = time.Now()
	}
	rec.Removed = false
	named := reference.TrimNamed(ref).String() + "@" + src.Top.String()
	if !slices.ContainsFunc(rec.Digests, func(n index.Name) bool { return n.Name == named }) {
		rec.Digests = append(rec.Digests, index.Name{Name: named, Seq: seq})
	}
	var losers []*index.Record
	if tag, ok := ref.(reference.Tagged); ok {
		full := reference.TrimNamed(ref).String() + ":" + tag.Tag()
		same := func(n index.Name) bool { return n.Name == full }
		if !slices.ContainsFunc(rec.Tags, same) {
			rec.Tags = append(rec.Tags, index.Name{Name: full, Seq: seq})
		}
		for _, e := range s.images {
			if e.rec.ID != rec.ID && slices.ContainsFunc(e.rec.Tags, same) {
				l := e.rec.Clone()
				l.Tags = slices.DeleteFunc(l.Tags, same)
				losers = append(losers, l)
			}
		}
	}
	s.mu.Unlock()

	if err := s.dir.Save(rec); err != nil {
		return nil, err
	}
	crashpoint.Here("pull image", "name", "given")
	for _, l := range losers {
		// Not fatal: the number on the tag decides at the next start.
		if err := s.dir.Save(l); err != nil {
			klog.FromContext(ctx).Error(err, "moved tag not taken from the old image's record", "image", l.ID)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old != nil {
		s.layers.Unhold(ids...) // the image has its own
		old.rec = rec
	} else {
		s.images[rec.ID] = &entry{rec: rec, config: src.Config}
	}
	for _, l := range losers {
		s.images[l.ID].rec = l
	}
	s.publish()
	return s.view.Load().byID[rec.ID], nil
}
