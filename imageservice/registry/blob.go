package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// minProgress is what a body must bring within the idle timeout to count as
// alive: a sender of a byte now and then is as good as a dead one.
const minProgress = 4 << 10

// errIdle ends a body that brings nothing.
var errIdle = errors.New("no data within the idle timeout")

// idleReader cancels a request whose body has stalled. Only the time spent
// waiting for the network counts: a consumer that is busy does not read.
type idleReader struct {
	r      io.Reader
	t      *time.Timer
	d      time.Duration
	left   time.Duration // of d, since the last progress
	credit int
}

func newIdleReader(r io.Reader, d time.Duration, cancel context.CancelCauseFunc) *idleReader {
	i := &idleReader{r: r, d: d, left: d, t: time.AfterFunc(d, func() { cancel(errIdle) })}
	i.t.Stop()
	return i
}

func (i *idleReader) Read(p []byte) (int, error) {
	start := time.Now()
	i.t.Reset(i.left)
	n, err := i.r.Read(p)
	i.t.Stop()
	i.left = max(i.left-time.Since(start), 1)
	if i.credit += n; i.credit >= minProgress {
		i.credit, i.left = 0, i.d
	}
	return n, err
}

func (i *idleReader) stop() { i.t.Stop() }

// Blob is the byte stream of one blob. It goes on by itself where a connection
// broke. It ends with io.EOF only after exactly the descriptor's size; the
// reader checks the digest.
type Blob struct {
	r      *Repository
	ctx    context.Context
	abort  context.CancelFunc
	d      ocispec.Descriptor
	skip   map[*endpoint]bool
	off    int64
	fails  int   // broken connections since the last real progress
	mark   int64 // offset at the last broken connection
	cancel context.CancelCauseFunc
	reqCtx context.Context
	body   *idleReader
	closer io.Closer
	from   *endpoint

	once sync.Once
}

// Blob opens a blob. The bytes are read under ctx. After a digest mismatch the
// caller may open the blob again avoiding the host that served it: avoid is
// that earlier Blob or nil; when there is no other host the error says so.
func (r *Repository) Blob(ctx context.Context, d ocispec.Descriptor, avoid *Blob) (*Blob, error) {
	if err := checkDescriptor(&d); err != nil {
		return nil, err
	}
	ctx, abort := context.WithCancel(ctx)
	b := &Blob{r: r, ctx: ctx, abort: abort, d: d, skip: map[*endpoint]bool{}}
	if avoid != nil {
		for e := range avoid.skip {
			b.skip[e] = true
		}
		b.skip[avoid.from] = true
	}
	if err := b.open(); err != nil {
		abort()
		return nil, err
	}
	return b, nil
}

// open starts a request for what is still missing.
func (b *Blob) open() error {
	can := func(e *endpoint) bool { return e.host.pull && !b.skip[e] }
	return b.r.each(b.ctx, can, func(e *endpoint, attempts int) error {
		ctx, cancel := context.WithCancelCause(b.ctx)
		h := http.Header{}
		if b.off > 0 {
			// No If-Range: the content is named by its digest, so bytes of another
			// host or of a changed entity tag are as good, and checked at the end.
			h.Set("Range", fmt.Sprintf("bytes=%d-", b.off))
		}
		resp, err := e.do(ctx, http.MethodGet, "blobs", b.d.Digest.String(), h, attempts)
		if err != nil {
			cancel(nil)
			return err
		}
		body := newIdleReader(resp.Body, b.r.client.cfg.IdleTimeout, cancel)
		if err := b.position(e, resp, body); err != nil {
			body.stop()
			_ = resp.Body.Close()
			cancel(nil)
			return err
		}
		b.body, b.closer, b.cancel, b.reqCtx, b.from = body, resp.Body, cancel, ctx, e
		return nil
	})
}

