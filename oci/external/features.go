package external

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go/features"

	"github.com/berth-runtime/berth/oci"
)

// Features is what a runtime says that it can do and Berth asks of it. A runtime
// without the command "features" says nothing.
type Features struct {
	// RecursiveReadonly: it takes the mount option "rro".
	RecursiveReadonly bool
}

// Probe asks the runtime of c for its features. An error means that it cannot be
// called; one that does not know the command has no features.
func Probe(ctx context.Context, handler string, c oci.Command) (Features, error) {
	if err := Check(c); err != nil {
		return Features{}, err
	}
	dir, err := os.MkdirTemp("", "berth-features-")
	if err != nil {
		return Features{}, err
	}
	defer os.RemoveAll(dir)
	r, err := New(Config{Handler: handler, Command: c, Dir: dir})
	if err != nil {
		return Features{}, err
	}
	out, err := r.run(ctx, nil, r.dir, call{verb: "features"})
	var said *commandError
	if errors.As(err, &said) {
		return Features{}, nil
	}
	if err != nil {
		return Features{}, err
	}
	var f features.Features
	if err := json.Unmarshal(out, &f); err != nil {
		return Features{}, fmt.Errorf("handler %q: %s features: %w", handler, c.Path, err)
	}
	return Features{RecursiveReadonly: slices.Contains(f.MountOptions, "rro")}, nil
}
