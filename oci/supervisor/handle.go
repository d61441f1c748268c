package supervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/crashpoint"
	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

func decode[T any](f wire.Frame) (v T, err error) {
	if err := json.Unmarshal(f.Body, &v); err != nil {
		return v, fmt.Errorf("%s: body: %w: %w", f.Op, err, errdefs.ErrInvalidArgument)
	}
	return v, nil
}

// on decodes the body and finds the container it is about.
func on[T any](s *Server, f wire.Frame, name func(T) id.Container) (T, *container, error) {
	v, err := decode[T](f)
	if err != nil {
		return v, nil, err
	}
	c, err := s.find(name(v))
	return v, c, err
}

func target(t wire.Target) id.Container { return t.ID }

// handle serves one request. files are closed by the caller; out is taken over
// by it; after runs when the answer is queued.
func (c *conn) handle(f wire.Frame, files []*os.File) (body any, out []*os.File, after func(), err error) {
	s := c.s
	if want, fixed := fdCount(f.Op); fixed && len(files) != want {
		return nil, nil, nil, fmt.Errorf("%s: %d descriptors, want %d: %w", f.Op, len(files), want, errdefs.ErrInvalidArgument)
	}
	switch f.Op {
	case wire.OpHello:
		h, err := decode[wire.Hello](f)
		if err != nil {
			return nil, nil, nil, err
		}
		c.events.Store(h.Events)
		c.version.Store(int32(h.Version))
		return wire.HelloReply{Version: min(h.Version, wire.Version), Pid: os.Getpid(), Build: version.String()}, nil, nil, nil
	case wire.OpList:
		return wire.ListReply{Containers: s.list()}, nil, nil, nil
	case wire.OpCreate, wire.OpCreateProfile:
		return nil, nil, nil, s.create(f)
	case wire.OpStart:
		r, k, err := on(s, f, func(r wire.Start) id.Container { return r.ID })
		if err != nil {
			return nil, nil, nil, err
		}
		reply, held, after, err := k.start(s, r)
		return reply, held, after, err
	case wire.OpExec:
		return c.exec(f, files)
	case wire.OpHoldings:
		r, err := decode[wire.Holdings](f)
		if err != nil {
			return nil, nil, nil, err
		}
		reply, held := s.holdings(r)
		return reply, held, nil, nil
	case wire.OpLanes:
		r, err := decode[wire.Lanes](f)
		if err != nil {
			return nil, nil, nil, err
		}
		reply, held, err := s.listLanes(r)
		return reply, held, nil, err
	case wire.OpFollow:
		r, k, err := on(s, f, func(r wire.Follow) id.Container { return r.ID })
		if err != nil {
			return nil, nil, nil, err
		}
		return nil, nil, nil, k.follow(s, c, r, files)
	case wire.OpDelete:
		t, err := decode[wire.Target](f)
		if err != nil {
			return nil, nil, nil, err
		}
		return nil, nil, nil, s.remove(t.ID)
	case wire.OpUserNamespace:
		r, err := decode[wire.UserNamespace](f)
		if err != nil {
			return nil, nil, nil, err
		}
		out, err := s.userNamespace(r)
		return nil, out, nil, err
	case wire.OpStdin:
		_, k, err := on(s, f, target)
		if err != nil {
			return nil, nil, nil, err
		}
		in, err := k.stdinFile()
		if err != nil {
			return nil, nil, nil, err
		}
		return nil, []*os.File{in}, nil, nil
	case wire.OpPutFD, wire.OpGetFD, wire.OpDropFD:
		out, err := s.keep(f, files)
		return nil, out, nil, err
	case wire.OpListFD:
		s.mu.Lock()
		defer s.mu.Unlock()
		keys := make([]string, 0, len(s.kept))
		for k := range s.kept {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		return wire.ListFDReply{Keys: keys}, nil, nil, nil
	}
	return nil, nil, nil, s.simple(f, files)
}

// simple serves the requests that are answered with nothing.
func (s *Server) simple(f wire.Frame, files []*os.File) error {
	switch f.Op {
	case wire.OpProfile:
		r, err := decode[wire.Profile](f)
		if err != nil {
			return err
		}
		return s.profiles.put(r)
	case wire.OpAdopt:
		h, err := decode[wire.Holding](f)
		if err != nil {
			return err
		}
		return s.adopt(h, files)
	case wire.OpPutLanes:
		return s.putLanes(files)
	case wire.OpSettled:
		s.settle()
		return nil
	case wire.OpSignal:
		r, c, err := on(s, f, func(r wire.Signal) id.Container { return r.ID })
		if err != nil {
			return err
		}
		return c.signal(r)
	case wire.OpUpdate:
		r, c, err := on(s, f, func(r wire.Update) id.Container { return r.ID })
		if err != nil {
			return err
		}
		if r.Resources == nil {
			return nil
		}
		c.life.RLock()
		defer c.life.RUnlock()
		return c.oci.Update(r.Resources)
	case wire.OpReopenLog:
		r, c, err := on(s, f, func(r wire.ReopenLog) id.Container { return r.ID })
		if err != nil {
			return err
		}
		return c.reopenLog(s, r.Path)
	case wire.OpResize:
		r, c, err := on(s, f, func(r wire.Resize) id.Container { return r.ID })
		if err != nil {
			return err
		}
		return c.resize(r)
	case wire.OpPause, wire.OpResume, wire.OpAttach, wire.OpCloseStdin:
		_, c, err := on(s, f, target)
		if err != nil {
			return err
		}
		switch f.Op {
		case wire.OpAttach:
			return c.attach(s, files[0], files[1])
		case wire.OpCloseStdin:
			return c.closeStdin()
		}
		if _, err := c.running(); err != nil {
			return err
		}
		c.life.RLock()
		defer c.life.RUnlock()
		if f.Op == wire.OpPause {
			return c.oci.Pause()
		}
		return c.oci.Resume()
	}
	return fmt.Errorf("request %q is unknown to this supervisor (%s): %w", f.Op, version.String(), errdefs.ErrNotImplemented)
}

// fdCount says how many descriptors a request has where that is fixed.
func fdCount(op wire.Op) (int, bool) {
	switch op {
	case wire.OpAttach:
		return 2, true
	case wire.OpExec, wire.OpPutFD, wire.OpAdopt, wire.OpFollow, wire.OpPutLanes:
		return 0, false
	}
	return 0, true
}

func (c *conn) exec(f wire.Frame, files []*os.File) (any, []*os.File, func(), error) {
	r, k, err := on(c.s, f, func(r wire.Exec) id.Container { return r.ID })
	if err != nil {
		return nil, nil, nil, err
	}
	if r.Process == nil || r.Exec == "" {
		return nil, nil, nil, fmt.Errorf("exec: process or exec id missing: %w", errdefs.ErrInvalidArgument)
	}
	setEnv(r.Process, r.Env)
	want := 3
	if r.Process.Terminal {
		want = 0
	}
	if len(files) != want {
		return nil, nil, nil, fmt.Errorf("exec: %d descriptors, want %d: %w", len(files), want, errdefs.ErrInvalidArgument)
	}
	var io oci.Stdio
	if want == 3 {
		for _, p := range files {
			if isStream(p) { // a pipe made by a client that polls it; the program does not expect that
				_ = control(p, func(fd int) error { return unix.SetNonblock(fd, false) })
			}
		}
		io = oci.Stdio{In: files[0], Out: files[1], Err: files[2]}
	}
	reply, held, after, err := k.exec(c.s, c, r, io)
	return reply, held, after, err
}

// create serves OpCreate and OpCreateProfile. The same body again, after a lost answer, joins or
// repeats the result of the first.
func (s *Server) create(f wire.Frame) error {
	r, err := decode[wire.Create](f)
	if err != nil {
		return err
	}
	if err := id.Valid(string(r.ID)); err != nil {
		return err
	}
	rt, err := s.runtime(r)
	if err != nil {
		return err
	}
	if r.Spec == nil {
		return fmt.Errorf("spec: missing: %w", errdefs.ErrInvalidArgument)
	}
	digest, err := s.profiles.fill(f.Op, &r)
	if err != nil {
		return err
	}
	c := newContainer(f.Op, f.Body, r)
	s.mu.Lock()
	if old := s.containers[r.ID]; old != nil {
		s.mu.Unlock()
		// The same body is a retry, another one a second container.
		if old.request.op != f.Op || !bytes.Equal(old.request.body, f.Body) {
			return fmt.Errorf("container %s: %w", r.ID, errdefs.ErrAlreadyExists)
		}
		<-old.made
		return old.makeErr
	}
	if s.ending {
		s.mu.Unlock()
		return fmt.Errorf("supervisor is ending: %w", errdefs.ErrUnavailable)
	}
	s.containers[r.ID] = c
	s.mu.Unlock()
	return s.finish(c, &r, "create", func() (err error) {
		crashpoint.Here("create", "make", "do")
		c.oci, err = s.make(rt, r, digest)
		return err
	})
}

// newContainer is the container of a request whose profile is filled in.
func newContainer(op wire.Op, body json.RawMessage, r wire.Create) *container {
	c := &container{id: r.ID, request: request{op: op, body: body}, stdin: r.Stdin, stdinOnce: r.StdinOnce, made: make(chan struct{})}
	if op == wire.OpCreateProfile {
		c.request.seccomp = r.Spec.Linux.Seccomp
	}
	return c
}

// finish makes a container that is listed, or takes it off the list again, and lets
// those go on who wait for it.
func (s *Server) finish(c *container, r *wire.Create, verb string, make func() error) error {
	s.touch()
	c.makeErr = fmt.Errorf("%s container: %w", verb, errdefs.ErrInternal) // stands when the runtime panics
	defer func() {
		if c.makeErr != nil {
			s.forget(c)
		}
		close(c.made)
	}()
	s.complete(r)
	c.makeErr = make()
	return c.makeErr
}

// runtime finds the runtime that a container asks for. A handler's command line
// comes with each request, so that this process knows no configuration that could
// be older than the daemon's.
func (s *Server) runtime(r wire.Create) (oci.Runtime, error) {
	if r.Command != nil && s.cfg.External != nil {
		return s.cfg.External(r.Handler, *r.Command, s.children.forking)
	}
	rt, ok := s.cfg.Handlers[r.Handler]
	if !ok {
		return nil, fmt.Errorf("handler %q: no such runtime: %w", r.Handler, errdefs.ErrInvalidArgument)
	}
	return rt, nil
}

// userNamespace serves OpUserNamespace.
func (s *Server) userNamespace(r wire.UserNamespace) ([]*os.File, error) {
	rt, ok := s.cfg.Handlers[version.Name].(oci.UserNamespaces)
	if !ok {
		return nil, fmt.Errorf("user namespaces: handler %q makes none: %w", version.Name, errdefs.ErrNotImplemented)
	}
	forked := s.children.forking() // they are made by a process
	defer forked()
	return rt.NewUserNamespace(oci.UserNamespaceRequest{UIDs: r.UIDs, GIDs: r.GIDs, Kinds: r.Kinds, Layers: r.Layers})
}

// complete fills in what the spec leaves to us: without an oom_score_adj of its
// own a container would inherit the supervisor's, which the OOM killer spares.
func (s *Server) complete(r *wire.Create) {
	p := r.Spec.Process
	if p == nil && r.PodInit {
		p = &specs.Process{Cwd: "/", NoNewPrivileges: true}
		r.Spec.Process = p
	}
	if p == nil {
		return
	}
	if p.OOMScoreAdj == nil {
		p.OOMScoreAdj = &s.score
	}
	setEnv(p, r.Env)
}

// setEnv replaces the environment by one that came as bytes.
func setEnv(p *specs.Process, env [][]byte) {
	if env == nil {
		return
	}
	p.Env = make([]string, len(env))
	for i, e := range env {
		p.Env[i] = string(e)
	}
}

func (s *Server) make(rt oci.Runtime, r wire.Create, seccomp [32]byte) (_ oci.Container, err error) {
	req := oci.CreateRequest{
		ID: r.ID, Bundle: r.Bundle, Spec: r.Spec, Rootfs: r.Rootfs, PodInit: r.PodInit, Volumes: r.Volumes, SeccompDigest: seccomp,
		Namespaces: map[specs.LinuxNamespaceType]*os.File{}, MountFDs: map[string]*os.File{},
	}
	var files []*os.File
	defer func() { wire.CloseFiles(files) }() // the runtime has duplicated what it keeps
	for kind, key := range r.Namespaces {
		f, err := s.borrow(key)
		if err != nil {
			return nil, fmt.Errorf("namespaces.%s: %w", kind, err)
		}
		files = append(files, f)
		req.Namespaces[kind] = f
	}
	for name, key := range r.Mounts {
		f, err := s.borrow(key)
		if err != nil {
			return nil, fmt.Errorf("mounts.%s: %w", name, err)
		}
		files = append(files, f)
		req.MountFDs[name] = f
	}
	if r.JoinPID != "" {
		f, err := s.pidNamespace(r.JoinPID)
		if err != nil {
			return nil, fmt.Errorf("joinPID: %w", err)
		}
		files = append(files, f)
		req.Namespaces[specs.PIDNamespace] = f
	}
	forked := s.children.forking() // a runtime may run programs of its own to create
	defer forked()
	return rt.Create(context.Background(), req)
}

// pidNamespace opens the PID namespace of a running container.
func (s *Server) pidNamespace(of id.Container) (*os.File, error) {
	c, err := s.find(of)
	if err != nil {
		return nil, err
	}
	p, err := c.running()
	if err != nil {
		return nil, err
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", p.pid))
	if err != nil {
		return nil, fmt.Errorf("container %s: %w: %w", of, err, errdefs.ErrFailedPrecondition)
	}
	// Alive after the open means that the number was still its own at the open.
	if p.exited() {
		_ = f.Close()
		return nil, fmt.Errorf("container %s has exited: %w", of, errdefs.ErrFailedPrecondition)
	}
	return f, nil
}

func (s *Server) remove(target id.Container) error {
	s.mu.Lock()
	c := s.containers[target]
	s.mu.Unlock()
	if c == nil {
		return nil
	}
	return c.delete(s, false)
}

// borrow duplicates a kept descriptor.
func (s *Server) borrow(key string) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.kept[key]
	if f == nil {
		return nil, fmt.Errorf("descriptor %q is not kept: %w", key, errdefs.ErrNotFound)
	}
	return dupFile(f)
}

// keep serves put-fd, get-fd and drop-fd.
func (s *Server) keep(f wire.Frame, files []*os.File) (out []*os.File, err error) {
	r, err := decode[wire.Keys](f)
	if err != nil {
		return nil, err
	}
	switch f.Op {
	case wire.OpGetFD:
		if len(r.Keys) > wire.MaxFDs {
			return nil, fmt.Errorf("keys: %d, at most %d: %w", len(r.Keys), wire.MaxFDs, errdefs.ErrInvalidArgument)
		}
		for _, k := range r.Keys {
			d, err := s.borrow(k)
			if err != nil {
				wire.CloseFiles(out)
				return nil, err
			}
			out = append(out, d)
		}
		return out, nil
	case wire.OpPutFD:
		if len(r.Keys) != len(files) || slices.Contains(r.Keys, "") {
			return nil, fmt.Errorf("keys: %d for %d descriptors, or an empty one: %w", len(r.Keys), len(files), errdefs.ErrInvalidArgument)
		}
		for _, file := range files {
			d, err := dupFile(file)
			if err != nil {
				wire.CloseFiles(out)
				return nil, err
			}
			out = append(out, d)
		}
	}
	var old []*os.File
	s.mu.Lock()
	for i, k := range r.Keys {
		if prev := s.kept[k]; prev != nil {
			old = append(old, prev)
			delete(s.kept, k)
		}
		if f.Op == wire.OpPutFD {
			s.kept[k] = out[i]
		}
	}
	s.mu.Unlock()
	crashpoint.Here("keep", string(f.Op), "known")
	// The last reference of a namespace or mount goes here: outside the lock.
	wire.CloseFiles(old)
	s.touch()
	return nil, nil
}
