package imageservice

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/imageservice/layer"
	"github.com/berth-runtime/berth/imageservice/registry"
	"github.com/berth-runtime/berth/imageservice/unpack"
)

// fetch is one layer on its way from a registry to a staged directory. Pulls of
// different images that share the layer share the fetch.
type fetch struct {
	id      digest.Digest
	reports listeners
	cancel  context.CancelFunc
	users   int
	done    chan struct{}
	staged  *layer.Staged
	err     error
}

// fetch returns the staged layer; the caller ends its use with drop. A failure
// of a fetch that another pull began (whose credentials may not suffice) is
// followed by an own try.
func (s *Service) fetch(ctx context.Context, repo *registry.Repository, l registry.Layer, p *pull) (*fetch, error) {
	for {
		f, mine := s.joinFetch(repo, l)
		remove := f.reports.add(p.reports.report)
		var err error
		select {
		case <-f.done:
			err = f.err
		case <-ctx.Done():
			err = ctx.Err()
		}
		remove()
		if err == nil {
			return f, nil
		}
		s.drop(f)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if mine {
			return nil, err
		}
	}
}

func (s *Service) joinFetch(repo *registry.Repository, l registry.Layer) (f *fetch, mine bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.fetches[l.DiffID]; f != nil {
		f.users++
		return f, false
	}
	ctx, cancel := context.WithCancel(s.ctx)
	f = &fetch{id: l.DiffID, cancel: cancel, users: 1, done: make(chan struct{})}
	s.fetches[l.DiffID] = f
	s.wg.Go(func() {
		defer cancel()
		f.staged, f.err = s.obtain(ctx, repo, l, f)
		if f.err != nil {
			s.mu.Lock()
			s.forgetFetch(f)
			s.mu.Unlock()
		}
		close(f.done)
	})
	return f, true
}

func (s *Service) forgetFetch(f *fetch) {
	if s.fetches[f.id] == f {
		delete(s.fetches, f.id)
	}
}

// drop ends one use. With the last the fetch is cancelled and what it staged,
// unless committed, deleted.
func (s *Service) drop(f *fetch) {
	s.mu.Lock()
	f.users--
	last := f.users == 0
	if last {
		s.forgetFetch(f)
	}
	s.mu.Unlock()
	if !last {
		return
	}
	f.cancel()
	<-f.done // soon: its reads end with its context
	if f.staged != nil {
		if err := f.staged.Discard(); err != nil {
			klog.FromContext(s.ctx).Error(err, "staged layer not deleted; the next start does it", "layer", f.id)
		}
	}
}

// obtain fetches and unpacks a layer, from another host once more when the
// first one's content was not what its digest says.
func (s *Service) obtain(ctx context.Context, repo *registry.Repository, l registry.Layer, f *fetch) (*layer.Staged, error) {
	blob, err := repo.Blob(ctx, l.Blob, nil)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.Blob.Digest, err)
	}
	st, err := s.unpack(ctx, blob, l, f)
	if errdefs.IsDataLoss(err) && blob.HasOther() && ctx.Err() == nil {
		var again *registry.Blob
		if again, err = repo.Blob(ctx, l.Blob, blob); err == nil {
			st, err = s.unpack(ctx, again, l, f)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", l.Blob.Digest, err)
	}
	return st, nil
}

// unpack is the one pass: read, hash, inflate, hash, unpack. It closes blob.
func (s *Service) unpack(ctx context.Context, blob *registry.Blob, l registry.Layer, f *fetch) (st *layer.Staged, err error) {
	defer func() { _ = blob.Close() }()
	if st, err = s.layers.Stage(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, st.Discard())
			st = nil
		}
	}()
	blobHash, tarHash := l.Blob.Digest.Algorithm().Hash(), l.DiffID.Algorithm().Hash()
	raw := unpack.NewStage(&meter{r: blob, l: l, f: f}, blobHash)
	usage, err := inflate(ctx, raw, tarHash, st.FS(), blob.Abort)
	if badContent(err) || err == nil {
		// Read to the end: a stream that made no sense is better explained by a
		// wrong digest, and nothing may follow the compressed tar unhashed.
		if _, rerr := io.Copy(io.Discard, raw); rerr != nil {
			err = rerr
		}
	}
	blob.Abort()
	raw.Close()
	if err != nil && !badContent(err) {
		return st, err
	}
	if got := digest.NewDigest(l.Blob.Digest.Algorithm(), blobHash); got != l.Blob.Digest {
		return st, fmt.Errorf("content has digest %s: %w", got, errdefs.ErrDataLoss)
	}
	if err != nil {
		return st, err
	}
	if got := digest.NewDigest(l.DiffID.Algorithm(), tarHash); got != l.DiffID {
		return st, fmt.Errorf("uncompressed content has digest %s, the config says %s: %w", got, l.DiffID, errdefs.ErrDataLoss)
	}
	f.reports.report(Progress{Layer: l.Blob.Digest, Done: l.Blob.Size, Total: l.Blob.Size, Complete: true})
	return st, st.Finish(layer.Info{DiffID: l.DiffID, Bytes: usage.Bytes, Inodes: usage.Inodes, Opaque: usage.Opaque})
}

// badContent reports whether err speaks about the bytes and not about the way
// they took.
func badContent(err error) bool {
	return !errdefs.IsUnavailable(err) && (errdefs.IsDataLoss(err) || errdefs.IsInvalidArgument(err))
}

// inflate decompresses raw, hashes and unpacks it. abort ends raw's source: when
// the reason is not in the content, nobody wants the rest.
func inflate(ctx context.Context, raw io.Reader, h hash.Hash, dir string, abort func()) (unpack.Usage, error) {
	z, err := unpack.Decompress(raw)
	if err != nil {
		return unpack.Usage{}, err
	}
	tarStream := unpack.NewStage(z, h)
	usage, err := unpack.Apply(ctx, dir, tarStream, unpack.Limits{})
	if err != nil && !badContent(err) {
		abort()
	}
	tarStream.Close()
	return usage, errors.Join(err, z.Close())
}

// meter reports progress, ten times a second at most.
type meter struct {
	r    io.Reader
	l    registry.Layer
	f    *fetch
	n    int64
	next time.Time
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.n += int64(n)
	if now := time.Now(); now.After(m.next) {
		m.next = now.Add(100 * time.Millisecond)
		m.f.reports.report(Progress{Layer: m.l.Blob.Digest, Done: m.n, Total: m.l.Blob.Size})
	}
	return n, err
}
