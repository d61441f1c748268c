package unpack

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

const (
	chunkSize  = 256 << 10
	chunkCount = 8
)

// chunk is a recycled buffer; fresh ones cost a page fault per 4 KiB.
type chunk struct {
	b    []byte
	refs atomic.Int32
}

var chunks = sync.Pool{New: func() any { return &chunk{b: make([]byte, chunkSize)} }}

func (c *chunk) put() {
	if c.refs.Add(-1) == 0 {
		chunks.Put(c)
	}
}

// Stage reads a source ahead on a goroutine of its own and hashes it on
// another, so that network, inflating, hashing and writing overlap.
type Stage struct {
	data   chan *chunk
	stopc  chan struct{}
	wg     sync.WaitGroup
	cur    *chunk
	off    int
	err    error // of the source; valid after data is closed
	n      int64
	closed bool
}

// NewStage starts to read src. h sees every byte; it may be used after Close.
func NewStage(src io.Reader, h hash.Hash) *Stage {
	s := &Stage{data: make(chan *chunk, chunkCount), stopc: make(chan struct{})}
	hashed := make(chan *chunk, chunkCount)
	s.wg.Go(func() {
		for c := range hashed {
			_, _ = h.Write(c.b) // a hash never fails
			c.put()
		}
	})
	s.wg.Go(func() {
		defer close(s.data)
		defer close(hashed)
		s.err = s.pump(src, hashed)
	})
	return s
}

func (s *Stage) pump(src io.Reader, hashed chan<- *chunk) error {
	for {
		c := chunks.Get().(*chunk)
		c.b = c.b[:cap(c.b)]
		n, err := readSome(src, c.b)
		c.b = c.b[:n]
		if n > 0 {
			c.refs.Store(2)
			hashed <- c
			select {
			case s.data <- c:
			case <-s.stopc:
				c.put()
				return errStopped
			}
		}
		if err != nil {
			return err
		}
		select {
		case <-s.stopc:
			return errStopped
		default:
		}
	}
}

var errStopped = errors.New("stream closed")

// readSome fills p at least half, so that small reads do not waste chunks.
func readSome(r io.Reader, p []byte) (n int, err error) {
	for n < len(p)/2 && err == nil {
		var k int
		k, err = r.Read(p[n:])
		n += k
	}
	return n, err
}

// Read implements io.Reader.
func (s *Stage) Read(p []byte) (int, error) {
	for s.cur == nil || s.off == len(s.cur.b) {
		if s.cur != nil {
			s.cur.put()
			s.cur = nil
		}
		c, ok := <-s.data
		if !ok {
			return 0, s.err
		}
		s.cur, s.off = c, 0
	}
	n := copy(p, s.cur.b[s.off:])
	s.off += n
	s.n += int64(n)
	return n, nil
}

// Close ends the stage and waits for its goroutines. The source's Read must
// return soon: the caller ends it first.
func (s *Stage) Close() {
	if s.closed {
		return
	}
	s.closed = true
	close(s.stopc)
	for c := range s.data {
		c.put()
	}
	s.wg.Wait()
	if s.cur != nil {
		s.cur.put()
		s.cur = nil
	}
}

// zstdWindow bounds the memory that a zstd frame may ask for.
const zstdWindow = 128 << 20

// Decompress recognises gzip and zstd by their first bytes and passes
// everything else through as it is. Close the result, then the source.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	magic, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, corrupt("gzip", err)
		}
		return &inflater{kind: "gzip", r: z, close: func() { _ = z.Close() }}, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}), len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18}):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, corrupt("zstd", err)
		}
		return &inflater{kind: "zstd", r: z, close: z.Close}, nil
	}
	return io.NopCloser(br), nil
}

type inflater struct {
	kind  string
	r     io.Reader
	close func()
}

func (i *inflater) Read(p []byte) (int, error) {
	n, err := i.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = corrupt(i.kind, err)
	}
	return n, err
}

func (i *inflater) Close() error {
	i.close()
	return nil
}

// corrupt marks errors of the format itself; those of the source (network,
// cancelled) keep their kind.
func corrupt(kind string, err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, gzip.ErrHeader) || errors.Is(err, gzip.ErrChecksum) || errors.Is(err, zstd.ErrMagicMismatch) || errors.Is(err, zstd.ErrCRCMismatch) {
		return fmt.Errorf("%s stream: %w: %w", kind, err, errdefs.ErrDataLoss)
	}
	return fmt.Errorf("%s stream: %w", kind, err)
}
