// Package index keeps which images there are and what they are called: one
// checksummed file per image, <dir>/<digest>.json, written durably. A file that
// is torn or damaged is set aside and costs only its own image.
package index

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/berth-runtime/berth/internal/durable"
)

// Record is what is kept about one image.
type Record struct {
	// ID is the digest of Config.
	ID digest.Digest `json:"id"`
	// Config is the image config, byte for byte.
	Config []byte `json:"config"`
	// Tags and Digests are the image's names.
	Tags    []Name `json:"tags,omitempty"`
	Digests []Name `json:"digests,omitempty"`
	// Layers are diff IDs from the bottom to the top.
	Layers   []digest.Digest `json:"layers"`
	PulledAt time.Time       `json:"pulledAt"`
	// Removed images are kept only for the containers that use them.
	Removed bool `json:"removed,omitempty"`
}

// Name is a name and when it was given, counted over all images: a crash while
// a tag moves leaves it with both, and then the later one is right.
type Name struct {
	Name string `json:"name"`
	Seq  uint64 `json:"seq"`
}

// Clone returns a copy that shares no slice that changes.
func (r *Record) Clone() *Record {
	c := *r
	c.Tags, c.Digests = slices.Clone(r.Tags), slices.Clone(r.Digests)
	return &c
}

const version = 1

type file struct {
	Version int             `json:"version"`
	Sum     string          `json:"sum"`
	Image   json.RawMessage `json:"image"`
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// Encode makes the content of a record's file.
func Encode(r *Record) ([]byte, error) {
	raw, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return json.Marshal(file{Version: version, Sum: sum(raw), Image: raw})
}

// Decode reads the content of a record's file and checks it.
func Decode(b []byte) (*Record, error) {
	var f file
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, err
	}
	if f.Version != version {
		return nil, fmt.Errorf("version %d, want %d", f.Version, version)
	}
	if sum(f.Image) != f.Sum {
		return nil, errors.New("wrong checksum")
	}
	var r Record
	if err := json.Unmarshal(f.Image, &r); err != nil {
		return nil, err
	}
	if err := r.ID.Validate(); err != nil {
		return nil, fmt.Errorf("id: %w", err)
	}
	if r.ID.Algorithm().FromBytes(r.Config) != r.ID {
		return nil, errors.New("config does not match the id")
	}
	for _, d := range r.Layers {
		if err := d.Validate(); err != nil {
			return nil, fmt.Errorf("layer: %w", err)
		}
	}
	for _, n := range slices.Concat(r.Tags, r.Digests) {
		if _, err := reference.ParseNamed(n.Name); err != nil {
			return nil, fmt.Errorf("name: %w", err)
		}
	}
	return &r, nil
}

// Dir is the directory of records.
type Dir string

func (d Dir) path(id digest.Digest) string {
	return filepath.Join(string(d), strings.Replace(id.String(), ":", "-", 1)+".json")
}

// Contents is what the directory of records holds.
type Contents struct {
	Records []*Record
	Damaged map[string]error // by file name
	Aside   []string         // paths of damaged files that Load has moved
	torn    []string         // paths of what a write left that did not finish
}

// Look reads all records and changes nothing. A missing directory holds none.
func (d Dir) Look() (Contents, error) {
	c := Contents{Damaged: map[string]error{}}
	entries, err := os.ReadDir(string(d))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return c, fmt.Errorf("image index: %w", err)
	}
	for _, e := range entries {
		p := filepath.Join(string(d), e.Name())
		switch {
		case strings.HasPrefix(e.Name(), "."):
			c.torn = append(c.torn, p)
			continue
		case e.IsDir():
			continue
		}
		if r, err := d.read(p); err == nil {
			c.Records = append(c.Records, r)
		} else if durable.IsShort(err) { // it may be whole
			return c, fmt.Errorf("image index: %w", err)
		} else {
			c.Damaged[e.Name()] = err
		}
	}
	aside, err := os.ReadDir(d.quarantined())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return c, fmt.Errorf("image index: %w", err)
	}
	for _, e := range aside {
		c.Aside = append(c.Aside, filepath.Join(d.quarantined(), e.Name()))
	}
	return c, nil
}

func (d Dir) quarantined() string { return filepath.Join(string(d), "quarantine") }

// Load reads all records. Damaged files are moved to <dir>/quarantine and
// described in the second result.
func (d Dir) Load() ([]*Record, []string, error) {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return nil, nil, fmt.Errorf("image index: %w", err)
	}
	c, err := d.Look()
	if err != nil {
		return nil, nil, err
	}
	for _, p := range c.torn {
		if err := os.Remove(p); err != nil {
			return nil, nil, fmt.Errorf("image index: %w", err)
		}
	}
	var damaged []string
	for name, err := range c.Damaged {
		damaged = append(damaged, fmt.Sprintf("image record %s: %v", name, err))
		if err := d.quarantine(filepath.Join(string(d), name)); err != nil {
			return nil, nil, fmt.Errorf("image index: %w", err)
		}
	}
	return c.Records, damaged, nil
}

func (d Dir) read(p string) (*Record, error) {
	b, err := os.ReadFile(p)
	if err != nil {
		return nil, err
	}
	r, err := Decode(b)
	if err == nil && d.path(r.ID) != p {
		err = fmt.Errorf("holds image %s", r.ID)
	}
	return r, err
}

func (d Dir) quarantine(p string) error {
	q := d.quarantined()
	if err := os.MkdirAll(q, 0o700); err != nil {
		return err
	}
	return os.Rename(p, filepath.Join(q, filepath.Base(p)))
}

// Save writes a record; it is durable when Save returns.
func (d Dir) Save(r *Record) error {
	b, err := Encode(r)
	if err == nil {
		err = durable.WriteFile(d.path(r.ID), b, 0o600, true)
	}
	if err != nil {
		return fmt.Errorf("image record %s: %w", r.ID, err)
	}
	return nil
}

// Delete removes a record durably; a missing one is no error.
func (d Dir) Delete(id digest.Digest) error {
	err := os.Remove(d.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = durable.SyncDir(string(d))
	}
	if err != nil {
		return fmt.Errorf("image record %s: %w", id, err)
	}
	return nil
}
