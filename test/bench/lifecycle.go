package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// life is a whole pod life with one ExecSync in the middle.
func (b *bench) life(ctx context.Context, name string, took func(string, time.Duration)) error {
	p, err := b.up(ctx, name, took)
	if err != nil {
		return err
	}
	d, err := b.execOnce(ctx, p)
	if err != nil {
		return fmt.Errorf("ExecSync: %w", err)
	}
	if took != nil {
		took("ExecSync", d)
	}
	return b.down(ctx, p, took)
}

// lifecycle measures lives one at a time.
func (b *bench) lifecycle(ctx context.Context) error {
	s := b.result.series("one at a time")
	for i := range b.o.n {
		if err := b.life(ctx, fmt.Sprintf("one-%d", i), s.took); err != nil {
			return err
		}
		if b.o.between > 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(b.o.between):
			}
		}
	}
	return nil
}

// parallel brings pods up with several clients at once, then down again.
func (b *bench) parallel(ctx context.Context) error {
	s := b.result.series(fmt.Sprintf("%d at a time", b.o.workers))
	var (
		mu  sync.Mutex
		all []*pod
	)
	wall, err := b.spread(ctx, b.o.n, func(ctx context.Context, i int) error {
		p, err := b.up(ctx, fmt.Sprintf("par-%d", i), s.took)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		all = append(all, p)
		return nil
	})
	if err != nil {
		return err
	}
	s.value("pods up per second", "1/s", float64(b.o.n)/wall.Seconds())
	wall, err = b.spread(ctx, len(all), func(ctx context.Context, i int) error { return b.down(ctx, all[i], s.took) })
	if err != nil {
		return err
	}
	s.value("pods down per second", "1/s", float64(b.o.n)/wall.Seconds())
	return nil
}

// spread calls do(0..n-1) from b.o.workers goroutines and tells the wall time. The
// first error stops the rest.
func (b *bench) spread(ctx context.Context, n int, do func(context.Context, int) error) (time.Duration, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		next atomic.Int64
		wg   sync.WaitGroup
	)
	start := time.Now()
	for range b.o.workers {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n || ctx.Err() != nil {
					return
				}
				if err := do(ctx, i); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return time.Since(start), context.Cause(ctx)
}

// execSync measures execs in one container, and the CPU time that one costs the
// runtime: of its own processes, and with the children that they waited for.
func (b *bench) execSync(ctx context.Context) error {
	p, err := b.up(ctx, "exec", nil)
	if err != nil {
		return err
	}
	for range 5 {
		if _, err := b.execOnce(ctx, p); err != nil {
			return err
		}
	}
	s := b.result.series("exec")
	before := b.watched.cpu()
	for range b.o.execs {
		d, err := b.execOnce(ctx, p)
		if err != nil {
			return err
		}
		s.took("ExecSync true", d)
	}
	used := b.watched.cpu().since(before)
	if b.watched.given() {
		s.value("CPU per ExecSync, runtime's processes", "ms", used.self.Seconds()*1e3/float64(b.o.execs))
		s.value("CPU per ExecSync, with their children", "ms", (used.self+used.children).Seconds()*1e3/float64(b.o.execs))
	}
	return b.down(ctx, p, nil)
}
