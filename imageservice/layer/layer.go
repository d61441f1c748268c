// Package layer keeps unpacked layers on disk, one directory per diff ID:
//
//	<root>/layers/sha256-<hex>/fs          what overlayfs mounts
//	<root>/layers/sha256-<hex>/layer.json  what it takes on disk
//	<root>/staging/<random>/...            not visible; deleted at every start
//
// A layer does not depend on its parents, so its diff ID alone names it. It
// becomes visible by one rename after a syncfs of the whole file system, so a
// visible layer is complete and durable whatever happens (no file of it is ever
// synced by itself). Layers are counted: Hold and Release; what nobody holds is
// deleted by Release and Sweep.
//
// Lock order: Store.mu is a leaf and never held across a system call.
package layer

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/durable"
)

// Info is what is known about a layer.
type Info struct {
	DiffID digest.Digest `json:"diffID"`
	// Bytes and Inodes are what the layer takes on disk, as counted when unpacked.
	Bytes  int64 `json:"bytes"`
	Inodes int64 `json:"inodes"`
	// Opaque reports that the layer hides everything below it.
	Opaque bool `json:"opaque,omitempty"`
}

// Store is the layers below one root. It is safe for concurrent use.
type Store struct {
	root string

	mu    sync.Mutex
	have  map[digest.Digest]*entry
	busy  map[string]bool // names in staging that somebody is working on
	bytes int64
	nodes int64
	// suspect: records were damaged, so a layer that nobody holds may be in use.
	suspect bool
}

type entry struct {
	info Info
	refs int
	gone chan struct{} // not nil while being deleted; closed when done
}

func newStore(root string) *Store {
	return &Store{root: root, have: map[digest.Digest]*entry{}, busy: map[string]bool{}}
}

// Open opens the store at root, making it when missing. It deletes what was
// being staged and returns a text for each damaged layer that it set aside:
// containers may run on it, so it stays on disk until the node was rebooted.
func Open(root string) (*Store, []string, error) {
	s := newStore(root)
	for _, d := range []string{s.layers(), s.staging(), s.aside(), s.EmptyDir()} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, nil, fmt.Errorf("layer store: %w", err)
		}
	}
	if err := os.Chmod(s.EmptyDir(), 0o755); err != nil {
		return nil, nil, fmt.Errorf("layer store: %w", err)
	}
	left, err := os.ReadDir(s.staging())
	if err != nil {
		return nil, nil, fmt.Errorf("layer store: %w", err)
	}
	for _, e := range left {
		if err := os.RemoveAll(filepath.Join(s.staging(), e.Name())); err != nil {
			return nil, nil, fmt.Errorf("layer store: %w", err)
		}
	}
	if err := s.clearAside(); err != nil {
		return nil, nil, fmt.Errorf("layer store: %w", err)
	}
	names, err := os.ReadDir(s.layers())
	if err != nil {
		return nil, nil, fmt.Errorf("layer store: %w", err)
	}
	var damaged []string
	for _, e := range names {
		info, err := s.load(e.Name())
		if durable.IsShort(err) { // it may be whole
			return nil, nil, fmt.Errorf("layer store: %w", err)
		}
		if err != nil {
			s.suspect = true
			damaged = append(damaged, fmt.Sprintf("layer %s: %v", e.Name(), err))
			if err := s.setAside(filepath.Join(s.layers(), e.Name())); err != nil {
				return nil, nil, fmt.Errorf("layer store: %w", err)
			}
			continue
		}
		s.add(info)
	}
	return s, damaged, nil
}

func (s *Store) layers() string  { return filepath.Join(s.root, "layers") }
func (s *Store) staging() string { return filepath.Join(s.root, "staging") }
func (s *Store) aside() string   { return filepath.Join(s.root, "quarantine") }

// setAside moves p out of sight. Overlays that are mounted on it go on.
func (s *Store) setAside(p string) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	return os.Rename(p, filepath.Join(s.aside(), boot+"."+filepath.Base(p)+"."+rand.Text()))
}

// clearAside deletes what was set aside in an earlier boot: nothing runs on it.
func (s *Store) clearAside() error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(s.aside())
	errs := []error{err}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), boot+".") {
			errs = append(errs, os.RemoveAll(filepath.Join(s.aside(), e.Name())))
		}
	}
	return errors.Join(errs...)
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// Suspect says that records of images were damaged: Sweep then sets aside what
// nobody holds instead of deleting it, since containers may run on it.
func (s *Store) Suspect() {
	s.mu.Lock()
	s.suspect = true
	s.mu.Unlock()
}

// EmptyDir is the one layer of images that have none.
func (s *Store) EmptyDir() string { return filepath.Join(s.root, "empty") }

