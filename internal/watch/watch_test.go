package watch

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestDirEndsWithItsDirectory: also when another one has its name already.
func TestDirEndsWithItsDirectory(t *testing.T) {
	for _, again := range []bool{false, true} {
		dir := filepath.Join(t.TempDir(), "d")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		calls, ended := make(chan struct{}, 100), make(chan error, 1)
		go func() { ended <- Dir(ctx, dir, func() { calls <- struct{}{} }) }()
		<-calls
		if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		select {
		case <-calls:
		case <-ctx.Done():
			t.Fatal("no call after a change")
		}
		if err := os.Remove(filepath.Join(dir, "f")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(4 * settle) // so that the directory's own end is all there is to hear
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
		if again {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := <-ended; err == nil || ctx.Err() != nil {
			t.Errorf("again %v: %v", again, err)
		}
	}
}
