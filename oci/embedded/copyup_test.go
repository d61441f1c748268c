package embedded

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
)

// copied copies dir into a new tmpfs and returns a path to it.
func copied(t *testing.T, dir string, options ...kernel.FSOption) (string, error) {
	t.Helper()
	to, err := kernel.NewFS("tmpfs", options, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { to.Close() })
	from, err := os.OpenFile(dir, unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	return fmt.Sprintf("/proc/self/fd/%d/.", to.Fd()), copyUp(from, to)
}

// described has a line of everything that a copy must keep for each name.
func described(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	inodes := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		s := fmt.Sprintf("%o %d:%d %d.%d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %d %x", len(b), sha256.Sum256(b))
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			s += " -> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			s += fmt.Sprintf(" %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if inodes[st.Ino] == "" {
				inodes[st.Ino] = rel // WalkDir goes in order of names, on both sides
			}
			s += fmt.Sprintf(" %d links, as %s", st.Nlink, inodes[st.Ino])
		}
		var names [4096]byte
		n, err := unix.Llistxattr(p, names[:])
		if err != nil {
			return err
		}
		list := strings.Split(string(names[:n]), "\x00")
		slices.Sort(list)
		for _, name := range list {
			if name == "" || strings.HasPrefix(name, "trusted.") {
				continue
			}
			var v [4096]byte
			n, err := unix.Lgetxattr(p, name, v[:])
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %s=%x", name, v[:n])
		}
		out[rel] = s
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// setXattr sets an attribute and reports whether both sides can have it.
func setXattr(t *testing.T, path, name string, value []byte) bool {
	t.Helper()
	to, err := kernel.NewFS("tmpfs", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	err = errors.Join(unix.Setxattr(fmt.Sprintf("/proc/self/fd/%d/.", to.Fd()), name, value, 0), unix.Setxattr(path, name, value, 0))
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Logf("%s: not on this kernel's tmpfs or the disk", name)
		_ = unix.Removexattr(path, name)
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	return true
}

// posixACL lets user 7 read.
func posixACL() []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2) // version
	for _, e := range [][3]uint32{{1, 6, ^uint32(0)}, {2, 4, 7}, {4, 4, ^uint32(0)}, {16, 4, ^uint32(0)}, {32, 0, ^uint32(0)}} {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

func TestCopyUp(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	write(t, dir+"/file", "content")
	write(t, dir+"/a/b/c/deep", strings.Repeat("deep", 100_000))
	write(t, dir+"/suid", "x")
	write(t, dir+"/empty", "")
	write(t, dir+"/none", "nobody may read this")
	write(t, dir+"/cap", "x")
	do := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	do(err)
	defer unix.Close(sock)
	sparse, err := os.Create(dir + "/sparse")
	do(err)
	_, err1 := sparse.WriteAt([]byte("middle"), 24<<20)
	_, err2 := sparse.WriteAt([]byte("late"), 40<<20+5)
	do(err1, err2, sparse.Truncate(64<<20+1), sparse.Close())
	do(
		os.Symlink("/etc/passwd", dir+"/abs"), os.Symlink("../../x", dir+"/a/up"), os.Symlink("missing", dir+"/dangling"),
		os.Link(dir+"/file", dir+"/a/b/hard"), os.Link(dir+"/file", dir+"/zhard"), os.Link(dir+"/abs", dir+"/a/hardlink-of-symlink"),
		unix.Mkfifo(dir+"/a/fifo", 0o640), unix.Mknod(dir+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Mknod(dir+"/block", unix.S_IFBLK|0o600, int(unix.Mkdev(7, 300))),
		unix.Bind(sock, &unix.SockaddrUnix{Name: dir + "/a/socket"}),
		os.Mkdir(dir+"/a/sticky", 0o700), os.WriteFile(dir+"/odd \n\xff name", nil, 0o600),
		os.Chown(dir+"/suid", 7, 8), os.Chmod(dir+"/none", 0), os.Lchown(dir+"/abs", 70000, 70001), os.Chown(dir+"/a/fifo", 1, 2),
		unix.Chmod(dir+"/suid", 0o6755), unix.Chmod(dir+"/a/sticky", 0o1777), unix.Chmod(dir+"/a/b", 0o2500), os.Chmod(dir+"/null", 0o666),
		os.Chown(dir, 9, 10), unix.Chmod(dir, 0o1750),
	)
	setXattr(t, dir+"/file", "user.note", []byte("kept"))
	setXattr(t, dir+"/a/b", "user.dir", []byte{})
	// cap_net_bind_service, effective, version 2
	setXattr(t, dir+"/cap", "security.capability", append([]byte{1, 0, 0, 2, 0, 4}, make([]byte, 14)...))
	if setXattr(t, dir+"/empty", "system.posix_acl_access", posixACL()) {
		setXattr(t, dir+"/a", "system.posix_acl_default", posixACL())
	}
	for i, name := range []string{"file", "a/b/c/deep", "abs", "a/fifo", "null", "a/b/c", "a/b", "a", "."} {
		ts := []unix.Timespec{{Sec: 1000}, {Sec: int64(1e9) + int64(i), Nsec: 123456789}}
		do(unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, name), ts, unix.AT_SYMLINK_NOFOLLOW))
	}
	want := described(t, dir)
	if want["a/socket"] == "" {
		t.Fatal("no socket was made")
	}
	delete(want, "a/socket")
	// 4 MiB hold the data, not the holes.
	to, err := copied(t, dir, kernel.FSOption{Key: "size", Value: "4m"})
	if err != nil {
		t.Fatal(err)
	}
	got := described(t, to)
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if got[name] != want[name] {
			t.Errorf("%q:\n%s\nwant\n%s", name, got[name], want[name])
		}
		delete(got, name)
	}
	if len(got) > 0 {
		t.Errorf("more than was there: %v", got)
	}
}

