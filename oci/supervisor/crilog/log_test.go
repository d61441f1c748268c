package crilog

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/supervisor/lane"
)

type rec struct{ stream, tag, content string }

func records(t testing.TB, path string) (out []rec) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	last := map[string]string{}
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			t.Fatalf("file ends inside a record: %q", b)
		}
		f := strings.SplitN(string(b[:i]), " ", 4)
		b = b[i+1:]
		if len(f) != 4 || len(f[0]) != len(timeFormat) {
			t.Fatalf("record %q", f)
		}
		if _, err := time.Parse(timeFormat, f[0]); err != nil {
			t.Fatal(err)
		}
		if f[0] < last[f[1]] {
			t.Fatalf("time of %s goes back: %s after %s", f[1], f[0], last[f[1]])
		}
		last[f[1]] = f[0]
		out = append(out, rec{f[1], f[2], f[3]})
	}
	return out
}

func newLog(t testing.TB) (*Log, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a", "b", "0.log")
	l, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, path
}

// source is a stream and the pipe that it reads.
type source struct {
	*Stream
	t    testing.TB
	r, w int
}

func newSource(t testing.TB, s *Stream) *source {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[0]); unix.Close(p[1]) })
	return &source{s, t, p[0], p[1]}
}

// source is a stream of l with a pool of its own.
func (l *Log) source(t testing.TB, stream int) *source {
	return newSource(t, l.Stream(lane.NewPool(nil, nil, nil), lane.Owner{Container: "c", Stream: stream}, nil))
}

// put writes p to the pipe, and what the pipe holds to the log, until all is there.
func (s *source) put(p []byte) {
	for len(p) > 0 {
		n, err := unix.Write(s.w, p)
		if err != nil && err != unix.EAGAIN {
			s.t.Error(err)
			return
		}
		p = p[max(n, 0):]
		s.pump()
	}
}

// pump writes to the log what the pipe holds, and reports its end.
func (s *source) pump() (end bool) {
	for {
		b, err := s.Receive(s.r)
		if err != nil && err != unix.EAGAIN {
			s.t.Error(err)
		}
		if len(b) == 0 {
			return err == nil
		}
		s.Write()
	}
}

func TestRecords(t *testing.T) {
	full := strings.Repeat("x", MaxContent)
	for _, tc := range []struct {
		name, in string
		want     []rec
	}{
		{"nothing", "", nil},
		{"line", "a\n", []rec{{"stdout", "F", "a"}}},
		{"empty line", "\n", []rec{{"stdout", "F", ""}}},
		{"unfinished", "a\nb", []rec{{"stdout", "F", "a"}, {"stdout", "P", "b"}}},
		{"raw bytes", "\x00\xff\r é\n", []rec{{"stdout", "F", "\x00\xff\r é"}}},
		{"just full", full + "\n", []rec{{"stdout", "F", full}}},
		{"one more", full + "y\n", []rec{{"stdout", "P", full}, {"stdout", "F", "y"}}},
		{"twice full", full + full + "\nz\n", []rec{{"stdout", "P", full}, {"stdout", "F", full}, {"stdout", "F", "z"}}},
		{"full, unfinished", full, []rec{{"stdout", "P", full}}},
	} {
		for _, step := range []int{1, 7, 4096, 1 << 20} {
			l, path := newLog(t)
			s := l.source(t, 0)
			for in := []byte(tc.in); len(in) > 0; in = in[min(step, len(in)):] {
				s.put(in[:min(step, len(in))])
			}
			s.End()
			if got := records(t, path); fmt.Sprint(got) != fmt.Sprint(tc.want) {
				t.Errorf("%s by %d: got %d records, want %d", tc.name, step, len(got), len(tc.want))
			}
			if s.lane != nil {
				t.Errorf("%s: an idle stream keeps a lane", tc.name)
			}
		}
	}
}

// TestChunking: however the bytes are cut, the records are the same and put
// together they are the bytes.
func TestChunking(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 30 {
		var in []byte
		for len(in) < 200_000 {
			n := rng.IntN(200)
			if rng.IntN(10) == 0 {
				n = rng.IntN(3 * MaxContent)
			}
			in = append(append(in, bytes.Repeat([]byte{byte('a' + rng.IntN(26))}, n)...), '\n')
		}
		l, path := newLog(t)
		s := l.source(t, 1)
		for rest := in; len(rest) > 0; {
			n := min(1+rng.IntN(70_000), len(rest))
			s.put(rest[:n])
			rest = rest[n:]
		}
		s.End()
		var out []byte
		for _, r := range records(t, path) {
			if len(r.content) > MaxContent || r.tag == "P" && len(r.content) != MaxContent {
				t.Fatalf("record %s of %d bytes", r.tag, len(r.content))
			}
			out = append(out, r.content...)
			if r.tag == "F" {
				out = append(out, '\n')
			}
		}
		if !bytes.Equal(in, out) {
			t.Fatalf("%d bytes became %d", len(in), len(out))
		}
	}
}

func TestReopenWhileWriting(t *testing.T) {
	l, path := newLog(t)
	const lines = 20000
	var wg sync.WaitGroup
	for i := range streamNames {
		s := l.source(t, i)
		wg.Go(func() {
			for i := range lines {
				s.put(fmt.Appendf(nil, "%d\n", i))
			}
			s.End()
		})
	}
	var files []string
	for i := range 50 {
		old := fmt.Sprintf("%s.%d", path, i)
		if err := os.Rename(path, old); err != nil {
			t.Fatal(err)
		}
		files = append(files, old)
		if err := l.Reopen(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	wg.Wait()
	next := map[string]int{}
	for _, f := range append(files, path) {
		for _, r := range records(t, f) {
			if r.content != fmt.Sprint(next[r.stream]) {
				t.Fatalf("%s: line %q, want %d", r.stream, r.content, next[r.stream])
			}
			next[r.stream]++
		}
	}
	if next["stdout"] != lines || next["stderr"] != lines {
		t.Errorf("lines %v", next)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	link, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := os.Symlink(filepath.Join(dir, "target"), link); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{link, fifo, dir, "relative"} {
		if l, err := Open(p); err == nil {
			l.Close()
			t.Errorf("%s was opened", p)
		}
	}
	l, path := newLog(t)
	if err := l.Reopen(link); err == nil {
		t.Error("reopened through a symlink")
	}
	l.source(t, 0).put([]byte("still here\n"))
	if r := records(t, path); len(r) != 1 {
		t.Errorf("records %v", r)
	}
	l.Close()
	if err := l.Reopen(path); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("reopen of a closed log: %v", err)
	}
}

// TestFullDisk: a device that takes nothing loses records and blocks nobody.
func TestFullDisk(t *testing.T) {
	f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	l := &Log{file: f}
	defer l.Close()
	s := l.source(t, 0)
	s.put([]byte("lost\n"))
	if want := uint64(headerLen + 5); l.Dropped() != want {
		t.Errorf("dropped %d, want %d", l.Dropped(), want)
	}
}
