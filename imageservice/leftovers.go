package imageservice

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/berth-runtime/berth/imageservice/index"
	"github.com/berth-runtime/berth/imageservice/layer"
	"github.com/berth-runtime/berth/internal/leftover"
)

// Leftovers finds removed images that nobody pins, layers of no image, and what no
// pull goes on with. Before Sweep it finds nothing: pins may be incomplete.
func (s *Service) Leftovers(context.Context) ([]leftover.Finding, error) {
	var out []leftover.Finding
	s.mu.Lock()
	swept := s.swept
	for id, e := range s.images {
		if e.rec.Removed && e.pins == 0 {
			out = append(out, leftover.Finding{Kind: leftover.Image, Name: id.String(), Detail: "removed by name, and no container uses it", Remove: s.collect})
		}
	}
	s.mu.Unlock()
	if !swept {
		return nil, nil
	}
	found, err := s.layers.Leftovers()
	return append(out, found...), err
}

// Look finds while no daemon runs what Leftovers finds, and images whose layers are
// not there, in the store at root. used tells whether a container uses an image by
// this id. It changes nothing.
func Look(root string, used func(id string) bool) ([]leftover.Finding, error) {
	dir := index.Dir(filepath.Join(root, "index"))
	c, err := dir.Look()
	if err != nil {
		return nil, err
	}
	var out []leftover.Finding
	aside := func(path, why string) {
		out = append(out, leftover.Finding{Kind: leftover.Record, Name: path, Detail: "record of an image " + why,
			Remedy: "pull the image again, and remove the file when nobody wants to look into it"})
	}
	for name, err := range c.Damaged {
		aside(filepath.Join(string(dir), name), "that cannot be read: "+err.Error())
	}
	for _, path := range c.Aside {
		aside(path, "that was set aside because it could not be read")
	}
	wanted := map[digest.Digest]bool{}
	var kept []*index.Record
	for _, r := range c.Records {
		if r.Removed && !used(r.ID.String()) {
			out = append(out, leftover.Finding{Kind: leftover.Image, Name: r.ID.String(), Detail: "removed by name, and no container uses it",
				Remove: func(context.Context) error { return dir.Delete(r.ID) }})
			continue
		}
		kept = append(kept, r)
		for _, d := range r.Layers {
			wanted[d] = true
		}
	}
	found, broken, err := layer.Look(root, wanted)
	for _, f := range found {
		if len(c.Damaged) > 0 && f.Remove != nil {
			f.Remove, f.Remedy = nil, "a record that cannot be read may be of its image, and containers may run on it: start berthd, which sets both aside"
		}
		out = append(out, f)
	}
	for _, r := range kept {
		var names []string
		for _, t := range r.Tags {
			names = append(names, t.Name)
		}
		for _, d := range r.Layers {
			if why := broken[d]; why != nil {
				out = append(out, leftover.Finding{Kind: leftover.Image, Name: r.ID.String(),
					Detail: fmt.Sprintf("layer %s is missing or damaged: %v; names: %s", d, why, strings.Join(names, ", ")),
					Remedy: "pull it again once the daemon runs, which drops it at its start"})
				break
			}
		}
	}
	return out, err
}