// TestCopyUpWithoutMknod: who may not make device nodes gets all the rest.
func TestCopyUpWithoutMknod(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	write(t, dir+"/file", "x")
	if err := errors.Join(unix.Mknod(dir+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), unix.Mkfifo(dir+"/pipe", 0o600)); err != nil {
		t.Fatal(err)
	}
	var to string
	err := kernel.OnThread(func() error {
		h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var d [2]unix.CapUserData
		if err := unix.Capget(&h, &d[0]); err != nil {
			return err
		}
		d[0].Effective &^= 1 << unix.CAP_MKNOD
		if err := unix.Capset(&h, &d[0]); err != nil {
			return err
		}
		var err error
		to, err = copied(t, dir)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(maps.Keys(described(t, to))); !slices.Equal(got, []string{".", "file", "pipe"}) {
		t.Errorf("copied: %q", got)
	}
}

func TestCopyUpLimits(t *testing.T) {
	needRoot(t)
	deep := t.TempDir()
	at := deep
	for range maxCopyDepth {
		at += "/d"
	}
	write(t, at+"/file", "x")
	if _, err := copied(t, deep); err != nil {
		t.Errorf("%d deep: %v", maxCopyDepth, err)
	}
	write(t, at+"/d/file", "x")
	_, err := copied(t, deep)
	refused(t, err, "tmpcopyup: ")

	full := t.TempDir()
	write(t, full+"/file", strings.Repeat("x", 100_000))
	_, err = copied(t, full, kernel.FSOption{Key: "size", Value: "16k"})
	if !errors.Is(err, errdefs.ErrResourceExhausted) || !strings.Contains(err.Error(), `"file"`) || !strings.Contains(err.Error(), "size") {
		t.Errorf("full tmpfs: %v", err)
	}

	mounted := t.TempDir()
	hostMount(t, mounted+"/a/sub")
	_, err = copied(t, mounted)
	refused(t, err, `tmpcopyup: "a/sub": is a mount point`)
	if _, err := copied(t, mounted+"/a/sub"); err != nil {
		t.Errorf("the root of a mount: %v", err)
	}

	f, err := os.Open(full + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := copyUp(f, f); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("no directory: %v", err)
	}
}

// TestCopyUpRace: names that change between a file, a FIFO, a directory and links
// to a secret while they are copied yield neither the secret nor a hang (I1, I7).
func TestCopyUpRace(t *testing.T) {
	needRoot(t)
	dir, out, secret := t.TempDir(), t.TempDir(), t.TempDir()
	write(t, secret+"/key", "secret")
	for i := range 20 {
		name := fmt.Sprintf("n%02d", i)
		write(t, dir+"/file"+name, "public")
		write(t, dir+"/dir"+name+"/key", "public")
		if err := errors.Join(os.Symlink(secret+"/key", out+"/file"+name), os.Symlink(secret, out+"/dir"+name)); err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 {
			if err := errors.Join(os.Remove(out+"/file"+name), unix.Mkfifo(out+"/file"+name, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
	}
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			for _, n := range names {
				select {
				case <-stop:
					return
				default:
				}
				if err := unix.Renameat2(unix.AT_FDCWD, dir+"/"+n.Name(), unix.AT_FDCWD, out+"/"+n.Name(), unix.RENAME_EXCHANGE); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	defer func() { close(stop); swapper.Wait() }()
	kinds := map[fs.FileMode]int{}
	all := []fs.FileMode{0, fs.ModeDir, fs.ModeSymlink, fs.ModeNamedPipe}
	missing := func(k fs.FileMode) bool { return kinds[k] == 0 }
	for round := 0; round < 200 || round < 5000 && slices.ContainsFunc(all, missing); round++ {
		to, err := copied(t, dir)
		if err != nil {
			t.Fatal(err)
		}
		err = filepath.WalkDir(to, func(p string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				kinds[d.Type()]++
				return err
			}
			kinds[0]++
			b, err := os.ReadFile(p)
			if !bytes.Equal(b, []byte("public")) {
				t.Errorf("%s: %q", p, b)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if slices.ContainsFunc(all, missing) {
		t.Errorf("the race did not show every kind: %v", kinds)
	}
}
