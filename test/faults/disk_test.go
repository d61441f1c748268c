package faults

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/pace"
	"github.com/berth-runtime/berth/test/testimage"
)

// ext4 mounts a small file system of its own on the folder sub of the daemon.
func (n *node) ext4(sub string, size int64, inodes int) string {
	n.t.Helper()
	image, dir := filepath.Join(n.Dir, sub+".img"), filepath.Join(n.Dir, sub)
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size)); err != nil {
		n.t.Fatal(err)
	}
	for _, cmd := range [][]string{
		{"mkfs.ext4", "-q", "-m", "0", "-N", fmt.Sprint(inodes), image}, // no blocks kept for root: we are root
		{"mount", "-o", "loop", image, dir},
	} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			n.t.Fatalf("%v: %v: %s", cmd, err, out)
		}
	}
	n.mounts = append(n.mounts, dir)
	return dir
}

// tmpfs is the same in memory.
func (n *node) tmpfs(sub, options string) string {
	n.t.Helper()
	dir := filepath.Join(n.Dir, sub)
	if err := unix.Mount("none", dir, "tmpfs", 0, options+",mode=700"); err != nil {
		n.t.Fatal(err)
	}
	n.mounts = append(n.mounts, dir)
	return dir
}

// filler takes all that is left of a file system.
type filler struct {
	t   *testing.T
	dir string
}

