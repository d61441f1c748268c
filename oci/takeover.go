package oci

import (
	"context"
	"encoding/json"
	"os"
)

// Heritable is implemented by containers that the next process of their runtime
// can go on with when this one dies.
type Heritable interface {
	// Bequeath returns what Adopt wants to be told of the started container besides
	// the request that made it, and descriptors, which are the caller's to keep and
	// to close. It does not change while the container runs.
	Bequeath() (json.RawMessage, []*os.File, error)
}

// Heritage is a started container whose maker is gone. Its files are borrowed for
// the call.
type Heritage struct {
	// Request made it. Of Namespaces only the keys count; MountFDs are not needed.
	Request CreateRequest
	// Pid and PidFD are the first process, which may have ended; PidFD is then nil
	// where it was closed since.
	Pid   int
	PidFD *os.File
	// Saved and Files are what Bequeath returned.
	Saved json.RawMessage
	Files []*os.File
}

// Adopter is implemented by runtimes whose containers are Heritable.
type Adopter interface {
	// Adopt goes on with a container. On error it is as it was: it runs, if it did.
	Adopt(ctx context.Context, h Heritage) (Container, error)
}
