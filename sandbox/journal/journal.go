// Package journal keeps one record file per pod sandbox and per container:
// versioned and checksummed JSON, replaced by rename.
//
// Records live below the daemon's root folder and not on the tmpfs of its state
// folder: after a reboot the network's DEL must still be called for each pod.
// They are not synced: they die with the boot, so they must be whole, not
// durable. A torn record (power loss) is moved aside, reported, and costs only
// its own pod or container.
package journal

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/berth-runtime/berth/internal/durable"
	"github.com/berth-runtime/berth/internal/id"
)

// Version of the record format. Readers ignore fields that they do not know.
const Version = 1

// envelope is the content of a record file.
type envelope struct {
	Version int             `json:"version"`
	Sum     string          `json:"sha256"`
	Body    json.RawMessage `json:"body"`
}

// Book is a folder of records of one kind.
type Book struct{ dir string }

// Open opens (and makes) the folder.
func Open(dir string) (*Book, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &Book{dir: dir}, nil
}

func (b *Book) path(key string) string { return filepath.Join(b.dir, key+".json") }

// Write replaces the record of key, which must be an id.
func (b *Book) Write(key string, v any) error {
	if err := id.Valid(key); err != nil {
		return err
	}
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("journal %s: %w", key, err)
	}
	sum := sha256.Sum256(body)
	data, err := json.Marshal(envelope{Version: Version, Sum: hex.EncodeToString(sum[:]), Body: body})
	if err != nil {
		return fmt.Errorf("journal %s: %w", key, err)
	}
	if err := durable.WriteFile(b.path(key), data, 0o600, false); err != nil {
		return fmt.Errorf("journal %s: %w", key, err)
	}
	return nil
}

// Remove drops the record of key; a missing one is success.
func (b *Book) Remove(key string) error {
	if err := id.Valid(key); err != nil {
		return err
	}
	if err := os.Remove(b.path(key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("journal %s: %w", key, err)
	}
	return nil
}

// Load calls f with each record, in no order. A record that cannot be read is
// renamed to <key>.json.bad and its error returned among the others; f's errors
// count the same.
func (b *Book) Load(f func(key string, body []byte) error) error {
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	var errs []error
	for _, e := range entries {
		name := e.Name()
		key, ok := strings.CutSuffix(name, ".json")
		if !ok {
			if strings.Contains(name, ".tmp-") { // a write that a crash cut short
				errs = append(errs, os.Remove(filepath.Join(b.dir, name)))
			}
			continue
		}
		body, err := b.read(key)
		if err == nil {
			err = f(key, body)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("journal %s: set aside as %s.bad: %w", key, name, err),
				os.Rename(b.path(key), b.path(key)+".bad"))
		}
	}
	return errors.Join(errs...)
}

func (b *Book) read(key string) ([]byte, error) {
	if err := id.Valid(key); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(b.path(key))
	if err != nil {
		return nil, err
	}
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if e.Version < 1 || e.Version > Version {
		return nil, fmt.Errorf("record version %d is not known to this daemon: %w", e.Version, errdefs.ErrDataLoss)
	}
	if sum := sha256.Sum256(e.Body); hex.EncodeToString(sum[:]) != e.Sum {
		return nil, fmt.Errorf("checksum differs: %w", errdefs.ErrDataLoss)
	}
	return e.Body, nil
}
