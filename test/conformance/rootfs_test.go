package conformance

import (
	"archive/tar"
	"context"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/testimage"
)

// pushImage makes an image of the test program's files with layers over them
// and returns its reference; change may edit its config.
func pushImage(t *testing.T, repo string, change func(*v1.Config), layers ...[]testimage.Entry) string {
	t.Helper()
	cf, err := images.image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config := *cf.Config.DeepCopy()
	config.Labels = map[string]string{"repo": repo} // or an image without changes would be the shared one
	if change != nil {
		change(&config)
	}
	all, err := images.image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, entries := range layers {
		l, err := testimage.Layer(testimage.Gzip, entries...)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, l)
	}
	img, err := testimage.Image("", config, all...)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := images.Push(context.Background(), repo+":1", img)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := node.Images.RemoveImage(ctx(t), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
			t.Error(err)
		}
	})
	return ref
}

func pullID(t *testing.T, ref string) string {
	t.Helper()
	id, err := pull(t, ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestRootfsIsTheImage looks from inside a container at everything that layers
// can say: whiteouts, opaque folders, hard links, device nodes, extended
// attributes, ids beyond 16 bits, special modes, replaced kinds.
func TestRootfsIsTheImage(t *testing.T) {
	const bigUID, bigGID = 2_000_000_000, 4_294_967_294
	// A version 2 file capability: cap_net_raw, effective.
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	ref := pushImage(t, "layers", nil, []testimage.Entry{
		{Name: "t/"},
		{Name: "t/big", UID: bigUID, GID: bigGID, Body: []byte("big")},
		{Name: "t/gone", Body: []byte("x")}, {Name: "t/gonedir/"}, {Name: "t/gonedir/f", Body: []byte("x")},
		{Name: "t/opaque/"}, {Name: "t/opaque/old", Body: []byte("x")}, {Name: "t/opaque/sub/"}, {Name: "t/opaque/sub/old", Body: []byte("x")},
		{Name: "t/one", Body: []byte("linked")}, {Name: "t/two", Type: tar.TypeLink, Target: "t/one"},
		{Name: "t/null", Type: tar.TypeChar, Mode: 0o666, Major: 1, Minor: 3}, {Name: "t/block", Type: tar.TypeBlock, Mode: 0o640, Major: 259, Minor: 300},
		{Name: "t/fifo", Type: tar.TypeFifo, Mode: 0o622},
		{Name: "t/attr", Body: []byte("x"), Xattrs: map[string]string{"security.capability": capability, "user.berth": "a\x00b"}},
		{Name: "t/setuid", Mode: 0o6755, UID: 1000, GID: 500, Body: []byte("x")}, {Name: "t/sticky/", Mode: 0o1777},
		{Name: "t/file-then-dir", Body: []byte("x")}, {Name: "t/dir-then-file/"}, {Name: "t/dir-then-file/f", Body: []byte("x")},
		{Name: "t/link-then-dir", Type: tar.TypeSymlink, Target: "/etc"},
		{Name: "t/lower", Body: []byte("from below")}, {Name: "t/back", Body: []byte("first")},
		{Name: "t/abs", Type: tar.TypeSymlink, Target: "/t/big"},
	}, []testimage.Entry{
		testimage.Whiteout("t", "gone"), testimage.Whiteout("t", "gonedir"), testimage.Whiteout("t", "back"),
		{Name: "t/opaque/"}, testimage.Opaque("t/opaque"), {Name: "t/opaque/new", Body: []byte("new")},
		{Name: "t/file-then-dir/"}, {Name: "t/file-then-dir/f", Body: []byte("now a folder")},
		{Name: "t/dir-then-file", Body: []byte("now a file")},
		{Name: "t/link-then-dir/"}, {Name: "t/link-then-dir/passwd", Body: []byte("not the image's users")},
	}, []testimage.Entry{
		{Name: "t/back", Body: []byte("third")},
	})
	id := pullID(t, ref)
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) { c.Image.Image = id })
	check := func(c string) {
		t.Helper()
		for _, row := range []struct{ cmd, want string }{
			{"ls /t", "abs\nattr\nback\nbig\nblock\ndir-then-file\nfifo\nfile-then-dir/\nlink-then-dir/\nlower\nnull\none\nopaque/\nsetuid\nsticky/\ntwo\n"},
			{"ls /t/opaque", "new\n"},
			{"cat /t/back", "third"}, {"cat /t/abs", "big"}, {"cat /t/dir-then-file", "now a file"}, {"cat /t/file-then-dir/f", "now a folder"},
			{"cat /t/link-then-dir/passwd", "not the image's users"},
			{"xattr /t/attr user.berth", "a\x00b"}, {"xattr /t/attr security.capability", capability},
			{"cat /t/null", ""},
		} {
			if out, e, code := execSync(t, c, append([]string{"/bin/prog"}, strings.Fields(row.cmd)...)...); code != 0 || out != row.want {
				t.Errorf("%s: %q %s, want %q", row.cmd, out, e, row.want)
			}
		}
		for name, want := range map[string]string{
			"/t/big": "-0644 2000000000:4294967294 3 nlink=1", "/t/null": "c0666 0:0 0 nlink=1", "/t/block": "b0640 0:0 0 nlink=1",
			"/t/fifo": "p0622", "/t/setuid": "-6755 1000:500", "/t/sticky": "d1777", "/t/abs": "l0777", "/t/one": "-0644 0:0 6 nlink=2", "/t/two": "-0644 0:0 6 nlink=2",
		} {
			if out := execOut(t, c, "/bin/stat", name); !strings.HasPrefix(out, name+" "+want) {
				t.Errorf("stat says %q, want %q", out, want)
			}
		}
		if out := execOut(t, c, "/bin/stat", "/t/null", "/t/block"); !strings.Contains(out, "dev=1:3") || !strings.Contains(out, "dev=259:300") {
			t.Errorf("device numbers: %s", out)
		}
	}
	check(c)
	// What the container writes stays its own.
	if _, e, code := execSync(t, c, "/bin/prog", "write", "/t/two", "changed"); code != 0 {
		t.Fatalf("write: %s", e)
	}
	if _, e, code := execSync(t, c, "/bin/prog", "write", "/t/gonedir/new", "made"); code != 0 {
		t.Errorf("a folder made where a whiteout was: %s", e)
	}
	if out := execOut(t, c, "/bin/ls", "/t/gonedir"); out != "new\n" {
		t.Errorf("what was whited out shows through a new folder: %q", out)
	}
	check(started(t, p, func(c *cri.ContainerConfig) { c.Image.Image = id }))
}

