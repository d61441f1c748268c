package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func pair(t testing.TB) (*Conn, *Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var c [2]*Conn
	for i, fd := range fds {
		if c[i], err = NewConn(fd); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c[i].Close() })
	}
	return c[0], c[1]
}

func TestFramesAndDescriptors(t *testing.T) {
	a, b := pair(t)
	const frames = 200
	sent := make(chan error, 1)
	go func() {
		for i := range frames {
			var files []*os.File
			for range i % 5 {
				r, w, err := os.Pipe()
				if err != nil {
					sent <- err
					return
				}
				fmt.Fprint(w, i)
				w.Close()
				defer r.Close()
				files = append(files, r)
			}
			body, _ := json.Marshal(strings.Repeat("x", i*1000))
			if err := a.Send(Frame{ID: uint64(i + 1), Op: OpList, Body: body}, files...); err != nil {
				sent <- err
				return
			}
		}
		sent <- a.Close()
	}()
	for i := range frames {
		f, files, err := b.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if f.ID != uint64(i+1) || len(files) != i%5 || len(f.Body) != i*1000+2 {
			t.Fatalf("frame %d: id %d, %d files, %d bytes", i, f.ID, len(files), len(f.Body))
		}
		for _, file := range files {
			got, err := io.ReadAll(file)
			file.Close()
			if err != nil || string(got) != fmt.Sprint(i) {
				t.Fatalf("frame %d: file has %q, %v", i, got, err)
			}
		}
	}
	if _, _, err := b.Recv(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

func TestProtocolErrors(t *testing.T) {
	frame := func(text string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, tc := range []struct {
		name  string
		bytes []byte
		files []*os.File
		want  error
	}{
		{"too long", []byte{0xff, 0, 0, 0}, nil, ErrProtocol},
		{"no json", frame("{"), nil, ErrProtocol},
		{"fds that did not come", frame(`{"id":1,"fds":1}`), nil, ErrProtocol},
		{"negative fds", frame(`{"id":1,"fds":-1}`), nil, ErrProtocol},
		{"fds of no frame", frame(`{"id":1}`), []*os.File{null}, ErrProtocol},
		{"cut", frame(`{"id":1}`)[:6], nil, io.ErrUnexpectedEOF},
	} {
		a, b := pair(t)
		if err := a.SendEncoded(tc.bytes, tc.files...); err != nil {
			t.Fatal(err)
		}
		a.Close()
		var err error
		for err == nil {
			_, _, err = b.Recv()
		}
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	if _, err := Encode(Frame{}, MaxFDs+1); !errors.Is(err, ErrProtocol) {
		t.Errorf("too many descriptors: %v", err)
	}
}

func TestErrorKinds(t *testing.T) {
	for _, k := range kinds {
		e := ToError(fmt.Errorf("thing: %w", k.kind))
		if e.Kind != k.word || !errors.Is(error(e), k.kind) {
			t.Errorf("%v became %+v", k.kind, e)
		}
	}
	if e := (&Error{Kind: "of a later version", Text: "x"}); !errors.Is(error(e), errdefs.ErrInternal) {
		t.Error("unknown kind is not internal")
	}
	if ToError(nil) != nil {
		t.Error("nil became an error")
	}
}

func FuzzDecoder(f *testing.F) {
	ok, err := Encode(Frame{ID: 7, Op: OpList, Body: json.RawMessage(`{"a":1}`)}, 2)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append(ok, ok...), uint8(3))
	f.Add([]byte{0, 0, 0, 1, '{'}, uint8(1))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff}, uint8(1))
	f.Fuzz(func(t *testing.T, in []byte, step uint8) {
		// The frames do not depend on how the bytes arrive, and memory follows
		// what arrived, not what was announced.
		whole, werr := frames(in, len(in)+1)
		parts, perr := frames(in, int(step)+1)
		if whole != parts || (werr == nil) != (perr == nil) {
			t.Errorf("at once %q %v, in parts %q %v", whole, werr, parts, perr)
		}
	})
}

func frames(in []byte, step int) (string, error) {
	var d decoder
	out := ""
	for len(in) > 0 {
		n := copy(d.space(step), in[:min(step, len(in))])
		d.filled(n)
		in = in[n:]
		for {
			f, ok, err := d.next()
			if err != nil {
				return out, err
			}
			if !ok {
				break
			}
			out += fmt.Sprintf("%d %q %d %s;", f.ID, f.Op, f.FDs, f.Body)
		}
	}
	return out, nil
}
