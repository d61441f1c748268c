package cni

import (
	"context"
	"time"

	"github.com/berth-runtime/berth/internal/watch"
)

// watchDir sends on changed after entries of dir changed. It ends when ctx
// does. A dir that does not exist (yet, or any more) is looked for every retry.
func watchDir(ctx context.Context, dir string, retry time.Duration, changed chan<- struct{}) {
	notify := func() {
		select {
		case changed <- struct{}{}:
		default: // one is pending
		}
	}
	for ctx.Err() == nil {
		_ = watch.Dir(ctx, dir, notify)
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
}