// TestPullOfAnIndexTakesThisNodesPlatform: the other platforms' layers are not
// even fetched.
func TestPullOfAnIndexTakesThisNodesPlatform(t *testing.T) {
	cf, err := images.image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := testimage.Layer(testimage.Gzip, testimage.Entry{Name: "foreign", Body: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	other, err := testimage.Image("s390x", cf.Config, foreign)
	if err != nil {
		t.Fatal(err)
	}
	idx, err := testimage.Index(other, images.image)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := images.PushIndex(context.Background(), "index:1", idx)
	if err != nil {
		t.Fatal(err)
	}
	id := pullID(t, ref)
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) { c.Image.Image = id })
	if out := execOut(t, c, "/bin/ls", "/"); strings.Contains(out, "foreign") {
		t.Errorf("the root holds another platform's file: %s", out)
	}
	img := imageStatus(t, ref)
	d, err := idx.Digest()
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, r := range img.RepoDigests {
		found = found || strings.HasSuffix(r, "@"+d.String())
	}
	if !found {
		t.Errorf("the index's digest %s is not among %v", d, img.RepoDigests)
	}
	only, err := testimage.Index(other)
	if err != nil {
		t.Fatal(err)
	}
	ref, err = images.PushIndex(context.Background(), "foreign:1", only)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pull(t, ref, nil); err == nil || !strings.Contains(err.Error(), "s390x") || !strings.Contains(err.Error(), cf.Architecture) {
		t.Errorf("an index without this platform: %v; want both platforms named", err)
	}
}

// TestContainersOutliveTheirImage: an image that is removed while a container
// runs stays on disk for it, across a restart of the daemon too.
func TestContainersOutliveTheirImage(t *testing.T) {
	ref := push(t, "removed", testimage.Gzip)
	id := pullID(t, ref)
	p := runPod(t, nil)
	running := started(t, p, func(c *cri.ContainerConfig) { c.Image.Image = id })
	created := create(t, p, func(c *cri.ContainerConfig) { c.Image.Image = id })
	if _, err := node.Images.RemoveImage(ctx(t), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: id}}); err != nil {
		t.Fatal(err)
	}
	if imageStatus(t, id) != nil {
		t.Error("the removed image is still shown")
	}
	start(t, created)
	restart(t, nil)
	for _, c := range []string{running, created} {
		if out := execOut(t, c, "/bin/cat", "/unique"); out != "removed" {
			t.Errorf("content after the image is gone: %q", out)
		}
		if s := containerStatus(t, c); s.ImageId != id {
			t.Errorf("image_id %q, want %q", s.ImageId, id)
		}
	}
	for _, c := range []string{running, created} {
		if _, err := node.Runtime.RemoveContainer(ctx(t), &cri.RemoveContainerRequest{ContainerId: c}); err != nil {
			t.Fatal(err)
		}
	}
	if again := pullID(t, ref); again != id {
		t.Errorf("pulled again as %s", again)
	}
}
