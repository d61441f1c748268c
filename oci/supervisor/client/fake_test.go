package client

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// fake is a supervisor that answers as its test says.
type fake struct {
	dir     string
	version int
	build   string
	// answer answers a request over the n-th connection, from 1 on. With end the
	// connection ends behind the answer, or instead of it when body is nil.
	answer func(n int, f wire.Frame) (body any, files []*os.File, end bool)

	mu   sync.Mutex
	said [][]wire.Op // over each connection
}

func (s *fake) listen(t *testing.T) {
	t.Helper()
	s.dir = t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(s.dir, socketName)})
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		served.Wait()
	})
	served.Go(func() {
		for n := 1; ; n++ {
			accepted, err := l.AcceptUnix()
			if err != nil {
				return
			}
			f, err := accepted.File()
			_ = accepted.Close()
			if err != nil {
				t.Error(err)
				return
			}
			fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			_ = f.Close()
			if err != nil {
				t.Error(err)
				return
			}
			conn, err := wire.NewConn(fd)
			if err != nil {
				t.Error(err)
				return
			}
			s.mu.Lock()
			s.said = append(s.said, nil)
			s.mu.Unlock()
			served.Go(func() { s.serve(n, conn) })
		}
	})
}

func (s *fake) serve(n int, conn *wire.Conn) {
	defer conn.Close()
	for {
		f, files, err := conn.Recv()
		if err != nil {
			return
		}
		wire.CloseFiles(files)
		s.mu.Lock()
		s.said[n-1] = append(s.said[n-1], f.Op)
		s.mu.Unlock()
		var body any
		var out []*os.File
		var end bool
		if f.Op == wire.OpHello {
			body = wire.HelloReply{Version: s.version, Pid: 7, Build: s.build}
		} else {
			body, out, end = s.answer(n, f)
		}
		if body != nil || !end {
			text, err := json.Marshal(body)
			if err == nil {
				err = conn.Send(wire.Frame{ID: f.ID, Body: text}, out...)
			}
			wire.CloseFiles(out)
			if err != nil {
				return
			}
		}
		if end {
			return
		}
	}
}

// heard lists the requests over the n-th connection.
func (s *fake) heard(n int) []wire.Op {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.said) < n {
		return nil
	}
	return append([]wire.Op(nil), s.said[n-1]...)
}

func null(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Error(err)
	}
	return f
}

// TestUpgradeIsAskedForWithEverythingHeld: a daemon that has just come holds what it
// can before it asks for an upgrade, whose new program may end at once.
func TestUpgradeIsAskedForWithEverythingHeld(t *testing.T) {
	c1 := id.NewContainer()
	s := &fake{version: wire.Version, build: "old"}
	s.answer = func(n int, f wire.Frame) (any, []*os.File, bool) {
		switch {
		case f.Op == wire.OpUpgrade:
			return nil, nil, true
		case f.Op == wire.OpList && n == 1:
			return wire.ListReply{Containers: []wire.Info{{ID: c1, State: wire.Running}}}, nil, false
		case f.Op == wire.OpHoldings:
			h := wire.Holding{ID: c1, Op: wire.OpCreate, Create: json.RawMessage(`{}`), Files: []wire.File{wire.FilePid}}
			return wire.HoldingsReply{Holdings: []wire.Holding{h}, Done: 1}, []*os.File{null(t)}, false
		}
		return struct{}{}, nil, false
	}
	s.listen(t)
	c, err := Open(context.Background(), Config{StateDir: s.dir, Binary: "/new", Build: "new"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	adopted := false
	for _, op := range s.heard(2) {
		adopted = adopted || op == wire.OpAdopt
	}
	if !adopted {
		t.Errorf("a container was lost with the program that did not start: it heard %v, the next one %v", s.heard(1), s.heard(2))
	}
}
