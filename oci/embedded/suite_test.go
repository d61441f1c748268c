package embedded

import (
	"testing"

	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/test/ocitest"
)

// TestSuite: what every runtime must do.
func TestSuite(t *testing.T) { ocitest.Run(t, openRuntime) }

// TestAdoptedSuite: and what it must do with containers of a dead supervisor.
func TestAdoptedSuite(t *testing.T) { ocitest.RunAdopted(t, openRuntime) }

func openRuntime(t *testing.T) oci.Runtime {
	r, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}
