package sandbox

import (
	"context"
	"os"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// Images is what the engine needs from the image service.
type Images interface {
	// Acquire finds an image by id or reference and pins it for owner (a container
	// id) until Release: a pinned image's layers stay on disk even when the image
	// is removed by name. Pins are kept in memory: the engine acquires again for
	// each of its records after a restart, before Ready.
	Acquire(ref, owner string) (*imageservice.Image, error)
	Release(owner string)
}

// Network attaches pods to the pod network.
type Network = cni.Network

// Runtime is the supervisor as the engine sees it (oci/supervisor/client).
type Runtime interface {
	Create(ctx context.Context, r wire.Create) error
	Start(ctx context.Context, r wire.Start) (wire.StartReply, error)
	Signal(ctx context.Context, r wire.Signal) error
	Delete(ctx context.Context, c id.Container) error
	Update(ctx context.Context, r wire.Update) error
	ReopenLog(ctx context.Context, r wire.ReopenLog) error
	List(ctx context.Context) ([]wire.Info, error)
	// UserNamespace makes a user namespace and returns it, and one of each of
	// r.Kinds, for the engine to close.
	UserNamespace(ctx context.Context, r wire.UserNamespace) ([]*os.File, error)
	// Exits delivers the exit records of containers, each at least once.
	Exits() <-chan wire.Exit
	// Resync fires after the connection to the supervisor was lost and made
	// again (perhaps to a new supervisor): the reader compares List with its records.
	Resync() <-chan struct{}
}

// RuntimeStreams is the part of the supervisor that concerns stdio.
type RuntimeStreams interface {
	Resize(ctx context.Context, r wire.Resize) error
	// Attach duplicates the container's output into the given files.
	Attach(ctx context.Context, c id.Container, stdout, stderr *os.File) error
	Stdin(ctx context.Context, c id.Container) (*os.File, error)
	CloseStdin(ctx context.Context, c id.Container) error
	// Exec starts a process. exit delivers its one exit record. With a terminal
	// the stdio files are nil and console is the pty master.
	Exec(ctx context.Context, r wire.Exec, stdin, stdout, stderr *os.File) (pid int, console *os.File, exit <-chan wire.Exit, err error)
}

// RuntimeFDs keeps descriptors in the supervisor, so that namespaces survive the daemon.
type RuntimeFDs interface {
	PutFDs(ctx context.Context, keys []string, files []*os.File) error
	GetFDs(ctx context.Context, keys []string) ([]*os.File, error) // all, or errdefs.ErrNotFound
	DropFDs(ctx context.Context, keys []string) error
	ListFDs(ctx context.Context) ([]string, error)
	// KeptBy says who knows what a supervisor must be given that takes the place of
	// a dead one, before it serves anything else: kept calls put for the files of
	// each pod. They may be closed meanwhile.
	KeptBy(kept func(put func(keys []string, files []*os.File)))
}
