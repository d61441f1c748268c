package testimage

import (
	"fmt"
	"math/rand/v2"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// layer makes the i-th layer of the tree: folders of up to 40 files, sizes
// between 0.1 and 1.9 of the mean, the last one taking what is left.
func (t Tree) layer(i int) (v1.Layer, error) {
	files := t.Files / t.Layers
	size := t.Bytes / int64(t.Layers)
	if i == t.Layers-1 {
		files, size = t.Files-files*i, t.Bytes-size*int64(i)
	}
	r := rand.New(rand.NewPCG(t.Seed, uint64(i)))
	return layerOf(t.Compression, func(yield func(Entry) error) error {
		dir := fmt.Sprintf("opt/layer%d/", i)
		for _, d := range []string{"opt/", dir} {
			if err := yield(Entry{Name: d}); err != nil {
				return err
			}
		}
		buf := make([]byte, 0, 1<<20)
		for f := range files {
			if f%40 == 0 {
				dir = fmt.Sprintf("opt/layer%d/lib%04d/", i, f/40)
				if err := yield(Entry{Name: dir}); err != nil {
					return err
				}
			}
			n := size / int64(files-f)
			if f < files-1 {
				n = n/10 + r.Int64N(n*9/5+1)
			}
			n = min(n, size)
			size -= n
			buf = fill(buf[:0], int(n), r)
			if err := yield(Entry{Name: fmt.Sprintf("%sfile%03d.dat", dir, f%40), Body: buf}); err != nil {
				return err
			}
		}
		return nil
	})
}

var text = []byte("func (s *state) next(ctx context.Context, in []byte) (out []byte, err error) { return s.table[in[0]].step(ctx, in[1:]) }\n")

// fill appends n bytes: for every 64 random ones, 128 of repeating text.
func fill(b []byte, n int, r *rand.Rand) []byte {
	end := len(b) + n
	for len(b) < end {
		for range 8 {
			v := r.Uint64()
			b = append(b, byte(v), byte(v>>8), byte(v>>16), byte(v>>24), byte(v>>32), byte(v>>40), byte(v>>48), byte(v>>56))
		}
		b = append(b, text...)
	}
	return b[:end]
}
