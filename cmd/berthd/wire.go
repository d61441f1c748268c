package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/cni"
	"github.com/berth-runtime/berth/cni/builtin"
	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/config"
	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/oci/external"
	"github.com/berth-runtime/berth/oci/supervisor/client"
	"github.com/berth-runtime/berth/sandbox"
	"github.com/berth-runtime/berth/sandbox/spec"
)

// open makes the parts from the bottom up. What is open already is closed again
// when a later one fails.
func open(ctx context.Context, cfg *config.Config, m *metrics) (_ *parts, err error) {
	var closers []func() error
	closeAll := func() error {
		var errs []error
		for i := len(closers) - 1; i >= 0; i-- {
			errs = append(errs, closers[i]())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, closeAll())
		}
	}()

	images, err := imageservice.Open(ctx, imageservice.Config{
		Root:              filepath.Join(cfg.Root, "images"),
		RegistryConfigDir: cfg.RegistryConfigDir,
		Platform:          cfg.Images.Platform,
	})
	if err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	closers = append(closers, images.Close)

	pods, network, err := openNetwork(ctx, cfg, &closers)
	if err != nil {
		return nil, err
	}
	binary, err := findSupervisor(cfg.Runtime.Supervisor)
	if err != nil {
		return nil, err
	}
	commands, handlers := openHandlers(ctx, cfg, &closers)
	supervisor, err := client.Open(ctx, client.Config{StateDir: cfg.State, Binary: binary, Build: version.String(), Commands: commands})
	if err != nil {
		return nil, fmt.Errorf("supervisor: %w", err)
	}
	closers = append(closers, supervisor.Close)

	host, err := spec.ProbeHost()
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	engine, err := sandbox.Open(ctx, sandbox.Config{
		Root:     cfg.Root,
		State:    cfg.State,
		Images:   images,
		Network:  network,
		Runtime:  supervisor,
		Streams:  supervisor,
		FDs:      supervisor,
		Handlers: handlers,
		Policy:   spec.Policy{TolerateMissingHugetlb: true},
		Host:     &host,
		Observe:  m.observeStep(),

		Reconcile:  cfg.Runtime.Reconcile.Duration,
		Reconciled: m.reconciled(),
	})
	if err != nil {
		return nil, fmt.Errorf("engine: %w", err)
	}
	closers = append(closers, engine.Close)
	// Containers have claimed their images again: what is left over can go, while
	// the first questions are answered.
	sweep, stop := context.WithCancel(context.WithoutCancel(ctx))
	var swept sync.WaitGroup
	swept.Go(func() {
		if err := images.Sweep(sweep); err != nil && sweep.Err() == nil {
			klog.ErrorS(err, "Images that nobody uses are not deleted; the next start tries again")
		}
	})
	closers = append(closers, func() error { stop(); swept.Wait(); return nil })
	return &parts{
		engine: engine,
		images: images,
		node:   &node{cfg: cfg, host: host, engine: engine, network: network, pods: pods, handlers: handlers},
		close:  closeAll,
	}, nil
}

const (
	// featuresTime bounds the question what an external runtime can do.
	featuresTime = 10 * time.Second
	// featuresWait is how long the daemon's start waits for the answers.
	featuresWait = 400 * time.Millisecond
)

// openHandlers asks the configured external runtimes what they can do, all at
// once. One that is not there, or does not answer, is a handler all the same, of
// which nothing is promised until it does: it may be installed or mended later,
// and its pods say what is wrong with it until then.
func openHandlers(ctx context.Context, cfg *config.Config, closers *[]func() error) (map[string]external.Command, []sandbox.Handler) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), featuresTime)
	commands := map[string]external.Command{}
	handlers := make([]sandbox.Handler, len(cfg.Runtimes))
	var wg sync.WaitGroup
	*closers = append(*closers, func() error { cancel(); wg.Wait(); return nil })
	for i, name := range slices.Sorted(maps.Keys(cfg.Runtimes)) {
		r := cfg.Runtimes[name]
		c := external.Command{Path: r.Path, Args: r.Args, Timeout: r.Timeout.Duration}
		commands[name] = c
		handlers[i].Name, handlers[i].RecursiveReadonly = name, new(atomic.Bool)
		wg.Go(func() {
			f, err := external.Probe(ctx, name, c)
			if err != nil {
				klog.ErrorS(err, "External runtime", "handler", name, "path", c.Path)
			}
			handlers[i].RecursiveReadonly.Store(f.RecursiveReadonly)
		})
	}
	answered := make(chan struct{})
	go func() { wg.Wait(); close(answered) }() // ends with what the closer waits for
	select {
	case <-answered:
	case <-time.After(featuresWait):
	}
	return commands, handlers
}

func openNetwork(ctx context.Context, cfg *config.Config, closers *[]func() error) (*builtin.Network, *cni.Selector, error) {
	pool := cfg.Network.Pool
	if pool == 0 {
		pool = -1 // none; 0 would be the package's default
	}
	pods, err := builtin.Open(ctx, builtin.Config{
		StateDir: filepath.Join(cfg.State, "network"),
		Subnets:  prefixes(cfg.Network.Subnets),
		Unmasked: prefixes(cfg.Network.Unmasked),
		MTU:      cfg.Network.MTU,
		PoolSize: pool,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("built-in network: %w", err)
	}
	*closers = append(*closers, pods.Close)
	network, err := cni.Open(ctx, cni.Config{
		ConfDir:  cfg.CNIConfDir,
		BinDir:   cfg.CNIBinDir,
		StateDir: filepath.Join(cfg.State, "cni"),
		Default:  pods,
		Timeout:  cfg.Network.PluginTimeout.Duration,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("cni: %w", err)
	}
	*closers = append(*closers, network.Close)
	return pods, network, nil
}

// prefixes parses what config.Validate has checked.
func prefixes(list []string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// findSupervisor is the configured binary, or the one beside this program, or
// the one in PATH.
func findSupervisor(configured string) (string, error) {
	const name = "berth-supervisor"
	if configured != "" {
		if _, err := os.Stat(configured); err != nil {
			return "", fmt.Errorf("runtime.supervisor: %w", err)
		}
		return configured, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if st, err := os.Stat(beside); err == nil && st.Mode()&0o111 != 0 {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is neither beside berthd nor in PATH; install it there or set runtime.supervisor: %w", name, errdefs.ErrFailedPrecondition)
	}
	return path, nil
}
