package external

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/berth-runtime/berth/internal/id"
)

// maxSweepers is how many leftovers are taken down at a time.
const maxSweepers = 4

// RemoveLeftovers takes down the containers that an earlier process with the
// same dir made and did not delete, but those to be kept: it crashed, and their
// mount namespaces and stdio went with it. What cannot be taken down stays for the
// next time. ctx bounds the whole.
func RemoveLeftovers(ctx context.Context, dir string, keep func(id.Container) bool, log *slog.Logger) error {
	bundles, err := filepath.Glob(filepath.Join(dir, "*", "bundles", "*"))
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	free := make(chan struct{}, maxSweepers)
	for _, b := range bundles {
		if name := filepath.Base(b); id.Valid(name) != nil || keep(id.Container(name)) {
			continue
		}
		free <- struct{}{}
		wg.Go(func() {
			defer func() { <-free }()
			if err := removeLeftover(ctx, dir, b, log); err != nil {
				mu.Lock()
				errs = append(errs, fmt.Errorf("leftover container %s: %w", filepath.Base(b), err))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func removeLeftover(ctx context.Context, dir, bundle string, log *slog.Logger) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(bundle, labelFile))
	var l label
	if err == nil {
		err = json.Unmarshal(b, &l)
	}
	if errors.Is(err, fs.ErrNotExist) || err != nil && len(b) == 0 {
		return removeBundle(bundle) // it ended before anything else was made
	}
	if err != nil {
		return fmt.Errorf("%s: %w", labelFile, err)
	}
	r, err := New(Config{Handler: filepath.Base(filepath.Dir(filepath.Dir(bundle))), Command: l.Command, Dir: dir, Log: log})
	if err != nil {
		return err
	}
	c := &Container{rt: r, id: id.Container(filepath.Base(bundle)), dir: bundle}
	if l.Cgroup != "" {
		if c.cgroup, err = r.cgroups.Open(l.Cgroup); err != nil {
			return err
		}
		if err := c.cgroup.KillAll(); err != nil {
			return err
		}
	}
	// In our own mount namespace: its own is gone, and to delete needs none of it.
	_, err = r.run(ctx, nil, bundle, call{verb: "delete", args: []string{"--force", string(c.id)}})
	if err != nil && r.knows(c.id) {
		return err
	}
	if err := r.removeCgroup(c.cgroup); err != nil {
		return err
	}
	return removeBundle(bundle)
}
