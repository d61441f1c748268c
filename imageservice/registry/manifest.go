package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds on documents from a registry (invariant I7).
const (
	maxManifest   = 4 << 20
	maxConfig     = 8 << 20
	maxIndexDepth = 3
	// maxLayers is overlayfs's own bound on lower directories.
	maxLayers = 500
)

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
)

var layerTypes = []string{
	ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
	"application/vnd.oci.image.layer.nondistributable.v1.tar",
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
	"application/vnd.docker.image.rootfs.diff.tar",
	"application/vnd.docker.image.rootfs.diff.tar.gzip",
	"application/vnd.docker.image.rootfs.diff.tar.zstd",
	"application/vnd.docker.image.rootfs.foreign.diff.tar",
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
}

// Layer is one layer of an image as it lies in the registry.
type Layer struct {
	Blob   ocispec.Descriptor
	DiffID digest.Digest
}

// Image is a resolved image: everything about it but the layers' bytes.
type Image struct {
	// Top is the digest of what the reference resolved to: an index or a manifest.
	Top digest.Digest
	// ID is the digest of the config, Raw its bytes.
	ID     digest.Digest
	Raw    []byte
	Config ocispec.Image
	// Layers are from the bottom to the top.
	Layers []Layer
}

// document is a manifest or an index, with the fields of both.
type document struct {
	MediaType string               `json:"mediaType"`
	Schema    int                  `json:"schemaVersion"`
	Config    *ocispec.Descriptor  `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
	FSLayers  json.RawMessage      `json:"fsLayers"`
}

// parseDocument reads a manifest or index. contentType is what the registry or
// the referring descriptor called it.
func parseDocument(body []byte, contentType string) (*document, error) {
	var d document
	if err := json.Unmarshal(body, &d); err != nil {
		return nil, fmt.Errorf("manifest: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if d.Schema == 1 || len(d.FSLayers) > 0 {
		return nil, fmt.Errorf("manifest: Docker schema 1 carries no config digest; push the image with a current tool: %w", errdefs.ErrInvalidArgument)
	}
	if mt, _, err := mime.ParseMediaType(contentType); err == nil {
		contentType = mt
	}
	switch contentType {
	case "", "application/json", "application/octet-stream", "text/plain":
		contentType = d.MediaType
	}
	if d.MediaType == "" {
		d.MediaType = contentType
	}
	// One digest must have one reading (CVE-2021-41190).
	if d.MediaType != contentType {
		return nil, fmt.Errorf("manifest: media type %.100q is served as %.100q: %w", d.MediaType, contentType, errdefs.ErrInvalidArgument)
	}
	isManifest, isIndex := d.Config != nil || d.Layers != nil, d.Manifests != nil
	if isManifest && isIndex {
		return nil, fmt.Errorf("manifest: has both layers and manifests: %w", errdefs.ErrInvalidArgument)
	}
	switch d.MediaType {
	case "":
		if !isManifest && !isIndex {
			return nil, fmt.Errorf("manifest: neither image nor index: %w", errdefs.ErrInvalidArgument)
		}
	case ocispec.MediaTypeImageManifest, dockerManifest:
		if isIndex {
			return nil, fmt.Errorf("manifest: has manifests: %w", errdefs.ErrInvalidArgument)
		}
		isManifest = true
	case ocispec.MediaTypeImageIndex, dockerIndex:
		if isManifest {
			return nil, fmt.Errorf("index: has layers: %w", errdefs.ErrInvalidArgument)
		}
	default:
		return nil, fmt.Errorf("manifest: media type %.100q is not an image: %w", d.MediaType, errdefs.ErrInvalidArgument)
	}
	if isManifest {
		return &d, d.checkManifest()
	}
	for i := range d.Manifests {
		if err := checkDescriptor(&d.Manifests[i]); err != nil {
			return nil, fmt.Errorf("index entry %d: %w", i, err)
		}
	}
	return &d, nil
}

func (d *document) isIndex() bool { return d.Config == nil }

func (d *document) checkManifest() error {
	if d.Config == nil {
		return fmt.Errorf("manifest: no config: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkDescriptor(d.Config); err != nil {
		return fmt.Errorf("manifest config: %w", err)
	}
	switch d.Config.MediaType {
	case ocispec.MediaTypeImageConfig, dockerConfig, "application/octet-stream", "":
	default:
		return fmt.Errorf("manifest: an artifact of type %.100q and not a container image: %w", d.Config.MediaType, errdefs.ErrInvalidArgument)
	}
	if d.Config.Size > maxConfig {
		return fmt.Errorf("manifest config: %d bytes, at most %d are accepted: %w", d.Config.Size, maxConfig, errdefs.ErrInvalidArgument)
	}
	if len(d.Layers) > maxLayers {
		return fmt.Errorf("manifest: %d layers, at most %d can be mounted: %w", len(d.Layers), maxLayers, errdefs.ErrInvalidArgument)
	}
	for i := range d.Layers {
		l := &d.Layers[i]
		if err := checkDescriptor(l); err != nil {
			return fmt.Errorf("manifest layer %d: %w", i, err)
		}
		if !slices.Contains(layerTypes, l.MediaType) {
			return fmt.Errorf("manifest layer %d: media type %.100q is not a file system layer: %w", i, l.MediaType, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// checkDescriptor checks the digest's grammar before anything uses it (I8).
func checkDescriptor(d *ocispec.Descriptor) error {
	if err := checkDigest(d.Digest); err != nil {
		return err
	}
	if d.Size < 0 {
		return fmt.Errorf("size %d: %w", d.Size, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %.100q: %w: %w", string(d), err, errdefs.ErrInvalidArgument)
	}
	if d.Algorithm() != digest.SHA256 && d.Algorithm() != digest.SHA512 {
		return fmt.Errorf("digest %.100q: want sha256 or sha512: %w", string(d), errdefs.ErrInvalidArgument)
	}
	return nil
}

// Image resolves ref, which must have a tag or a digest, to the image for p.
func (r *Repository) Image(ctx context.Context, ref reference.Named, p ocispec.Platform) (*Image, error) {
	var name string
	var want digest.Digest
	switch ref := ref.(type) {
	case reference.Canonical:
		want = ref.Digest()
		name = want.String()
	case reference.Tagged:
		name = ref.Tag()
	default:
		return nil, fmt.Errorf("image %s: neither tag nor digest: %w", ref, errdefs.ErrInvalidArgument)
	}
	doc, top, err := r.manifest(ctx, name, want, "")
	if err != nil {
		return nil, err
	}
	for depth := 0; doc.isIndex(); depth++ {
		if depth == maxIndexDepth {
			return nil, fmt.Errorf("index: nested deeper than %d: %w", maxIndexDepth, errdefs.ErrInvalidArgument)
		}
		entry, err := choose(doc.Manifests, p)
		if err != nil {
			return nil, err
		}
		if doc, _, err = r.manifest(ctx, entry.Digest.String(), entry.Digest, entry.MediaType); err != nil {
			return nil, err
		}
	}
	return r.complete(ctx, doc, top, p)
}

// complete fetches the config of a manifest and joins both.
func (r *Repository) complete(ctx context.Context, doc *document, top digest.Digest, p ocispec.Platform) (*Image, error) {
	img := &Image{Top: top, ID: doc.Config.Digest}
	var err error
	if img.Raw, err = r.small(ctx, *doc.Config); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if img.Config, err = ParseConfig(img.Raw); err != nil {
		return nil, err
	}
	c := &img.Config
	if c.OS != "" && c.Architecture != "" && !platforms.Only(p).Match(c.Platform) {
		return nil, fmt.Errorf("image is for %s, not for %s: %w", platforms.Format(c.Platform), platforms.Format(p), errdefs.ErrNotFound)
	}
	if len(c.RootFS.DiffIDs) != len(doc.Layers) {
		return nil, fmt.Errorf("config: %d diff ids for %d layers: %w", len(c.RootFS.DiffIDs), len(doc.Layers), errdefs.ErrInvalidArgument)
	}
	for i, l := range doc.Layers {
		img.Layers = append(img.Layers, Layer{Blob: l, DiffID: c.RootFS.DiffIDs[i]})
	}
	return img, nil
}

// ParseConfig reads an image config and checks the digests in it.
func ParseConfig(raw []byte) (ocispec.Image, error) {
	var c ocispec.Image
	if err := json.Unmarshal(raw, &c); err != nil {
		return c, fmt.Errorf("config: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for i, d := range c.RootFS.DiffIDs {
		if err := checkDigest(d); err != nil {
			return c, fmt.Errorf("config: diff id %d: %w", i, err)
		}
	}
	return c, nil
}

// choose picks the best entry of an index for p. An entry without a platform
// is taken only when nothing names a fitting one.
func choose(entries []ocispec.Descriptor, p ocispec.Platform) (ocispec.Descriptor, error) {
	m := platforms.Only(p)
	var fit, bare []ocispec.Descriptor
	var have []string
	for _, e := range entries {
		switch e.MediaType {
		case ocispec.MediaTypeImageManifest, dockerManifest, ocispec.MediaTypeImageIndex, dockerIndex:
		default:
			continue
		}
		switch {
		case e.Platform == nil:
			bare = append(bare, e)
		case m.Match(*e.Platform):
			fit = append(fit, e)
		case len(have) < 20:
			have = append(have, fmt.Sprintf("%.60q", platforms.Format(*e.Platform)))
		}
	}
	slices.SortStableFunc(fit, func(a, b ocispec.Descriptor) int {
		switch {
		case m.Less(*a.Platform, *b.Platform):
			return -1
		case m.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	if all := append(fit, bare...); len(all) > 0 {
		return all[0], nil
	}
	return ocispec.Descriptor{}, fmt.Errorf("no image for %s in the index (it has %s): %w", platforms.Format(p), strings.Join(have, ", "), errdefs.ErrNotFound)
}

var acceptManifests = http.Header{"Accept": {strings.Join([]string{
	ocispec.MediaTypeImageIndex, dockerIndex, ocispec.MediaTypeImageManifest, dockerManifest, "*/*;q=0.1",
}, ", ")}}

// manifest fetches and checks one manifest or index by tag or digest. want is
// empty for a tag; mediaType is empty where the name, not a descriptor, led here.
func (r *Repository) manifest(ctx context.Context, name string, want digest.Digest, mediaType string) (doc *document, got digest.Digest, err error) {
	can := func(e *endpoint) bool { return want != "" && e.host.pull || e.host.resolve }
	err = r.each(ctx, can, func(e *endpoint, attempts int) error {
		body, contentType, err := e.fetchSmall(ctx, "manifests", name, acceptManifests, maxManifest, attempts)
		if err != nil {
			return err
		}
		algo := digest.SHA256
		if want != "" {
			algo = want.Algorithm()
		}
		got = algo.FromBytes(body)
		if want != "" && got != want {
			return fmt.Errorf("registry %s: manifest %s: content has digest %s: %w", e.host.base.Host, want, got, errdefs.ErrDataLoss)
		}
		if mediaType != "" {
			contentType = mediaType
		}
		doc, err = parseDocument(body, contentType)
		return err
	})
	return doc, got, err
}

// small fetches a blob whole and checks its digest.
func (r *Repository) small(ctx context.Context, d ocispec.Descriptor) (body []byte, err error) {
	can := func(e *endpoint) bool { return e.host.pull }
	err = r.each(ctx, can, func(e *endpoint, attempts int) error {
		b, _, err := e.fetchSmall(ctx, "blobs", d.Digest.String(), nil, d.Size, attempts)
		if err != nil {
			return err
		}
		if got := d.Digest.Algorithm().FromBytes(b); got != d.Digest {
			return fmt.Errorf("registry %s: blob %s: content has digest %s: %w", e.host.base.Host, d.Digest, got, errdefs.ErrDataLoss)
		}
		body = b
		return nil
	})
	return body, err
}

// fetchSmall reads a bounded document, repeating a body that broke off.
func (e *endpoint) fetchSmall(ctx context.Context, kind, name string, h http.Header, limit int64, attempts int) ([]byte, string, error) {
	for try := 0; ; try++ {
		tctx, cancel := context.WithCancelCause(ctx)
		resp, err := e.do(tctx, http.MethodGet, kind, name, h, attempts)
		if err != nil {
			cancel(nil)
			return nil, "", err
		}
		body := newIdleReader(resp.Body, e.client.cfg.IdleTimeout, cancel)
		var buf bytes.Buffer
		n, err := buf.ReadFrom(io.LimitReader(body, limit+1))
		idle := context.Cause(tctx)
		body.stop()
		cancel(nil)
		_ = resp.Body.Close()
		if n > limit {
			return nil, "", fmt.Errorf("registry %s: %s larger than %d bytes: %w", e.host.base.Host, strings.TrimSuffix(kind, "s"), limit, errdefs.ErrInvalidArgument)
		}
		if err == nil {
			return buf.Bytes(), resp.Header.Get("Content-Type"), nil
		}
		if ctx.Err() != nil {
			return nil, "", ctx.Err()
		}
		if idle != nil {
			err = idle
		}
		if try+1 >= attempts {
			return nil, "", fmt.Errorf("registry %s: %w: %w", e.host.base.Host, err, errdefs.ErrUnavailable)
		}
		if err := sleep(ctx, e.backoff(try)); err != nil {
			return nil, "", err
		}
	}
}
