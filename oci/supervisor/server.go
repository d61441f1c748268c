// Package supervisor is the process that is parent of all containers of a node.
// It forks them through oci.Runtime, owns their stdio and writes their logs,
// keeps their exit records until they are deleted, and keeps descriptors for the
// daemon. The daemon may die and come back at any time; clients speak package
// wire to it.
//
// Locks: Server.mu guards the maps of containers, kept descriptors and
// connections and is held for moments, never over a system call that can
// block. A container has locks of its own (container.go). Order: container.mu,
// then Server.mu; children.mu, attachers.mu, profiles.mu, conn.mu, the mutex of
// a log and that of the lanes' pool are innermost. Server.gate is outside of all.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/supervisor/lane"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

const (
	// SocketName is the socket's name in the state directory.
	SocketName = "supervisor.sock"
	// LockName is the name of the lock file, which holds the supervisor's pid.
	LockName = "supervisor.lock"

	idleTime = 5 * time.Second
	sigkill  = int(unix.SIGKILL)
)

// Config configures a Server.
type Config struct {
	// StateDir holds socket and lock. It is made with mode 0700.
	StateDir string
	// Handlers are the runtimes by handler name; "" is the default one.
	Handlers map[string]oci.Runtime
	// External makes the runtime of a handler that comes with its command line;
	// nil knows none. forking must be called before each process that the runtime
	// starts and waits for itself, and done when it was reaped: our reaper of
	// orphans would take it otherwise.
	External func(handler string, c oci.Command, forking func() (done func())) (oci.Runtime, error)
	// Settle is called once, when all containers of a dead supervisor that can be
	// gone on with are here: it takes down what is left of others, but those that
	// keep names. May be nil.
	Settle func(keep func(id.Container) bool)
	// Log takes what operators should know; nil means slog.Default.
	Log *slog.Logger
}

// Server is the supervisor.
type Server struct {
	cfg      Config
	log      *slog.Logger
	children *children
	score    int             // oom_score_adj of containers whose spec has none
	ctx      context.Context // ends with Serve
	cancel   context.CancelFunc
	clients  sync.WaitGroup // goroutines of the connections
	lives    sync.WaitGroup // goroutines of containers, which end with them
	profiles profiles
	lanes    *lane.Pool
	left     leftLanes
	settled  sync.Once
	// gate is held shared by every request, and alone by an upgrade.
	gate    sync.RWMutex
	end     chan struct{} // closed when it is time to leave
	endOnce sync.Once

	mu         sync.Mutex
	lock       *os.File
	listener   *os.File
	socket     fileID // of the listener's file
	containers map[id.Container]*container
	kept       map[string]*os.File
	conns      map[*conn]struct{}
	idle       *time.Timer
	ending     bool
}