func newFiller(t *testing.T, dir string) *filler {
	t.Helper()
	f := &filler{t, filepath.Join(dir, "filler")}
	if err := os.Mkdir(f.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return f
}

// bytes fills it to the last byte.
func (f *filler) bytes() {
	f.t.Helper()
	w, err := os.OpenFile(filepath.Join(f.dir, "bytes"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		f.t.Fatal(err)
	}
	defer w.Close()
	for _, size := range []int{1 << 20, 4096, 1} {
		for block := make([]byte, size); err == nil; {
			_, err = w.Write(block)
		}
		if !errors.Is(err, unix.ENOSPC) {
			f.t.Fatal(err)
		}
		err = w.Sync() // what is only promised is not there yet
		if err != nil && !errors.Is(err, unix.ENOSPC) {
			f.t.Fatal(err)
		}
		err = nil
	}
}

// inodes fills it to the last file.
func (f *filler) inodes() {
	f.t.Helper()
	for i := 0; ; i++ {
		w, err := os.CreateTemp(f.dir, "inode-")
		if errors.Is(err, unix.ENOSPC) {
			return
		}
		if err != nil {
			f.t.Fatal(err)
		}
		w.Close()
	}
}

// free gives everything back.
func (f *filler) free() {
	f.t.Helper()
	if err := errors.Join(os.RemoveAll(f.dir), os.Mkdir(f.dir, 0o700)); err != nil {
		f.t.Fatal(err)
	}
}

// bigImage is an image with one layer of size bytes that do not compress.
func bigImage(t *testing.T, name string, size int) string {
	t.Helper()
	body := make([]byte, size)
	if _, err := rand.Read(body); err != nil {
		t.Fatal(err)
	}
	l, err := testimage.Layer(testimage.Gzip, testimage.Entry{Name: "big", Body: body})
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := program.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	img, err := testimage.Image("", cfg.Config, l)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := registry.Push(context.Background(), name, img)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// wantFull checks that err says which file system is full.
func wantFull(t *testing.T, what string, err error, dir string) {
	t.Helper()
	wantErr(t, what, err, "no space left on device", "file system at "+dir)
	if err != nil && status.Code(err) != codes.ResourceExhausted {
		t.Errorf("%s: code %v: %v", what, status.Code(err), err)
	}
}

// tree is what is below the daemon's folders, without what changes all the time.
func (n *node) tree() map[string]bool {
	n.t.Helper()
	out := map[string]bool{}
	for _, dir := range []string{"root", "run/pods", "run/network/pods", "run/cni"} {
		for _, f := range files(n.t, filepath.Join(n.Dir, dir)) {
			if !strings.HasPrefix(f, "filler/") && !strings.HasPrefix(f, "podlogs/") {
				out[filepath.Join(dir, f)] = true
			}
		}
	}
	return out
}

// same checks that the tree is, or soon becomes, what it was: some of what is to
// go is left to the reconciler.
func (n *node) same(what string, before map[string]bool) {
	n.t.Helper()
	after := n.tree()
	for deadline := time.Now().Add(pace.Wait(15 * time.Second)); !maps.Equal(before, after) && time.Now().Before(deadline); after = n.tree() {
		time.Sleep(20 * time.Millisecond)
	}
	for f := range after {
		if !before[f] {
			n.t.Errorf("%s: left %s", what, f)
		}
	}
	for f := range before {
		if !after[f] {
			n.t.Errorf("%s: lost %s", what, f)
		}
	}
}

// TestRootDiskFull: with not a byte, or not an inode, left on the disk of the
// root folder and the logs, nothing new can be made, and everything that is there
// can be looked at, entered, stopped and removed, also after a restart.
func TestRootDiskFull(t *testing.T) {
	for _, what := range []string{"bytes", "inodes"} {
		t.Run(what, func(t *testing.T) {
			n := fresh(t)
			root := n.ext4("root", 64<<20, 2048)
			n.up()
			n.pull(prog)
			small := bigImage(t, "small:1", 100<<10)
			n.pull(small)
			big := bigImage(t, "big:1", 1<<20)
			f := newFiller(t, root)
			fill := map[string]func(){"bytes": f.bytes, "inodes": f.inodes}[what]

			logged := n.PodConfig()
			logged.LogDirectory = filepath.Join(root, "podlogs")
			p := &pod{config: logged}
			var err error
			if p.id, err = n.tryPod(logged); err != nil {
				t.Fatal(err)
			}
			other := n.pod()
			writer := n.run(p, "count", "100000", "1000")
			keep, gone := n.run(p, "sleep", "1000"), n.run(p, "sleep", "1000")
			made, ofOther := n.create(p, "sleep", "1000"), n.run(other, "sleep", "1000")
			n.eventually("the writer writes", func() bool { return strings.Contains(n.logOf(writer), " F 100\n") })
			fill()
			before := n.tree()

			_, err = n.tryPod(n.PodConfig())
			wantFull(t, "run pod", err, root)
			_, err = n.tryCreate(p, harness.ContainerConfig(prog, "sleep", "1000"))
			wantFull(t, "create", err, root)
			if what == "bytes" { // an inode more is not wanted here
				fill()
				wantFull(t, "start", n.tryStart(made), root)
			}
			_, err = n.Images.PullImage(n.ctx(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: big}})
			wantFull(t, "pull", err, root)
			n.same("after what was refused", before)
			n.says("no space left on device")

			for _, restart := range []bool{false, true} {
				if restart {
					fill()
					n.restart()
				}
				n.ready()
				if p, c := n.pods(), n.containers(); len(p) != 2 || len(c) != 5 {
					t.Errorf("restart %v: pods %v, containers %v", restart, p, c)
				}
				n.alive(writer)
				n.alive(keep)
				n.alive(ofOther)
				if s := n.container(made); s.State != cri.ContainerState_CONTAINER_CREATED {
					t.Errorf("restart %v: the container that could not be started is %v", restart, s.State)
				}
			}
			fill()
			if err := n.tryStop(gone, 5); err != nil {
				t.Errorf("stop: %v", err)
			}
			if err := n.tryStop(writer, 0); err != nil {
				t.Errorf("stop of the writer: %v", err)
			}
			if s := n.container(writer); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 {
				t.Errorf("writer: %v, code %d", s.State, s.ExitCode)
			}
			fill()
			n.restart() // the records of both could not be written
			if s := n.container(writer); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 {
				t.Errorf("writer after a restart: %v, code %d", s.State, s.ExitCode)
			}
			if lines := strings.Split(n.logOf(writer), "\n"); len(lines) < 100 || !strings.HasSuffix(lines[99], " F 99") {
				t.Errorf("log of the writer has %d lines", len(lines))
			}
			if err := n.tryRemove(gone); err != nil {
				t.Errorf("remove: %v", err)
			}
			fill()
			n.removePod(other.id)
			fill()
			n.restart()
			if p, c := n.pods(), n.containers(); len(p) != 1 || len(c) != 3 {
				t.Errorf("after the removals and a restart: pods %v, containers %v", p, c)
			}
			fill()
			if _, err := n.Images.RemoveImage(n.ctx(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: small}}); err != nil {
				t.Errorf("remove image: %v", err)
			}
			// One that a container uses goes out of sight only.
			if _, err := n.Images.RemoveImage(n.ctx(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: prog}}); err != nil {
				t.Errorf("remove image in use: %v", err)
			}
			if r, err := n.Images.ListImages(n.ctx(), &cri.ListImagesRequest{}); err != nil || len(r.Images) != 0 {
				t.Errorf("images left: %v, %v", r, err)
			}
			n.alive(keep)

			f.free()
			n.pull(prog)
			n.pull(big)
			if err := n.tryStart(made); err != nil {
				t.Errorf("start with space: %v", err)
			}
			n.alive(made)
			n.alive(n.run(n.pod(), "sleep", "1000"))
			n.restart()
			n.alive(keep)
			n.removePod(p.id)
			n.ready()
		})
	}
}