// position makes body start at b.off.
func (b *Blob) position(e *endpoint, resp *http.Response, body io.Reader) error {
	total := resp.ContentLength
	if resp.StatusCode == http.StatusPartialContent {
		start, ok := rangeStart(resp.Header.Get("Content-Range"))
		if !ok || start != b.off {
			return fmt.Errorf("registry %s: blob %s: asked for bytes from %d, got %.100q: %w", e.host.base.Host, b.d.Digest, b.off, resp.Header.Get("Content-Range"), errdefs.ErrUnavailable)
		}
		if total >= 0 {
			total += b.off
		}
	}
	if total >= 0 && total != b.d.Size {
		return fmt.Errorf("registry %s: blob %s: %d bytes instead of %d: %w", e.host.base.Host, b.d.Digest, total, b.d.Size, errdefs.ErrDataLoss)
	}
	if b.off > 0 && resp.StatusCode != http.StatusPartialContent {
		// The host ignores ranges: read again what we have.
		if _, err := io.CopyN(io.Discard, body, b.off); err != nil {
			return e.netError(b.ctx, resp.Request.URL, err)
		}
	}
	return nil
}

func rangeStart(v string) (int64, bool) {
	v, ok := strings.CutPrefix(v, "bytes ")
	if !ok {
		return 0, false
	}
	s, _, ok := strings.Cut(v, "-")
	n, err := strconv.ParseInt(s, 10, 64)
	return n, ok && err == nil
}

// Read implements io.Reader.
func (b *Blob) Read(p []byte) (int, error) {
	for {
		if b.body == nil {
			if err := b.open(); err != nil {
				return 0, err
			}
		}
		n, err := b.body.Read(p)
		b.off += int64(n)
		if b.off > b.d.Size {
			return 0, fmt.Errorf("blob %s: more than %d bytes: %w", b.d.Digest, b.d.Size, errdefs.ErrDataLoss)
		}
		if n > 0 {
			return n, nil
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, io.EOF) && b.off == b.d.Size:
			return 0, io.EOF
		}
		if err := b.broken(err); err != nil {
			return 0, err
		}
	}
}

// broken decides whether to go on after a connection ended early.
func (b *Blob) broken(err error) error {
	if b.ctx.Err() != nil {
		return b.ctx.Err()
	}
	if cause := context.Cause(b.reqCtx); cause != nil {
		err = cause
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	from := b.from
	b.hangUp()
	if b.off-b.mark >= 1<<20 {
		b.fails = 0
	}
	b.mark = b.off
	if b.fails++; b.fails >= b.r.client.cfg.Attempts {
		return fmt.Errorf("registry %s: blob %s at byte %d of %d: %w: %w", from.host.base.Host, b.d.Digest, b.off, b.d.Size, err, errdefs.ErrUnavailable)
	}
	return sleep(b.ctx, from.backoff(b.fails-1))
}

func (b *Blob) hangUp() {
	if b.body == nil {
		return
	}
	b.body.stop()
	b.cancel(nil)
	_ = b.closer.Close()
	b.body = nil
}

// Abort makes a running Read and all later ones end with an error.
func (b *Blob) Abort() { b.abort() }

// Close ends the stream. It must not run at the same time as Read.
func (b *Blob) Close() error {
	b.abort()
	b.once.Do(b.hangUp)
	return nil
}

// HasOther reports whether another host may serve the blob.
func (b *Blob) HasOther() bool {
	for _, e := range b.r.endpoints {
		if e.host.pull && e != b.from && !b.skip[e] {
			return true
		}
	}
	return false
}

// Head asks what ref's tag or digest resolves to without fetching it: the
// check that the registry still grants access. It returns "" when the registry
// does not tell.
func (r *Repository) Head(ctx context.Context, ref reference.Named) (string, error) {
	name := ""
	switch ref := ref.(type) {
	case reference.Canonical:
		name = ref.Digest().String()
	case reference.Tagged:
		name = ref.Tag()
	}
	var got string
	err := r.each(ctx, func(e *endpoint) bool { return e.host.resolve }, func(e *endpoint, attempts int) error {
		resp, err := e.do(ctx, http.MethodHead, "manifests", name, acceptManifests, attempts)
		if err != nil {
			return err
		}
		got = resp.Header.Get("Docker-Content-Digest")
		return resp.Body.Close()
	})
	return got, err
}
