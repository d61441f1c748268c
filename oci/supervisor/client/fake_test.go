package client

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/test/pace"
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

// eventually waits for ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(pace.Wait(10 * time.Second)); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s", what)
		}
	}
}

func (s *fake) hears(n int, op wire.Op) int {
	count := 0
	for _, o := range s.heard(n) {
		if o == op {
			count++
		}
	}
	return count
}

// TestAnAnswerThatNobodyWaitsFor: a container whose Start was given up runs; what
// came with the answer is held all the same.
func TestAnAnswerThatNobodyWaitsFor(t *testing.T) {
	c1 := id.NewContainer()
	ctx, cancel := context.WithCancel(context.Background())
	s := &fake{version: wire.Version}
	s.answer = func(n int, f wire.Frame) (any, []*os.File, bool) {
		if f.Op != wire.OpStart {
			return struct{}{}, nil, false
		}
		cancel()
		time.Sleep(50 * time.Millisecond)
		h := &wire.Holding{ID: c1, Pid: 7, Files: []wire.File{wire.FilePid, wire.FileStdout}}
		return wire.StartReply{Pid: 7, Holding: h}, []*os.File{null(t), null(t)}, true
	}
	s.listen(t)
	c, err := Open(context.Background(), Config{StateDir: s.dir})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Create(context.Background(), wire.Create{ID: c1, Spec: &specs.Spec{}}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Start(ctx, wire.Start{ID: c1}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	eventually(t, "the next supervisor", func() bool { return s.hears(2, wire.OpSettled) == 1 })
	if s.hears(2, wire.OpAdopt) != 1 {
		t.Errorf("a running container was lost: the next supervisor heard %v", s.heard(2))
	}
}

// TestStdinForACallerThatHasGone: the supervisor has given its end away, so that we
// must not keep the container from seeing the end of its input.
func TestStdinForACallerThatHasGone(t *testing.T) {
	c1 := id.NewContainer()
	ctx, cancel := context.WithCancel(context.Background())
	answered := make(chan struct{})
	s := &fake{version: wire.Version}
	s.answer = func(n int, f wire.Frame) (any, []*os.File, bool) {
		switch f.Op {
		case wire.OpStart:
			h := &wire.Holding{ID: c1, Pid: 7, Files: []wire.File{wire.FilePid, wire.FileStdin}}
			return wire.StartReply{Pid: 7, Holding: h}, []*os.File{null(t), null(t)}, false
		case wire.OpStdin:
			cancel()
			time.Sleep(50 * time.Millisecond)
			close(answered)
			return struct{}{}, []*os.File{null(t)}, false
		}
		return struct{}{}, nil, false
	}
	s.listen(t)
	c, err := Open(context.Background(), Config{StateDir: s.dir})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Create(context.Background(), wire.Create{ID: c1, Spec: &specs.Spec{}, Stdin: true, StdinOnce: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Start(context.Background(), wire.Start{ID: c1}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Stdin(ctx, c1); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	<-answered
	if _, err := c.ListFDs(context.Background()); err != nil { // its answer comes behind
		t.Fatal(err)
	}
	if h, files, ok := c.held.handOver(c1); !ok || len(h.Files) != 1 {
		t.Errorf("holds %v", h.Files)
	} else {
		wire.CloseFiles(files)
	}
}

// TestWhatAnswersBringIsHeldFirst: the connection breaks right behind an answer, and
// the next one is made before its caller gets to run.
func TestWhatAnswersBringIsHeldFirst(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // nobody runs but who is meant to
	c := &Client{ctx: context.Background(), exits: newExitQueue(), ready: make(chan struct{}), waitTime: 10 * time.Second}
	once := func(call func() error, answer string) {
		t.Helper()
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		ours, err := wire.NewConn(pair[0])
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := wire.NewConn(pair[1])
		if err != nil {
			t.Fatal(err)
		}
		l := &link{conn: ours, done: make(chan struct{}), pending: map[uint64]waiting{}}
		c.use(l)
		ended := make(chan error, 1)
		go func() { ended <- call() }()
		f, files, err := theirs.Recv()
		if err != nil {
			t.Fatal(err)
		}
		wire.CloseFiles(files)
		pidfd := null(t)
		if err := errors.Join(theirs.Send(wire.Frame{ID: f.ID, Body: json.RawMessage(answer)}, pidfd), theirs.Close(), pidfd.Close()); err != nil {
			t.Fatal(err)
		}
		c.read(l)
		c.lose(l)
		t.Cleanup(func() {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	ctx := context.Background()
	once(func() error {
		_, _, _, err := c.Exec(ctx, wire.Exec{ID: "c", Exec: "x"}, nil, nil, nil)
		return err
	}, `{"pid":7}`)
	if n := len(c.held.following()); n != 1 {
		t.Errorf("follows %d execs, one runs", n)
	}
	c.held.request("c", wire.OpCreate, nil, "", nil)
	once(func() error {
		_, err := c.Start(ctx, wire.Start{ID: "c"})
		return err
	}, `{"pid":7,"holding":{"id":"c","files":["pidfd"]}}`)
	if n := len(c.held.starts()); n != 1 {
		t.Errorf("holds %d containers, one runs", n)
	}
	once(func() error { return c.Delete(ctx, "c") }, `{}`)
	if n := len(c.held.starts()); n != 0 {
		t.Errorf("holds %d containers, none is there", n)
	}
	c.held.close()
}

// TestExitsMissedMeanwhile: a container that ended while there was no connection is
// known to have ended, and its streams are let go of.
func TestExitsMissedMeanwhile(t *testing.T) {
	c1 := id.NewContainer()
	s := &fake{version: wire.Version}
	s.answer = func(n int, f wire.Frame) (any, []*os.File, bool) {
		switch {
		case f.Op == wire.OpStart:
			h := &wire.Holding{ID: c1, Pid: 7, Files: []wire.File{wire.FilePid, wire.FileStdout}}
			return wire.StartReply{Pid: 7, Holding: h}, []*os.File{null(t), null(t)}, true
		case f.Op == wire.OpList && n == 2:
			return wire.ListReply{Containers: []wire.Info{{ID: c1, State: wire.Exited, Exit: &wire.Exit{ID: c1, Code: 3}}}}, nil, false
		}
		return struct{}{}, nil, false
	}
	s.listen(t)
	c, err := Open(context.Background(), Config{StateDir: s.dir})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Create(context.Background(), wire.Create{ID: c1, Spec: &specs.Spec{}}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Start(context.Background(), wire.Start{ID: c1}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ListFDs(context.Background()); err != nil { // over the next connection
		t.Fatal(err)
	}
	if h, _, ok := c.held.handOver(c1); !ok || h.Exit == nil || h.Exit.Code != 3 || len(h.Files) != 0 {
		t.Errorf("holds %+v", h)
	}
}

// TestExecsOfAnOlderSupervisor: one that nobody can be asked about is not waited
// for when the connection is lost.
func TestExecsOfAnOlderSupervisor(t *testing.T) {
	s := &fake{version: wire.VersionTakeover - 1}
	s.answer = func(n int, f wire.Frame) (any, []*os.File, bool) {
		return wire.ExecReply{Pid: 7}, nil, f.Op == wire.OpExec
	}
	s.listen(t)
	c, err := Open(context.Background(), Config{StateDir: s.dir})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _, exit, err := c.Exec(context.Background(), wire.Exec{ID: "c", Exec: "x"}, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case e := <-exit:
		if e.Code != ExitUnknown {
			t.Errorf("%+v", e)
		}
	case <-time.After(pace.Wait(5 * time.Second)):
		t.Error("its caller waits for ever")
	}
}
