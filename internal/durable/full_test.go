package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestExplainNamesTheFullFileSystem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=64k,nr_inodes=10"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	path := filepath.Join(dir, "a", "file")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	werr := WriteFile(path, make([]byte, 100<<10), 0o600, false)
	err := Explain(fmt.Errorf("record: %w", werr))
	if !errdefs.IsResourceExhausted(err) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("kind of %v", err)
	}
	for _, s := range []string{"record: write " + dir, "no space left on device", "file system at " + dir + ": 64 of 64 KiB and 8 of 10 inodes are free"} {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%v: want it to say %q", err, s)
		}
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestExplainLeavesOtherErrorsAlone(t *testing.T) {
	for _, err := range []error{nil, fs.ErrNotExist, errdefs.ErrNotFound} {
		if got := Explain(err); got != err {
			t.Errorf("%v became %v", err, got)
		}
	}
	for _, err := range []error{unix.ENOSPC, &fs.PathError{Op: "write", Path: "pipe", Err: unix.EDQUOT}, &os.LinkError{Op: "rename", Old: "/", New: "/", Err: unix.ENOSPC}} {
		if got := Explain(err); !errdefs.IsResourceExhausted(got) {
			t.Errorf("%v became %v", err, got)
		}
	}
}
