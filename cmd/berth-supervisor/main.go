// Command berth-supervisor is the parent of all containers of a node. The daemon
// starts it; it outlives the daemon and ends by itself when nothing needs it.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded"
	"github.com/berth-runtime/berth/oci/external"
	"github.com/berth-runtime/berth/oci/supervisor"
)

// leftoverTime bounds the clearing up after a dead supervisor: the daemon waits for it.
const leftoverTime = 4 * time.Second

func main() {
	crashpoint.Arm(crashpoint.Supervisor)
	state := flag.String("state", "", "state `directory`, an absolute path (socket, lock, log)")
	resume := flag.Int("resume", -1, "`descriptor` of what the program before this one left, for an upgrade in place")
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *showVersion {
		fmt.Println(version.String())
		return
	}
	// The heap is a few MiB: collecting it more often is cheaper than holding twice its size.
	debug.SetGCPercent(50)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := run(*state, *resume, log); err != nil {
		log.Error("supervisor", "error", err)
		os.Exit(1)
	}
}

func run(state string, resume int, log *slog.Logger) error {
	rt, err := embedded.New(embedded.Config{Log: log})
	if err != nil {
		return err
	}
	defer rt.Close()
	externals := filepath.Join(state, "external")
	cfg := supervisor.Config{
		StateDir: state,
		Handlers: map[string]oci.Runtime{"": rt, "berth": rt},
		External: func(handler string, c oci.Command, forking func() func()) (oci.Runtime, error) {
			return external.New(external.Config{Handler: handler, Command: c, Dir: externals, Forking: forking, Log: log})
		},
		Settle: func(keep func(id.Container) bool) {
			ctx, cancel := context.WithTimeout(context.Background(), leftoverTime)
			defer cancel()
			if err := external.RemoveLeftovers(ctx, externals, keep, log); err != nil {
				log.Error("containers of an earlier supervisor", "error", err)
			}
		},
		Log: log,
	}
	var s *supervisor.Server
	if resume >= 0 {
		s, err = supervisor.Resume(cfg, resume)
	} else {
		s, err = supervisor.New(cfg)
	}
	if err != nil {
		return err
	}
	return s.Serve(context.Background())
}
