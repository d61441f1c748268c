package testimage

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// Compression is how a layer's tar is stored.
type Compression string

// The compressions that OCI image layers know.
const (
	Gzip         Compression = "gzip"
	Zstd         Compression = "zstd"
	Uncompressed Compression = "none"
)

// Entry is one entry of a layer. The zero Type is a regular file, or a folder when
// Name ends in a slash. The zero Mode is 0644 for files and 0755 for the rest.
type Entry struct {
	Name     string // without a leading slash
	Type     byte   // tar.TypeReg, TypeLink, TypeSymlink, TypeChar, TypeBlock, TypeFifo, TypeDir
	Mode     int64
	UID, GID int
	Body     []byte
	Target   string // of a hard or symbolic link
	Major    int64
	Minor    int64
	Xattrs   map[string]string
	ModTime  time.Time // zero: 2024-01-01, so that layers are the same every time
}

// Whiteout is the entry that removes name of the layers below.
func Whiteout(dir, name string) Entry { return Entry{Name: dir + "/.wh." + name} }

// Opaque is the entry that hides all that the layers below have in dir.
func Opaque(dir string) Entry { return Entry{Name: dir + "/.wh..wh..opq"} }

var epoch = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

func (e Entry) header() *tar.Header {
	h := &tar.Header{
		Name: e.Name, Typeflag: e.Type, Mode: e.Mode, Uid: e.UID, Gid: e.GID, Linkname: e.Target,
		Devmajor: e.Major, Devminor: e.Minor, ModTime: e.ModTime, Format: tar.FormatPAX,
	}
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
		if n := len(e.Name); n > 0 && e.Name[n-1] == '/' {
			h.Typeflag = tar.TypeDir
		}
	}
	if h.Typeflag == tar.TypeReg {
		h.Size = int64(len(e.Body))
	}
	if h.Mode == 0 {
		h.Mode = 0o755
		if h.Typeflag == tar.TypeReg {
			h.Mode = 0o644
		}
	}
	if h.ModTime.IsZero() {
		h.ModTime = epoch
	}
	for k, v := range e.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+k] = v
	}
	return h
}

// Layer makes a layer of entries, in their order.
func Layer(c Compression, entries ...Entry) (v1.Layer, error) {
	return layerOf(c, func(yield func(Entry) error) error {
		for _, e := range entries {
			if err := yield(e); err != nil {
				return err
			}
		}
		return nil
	})
}

// RawLayer makes a layer of a tar that the caller wrote, malformed ones included.
func RawLayer(c Compression, tarball []byte) (v1.Layer, error) {
	return pack(c, func(w io.Writer) error {
		_, err := w.Write(tarball)
		return err
	})
}

func layerOf(c Compression, each func(yield func(Entry) error) error) (v1.Layer, error) {
	return pack(c, func(w io.Writer) error {
		t := tar.NewWriter(w)
		err := each(func(e Entry) error {
			h := e.header()
			if err := t.WriteHeader(h); err != nil {
				return fmt.Errorf("entry %s: %w", e.Name, err)
			}
			if h.Typeflag != tar.TypeReg {
				return nil
			}
			_, err := t.Write(e.Body)
			return err
		})
		if err != nil {
			return err
		}
		return t.Close()
	})
}

// pack runs write through the compression, taking the digests of both sides.
func pack(c Compression, write func(io.Writer) error) (v1.Layer, error) {
	l := &layer{compression: c}
	blob, plain := sha256.New(), sha256.New()
	sink := io.MultiWriter(&l.blob, blob)
	var comp io.WriteCloser
	switch c {
	case Gzip:
		comp = gzip.NewWriter(sink)
	case Zstd:
		z, err := zstd.NewWriter(sink)
		if err != nil {
			return nil, err
		}
		comp = z
	case Uncompressed:
		comp = noClose{sink}
	default:
		return nil, fmt.Errorf("compression %q: want gzip, zstd or none", c)
	}
	if err := write(io.MultiWriter(comp, plain)); err != nil {
		return nil, err
	}
	if err := comp.Close(); err != nil {
		return nil, err
	}
	l.digest = v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(blob.Sum(nil))}
	l.diffID = v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(plain.Sum(nil))}
	return l, nil
}

type noClose struct{ io.Writer }

func (noClose) Close() error { return nil }

// layer is a v1.Layer in memory.
type layer struct {
	compression    Compression
	blob           bytes.Buffer
	digest, diffID v1.Hash
}

func (l *layer) Digest() (v1.Hash, error) { return l.digest, nil }
func (l *layer) DiffID() (v1.Hash, error) { return l.diffID, nil }
func (l *layer) Size() (int64, error)     { return int64(l.blob.Len()), nil }

func (l *layer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.blob.Bytes())), nil
}

func (l *layer) Uncompressed() (io.ReadCloser, error) {
	r := bytes.NewReader(l.blob.Bytes())
	switch l.compression {
	case Gzip:
		return gzip.NewReader(r)
	case Zstd:
		z, err := zstd.NewReader(r)
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(r), nil
}

func (l *layer) MediaType() (types.MediaType, error) {
	switch l.compression {
	case Gzip:
		return types.OCILayer, nil
	case Zstd:
		return types.OCILayerZStd, nil
	}
	return types.OCIUncompressedLayer, nil
}