// TestRootDiskFullWhilePulling: the disk fills up at different points of a pull.
// Nothing of it stays, and the same pull works when there is space.
func TestRootDiskFullWhilePulling(t *testing.T) {
	n := fresh(t)
	root := n.ext4("root", 64<<20, 2048)
	n.up()
	n.pull(prog)
	n.alive(n.run(n.pod(), "sleep", "1000"))
	big := bigImage(t, "pulled:1", 8<<20)
	f := newFiller(t, root)
	before := n.tree()
	for _, room := range []int64{0, 4 << 10, 64 << 10, 1 << 20, 3 << 20, 7 << 20} {
		leave := filepath.Join(root, "filler", "room")
		if room > 0 {
			if err := os.WriteFile(leave, bytes.Repeat([]byte{1}, int(room)), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		f.bytes()
		if err := os.RemoveAll(leave); err != nil {
			t.Fatal(err)
		}
		_, err := n.Images.PullImage(n.ctx(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: big}})
		wantFull(t, fmt.Sprintf("pull with %d bytes", room), err, root)
		n.same(fmt.Sprintf("%d bytes", room), before)
		f.free()
	}
	n.pull(big)
	n.ready()
}

// TestStateFolderFull: the same for the folder of sockets and pod files.
func TestStateFolderFull(t *testing.T) {
	for what, options := range map[string]string{"bytes": "size=1m", "inodes": "size=8m,nr_inodes=120"} {
		t.Run(what, func(t *testing.T) {
			n := fresh(t)
			state := n.tmpfs("run", options)
			n.up()
			n.pull(prog)
			p, other := n.pod(), n.pod()
			keep, made, ofOther := n.run(p, "sleep", "1000"), n.create(p, "sleep", "1000"), n.run(other, "sleep", "1000")
			f := newFiller(t, state)
			fill := map[string]func(){"bytes": f.bytes, "inodes": f.inodes}[what]
			fill()
			before := n.tree()
			_, err := n.tryPod(n.PodConfig())
			wantFull(t, "run pod", err, state)
			n.same("after what was refused", before)
			n.alive(keep)
			n.restart()
			fill()
			n.ready()
			n.alive(keep)
			if err := n.tryStart(made); err != nil {
				t.Errorf("start: %v", err) // the state folder has no part in it
			}
			n.alive(made)
			n.alive(ofOther)
			n.removePod(other.id)
			fill()
			n.restart()
			if p := n.pods(); len(p) != 1 {
				t.Errorf("pods %v", p)
			}
			f.free()
			n.alive(n.run(n.pod(), "sleep", "1000"))
			n.alive(keep)
		})
	}
}
