package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/berth-runtime/berth/test/testimage"
)

// pullAll measures pulls, each image removed before the next pull of it.
func (b *bench) pullAll(ctx context.Context) error {
	type image struct{ name, ref string }
	var images []image
	for ref := range strings.SplitSeq(b.o.pull, ",") {
		if ref = strings.TrimSpace(ref); ref != "" {
			images = append(images, image{ref, ref})
		}
	}
	if len(images) == 0 {
		for i, c := range []testimage.Compression{testimage.Gzip, testimage.Zstd} {
			tree := testimage.Large
			tree.Compression = c
			// Other files: layers that a runtime already has it need not unpack.
			tree.Seed += uint64(i)
			img, err := tree.Image("")
			if err != nil {
				return err
			}
			ref, err := b.reg.Push(ctx, "large-"+string(c)+":1", img)
			if err != nil {
				return err
			}
			images = append(images, image{"200 MB, 12,000 files, " + string(c), ref})
		}
	}
	s := b.result.series("pull")
	for _, img := range images {
		b.ownImages = append(b.ownImages, img.ref)
		for range b.o.pulls {
			if err := b.removeImage(ctx, img.ref); err != nil {
				return fmt.Errorf("remove %s: %w", img.ref, err)
			}
			before := b.watched.cpu()
			d, err := b.pullImage(ctx, img.ref)
			if err != nil {
				return fmt.Errorf("%s: %w", img.ref, err)
			}
			s.took(img.name, d)
			if b.watched.given() {
				used := b.watched.cpu().since(before)
				s.add(img.name+", CPU", "s", (used.self + used.children).Seconds())
			}
		}
	}
	return nil
}
