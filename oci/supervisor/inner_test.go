package supervisor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/crilog"
	"github.com/berth-runtime/berth/oci/supervisor/lane"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// A log disk that stalls around the exit: what is in the pipe is logged all the
// same, and both streams together get one drainTime.
func TestStopOutputsKeepsWhatIsInThePipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	lanes := lane.NewPool(nil, nil, nil)
	l, err := crilog.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const rest = 1000
	var outputs []*output
	var writers []*os.File
	for i, name := range []string{"stdout", "stderr"} {
		ours, theirs, err := pipe(name, false)
		if err != nil {
			t.Fatal(err)
		}
		defer theirs.Close() // stays open: a process outside the cgroup has it
		o := &output{number: i, file: ours, log: l.Stream(lanes, lane.Owner{Container: "c", Stream: i}, nil), done: make(chan struct{})}
		stalled := false
		go o.run(func(int, []byte) {
			if i == 0 && !stalled {
				stalled = true
				time.Sleep(1500 * time.Millisecond)
			}
		})
		outputs, writers = append(outputs, o), append(writers, theirs)
	}
	if _, err := writers[0].WriteString("first\n"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	if _, err := writers[0].Write(bytes.Repeat([]byte("0123456789012345678901234567890123456789\n"), rest)); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	stopOutputs(outputs, drainTime, time.Minute)
	closeOutputs(outputs)
	if d := time.Since(begin); d > 1900*time.Millisecond {
		t.Errorf("took %v: the streams waited one after the other", d)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, []byte("\n")); n != rest+1 {
		t.Errorf("%d lines in the log, %d were written before the exit", n, rest+1)
	}
}

