package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/cri"
	"github.com/berth-runtime/berth/cri/pulls"
	"github.com/berth-runtime/berth/internal/config"
	"github.com/berth-runtime/berth/internal/pullapi"
	"github.com/berth-runtime/berth/internal/version"
)

// parts is what the front door stands on.
type parts struct {
	engine cri.Engine
	images cri.Images
	node   cri.Node
	close  func() error // in the opposite order of opening; containers run on
}

// opener makes the parts; m, when not nil, is told of the steps of operations.
type opener func(ctx context.Context, cfg *config.Config, m *metrics) (*parts, error)

// stopTimeout bounds how long a stop waits for requests. Operations of the
// engine are journalled: what is cut is resumed by the next daemon.
const stopTimeout = 10 * time.Second

// tuneMemory trades a little processor time for memory, which every node pays
// for all the time: the heap is small and mostly long-lived.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
}

// run serves until SIGTERM or SIGINT; a second one ends the process at once.
// Containers keep running either way.
func run(ctx context.Context, cfg *config.Config, open opener) error {
	for _, dir := range []string{cfg.Root, cfg.State} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	state, err := lockDir("state", cfg.State)
	if err != nil {
		return err
	}
	defer state.Close()
	if cfg.Root != cfg.State {
		// Another daemon's containers are unknown to this one's records, and it
		// would clear their layers away as left-overs.
		root, err := lockDir("root", cfg.Root)
		if err != nil {
			return err
		}
		defer root.Close()
	}
	// Before anything is started; the socket itself is made when CRI can answer.
	if _, err := staleSocket(cfg.Socket); err != nil {
		return err
	}

	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	defer onSignals(stop)()
	err = serve(ctx, cfg, open)
	if err == nil {
		klog.InfoS("stopped; containers keep running")
	}
	return err
}

// onSignals cancels at the first SIGTERM or SIGINT and exits at the second.
func onSignals(stop context.CancelCauseFunc) (undo func()) {
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, unix.SIGTERM, unix.SIGINT)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for n := 0; ; n++ {
			select {
			case <-done:
				return
			case s := <-ch:
				if n > 0 {
					klog.ErrorS(nil, "second signal, exiting at once", "signal", s.String())
					os.Exit(1)
				}
				klog.InfoS("stopping", "signal", s.String())
				stop(fmt.Errorf("signal %s", s))
			}
		}
	}()
	return func() {
		signal.Stop(ch)
		close(done)
		<-ended
	}
}

func serve(ctx context.Context, cfg *config.Config, open opener) (err error) {
	started := time.Now()
	var m *metrics
	if cfg.MetricsAddress != "" {
		if m, err = openMetrics(cfg.MetricsAddress); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, m.Close()) }()
	}
	p, err := open(ctx, cfg, m)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	server, err := cri.New(cri.Config{
		StreamAddress:     cfg.Streaming.Address,
		StreamIdleTimeout: cfg.Streaming.IdleTimeout.Duration,
		Observe:           m.observe(),
	}, p.engine, p.images, p.node)
	if err != nil {
		return err
	}
	l, err := listen(cfg.Socket)
	if err != nil {
		return errors.Join(err, server.Close())
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	pulled, closePulls, err := servePulls(cfg, p.images)
	if err == nil {
		defer guardSockets(ctx, l, pulled)()
		defer func() { err = errors.Join(err, closePulls()) }()
		err = probe(ctx, cfg.Socket)
	}
	switch {
	case ctx.Err() != nil: // told to stop while starting
		return shutDown(server, served)
	case err != nil:
		return errors.Join(fmt.Errorf("start: %w", err), shutDown(server, served))
	}
	ready(cfg, time.Since(started))
	select {
	case <-ctx.Done():
	case err := <-served:
		return fmt.Errorf("CRI server ended: %w", err)
	}
	_, _ = sd.SdNotify(false, sd.SdNotifyStopping)
	return shutDown(server, served)
}

// servePulls serves the socket on which pulls can be watched.
func servePulls(cfg *config.Config, i pulls.Puller) (l *socket, stop func() error, err error) {
	l, err = listen(pullapi.SocketFor(cfg.Socket))
	if err != nil {
		return nil, nil, err
	}
	s := pulls.NewServer(i)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	return l, func() error {
		err := s.Close()
		if e := <-served; !errors.Is(e, http.ErrServerClosed) {
			err = errors.Join(err, e)
		}
		return err
	}, nil
}

func shutDown(server *cri.Server, served <-chan error) error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	server.Stop(ctx)
	return <-served
}

func ready(cfg *config.Config, took time.Duration) {
	if _, err := sd.SdNotify(false, sd.SdNotifyReady); err != nil {
		klog.ErrorS(err, "service manager not told")
	}
	klog.InfoS("READY", "version", version.Version, "socket", cfg.Socket, "pid", os.Getpid(), "took", took.Round(time.Millisecond))
}

// probe asks what kubelets ask first, over the socket that they use.
func probe(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	conn, err := grpc.NewClient("passthrough:///berth", grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{}); err != nil {
		return err
	}
	_, err = runtimeapi.NewImageServiceClient(conn).ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	return err
}
