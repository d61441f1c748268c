package sandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/sandbox/lifecycle"
)

// onDisk is the state of a container's record as the next daemon would read it.
func (k *kit) onDisk(c id.Container) (state lifecycle.State) {
	k.t.Helper()
	ok(k.t, k.ctrBook.Load(func(key string, body []byte) error {
		r, err := decodeContainer(body)
		if r.ID == c {
			state = r.State
		}
		return err
	}))
	return state
}

// TestRecordsAreWrittenWhenThereIsSpaceAgain: what happened on a full disk is on
// record soon after there is room, and not only in memory.
func TestRecordsAreWrittenWhenThereIsSpaceAgain(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	book := filepath.Join(root, "sandboxes", "containers")
	ok(t, os.MkdirAll(book, 0o700))
	ok(t, unix.Mount("none", book, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { ok(t, unix.Unmount(book, unix.MNT_DETACH)) })
	k := openKit(t, newWorld(t), root, t.TempDir())
	ctx := context.Background()
	c := k.running(k.pod("a"), "c")
	filler := filepath.Join(book, "filler")
	err := os.WriteFile(filler, make([]byte, 1<<20), 0o600)
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	// The line fits into the last page of its file, until that is full too.
	for k.onDisk(c) == lifecycle.Running {
		rec := must(k.findContainer(string(c)))(t).record()
		if k.ctrBook.Write(string(c), &rec) != nil {
			break
		}
	}
	ok(t, k.StopContainer(ctx, string(c), 0))
	if s := must(k.Container(string(c)))(t); s.State != ContainerExited {
		t.Fatalf("state %v", s.State)
	}
	if got := k.onDisk(c); got != lifecycle.Running {
		t.Fatalf("on a full disk: record says %v", got)
	}
	k.payOwed()
	ok(t, os.Remove(filler))
	k.payOwed()
	if got := k.onDisk(c); got != lifecycle.Exited {
		t.Fatalf("with space: record says %v", got)
	}
	found := must(k.findContainer(string(c)))(t)
	found.mu.Lock()
	defer found.mu.Unlock()
	if found.owed {
		t.Error("the record counts as not written")
	}
}