// The output of a container whose supervisor was killed begins with what that one
// had read.
func TestOutputGoesOnFromALane(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	ours, theirs, err := pipe("stdout", false)
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	write := func(s string) {
		t.Helper()
		if _, err := theirs.WriteString(s); err != nil {
			t.Fatal(err)
		}
	}
	// The killed one: it has read two lines and a half, and logged one of them.
	former := lane.NewPool(nil, nil, nil).Take(lane.Owner{Container: "c", Stream: 0})
	write("one\ntwo\nthr")
	var via lane.Via
	if err := control(ours, func(fd int) error {
		_, err := former.Receive(fd, &via)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	former.Skip(len("one\n"))

	files, err := former.Files()
	if err != nil {
		t.Fatal(err)
	}
	former.Close()
	left, err := lane.Open(files)
	if err != nil {
		t.Fatal(err)
	}
	io := &stdio{container: "c", lanes: lane.NewPool(nil, nil, nil), log: crilog.Adopt(path, func(err error) { t.Error(err) }, left)}
	io.lanes.Add(left)
	o := io.output(0, ours, left)
	write("ee\nfour")
	theirs.Close()
	if err := o.run(func(int, []byte) {}); err != nil {
		t.Fatal(err)
	}
	io.closeOurs()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(b)) {
		_, rest, _ := strings.Cut(line, " ")
		got = append(got, rest)
	}
	if want := []string{"stdout F two\n", "stdout F three\n", "stdout P four\n"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if _, _, busy := left.Owner(); busy {
		t.Error("the lane was not given back")
	}
}

// A process that never stops writing does not keep the drain.
func TestDrainIsBounded(t *testing.T) {
	ours, theirs, err := pipe("stdout", false)
	if err != nil {
		t.Fatal(err)
	}
	o := &output{file: ours, done: make(chan struct{})}
	quit := make(chan struct{})
	go func() {
		defer close(quit)
		for b := make([]byte, 4096); ; {
			if _, err := theirs.Write(b); err != nil {
				return
			}
		}
	}()
	go o.run(func(int, []byte) {})
	begin := time.Now()
	stopOutputs([]*output{o}, 50*time.Millisecond, time.Minute)
	closeOutputs([]*output{o})
	if d := time.Since(begin); d > time.Second {
		t.Errorf("drain took %v", d)
	}
	<-quit // EPIPE
	theirs.Close()
}

// fakeContainer starts true children; its OOM count is the test's.
type fakeContainer struct {
	oci.Container
	ooms    uint64
	starts  func()
	execs   func()
	deleted bool
	alive   []int
	t       *testing.T
}

func (f *fakeContainer) run(s string) (oci.Process, error) {
	fd := -1
	cmd := osexec.Command("/bin/sh", "-c", s)
	cmd.SysProcAttr = &unix.SysProcAttr{PidFD: &fd}
	if err := cmd.Start(); err != nil {
		return oci.Process{}, err
	}
	f.alive = append(f.alive, cmd.Process.Pid)
	return oci.Process{Pid: cmd.Process.Pid, PidFD: os.NewFile(uintptr(fd), "pidfd")}, nil
}

func (f *fakeContainer) Start(context.Context, oci.Stdio) (oci.Process, error) {
	if f.starts != nil {
		f.starts()
	}
	return f.run("exec sleep 60")
}

func (f *fakeContainer) Exec(_ context.Context, p *specs.Process, _ oci.Stdio) (oci.Process, error) {
	if f.execs != nil {
		f.execs()
	}
	return f.run("exec sleep 60")
}

func (f *fakeContainer) KillAll() error            { return nil } // signals to known processes must do
func (f *fakeContainer) OOMKills() (uint64, error) { return f.ooms, nil }
func (f *fakeContainer) Delete() error {
	f.deleted = true
	for _, pid := range f.alive {
		if unix.Kill(pid, 0) == nil {
			f.t.Errorf("deleted while process %d lives", pid)
		}
	}
	return nil
}

func fakeServer(t *testing.T) *Server {
	t.Helper()
	s, err := New(Config{StateDir: t.TempDir(), Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.cancel()
		if err := s.shut(); err != nil {
			t.Error(err)
		}
		s.lives.Wait()
	})
	return s
}

func (f *fakeContainer) in(s *Server) *container {
	c := &container{id: id.NewContainer(), oci: f, made: make(chan struct{})}
	close(c.made)
	s.mu.Lock()
	s.containers[c.id] = c
	s.mu.Unlock()
	return c
}

func run(t *testing.T, s *Server, c *container) {
	t.Helper()
	_, _, watch, err := c.start(s, wire.Start{ID: c.id})
	if err != nil {
		t.Fatal(err)
	}
	watch()
}

func TestOOMKilled(t *testing.T) {
	kill := wire.Signal{Signal: sigkill}
	for name, c := range map[string]struct {
		end  func(*fakeContainer, *container) error
		want bool
	}{
		"the first process": {func(f *fakeContainer, c *container) error {
			f.ooms = 1
			return unix.Kill(c.first.pid, unix.SIGKILL) // as the kernel does
		}, true},
		"a child, then our SIGKILL": {func(f *fakeContainer, c *container) error {
			f.ooms = 3
			return c.signal(kill)
		}, false},
		"a child, then SIGKILL to all": {func(f *fakeContainer, c *container) error {
			f.ooms = 1
			if err := c.signal(wire.Signal{Signal: sigkill, All: true}); err != nil {
				return err
			}
			return unix.Kill(c.first.pid, unix.SIGKILL)
		}, false},
		"a child, then another signal": {func(f *fakeContainer, c *container) error {
			f.ooms = 1
			return c.signal(wire.Signal{Signal: 15})
		}, false},
		"nobody": {func(f *fakeContainer, c *container) error { return c.signal(kill) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			s, f := fakeServer(t), &fakeContainer{t: t}
			k := f.in(s)
			run(t, s, k)
			if err := c.end(f, k); err != nil {
				t.Fatal(err)
			}
			<-k.first.done
			if k.exit.OOMKilled != c.want {
				t.Errorf("OOMKilled %v", k.exit.OOMKilled)
			}
			if err := k.delete(s, false); err != nil {
				t.Error(err)
			}
		})
	}
}

// Delete comes while the runtime starts the process.
func TestDeleteDuringStart(t *testing.T) {
	s, f := fakeServer(t), &fakeContainer{t: t}
	k := f.in(s)
	deleted := make(chan error, 1)
	f.starts = func() {
		go func() { deleted <- k.delete(s, false) }()
		time.Sleep(100 * time.Millisecond)
	}
	_, _, watch, err := k.start(s, wire.Start{ID: k.id})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // the answer is on its way
	watch()
	if err := <-deleted; err != nil || !f.deleted {
		t.Error(err, f.deleted)
	}
	if _, _, _, err := k.start(s, wire.Start{ID: k.id}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("start after delete: %v", err)
	}
}

// Delete comes while the runtime starts an exec.
func TestDeleteDuringExec(t *testing.T) {
	s, f := fakeServer(t), &fakeContainer{t: t}
	k := f.in(s)
	run(t, s, k)
	deleted := make(chan error, 1)
	f.execs = func() {
		go func() { deleted <- k.delete(s, false) }()
		time.Sleep(300 * time.Millisecond) // the first process is gone by now
	}
	owner := &conn{s: s, closed: true}
	_, _, watch, err := k.exec(s, owner, wire.Exec{Exec: "x", Process: &specs.Process{}}, oci.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	watch()
	if err := <-deleted; err != nil || !f.deleted {
		t.Error(err, f.deleted)
	}
}

func TestExecIDsAreTakenOnce(t *testing.T) {
	s, f := fakeServer(t), &fakeContainer{t: t}
	k := f.in(s)
	run(t, s, k)
	owner := &conn{s: s, closed: true}
	r := wire.Exec{Exec: "x", Process: &specs.Process{}}
	f.execs = func() {
		f.execs = nil
		if _, _, _, err := k.exec(s, owner, r, oci.Stdio{}); !errors.Is(err, errdefs.ErrAlreadyExists) {
			t.Errorf("a second exec with the id of one that is being started: %v", err)
		}
		if err := k.signal(wire.Signal{Exec: "x", Signal: sigkill}); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("signal to it: %v", err)
		}
	}
	_, _, watch, err := k.exec(s, owner, r, oci.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	watch()
	if err := k.delete(s, false); err != nil {
		t.Error(err)
	}
}

// After the decision to end nothing is accepted, and before it nothing is lost.
func TestIdleEnd(t *testing.T) {
	s, f := fakeServer(t), &fakeContainer{t: t}
	k := f.in(s)
	if s.endIf(s.unused) {
		t.Error("ends with a container")
	}
	if err := k.delete(s, true); err != nil {
		t.Fatal(err)
	}
	if !s.endIf(s.unused) {
		t.Error("does not end without one")
	}
	s.cfg.Handlers = map[string]oci.Runtime{"": nil}
	err := s.create(wire.Frame{Op: wire.OpCreate, Body: []byte(`{"id":"` + string(id.NewContainer()) + `","spec":{}}`)})
	if !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("create after the decision: %v", err)
	}
}

// SIGTERM deletes what is only created and leaves alone what is being started.
func TestTerminateSparesAStart(t *testing.T) {
	s, f := fakeServer(t), &fakeContainer{t: t}
	k := f.in(s)
	f.starts = s.terminate
	run(t, s, k)
	select {
	case <-s.end:
		t.Error("the supervisor leaves a container that was being started")
	default:
	}
	if err := k.delete(s, false); err != nil {
		t.Error(err)
	}
}

// A pid comes back as another child: nothing that was known of the former one counts.
func TestReapingForgetsThePid(t *testing.T) {
	c := newChildren()
	done := c.forking()
	cmd := osexec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if found, reaped := c.reapOne(); !found || reaped {
		t.Fatalf("a child in the making: found %v, reaped %v", found, reaped)
	}
	c.add(pid)
	done()
	if status, err := c.wait(pid, nil); err != nil || status.ExitStatus() != 0 {
		t.Fatal(status, err)
	}
	if len(c.known) != 0 || len(c.seen) != 0 {
		t.Errorf("known %v, seen %v", c.known, c.seen)
	}
	_ = cmd.Process.Release()
}

func TestSpecWithoutScoreOrEnvironment(t *testing.T) {
	s := &Server{score: 7}
	r := wire.Create{PodInit: true, Spec: &specs.Spec{}}
	s.complete(&r)
	if p := r.Spec.Process; p == nil || p.OOMScoreAdj == nil || *p.OOMScoreAdj != 7 {
		t.Errorf("pod init: %+v", p)
	}
	own := -5
	r = wire.Create{Spec: &specs.Spec{Process: &specs.Process{OOMScoreAdj: &own, Env: []string{"A=�"}}}, Env: [][]byte{[]byte("A=\xff")}}
	s.complete(&r)
	if p := r.Spec.Process; *p.OOMScoreAdj != -5 || len(p.Env) != 1 || p.Env[0] != "A=\xff" {
		t.Errorf("%+v", p)
	}
}

// A burst makes lanes that are told to the daemon and taken back from it.
func TestLanesOfABurst(t *testing.T) {
	s := fakeServer(t)
	s.settle()
	c := &conn{s: s, wake: make(chan struct{}, 1)}
	c.events.Store(true)
	c.version.Store(wire.VersionTakeover)
	old := &conn{s: s, wake: make(chan struct{}, 1)}
	old.events.Store(true)
	quit := make(chan struct{})
	var said []string
	go func() { // the daemon
		defer close(quit)
		for range c.wake {
			c.mu.Lock()
			queue, closed := c.queue, c.closed
			c.queue = nil
			c.mu.Unlock()
			for _, m := range queue {
				said = append(said, strings.TrimSpace(string(m.bytes[bytes.IndexByte(m.bytes, '{'):])))
				m.done()
			}
			if closed {
				return
			}
		}
	}()
	s.mu.Lock()
	s.conns[c], s.conns[old] = struct{}{}, struct{}{}
	s.mu.Unlock()
	var taken []*lane.Lane
	for range 5 {
		taken = append(taken, s.lanes.Take(lane.Owner{Container: "c"}))
	}
	for _, l := range taken {
		s.lanes.Put(l)
	}
	s.mu.Lock()
	delete(s.conns, c)
	delete(s.conns, old)
	s.mu.Unlock()
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.signal()
	<-quit
	if got := strings.Join(said, "\n"); !strings.Contains(got, `"op":"lane"`) || !strings.Contains(got, `"op":"lane-gone"`) || strings.Count(got, `"ids":[4]`) != 2 || len(said) != 2 {
		t.Errorf("the daemon heard %q", said)
	}
	if len(old.queue) > 0 {
		t.Error("an old daemon heard of lanes")
	}
}
