package imageservice

import (
	"archive/tar"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// bigImage makes a layered image of about 200 MB in some 8,000 files of text-like data.
func bigImage(b *testing.B, kind string) (v1.Image, int64) {
	rng := rand.New(rand.NewPCG(1, 2))
	words := make([]byte, 1<<20)
	for i := range words {
		words[i] = "etaoin shrdlu,.\n0123456789abcdef"[rng.IntN(32)]
		if i > 4096 && rng.IntN(4) > 0 { // repeat something earlier, so that it compresses
			words[i] = words[i-1-rng.IntN(2)*4000]
		}
	}
	var layers []v1.Layer
	var total int64
	for range 4 {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		for d := range 100 {
			_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("usr/lib/d%d/", d), Mode: 0o755})
			for f := range 20 {
				size := 1000 + rng.IntN(30_000)
				if f == 0 {
					size = 200_000
				}
				_ = w.WriteHeader(&tar.Header{Name: fmt.Sprintf("usr/lib/d%d/f%d", d, f), Mode: 0o644, Size: int64(size), ModTime: time.Unix(1e9, 0)})
				_, _ = w.Write(words[rng.IntN(len(words)-size):][:size])
			}
		}
		_ = w.Close()
		total += int64(buf.Len())
		layers = append(layers, compressed(b, kind, buf.Bytes()))
	}
	return imageOf(b, layers...), total
}

func BenchmarkPull(b *testing.B) {
	for _, kind := range []string{"gzip", "zstd"} {
		b.Run(kind, func(b *testing.B) {
			h := newHub(b)
			img, total := bigImage(b, kind)
			push(b, h.host()+"/big:v1", img)
			b.SetBytes(total)
			base := b.TempDir()
			for i := 0; b.Loop(); i++ {
				// A store of its own each time: ext4 does not reuse inodes for minutes,
				// so that pulling after removing would measure that.
				root := filepath.Join(base, fmt.Sprint(i))
				s := newService(b, root)
				if _, err := s.Pull(b.Context(), PullRequest{Ref: h.host() + "/big:v1"}); err != nil {
					b.Fatal(err)
				}
				_ = s.Close()
			}
			b.StopTimer()
			_ = os.RemoveAll(base)
		})
	}
}