// New takes the lock of the state directory and listens. It fails with
// errdefs.ErrAlreadyExists when another supervisor keeps the lock.
func New(cfg Config) (_ *Server, err error) {
	s := newServer(cfg)
	if !filepath.IsAbs(cfg.StateDir) {
		return nil, fmt.Errorf("state directory %q: want an absolute path: %w", cfg.StateDir, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := os.Chmod(cfg.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if s.lock, err = takeLock(filepath.Join(cfg.StateDir, LockName), lockWait); err != nil {
		return nil, err
	}
	if s.listener, s.socket, err = listen(filepath.Join(cfg.StateDir, SocketName)); err != nil {
		return nil, errors.Join(err, s.lock.Close())
	}
	return s, nil
}

func newServer(cfg Config) *Server {
	s := &Server{
		cfg: cfg, log: cfg.Log, children: newChildren(), end: make(chan struct{}),
		containers: map[id.Container]*container{}, kept: map[string]*os.File{}, conns: map[*conn]struct{}{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if s.log == nil {
		s.log = slog.Default()
	}
	s.lanes = lane.NewPool(s.announce, s.retire, func(err error) {
		s.log.Warn("container output passes memory of this process alone and is lost if it is killed", "error", err)
	})
	return s
}

// Serve makes the process the subreaper of its descendants and serves until it
// is idle for 5 seconds, gets SIGTERM while no container runs, or ctx ends.
// Containers that run when ctx ends keep running. A Server serves once.
func (s *Server) Serve(ctx context.Context) error {
	s.score = max(ownScore(), 0)
	leave, err := becomeSupervisor(s.log)
	if err != nil {
		s.cancel()
		return errors.Join(err, s.shut())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var own sync.WaitGroup
	own.Go(func() { s.children.reapOrphans(ctx) })
	own.Go(func() { s.watchTerm(ctx) })
	l := s.listener
	own.Go(func() { s.accept(l) })
	own.Go(func() { s.guardState(ctx) })
	s.touch()
	s.log.Info("supervisor serves", "pid", os.Getpid(), "state", s.cfg.StateDir)
	select {
	case <-s.end:
	case <-ctx.Done():
	}
	err = s.shut()
	cancel()
	own.Wait()
	s.cancel()
	s.clients.Wait()
	if !s.runs() {
		ended := make(chan struct{})
		go func() { s.lives.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(drainTime + stuckTime): // a log disk that does not answer
			s.log.Error("leaving, although a log disk does not answer: the end of a log is lost")
		}
	}
	leave()
	return err
}

// shut closes the socket, all connections and the lock, in this order: whoever
// gets the lock next finds no socket of ours.
func (s *Server) shut() error {
	s.mu.Lock()
	s.ending = true
	err := os.Remove(filepath.Join(s.cfg.StateDir, SocketName))
	if errors.Is(err, os.ErrNotExist) { // the directory was wiped just now
		err = nil
	}
	err = errors.Join(err, s.listener.Close())
	if s.idle != nil {
		s.idle.Stop()
	}
	for c := range s.conns {
		c.close()
	}
	err = errors.Join(err, s.lock.Close())
	s.mu.Unlock()
	return err
}

func (s *Server) leave() { s.endOnce.Do(func() { close(s.end) }) }

// touch is called whenever the supervisor may have become idle or busy.
func (s *Server) touch() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending {
		return
	}
	if s.idle != nil {
		s.idle.Stop()
		s.idle = nil
	}
	if s.unused() {
		s.idle = time.AfterFunc(idleTime, func() {
			if s.endIf(s.unused) {
				s.leave()
			}
		})
	}
}

// endIf decides to end when ok says so. It does so under the lock that also
// guards the coming of connections and containers: whoever comes later is turned
// away at once and finds, or starts, the next supervisor.
func (s *Server) endIf(ok func() bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ending && !ok() {
		return false
	}
	s.ending = true
	return true
}

func (s *Server) unused() bool { return len(s.containers)+len(s.kept)+len(s.conns) == 0 }

// goNamed runs f for a container. The goroutine ends with the container's
// processes or with the reader of its output.
func (s *Server) goNamed(name string, f func()) { s.lives.Go(func() { s.guard(name, f) }) }

// goClient runs f for a connection; it ends when the connection is closed.
func (s *Server) goClient(name string, f func()) { s.clients.Go(func() { s.guard(name, f) }) }

// guard runs f; a panic in it is logged and does not end the containers' parent.
func (s *Server) guard(name string, f func()) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic", "in", name, "panic", p, "stack", string(debug.Stack()))
		}
	}()
	f()
}

// own makes a process of what a runtime started. When that cannot be done the
// child is killed and reaped.
func (s *Server) own(p oci.Process) (*process, error) {
	proc, err := newProcess(p)
	if err == nil {
		return proc, nil
	}
	_ = control(p.PidFD, func(fd int) error { return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) })
	_, _ = s.children.wait(p.Pid, nil) // killed: it ends, or somebody else has reaped it
	_ = p.PidFD.Close()
	if p.Console != nil {
		_ = p.Console.Close()
	}
	return nil, err
}

// publish sends an exit record to every connection that asked for events.
func (s *Server) publish(e wire.Exit) {
	s.mu.Lock()
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		if c.events.Load() {
			c.notify(e)
		}
	}
}

func (s *Server) find(c id.Container) (*container, error) {
	s.mu.Lock()
	found := s.containers[c]
	s.mu.Unlock()
	if found == nil {
		return nil, fmt.Errorf("container %s: %w", c, errdefs.ErrNotFound)
	}
	<-found.made
	if found.makeErr != nil {
		return nil, fmt.Errorf("container %s: %w", c, errdefs.ErrNotFound)
	}
	return found, nil
}

func (s *Server) forget(c *container) {
	s.mu.Lock()
	if s.containers[c.id] == c {
		delete(s.containers, c.id)
	}
	s.mu.Unlock()
	s.touch()
}

func (s *Server) all() []*container {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*container, 0, len(s.containers))
	for _, c := range s.containers {
		all = append(all, c)
	}
	return all
}

func (s *Server) list() []wire.Info {
	all := s.all()
	out := make([]wire.Info, 0, len(all))
	for _, c := range all {
		if i, ok := c.info(); ok {
			out = append(out, i)
		}
	}
	return out
}

// terminate serves SIGTERM: it ends the supervisor unless a container runs.
func (s *Server) terminate() {
	if s.runs() {
		s.log.Warn("SIGTERM is ignored while containers run; stop them first")
		return
	}
	all := s.all()
	left := map[*container]bool{}
	for _, c := range all {
		err := c.delete(s, true)
		if err != nil && !errors.Is(err, errRunning) {
			s.log.Error("container is left behind", "container", string(c.id), "error", err)
			left[c] = true
		}
	}
	// One that was made or started meanwhile is not lost: it keeps us here.
	if !s.endIf(func() bool {
		for _, c := range s.containers {
			if !left[c] {
				return false
			}
		}
		return true
	}) {
		s.log.Warn("SIGTERM is ignored: a container was started meanwhile")
		return
	}
	s.leave()
}

func (s *Server) runs() bool {
	for _, i := range s.list() {
		if i.State == wire.Running {
			return true
		}
	}
	return false
}