func fileName(d digest.Digest) string { return strings.Replace(d.String(), ":", "-", 1) }

func (s *Store) path(d digest.Digest) string { return filepath.Join(s.layers(), fileName(d)) }

// Dir is the directory that overlayfs mounts for a layer.
func (s *Store) Dir(d digest.Digest) string { return filepath.Join(s.path(d), "fs") }

// record is layer.json: a checksum and what it protects.
type record struct {
	Sum  string          `json:"sum"`
	Info json.RawMessage `json:"info"`
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func (s *Store) load(name string) (Info, error) {
	b, err := os.ReadFile(filepath.Join(s.layers(), name, "layer.json"))
	if err != nil {
		return Info{}, err
	}
	var r record
	var info Info
	if err := json.Unmarshal(b, &r); err != nil {
		return Info{}, err
	}
	if sum(r.Info) != r.Sum {
		return Info{}, errors.New("checksum of layer.json is wrong")
	}
	if err := json.Unmarshal(r.Info, &info); err != nil {
		return Info{}, err
	}
	if fileName(info.DiffID) != name {
		return Info{}, fmt.Errorf("layer.json is of %s", info.DiffID)
	}
	st, err := os.Lstat(filepath.Join(s.layers(), name, "fs"))
	if err == nil && !st.IsDir() {
		err = errors.New("fs is not a directory")
	}
	return info, err
}

func (s *Store) add(info Info) *entry {
	e := &entry{info: info}
	s.have[info.DiffID] = e
	s.bytes += info.Bytes
	s.nodes += info.Inodes
	return e
}

// Get returns what is known about a visible layer.
func (s *Store) Get(d digest.Digest) (Info, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.have[d]
	if e == nil || e.gone != nil {
		return Info{}, false
	}
	return e.info, true
}

// Usage is what all visible layers take.
func (s *Store) Usage() (bytes, inodes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes, s.nodes
}

// Hold keeps a layer on disk until Release. It reports false when there is no
// such layer.
func (s *Store) Hold(d digest.Digest) bool {
	for {
		s.mu.Lock()
		e := s.have[d]
		if e == nil {
			s.mu.Unlock()
			return false
		}
		if e.gone == nil {
			e.refs++
			s.mu.Unlock()
			return true
		}
		gone := e.gone
		s.mu.Unlock()
		<-gone
	}
}

// Release ends one Hold of each layer and deletes those that nobody holds now.
func (s *Store) Release(ds ...digest.Digest) error {
	return s.reap(func(f func(*entry)) {
		for _, d := range ds {
			if e := s.have[d]; e != nil && e.refs > 0 {
				e.refs--
				f(e)
			}
		}
	})
}

// Unhold ends one Hold of each layer and deletes nothing.
func (s *Store) Unhold(ds ...digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range ds {
		if e := s.have[d]; e != nil && e.refs > 0 {
			e.refs--
		}
	}
}

// Sweep deletes all layers that nobody holds, or sets them aside after Suspect.
func (s *Store) Sweep() error {
	defer func() {
		s.mu.Lock()
		s.suspect = false
		s.mu.Unlock()
	}()
	return s.reap(func(f func(*entry)) {
		for _, e := range s.have {
			f(e)
		}
	})
}

// reap deletes those of the entries that walk yields which nobody holds.
func (s *Store) reap(walk func(func(*entry))) error {
	var dead []*entry
	s.mu.Lock()
	suspect := s.suspect
	walk(func(e *entry) {
		if e.refs == 0 && e.gone == nil {
			e.gone = make(chan struct{})
			dead = append(dead, e)
		}
	})
	s.mu.Unlock()
	var errs []error
	for _, e := range dead {
		// The rename is what makes it disappear; a crash in the deletion after it
		// leaves staging, which the next start empties.
		var trash string
		var err error
		if suspect {
			err = s.setAside(s.path(e.info.DiffID))
		} else {
			trash, err = s.hide(s.path(e.info.DiffID))
		}
		s.mu.Lock()
		if err == nil {
			delete(s.have, e.info.DiffID)
			s.bytes -= e.info.Bytes
			s.nodes -= e.info.Inodes
		}
		close(e.gone)
		e.gone = nil
		s.mu.Unlock()
		if err == nil && trash != "" {
			err = s.empty(trash)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("layer %s: %w", e.info.DiffID, err))
		}
	}
	return errors.Join(errs...)
}

func (s *Store) hide(p string) (string, error) {
	// No folder is made for it: that would not work on a full disk, where deleting must.
	trash := filepath.Join(s.staging(), "trash-"+rand.Text())
	crashpoint.Here("layer", "hide", "do")
	s.claim(trash)
	if err := os.Rename(p, trash); err != nil {
		s.release(trash)
		return "", err
	}
	crashpoint.Here("layer", "hide", "done")
	return trash, nil
}

