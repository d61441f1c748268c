// Command berth-supervisor is the parent of all containers of a node. The daemon
// starts it; it outlives the daemon and ends by itself when nothing needs it.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded"
	"github.com/berth-runtime/berth/oci/supervisor"
)

func main() {
	state := flag.String("state", "", "state `directory`, an absolute path (socket, lock, log)")
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *showVersion {
		fmt.Println(version.String())
		return
	}
	// The heap is a few MiB: collecting it more often is cheaper than holding twice its size.
	debug.SetGCPercent(50)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := run(*state, log); err != nil {
		log.Error("supervisor", "error", err)
		os.Exit(1)
	}
}

func run(state string, log *slog.Logger) error {
	rt, err := embedded.New(embedded.Config{Log: log})
	if err != nil {
		return err
	}
	defer rt.Close()
	s, err := supervisor.New(supervisor.Config{
		StateDir: state,
		Handlers: map[string]oci.Runtime{"": rt, "berth": rt},
		Log:      log,
	})
	if err != nil {
		return err
	}
	return s.Serve(context.Background())
}
