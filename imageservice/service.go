package imageservice

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/imageservice/index"
	"github.com/berth-runtime/berth/imageservice/layer"
	"github.com/berth-runtime/berth/imageservice/registry"
	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/durable"
)

// Service is the image store of the node. It is safe for concurrent use.
//
// List, Status and FsUsage read an immutable view and wait for nothing. Changes
// of the index go one at a time through the write token, which is held across
// disk writes; mu protects memory only and is never held across them. Order:
// write, then mu, then the layer store's own lock.
type Service struct {
	cfg      Config
	platform ocispec.Platform
	client   *registry.Client
	layers   *layer.Store
	dir      index.Dir

	ctx    context.Context // of everything that runs in the background
	cancel context.CancelFunc
	wg     sync.WaitGroup

	write chan struct{} // token: holds one value while the index is being changed

	mu      sync.Mutex
	images  map[digest.Digest]*entry
	pins    map[string]map[digest.Digest]bool // owner -> images
	seq     uint64
	swept   bool // pins are complete: what is not pinned may go
	closed  bool
	pulls   map[string]*pull
	fetches map[digest.Digest]*fetch

	view atomic.Pointer[view]
}

// entry is an image in memory. rec is replaced, never changed in place.
type entry struct {
	rec    *index.Record
	config ocispec.Image
	pins   int
}

// Open starts the service on cfg.Root. What a crash left half-done is deleted;
// damaged records are set aside and logged. Layers that no image uses stay
// until Sweep, since containers may have yet to claim theirs.
func Open(ctx context.Context, cfg Config) (*Service, error) {
	return open(ctx, cfg, registry.Config{Dir: cfg.RegistryConfigDir})
}

func open(ctx context.Context, cfg Config, rc registry.Config) (*Service, error) {
	s := &Service{
		cfg: cfg, platform: platforms.DefaultSpec(), dir: index.Dir(filepath.Join(cfg.Root, "index")),
		write: make(chan struct{}, 1), images: map[digest.Digest]*entry{},
		pins: map[string]map[digest.Digest]bool{}, pulls: map[string]*pull{}, fetches: map[digest.Digest]*fetch{},
	}
	if cfg.Platform != "" {
		p, err := platforms.Parse(cfg.Platform)
		if err != nil {
			return nil, fmt.Errorf("platform %q: want os/arch[/variant]: %w: %w", cfg.Platform, err, errdefs.ErrInvalidArgument)
		}
		s.platform = p
	}
	if err := os.MkdirAll(cfg.Root, 0o711); err != nil {
		return nil, fmt.Errorf("image root: %w", err)
	}
	var damaged []string
	var err error
	if s.layers, damaged, err = layer.Open(cfg.Root); err != nil {
		return nil, err
	}
	records, more, err := s.dir.Load()
	if err != nil {
		return nil, err
	}
	log := klog.FromContext(ctx)
	if len(more) > 0 {
		s.layers.Suspect()
	}
	for _, d := range append(damaged, more...) {
		log.Error(nil, "damaged part of the image store set aside", "what", d)
	}
	if err := s.load(ctx, records); err != nil {
		return nil, err
	}
	s.client = registry.New(rc)
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return s, nil
}

// load takes the records into memory; those without their layers are dropped.
func (s *Service) load(ctx context.Context, records []*index.Record) error {
	owner := map[string]index.Name{} // tag -> the latest claim
	for _, r := range records {
		for _, t := range r.Tags {
			s.seq = max(s.seq, t.Seq)
			if t.Seq >= owner[t.Name].Seq {
				owner[t.Name] = t
			}
		}
	}
	for _, r := range records {
		cfg, err := registry.ParseConfig(r.Config)
		if err == nil {
			err = s.hold(r.Layers)
		}
		if err != nil {
			klog.FromContext(ctx).Error(err, "image dropped: pull it again", "image", r.ID)
			s.layers.Suspect()
			if err := s.dir.Delete(r.ID); err != nil {
				return err
			}
			continue
		}
		r.Tags = slices.DeleteFunc(r.Tags, func(t index.Name) bool { return owner[t.Name] != t })
		s.images[r.ID] = &entry{rec: r, config: cfg}
	}
	// Without images no container of an earlier run can have a claim.
	s.swept = len(s.images) == 0
	s.publish()
	return nil
}

func (s *Service) hold(ids []digest.Digest) error {
	for i, d := range ids {
		if !s.layers.Hold(d) {
			s.layers.Unhold(ids[:i]...)
			return fmt.Errorf("layer %s is missing: %w", d, errdefs.ErrDataLoss)
		}
	}
	return nil
}

// Close cancels running pulls and waits for all that runs in the background.
func (s *Service) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	s.client.Close()
	return nil
}

// spawn runs f in the background unless the service is closed.
func (s *Service) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.wg.Go(f)
	return true
}