// workIn makes a directory in staging that counts as somebody's until empty.
func (s *Store) workIn(prefix string) (string, error) {
	dir, err := os.MkdirTemp(s.staging(), prefix)
	if err == nil {
		s.claim(dir)
	}
	return dir, err
}

func (s *Store) claim(dir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy[filepath.Base(dir)] = true
}

func (s *Store) release(dir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.busy, filepath.Base(dir))
}

// empty deletes a directory of staging, if it is still there, and lets go of it.
func (s *Store) empty(dir string) error {
	err := os.RemoveAll(dir)
	s.release(dir)
	return err
}

// Staged is a layer that is being unpacked or waits to become visible.
type Staged struct {
	store *Store
	dir   string
	info  Info

	mu    sync.Mutex // serialises the one rename, for pulls that share the layer
	state int
}

const (
	staged = iota
	committed
	discarded
)

// Stage makes room for a new layer.
func (s *Store) Stage() (*Staged, error) {
	dir, err := s.workIn("layer-")
	if err != nil {
		return nil, fmt.Errorf("layer store: %w", err)
	}
	crashpoint.Here("layer", "stage", "made")
	st := &Staged{store: s, dir: dir}
	if err := errors.Join(os.Chmod(dir, 0o711), os.Mkdir(st.FS(), 0o755), os.Chmod(st.FS(), 0o755)); err != nil {
		return nil, errors.Join(fmt.Errorf("layer store: %w", err), s.empty(dir))
	}
	return st, nil
}

// FS is the directory to unpack into.
func (t *Staged) FS() string { return filepath.Join(t.dir, "fs") }

// Finish says what was unpacked. The layer can be committed after it.
func (t *Staged) Finish(info Info) error {
	raw, err := json.Marshal(info)
	if err != nil {
		return fmt.Errorf("layer %s: %w", info.DiffID, err)
	}
	b, err := json.Marshal(record{Sum: sum(raw), Info: raw})
	if err != nil {
		return fmt.Errorf("layer %s: %w", info.DiffID, err)
	}
	if err := durable.WriteFile(filepath.Join(t.dir, "layer.json"), b, 0o600, false); err != nil {
		return fmt.Errorf("layer %s: %w", info.DiffID, err)
	}
	t.info = info
	return nil
}

// Discard deletes a layer that did not become visible.
func (t *Staged) Discard() error {
	t.mu.Lock()
	was := t.state
	if was == staged {
		t.state = discarded
	}
	t.mu.Unlock()
	if was != staged {
		return nil
	}
	return t.store.empty(t.dir)
}

// ErrSpent is what Commit fails with when a layer that another caller committed
// was deleted again meanwhile: it must be staged anew.
var ErrSpent = fmt.Errorf("staged layer was used and deleted by another pull: %w", errdefs.ErrUnavailable)

// Commit makes layers durable, then visible, each with one more Hold. Layers
// that another caller committed meanwhile are held only.
func (s *Store) Commit(layers []*Staged) error {
	if len(layers) == 0 {
		return nil
	}
	if err := s.sync(); err != nil {
		return err
	}
	crashpoint.Here("layer", "commit", "synced")
	var held []digest.Digest
	for _, t := range layers {
		if err := t.commit(); err != nil {
			s.Unhold(held...)
			return fmt.Errorf("layer %s: %w", t.info.DiffID, err)
		}
		held = append(held, t.info.DiffID)
		crashpoint.Here("layer", "commit", "one visible")
	}
	if err := durable.SyncDir(s.layers()); err != nil {
		s.Unhold(held...)
		return fmt.Errorf("layer store: %w", err)
	}
	return nil
}

func (t *Staged) commit() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.store
	if s.Hold(t.info.DiffID) {
		return nil // visible already; Discard deletes what is left here
	}
	if t.state != staged {
		return ErrSpent
	}
	if err := os.Rename(t.dir, s.path(t.info.DiffID)); err != nil {
		if !errors.Is(err, fs.ErrExist) || !s.Hold(t.info.DiffID) {
			return err
		}
		return nil
	}
	t.state = committed
	s.mu.Lock()
	s.add(t.info).refs = 1
	delete(s.busy, filepath.Base(t.dir))
	s.mu.Unlock()
	return nil
}

// sync writes everything of the file system to disk.
func (s *Store) sync() error {
	d, err := os.Open(s.staging())
	if err != nil {
		return fmt.Errorf("layer store: %w", err)
	}
	err = unix.Syncfs(int(d.Fd()))
	if err != nil {
		err = fmt.Errorf("layer store: sync of the file system: %w", err)
	}
	return errors.Join(err, d.Close())
}
