package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/crilog"
	"github.com/berth-runtime/berth/oci/supervisor/lane"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// A supervisor may be killed at any time and its containers must not notice. So
// the daemon holds duplicates of all that the kernel would take back with us: of
// each started container the pidfd, without which its exit code is lost, and our
// ends of its stdio, without which it gets SIGPIPE; and the lanes, where output is
// that was read and not yet written. Each Start answers with them, a daemon that
// comes later asks (OpHoldings, OpLanes), and the next supervisor is given them
// before any other request (OpPutLanes, OpAdopt, OpSettled).

// maxRuntimeFiles is the most descriptors of one container that a runtime bequeaths.
const maxRuntimeFiles = 8

// holding returns what the daemon is to hold of a started container, without the
// request that made it; the files are the caller's. A stream that cannot be
// duplicated has just ended. It reports false as well when there is no room for
// another descriptor.
func (c *container) holding(s *Server) (h wire.Holding, files []*os.File, started bool) {
	var saved json.RawMessage
	var extra []*os.File
	if heir, ok := c.oci.(oci.Heritable); ok {
		var err error
		if saved, extra, err = heir.Bequeath(); err != nil || len(extra) > maxRuntimeFiles {
			s.log.Error("container cannot be handed over", "container", string(c.id), "error", err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.first == nil {
		wire.CloseFiles(extra)
		return h, nil, false
	}
	h = wire.Holding{ID: c.id, Pid: c.first.pid, StartedAt: c.startedAt, LogPath: c.logPath, Runtime: saved, Exit: c.exit}
	add := func(name wire.File, f *os.File) {
		if f == nil {
			return
		}
		if d, err := dupFile(f); err == nil {
			h.Files, files = append(h.Files, name), append(files, d)
		}
	}
	if c.exit == nil {
		if add(wire.FilePid, c.first.pidfd); files == nil { // without it, it would count as ended
			wire.CloseFiles(extra)
			return wire.Holding{}, nil, false
		}
		add(wire.FileStdin, c.stdinEnd)
		for _, o := range c.outputs {
			switch {
			case c.first.console != nil:
				add(wire.FileConsole, o.file)
			case o.number == 0:
				add(wire.FileStdout, o.file)
			default:
				add(wire.FileStderr, o.file)
			}
		}
	}
	for _, f := range extra {
		h.Files, files = append(h.Files, wire.FileRuntime), append(files, f)
	}
	return h, files, true
}

// holdings serves OpHoldings.
func (s *Server) holdings(r wire.Holdings) (reply wire.HoldingsReply, files []*os.File) {
	size := 0
	for _, n := range r.IDs {
		s.mu.Lock()
		c := s.containers[n]
		s.mu.Unlock()
		if c != nil {
			select {
			case <-c.made:
			default:
				c = nil // not started either
			}
		}
		if c != nil && c.makeErr == nil {
			if h, held, started := c.holding(s); started {
				c.request.addTo(&h)
				size += len(h.Create) + len(h.Profile)
				reply.Holdings, files = append(reply.Holdings, h), append(files, held...)
			}
		}
		reply.Done++
		// Room for one more container, whatever it has.
		if len(files) > wire.MaxFDs-maxRuntimeFiles-4 || size > wire.MaxFrame/4 {
			break
		}
	}
	return reply, files
}

// adopt serves OpAdopt: the container's processes are nobody's we know. The files
// are the caller's.
func (s *Server) adopt(h wire.Holding, files []*os.File) (err error) {
	return s.inherit(h, files, origin{Foreign: true})
}

// origin is how a process came to us.
type origin struct {
	Foreign bool       `json:"foreign,omitempty"` // it is not our child
	Ended   *wire.Exit `json:"ended,omitempty"`   // it was our child, and is reaped
}

func (o origin) process(s *Server, pid int, pidfd *os.File) *process {
	p := &process{pid: pid, pidfd: pidfd, foreign: o.Foreign, done: make(chan struct{})}
	if o.Ended != nil {
		p.reaped.Store(o.Ended)
	} else if !o.Foreign {
		s.children.add(pid)
	}
	return p
}

func (s *Server) inherit(h wire.Holding, files []*os.File, from origin) (err error) {
	if len(h.Files) != len(files) || (h.Op != wire.OpCreate && h.Op != wire.OpCreateProfile) {
		return fmt.Errorf("adopt: %d descriptors, want %d; made by %q: %w", len(files), len(h.Files), h.Op, errdefs.ErrInvalidArgument)
	}
	r, err := decode[wire.Create](wire.Frame{Op: h.Op, Body: h.Create})
	if err != nil {
		return err
	}
	if r.ID != h.ID || r.Spec == nil || id.Valid(string(h.ID)) != nil {
		return fmt.Errorf("adopt container %q: its request is of %q: %w", h.ID, r.ID, errdefs.ErrInvalidArgument)
	}
	rt, err := s.runtime(r)
	if err != nil {
		return err
	}
	adopter, ok := rt.(oci.Adopter)
	if !ok {
		return fmt.Errorf("adopt container %s: handler %q cannot: %w", h.ID, r.Handler, errdefs.ErrNotImplemented)
	}
	if len(h.Profile) > 0 {
		if err := s.profiles.put(wire.Profile{Digest: r.Seccomp, Text: h.Profile}); err != nil {
			return err
		}
	}
	digest, err := s.profiles.fill(h.Op, &r)
	if err != nil {
		return err
	}
	c := newContainer(h.Op, h.Create, r)
	s.mu.Lock()
	if s.ending || s.containers[h.ID] != nil {
		s.mu.Unlock()
		return fmt.Errorf("adopt container %s: is here already, or the supervisor is ending: %w", h.ID, errdefs.ErrAlreadyExists)
	}
	s.containers[h.ID] = c
	s.mu.Unlock()
	return s.finish(c, &r, "adopt", func() error { return c.inherit(s, adopter, r, digest, h, files, from) })
}

func (c *container) inherit(s *Server, rt oci.Adopter, r wire.Create, digest [32]byte, h wire.Holding, files []*os.File, from origin) (err error) {
	g := oci.Heritage{Request: oci.CreateRequest{
		ID: r.ID, Bundle: r.Bundle, Spec: r.Spec, Rootfs: r.Rootfs, PodInit: r.PodInit, Volumes: r.Volumes, SeccompDigest: digest,
		Namespaces: map[specs.LinuxNamespaceType]*os.File{},
	}, Pid: h.Pid, Saved: h.Runtime}
	for kind := range r.Namespaces {
		g.Request.Namespaces[kind] = nil
	}
	if r.JoinPID != "" {
		g.Request.Namespaces[specs.PIDNamespace] = nil
	}
	named := map[wire.File]*os.File{}
	for i, name := range h.Files {
		named[name] = files[i]
		if name == wire.FileRuntime {
			g.Files = append(g.Files, files[i])
		}
	}
	g.PidFD = named[wire.FilePid]
	if c.oci, err = rt.Adopt(context.Background(), g); err != nil {
		return err
	}
	c.starting, c.startedAt, c.logPath = true, h.StartedAt, h.LogPath
	if h.Exit != nil || g.PidFD == nil {
		c.exit = h.Exit
		if c.exit == nil { // ended just when it was handed over
			c.exit = &wire.Exit{ID: c.id, Pid: h.Pid, Code: 255, Unknown: true, FinishedAt: time.Now().UTC()}
		}
		c.first = &process{pid: h.Pid, foreign: true, done: make(chan struct{})}
		close(c.first.done)
		return nil
	}
	pidfd, err := dupPollable(g.PidFD)
	if err != nil {
		return err
	}
	first := from.process(s, h.Pid, pidfd)
	io, err := c.inheritStdio(s, first, h, named)
	if err != nil {
		first.close()
		return err
	}
	c.mu.Lock()
	c.first, c.log, c.outputs, c.stdinEnd = first, io.log, io.outputs, io.stdin
	if !first.exited() {
		c.cgroups = cgroupsOf(h.Pid)
	}
	c.mu.Unlock()
	c.read(s, io)
	s.goNamed("watch", func() { c.watch(s, first, io) })
	return nil
}

// inheritStdio goes on with the streams of a container.
func (c *container) inheritStdio(s *Server, first *process, h wire.Holding, named map[wire.File]*os.File) (_ *stdio, err error) {
	io := &stdio{container: c.id, lanes: s.lanes}
	left := map[int]*lane.Lane{}
	for _, l := range s.left.take(c.id) {
		if _, stream, _ := l.Owner(); left[stream] == nil {
			left[stream] = l
		} else {
			s.lanes.Put(l) // one stream has one lane
		}
	}
	defer func() {
		if err != nil {
			io.closeOurs()
		}
	}()
	if h.LogPath != "" {
		// The container goes on whatever becomes of its log.
		io.log = crilog.Adopt(h.LogPath, func(err error) {
			s.log.Error("container output is lost: its log cannot be opened", "container", string(c.id), "error", err)
		}, slices.Collect(maps.Values(left))...)
	}
	if f := named[wire.FileConsole]; f != nil {
		master, err := dupFile(f)
		if err != nil {
			return nil, err
		}
		return io, io.useConsole(first, master, left[0])
	}
	if f := named[wire.FileStdin]; f != nil {
		if io.stdin, err = dupPollable(f); err != nil {
			return nil, err
		}
	}
	for i, name := range []wire.File{wire.FileStdout, wire.FileStderr} {
		if f := named[name]; f != nil {
			ours, err := dupPollable(f)
			if err != nil {
				return nil, err
			}
			io.outputs = append(io.outputs, io.output(i, ours, left[i]))
		}
	}
	return io, nil
}

// settle serves OpSettled.
func (s *Server) settle() {
	for _, l := range s.left.drop() { // of containers that were deleted, or refused
		s.lanes.Put(l)
	}
	s.lanes.Warm() // not before: a client gives its lanes to a supervisor that has none
	if s.cfg.Settle == nil {
		return
	}
	s.settled.Do(func() {
		s.cfg.Settle(func(n id.Container) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.containers[n] != nil
		})
	})
}

// follow serves OpFollow: the client's former connection, or our predecessor, is
// gone. An exec that is not known is nobody's child we know.
func (c *container) follow(s *Server, owner *conn, r wire.Follow, files []*os.File) error {
	return c.inheritExec(s, owner, r, files, origin{Foreign: true})
}

func (c *container) inheritExec(s *Server, owner *conn, r wire.Follow, files []*os.File, from origin) error {
	want := 1
	if r.Terminal {
		want = 2
	}
	if len(files) != want {
		return fmt.Errorf("follow exec %s: %d descriptors, want %d: %w", r.Exec, len(files), want, errdefs.ErrInvalidArgument)
	}
	var console *os.File
	if r.Terminal {
		var err error
		if console, err = dupFile(files[1]); err != nil {
			return err
		}
	}
	pidfd, err := dupPollable(files[0])
	if err != nil {
		return errors.Join(err, closeIf(console))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.unheard[r.Exec]; ok {
		delete(c.unheard, r.Exec)
		owner.notify(e)
		return errors.Join(closeIf(console), pidfd.Close())
	}
	if x := c.execs[r.Exec]; x != nil {
		x.owner = owner
		old := x.console
		x.console = console
		return errors.Join(closeIf(old), pidfd.Close())
	}
	if c.deleting != nil {
		return errors.Join(fmt.Errorf("container %s: being deleted: %w", c.id, errdefs.ErrFailedPrecondition), closeIf(console), pidfd.Close())
	}
	x := &exec{process: from.process(s, r.Pid, pidfd), id: r.Exec, owner: owner}
	x.console = console
	if c.execs == nil {
		c.execs = map[id.Exec]*exec{}
	}
	c.execs[r.Exec] = x
	s.goNamed("watch", func() { c.watchExec(s, x) })
	return nil
}

func closeIf(f *os.File) error {
	if f == nil {
		return nil
	}
	err := f.Close()
	if errors.Is(err, os.ErrClosed) { // hung up
		return nil
	}
	return err
}
