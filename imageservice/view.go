package imageservice

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// view is an immutable picture of the index.
type view struct {
	list        []*Image // sorted by id
	byID        map[digest.Digest]*Image
	byName      map[string]*Image
	removed     map[string]*Image // by id: gone from sight, still pinned
	recordBytes int64
}

// publish makes the view of what is in memory. Called with mu.
func (s *Service) publish() {
	v := &view{byID: map[digest.Digest]*Image{}, byName: map[string]*Image{}, removed: map[string]*Image{}}
	for _, id := range slices.Sorted(maps.Keys(s.images)) {
		e := s.images[id]
		img := s.image(e)
		v.recordBytes += int64(len(e.rec.Config))
		if e.rec.Removed {
			v.removed[id.String()] = img
			v.removed[id.Encoded()] = img
			continue
		}
		v.list = append(v.list, img)
		v.byID[id] = img
		for _, n := range slices.Concat(img.Tags, img.Digests) {
			v.byName[n] = img
		}
	}
	s.view.Store(v)
}

// image converts an entry.
func (s *Service) image(e *entry) *Image {
	img := &Image{ID: e.rec.ID, Config: e.config, Size: int64(len(e.rec.Config)), PulledAt: e.rec.PulledAt}
	for _, t := range e.rec.Tags {
		img.Tags = append(img.Tags, t.Name)
	}
	for _, d := range e.rec.Digests {
		img.Digests = append(img.Digests, d.Name)
	}
	slices.Sort(img.Tags)
	slices.Sort(img.Digests)
	for _, d := range slices.Backward(e.rec.Layers) {
		info, _ := s.layers.Get(d)
		img.Size += info.Bytes
		img.Layers = append(img.Layers, s.layers.Dir(d))
		if info.Opaque {
			break // its root hides all layers below
		}
	}
	if len(img.Layers) == 0 {
		img.Layers = []string{s.layers.EmptyDir()}
	}
	return img
}

// find looks an image up by id, unique prefix of an id, or name. A name wins
// over a prefix: "cafe" is a good name for an image.
func (v *view) find(ref string) (*Image, error) {
	if d, ok := strings.CutPrefix(ref, "sha256:"); ok {
		return v.prefix(d)
	}
	if len(ref) == 64 && isHex(ref) {
		return v.byID[digest.Digest("sha256:"+ref)], nil
	}
	named, err := normalize(ref)
	if err == nil {
		if img := v.byName[named.String()]; img != nil {
			return img, nil
		}
	}
	if isHex(ref) {
		return v.prefix(ref)
	}
	return nil, err
}

func (v *view) prefix(hex string) (*Image, error) {
	if !isHex(hex) {
		return nil, nil
	}
	var found *Image
	for _, img := range v.list {
		if strings.HasPrefix(img.ID.Encoded(), hex) {
			if found != nil {
				return nil, fmt.Errorf("image id %q: prefix of several images; give more digits: %w", hex, errdefs.ErrInvalidArgument)
			}
			found = img
		}
	}
	return found, nil
}

func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdef") == ""
}

// normalize completes a reference: docker.io/library, then the tag "latest". A
// digest wins over a tag beside it.
func normalize(ref string) (reference.Named, error) {
	n, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("image reference %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return n, nil
}
