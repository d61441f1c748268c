package testimage

import (
	"archive/tar"
	"context"
	"fmt"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Image makes an OCI image for goarch ("" is the machine's own) of config and
// layers, the lowest first.
func Image(goarch string, config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	if goarch == "" {
		goarch = runtime.GOARCH
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, l := range layers {
		mt, err := l.MediaType()
		if err != nil {
			return nil, err
		}
		if img, err = mutate.Append(img, mutate.Addendum{Layer: l, MediaType: mt}); err != nil {
			return nil, err
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Config, cf.Created = "linux", goarch, config, v1.Time{Time: epoch}
	return mutate.ConfigFile(img, cf)
}

// Index makes an image index with one manifest per image, by the platform that
// each says it is for.
func Index(images ...v1.Image) (v1.ImageIndex, error) {
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, img := range images {
		cf, err := img.ConfigFile()
		if err != nil {
			return nil, err
		}
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{
			Add:        img,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: cf.OS, Architecture: cf.Architecture}},
		})
	}
	return idx, nil
}

const passwd = `root:x:0:0:root:/root:/bin/prog
daemon:x:1:1:daemon:/usr/sbin:/bin/false
tester:x:1000:1000:tester:/home/tester:/bin/prog
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
`

const group = `root:x:0:
daemon:x:1:
crew:x:500:tester
watch:x:501:tester,nobody
tester:x:1000:
nobody:x:65534:
`

// links are the names under /bin that start the program with that command.
var links = []string{
	"serve", "get", "resolve", "listen", "sleep", "print", "exit", "true", "false", "both", "echo", "cat", "env", "id", "ls",
	"stat", "write", "pwd", "hostname", "tty", "signal-ignore", "signal-report", "alloc", "fork", "orphan", "spin",
	"count", "exit-after", "log-samples",
}

// BaseEntries is the root filesystem of Program: the program in /bin under the
// name of each of its commands, the measuring programs /tiny/true and
// /tiny/pause, users root, daemon, tester (1000, in groups crew 500 and watch
// 501) and nobody, and the folders that a root filesystem has.
func BaseEntries(ctx context.Context, goarch string) ([]Entry, error) {
	if goarch == "" {
		goarch = runtime.GOARCH
	}
	prog, err := BuildProgram(ctx, goarch)
	if err != nil {
		return nil, err
	}
	exiter, err := Exiter(goarch)
	if err != nil {
		return nil, err
	}
	pauser, err := Pauser(goarch)
	if err != nil {
		return nil, err
	}
	entries := []Entry{
		{Name: "bin/"}, {Name: "dev/"}, {Name: "etc/"}, {Name: "home/"}, {Name: "home/tester/", UID: 1000, GID: 1000}, {Name: "mnt/"},
		{Name: "proc/"}, {Name: "root/", Mode: 0o700}, {Name: "run/"}, {Name: "sys/"}, {Name: "tiny/"}, {Name: "tmp/", Mode: 0o1777}, {Name: "var/"},
		{Name: "var/run", Type: tar.TypeSymlink, Target: "../run", Mode: 0o777},
		{Name: "etc/passwd", Body: []byte(passwd)}, {Name: "etc/group", Body: []byte(group)},
		{Name: "tiny/true", Mode: 0o755, Body: exiter}, {Name: "tiny/pause", Mode: 0o755, Body: pauser},
		{Name: "bin/prog", Mode: 0o755, Body: prog},
	}
	for _, n := range links {
		entries = append(entries, Entry{Name: "bin/" + n, Type: tar.TypeLink, Target: "bin/prog", Mode: 0o755})
	}
	return entries, nil
}

// Path is the PATH in the environment of Program.
const Path = "PATH=/bin:/tiny"

// Program makes the image that tests run: BaseEntries in one layer, PATH set,
// and /bin/prog as the entry point with "sleep" as its argument, so that a
// container without a command stays up until it is stopped.
func Program(ctx context.Context, goarch string, c Compression) (v1.Image, error) {
	entries, err := BaseEntries(ctx, goarch)
	if err != nil {
		return nil, err
	}
	l, err := Layer(c, entries...)
	if err != nil {
		return nil, err
	}
	return Image(goarch, v1.Config{Env: []string{Path}, Entrypoint: []string{"/bin/prog"}, Cmd: []string{"sleep"}}, l)
}

// Pause makes an image of /pause alone, for runtimes that keep a process in
// every pod.
func Pause(goarch string) (v1.Image, error) {
	if goarch == "" {
		goarch = runtime.GOARCH
	}
	p, err := Pauser(goarch)
	if err != nil {
		return nil, err
	}
	l, err := Layer(Gzip, Entry{Name: "pause", Mode: 0o755, Body: p})
	if err != nil {
		return nil, err
	}
	return Image(goarch, v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}, l)
}

// Tree describes an image of many files, such as a language runtime with its
// libraries has: sizes spread around the mean, two thirds of the bytes
// compressible. The same values make the same image.
type Tree struct {
	Files       int   // regular files in all
	Bytes       int64 // their size in all
	Layers      int   // layers that they are spread over
	Compression Compression
	Seed        uint64
}

// Large is an image of 200 MB in 12,000 files and 5 layers.
var Large = Tree{Files: 12000, Bytes: 200e6, Layers: 5, Compression: Gzip, Seed: 1}

// Image makes the image.
func (t Tree) Image(goarch string) (v1.Image, error) {
	if t.Layers < 1 || t.Files < t.Layers || t.Bytes < int64(t.Files) {
		return nil, fmt.Errorf("tree: %d layers, %d files, %d bytes: want layers >= 1, files >= layers, bytes >= files", t.Layers, t.Files, t.Bytes)
	}
	layers := make([]v1.Layer, t.Layers)
	errs := make(chan error, t.Layers)
	for i := range layers {
		go func() {
			var err error
			layers[i], err = t.layer(i)
			errs <- err
		}()
	}
	var first error
	for range layers {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	if first != nil {
		return nil, first
	}
	return Image(goarch, v1.Config{Env: []string{Path}, Entrypoint: []string{"/bin/prog"}}, layers...)
}
