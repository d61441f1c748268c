package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/durable"
	"github.com/berth-runtime/berth/oci/embedded"
)

// Names in a container's directory.
const (
	recordFile = "state.json"
	specFile   = "spec.json"
	limitsFile = "limits.lock"
	gateDir    = "gate"
)

// version of the record's form. A record of another one is refused, not guessed at.
const version = 1

// Record is what is written down of a container. The spec in Saved is kept in a
// file of its own, byte for byte as it was given: most commands do not need it.
type Record struct {
	Version     int               `json:"version"`
	OCIVersion  string            `json:"ociVersion"`
	Rootfs      string            `json:"rootfs"` // absolute path
	Created     time.Time         `json:"created"`
	Annotations map[string]string `json:"annotations,omitempty"`
	OwnPIDs     bool              `json:"ownPids"`               // the container has a PID namespace of its own
	KeepKeyring bool              `json:"keepKeyring,omitempty"` // --no-new-keyring
	NoCgroup    bool              `json:"noCgroup,omitempty"`
	Systemd     bool              `json:"systemd,omitempty"` // its cgroup is a unit of systemd
	// Saved.Pid is 0 until the first process exists.
	Saved embedded.Saved `json:"saved"`
}

// Save replaces the record.
func (d *Dir) Save(r Record) error {
	r.Version = version
	r.Saved.Spec = nil
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("%s: state: %w", d.ID, err)
	}
	if err := durable.WriteFile(filepath.Join(d.Path, recordFile), b, 0o600, false); err != nil {
		return fmt.Errorf("%s: state: %w", d.ID, err)
	}
	return nil
}

// Load reads the record; Saved.Spec is nil.
func (d *Dir) Load() (Record, error) {
	b, err := os.ReadFile(filepath.Join(d.Path, recordFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, fmt.Errorf("%s: %w", d.ID, ErrNotExist)
	}
	if err != nil {
		return Record{}, fmt.Errorf("%s: state: %w", d.ID, err)
	}
	var r Record
	if err := json.Unmarshal(b, &r); err != nil {
		return Record{}, fmt.Errorf("%s: %s: %w", d.ID, recordFile, err)
	}
	if r.Version != version {
		return Record{}, fmt.Errorf("%s: %s: version %d was written by another berth-oci; this one knows %d", d.ID, recordFile, r.Version, version)
	}
	return r, nil
}

// SaveSpec keeps the spec as it was given. It comes before the first Save.
func (d *Dir) SaveSpec(raw []byte) error {
	if err := os.WriteFile(filepath.Join(d.Path, specFile), raw, 0o600); err != nil {
		return fmt.Errorf("%s: spec: %w", d.ID, err)
	}
	return nil
}

// LoadSpec reads the spec as it was given.
func (d *Dir) LoadSpec() (*specs.Spec, error) {
	b, err := os.ReadFile(filepath.Join(d.Path, specFile))
	if err != nil {
		return nil, fmt.Errorf("%s: spec: %w", d.ID, err)
	}
	var s specs.Spec
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("%s: %s: %w", d.ID, specFile, err)
	}
	return &s, nil
}

// MakeGate makes the gate of the container.
func (d *Dir) MakeGate() (embedded.Gate, error) {
	if err := os.Mkdir(filepath.Join(d.Path, gateDir), 0o700); err != nil {
		return embedded.Gate{}, fmt.Errorf("%s: gate: %w", d.ID, err)
	}
	return embedded.MakeGate(filepath.Join(d.Path, gateDir))
}

// OpenGate opens the gate of a created container.
func (d *Dir) OpenGate() (embedded.Gate, error) {
	return embedded.OpenGate(filepath.Join(d.Path, gateDir))
}

// RemoveGate is what makes a container known as started.
func (d *Dir) RemoveGate() error {
	// The name first, in one step: half a gate would still read as a gate.
	old := filepath.Join(d.Path, gateDir+".old")
	if err := os.Rename(filepath.Join(d.Path, gateDir), old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: gate: %w", d.ID, err)
	}
	return os.RemoveAll(old)
}
