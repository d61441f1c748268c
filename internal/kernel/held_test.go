package kernel

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Clones of a held mount show one filesystem, whichever way the kernel takes.
func TestHold(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	empty, err := NewEmptyMountNS()
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	for name, hold := range map[string]func(empty, m *os.File) (*os.File, error){"as the kernel can": Hold, "in a namespace": holdInNS} {
		t.Run(name, func(t *testing.T) {
			m, err := NewFS("tmpfs", nil, unix.MOUNT_ATTR_NOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			held, err := hold(empty, m)
			if err != nil {
				t.Fatal(err)
			}
			defer held.Close()
			var clones [2]*os.File
			for i := range clones {
				if clones[i], err = CloneHeld(held, false); err != nil {
					t.Fatal(err)
				}
				defer clones[i].Close()
			}
			fd, err := unix.Openat(int(clones[0].Fd()), "x", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			unix.Close(fd)
			var st unix.Stat_t
			if err := unix.Fstatat(int(clones[1].Fd()), "x", &st, 0); err != nil {
				t.Errorf("the other clone: %v", err)
			}
			var fs unix.Statfs_t
			if err := unix.Fstatfs(int(clones[1].Fd()), &fs); err != nil || fs.Flags&unix.ST_NOEXEC == 0 {
				t.Errorf("attributes: %#x, %v", fs.Flags, err)
			}
			// What is mounted somewhere is cloned as it is.
			dir := t.TempDir()
			d, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			c, err := CloneHeld(d, false)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := os.WriteFile(filepath.Join(dir, "y"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := unix.Fstatat(int(c.Fd()), "y", &st, 0); err != nil {
				t.Errorf("clone of a folder: %v", err)
			}
		})
	}
}

func TestCloneDetached(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	empty, err := NewEmptyMountNS()
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	m, err := NewFS("tmpfs", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for _, d := range []string{"a", "a/b"} {
		if err := unix.Mkdirat(int(m.Fd()), d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	at, err := OpenInRoot(m, "a", unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	c, err := CloneDetached(empty, m, at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var st unix.Stat_t
	if err := unix.Fstatat(int(c.Fd()), "b", &st, 0); err != nil {
		t.Error(err)
	}
}
