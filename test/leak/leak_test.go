package leak

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSinceNamesANewMountAndForgetsAnOldOne(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	dir := filepath.Join(t.TempDir(), "m")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	before, err := Take()
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	left, err := before.Since(0)
	if e := unix.Unmount(dir, 0); e != nil {
		t.Fatal(e)
	}
	if err != nil || len(left) != 1 || left[0] != "mount: "+dir {
		t.Fatalf("left = %q, %v", left, err)
	}
	if left, err = before.Since(0); err != nil || len(left) != 0 {
		t.Fatalf("after unmount: left = %q, %v", left, err)
	}
}
