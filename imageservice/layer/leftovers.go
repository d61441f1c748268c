package layer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/berth-runtime/berth/internal/leftover"
)

// Leftovers lists layers that nobody holds, folders that are no layer, and what is
// staged by nobody.
func (s *Store) Leftovers() ([]leftover.Finding, error) {
	names, staged, err := s.names()
	if err != nil {
		return nil, err
	}
	var out []leftover.Finding
	s.mu.Lock()
	defer s.mu.Unlock()
	known := map[string]bool{}
	for d, e := range s.have {
		known[fileName(d)] = true
		if e.refs == 0 && e.gone == nil {
			out = append(out, leftover.Finding{Kind: leftover.ImageLayer, Name: d.String(), Detail: "layer that no image has",
				Remove: func(context.Context) error {
					return s.reap(func(f func(*entry)) {
						if e := s.have[d]; e != nil {
							f(e)
						}
					})
				}})
		}
	}
	for _, name := range names {
		if !known[name] {
			out = append(out, s.unknown(name, "no layer that this daemon has made or found whole"))
		}
	}
	for _, name := range staged {
		if !s.busy[name] {
			out = append(out, s.stray(name))
		}
	}
	return out, nil
}

// names lists the folders of layers and of staging.
func (s *Store) names() (layers, staged []string, err error) {
	for dir, to := range map[string]*[]string{s.layers(): &layers, s.staging(): &staged} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, fmt.Errorf("layer store: %w", err)
		}
		for _, e := range entries {
			*to = append(*to, e.Name())
		}
	}
	return layers, staged, nil
}

// unknown is a folder among the layers that must go, if it is named as one of ours.
func (s *Store) unknown(name, why string) leftover.Finding {
	path := filepath.Join(s.layers(), name)
	f := leftover.Finding{Kind: leftover.ImageLayer, Name: path, Detail: why, Remedy: "not named as a layer is; remove it by hand"}
	d, err := digest.Parse(strings.Replace(name, "-", ":", 1))
	if err != nil || fileName(d) != name {
		return f
	}
	f.Remedy, f.Remove = "", func(context.Context) error {
		if _, ok := s.Get(d); ok {
			return nil
		}
		if _, err := s.load(name); err != nil {
			return s.setAside(path) // containers may run on it
		}
		trash, err := s.hide(path)
		if err != nil {
			return err
		}
		return s.empty(trash)
	}
	return f
}

// stray is something staged that nobody works on.
func (s *Store) stray(name string) leftover.Finding {
	path := filepath.Join(s.staging(), name)
	return leftover.Finding{Kind: leftover.ImageLayer, Name: path, Detail: "part of a layer that no pull goes on with",
		Remove: func(context.Context) error {
			s.mu.Lock()
			busy := s.busy[name]
			s.mu.Unlock()
			if busy {
				return nil
			}
			return os.RemoveAll(path)
		}}
}

// Look finds while no daemon runs what is no layer of the wanted ones, in the store
// at root, and which of the wanted layers are missing or damaged. It changes nothing.
func Look(root string, wanted map[digest.Digest]bool) (out []leftover.Finding, broken map[digest.Digest]error, err error) {
	s := newStore(root)
	names, staged, err := s.names()
	if err != nil {
		return nil, nil, err
	}
	broken = map[digest.Digest]error{}
	for d := range wanted {
		if _, err := s.load(fileName(d)); err != nil {
			broken[d] = err
		}
	}
	for _, name := range names {
		if d := digest.Digest(strings.Replace(name, "-", ":", 1)); wanted[d] {
			continue
		}
		why := "layer that no image has"
		if _, err := s.load(name); err != nil {
			why = "layer that is not whole, and that no image has: " + err.Error()
		}
		out = append(out, s.unknown(name, why))
	}
	for _, name := range staged {
		out = append(out, s.stray(name))
	}
	return out, broken, nil
}