func (s *Service) lockIndex(ctx context.Context) error {
	select {
	case s.write <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Service) unlockIndex() { <-s.write }

// Status finds an image by id, unique id prefix, tag or digest reference; nil
// when there is none.
func (s *Service) Status(ref string) (*Image, error) { return s.view.Load().find(ref) }

// List returns the images that filter names; all when it is empty.
func (s *Service) List(filter string) []*Image {
	v := s.view.Load()
	if filter == "" {
		return slices.Clone(v.list)
	}
	if img, err := v.find(filter); err == nil && img != nil {
		return []*Image{img}
	}
	return nil
}

// FsUsage is what the store takes. It is counted, never measured.
func (s *Service) FsUsage() FsUsage {
	bytes, inodes := s.layers.Usage()
	v := s.view.Load()
	return FsUsage{
		Mountpoint: s.cfg.Root,
		Bytes:      uint64(max(0, bytes) + v.recordBytes),
		Inodes:     uint64(max(0, inodes) + int64(len(v.list)) + 1),
		At:         time.Now(),
	}
}

// Acquire finds an image by id or reference and pins it for owner until
// Release. An image that was removed while pinned is found by its full id.
func (s *Service) Acquire(ref, owner string) (*Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.view.Load() // published under mu: entry and view agree
	img, err := v.find(ref)
	if err != nil {
		return nil, err
	}
	if img == nil {
		img = v.removed[ref]
	}
	if img == nil {
		return nil, fmt.Errorf("image %q: not on this node; pull it first: %w", ref, errdefs.ErrNotFound)
	}
	if s.pins[owner] == nil {
		s.pins[owner] = map[digest.Digest]bool{}
	}
	if !s.pins[owner][img.ID] {
		s.pins[owner][img.ID] = true
		s.images[img.ID].pins++
	}
	return img, nil
}

// Release drops all pins of owner. Images that were removed meanwhile and that
// nobody else pins are deleted in the background.
func (s *Service) Release(owner string) {
	s.mu.Lock()
	free := false
	for id := range s.pins[owner] {
		e := s.images[id]
		e.pins--
		free = free || s.swept && e.pins == 0 && e.rec.Removed
	}
	delete(s.pins, owner)
	s.mu.Unlock()
	if free {
		s.spawn(func() {
			if err := s.collect(s.ctx); err != nil && s.ctx.Err() == nil {
				klog.FromContext(s.ctx).Error(err, "removed image not deleted; the next sweep tries again")
			}
		})
	}
}

// Remove removes all names of the image that ref names, and the image itself
// with the layers that no other image uses. While containers pin it, or while
// pins may be incomplete after a restart (before Sweep), it only disappears
// from sight. A missing image is no error.
func (s *Service) Remove(ctx context.Context, ref string) error {
	if err := s.lockIndex(ctx); err != nil {
		return fmt.Errorf("image %q: %w", ref, err)
	}
	img, err := s.Status(ref)
	if err != nil || img == nil {
		s.unlockIndex()
		return err
	}
	crashpoint.Here("remove image", "name", "do")
	s.mu.Lock()
	old := s.images[img.ID].rec
	rec := old.Clone()
	rec.Tags, rec.Digests, rec.Removed = nil, nil, true
	s.setRecord(rec)
	s.mu.Unlock()
	if err = s.dir.Save(rec); durable.IsFull(err) {
		// Removing images is how a full disk gets space. A crash before the record is
		// deleted brings the image back, to be removed again.
		klog.FromContext(ctx).Error(durable.Explain(err), "removal of an image is not on record yet", "image", rec.ID)
		err = nil
	}
	if err != nil {
		s.mu.Lock()
		s.setRecord(old)
		s.mu.Unlock()
	}
	s.unlockIndex()
	if err != nil {
		return fmt.Errorf("image %q: %w", ref, err)
	}
	return s.collect(ctx)
}

// setRecord replaces an image's record in memory. Called with mu.
func (s *Service) setRecord(rec *index.Record) {
	s.images[rec.ID].rec = rec
	s.publish()
}

// Sweep says that every container has acquired its image again. It deletes
// removed images that nobody pins and layers that no image uses; from then on
// Remove frees space at once.
func (s *Service) Sweep(ctx context.Context) error {
	s.mu.Lock()
	s.swept = true
	s.mu.Unlock()
	crashpoint.Here("sweep images")
	return errors.Join(s.collect(ctx), s.layers.Sweep())
}

// collect deletes removed images without pins.
func (s *Service) collect(ctx context.Context) error {
	if err := s.lockIndex(ctx); err != nil {
		return err
	}
	defer s.unlockIndex()
	var dead []*entry
	s.mu.Lock()
	for id, e := range s.images {
		if s.swept && e.rec.Removed && e.pins == 0 {
			dead = append(dead, e)
			delete(s.images, id)
		}
	}
	s.publish()
	s.mu.Unlock()
	var errs []error
	for _, e := range dead {
		// The name goes before the layers: a crash between leaves layers without
		// an image, which Sweep deletes, and never an image without layers.
		if err := s.dir.Delete(e.rec.ID); err != nil {
			errs = append(errs, err)
			s.mu.Lock()
			s.images[e.rec.ID] = e
			s.publish()
			s.mu.Unlock()
			continue
		}
		crashpoint.Here("collect image", "record", "deleted")
		errs = append(errs, s.layers.Release(e.rec.Layers...))
		crashpoint.Here("collect image", "layers", "released")
	}
	return errors.Join(errs...)
}

// hostOf is the registry host in an auth server field, which may be a URL.
func hostOf(server string) string {
	if _, rest, ok := strings.Cut(server, "://"); ok {
		server = rest
	}
	host, _, _ := strings.Cut(server, "/")
	switch host = strings.ToLower(host); host {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return host
}
