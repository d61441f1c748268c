package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// A caller without a deadline does not wait for ever for a supervisor that does
// not come.
func TestWaitIsBounded(t *testing.T) {
	c := &Client{ctx: context.Background(), ready: make(chan struct{}), waitTime: 30 * time.Millisecond}
	done := make(chan error, 1)
	go func() {
		_, err := c.List(context.Background())
		done <- err
	}()
	select {
	case err := <-done:
		if !errors.Is(err, errdefs.ErrUnavailable) {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("waits for ever")
	}
}

// TestABrokenConnectionIsUsedOnce: a request that can be repeated is, over the next
// connection, and not over the broken one again.
func TestABrokenConnectionIsUsedOnce(t *testing.T) {
	dir := t.TempDir()
	socket, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, socketName)})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	go func() {
		for {
			if serve(socket, 1) != nil {
				return
			}
		}
	}()
	whole, err := dial(dir)
	if err != nil {
		t.Fatal(err)
	}
	c := &Client{ctx: context.Background(), exits: newExitQueue(), ready: make(chan struct{}), waitTime: 10 * time.Second}
	c.use(&link{broken: true})
	time.AfterFunc(50*time.Millisecond, func() {
		go c.read(whole)
		c.use(whole)
	})
	if _, err := c.List(context.Background()); errors.Is(err, wire.ErrBroken) {
		t.Error(err)
	}
	_ = whole.conn.Close()
	<-whole.done
}

// What waits for the end of a supervisor ends with the client, which the
// supervisor outlives.
func TestSpawnedIsReapedOrLeft(t *testing.T) {
	for name, script := range map[string]string{"ends": "exit 3", "lives on": "exec sleep 2"} {
		t.Run(name, func(t *testing.T) {
			binary := filepath.Join(t.TempDir(), "supervisor")
			if err := os.WriteFile(binary, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			c := &Client{cfg: Config{StateDir: t.TempDir(), Binary: binary}}
			c.ctx, c.cancel = context.WithCancel(context.Background())
			ended, err := c.spawn()
			if err != nil {
				t.Fatal(err)
			}
			if name == "ends" {
				select {
				case err := <-ended:
					if err == nil {
						t.Error("no reason for the end")
					}
				case <-time.After(5 * time.Second):
					t.Error("the end is not seen")
				}
			}
			c.cancel()
			begin := time.Now()
			c.done.Wait()
			if d := time.Since(begin); d > time.Second {
				t.Errorf("waited %v for a supervisor that lives on", d)
			}
		})
	}
}

func TestRawEnv(t *testing.T) {
	if got := rawEnv(&specs.Process{Env: []string{"A=ä"}}); got != nil {
		t.Errorf("UTF-8: %q", got)
	}
	got := rawEnv(&specs.Process{Env: []string{"A=b", "B=\xff"}})
	if len(got) != 2 || string(got[0]) != "A=b" || string(got[1]) != "B=\xff" {
		t.Errorf("%q", got)
	}
	if rawEnv(nil) != nil || rawEnv(&specs.Process{}) != nil {
		t.Error("no environment")
	}
}

// A supervisor of the time before external runtimes leaves out the command line
// and does not know the handler: the error says what to do.
func TestExternalHandlerOnAnOldSupervisor(t *testing.T) {
	for _, version := range []int{1, wire.VersionCommand} {
		dir := t.TempDir()
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, socketName)})
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- serve(l, version) }()
		c, err := Open(context.Background(), Config{StateDir: dir, Commands: map[string]oci.Command{"runc": {Path: "/usr/sbin/runc"}}})
		if err != nil {
			t.Fatal(err)
		}
		var want error = errdefs.ErrFailedPrecondition
		if version == wire.VersionCommand {
			want = errdefs.ErrInvalidArgument
		}
		err = c.Create(context.Background(), wire.Create{ID: id.NewContainer(), Handler: "runc", Spec: &specs.Spec{}})
		if !errors.Is(err, want) || version == 1 && !strings.Contains(err.Error(), "(old, pid 7) is older than external runtimes") {
			t.Errorf("version %d: %v", version, err)
		}
		if err := errors.Join(c.Close(), l.Close()); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
}

// serve answers one connection as a supervisor of that version does.
func serve(l *net.UnixListener, version int) error {
	accepted, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	f, err := accepted.File()
	if err := errors.Join(err, accepted.Close()); err != nil {
		return err
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	conn, err := wire.NewConn(fd)
	if err != nil {
		return err
	}
	defer conn.Close()
	for {
		f, files, err := conn.Recv()
		if err != nil {
			return nil // the client has closed
		}
		wire.CloseFiles(files)
		answer := wire.Frame{ID: f.ID}
		switch f.Op {
		case wire.OpHello:
			if answer.Body, err = json.Marshal(wire.HelloReply{Version: version, Pid: 7, Build: "old"}); err != nil {
				return err
			}
		default:
			answer.Err = wire.ToError(fmt.Errorf("handler \"runc\": no such runtime: %w", errdefs.ErrInvalidArgument))
		}
		if err := conn.Send(answer); err != nil {
			return err
		}
	}
}

// The lanes that are held are those that the supervisor last spoke of.
func TestLanesComeAndGo(t *testing.T) {
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
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	open := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	before := open()
	c := &Client{}
	say := func(op wire.Op, id int, files ...*os.File) {
		t.Helper()
		body, err := json.Marshal(wire.LanesReply{IDs: []int{id}})
		if err == nil {
			err = theirs.Send(wire.Frame{Op: op, Body: body}, files...)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	say(wire.OpLane, 4, null, null, null)
	say(wire.OpLane, 5, null, null, null)
	say(wire.OpLane, 5, null, null, null) // another one with that number
	say(wire.OpLaneGone, 4)
	say(wire.OpLaneGone, 6) // we have not heard of it
	theirs.Close()
	l := &link{conn: ours, done: make(chan struct{})}
	c.read(l)
	if got := fmt.Sprint(c.held.heldLanes()); got != "[5]" {
		t.Errorf("holds %s", got)
	}
	if _, ok := c.held.lane(4); ok {
		t.Error("lane 4 is still there")
	}
	c.held.close()
	if now := open(); now > before-2 { // the two sockets
		t.Errorf("%d descriptors, were %d", now, before)
	}
}
