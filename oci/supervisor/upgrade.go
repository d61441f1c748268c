package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/internal/version"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// An upgrade is execve(2): the process, and with it every child, stays. What the
// daemon would hand over after a crash we hand to ourselves, in a memfd, with the
// descriptors left open; the socket stays, so that whoever connects meanwhile
// waits. Output that is on its way is in its lane, as at a crash. Should the other
// program not start, it is a crash, and the daemon takes over.

const (
	// upgradeTime bounds the wait for requests that are being served.
	upgradeTime = 10 * time.Second
	// awakeTime bounds the wait for threads while no request is served.
	awakeTime = 100 * time.Millisecond
	// checkTime bounds the check that the other program is one like us.
	checkTime = 10 * time.Second
)

// estate is what an upgrade leaves, as JSON. Descriptors are numbers.
type estate struct {
	Listener   int            `json:"listener"`
	Lock       int            `json:"lock"`
	Containers []leftParts    `json:"containers"`
	Execs      []leftExec     `json:"execs"`
	Unheard    []wire.Exit    `json:"unheard"`
	Kept       map[string]int `json:"kept"`
	Lanes      [][]int        `json:"lanes"`

	firsts, further []*process // of Containers, of Execs
}

type leftParts struct {
	wire.Holding
	origin
	FDs []int `json:"fds"`
}

type leftExec struct {
	wire.Follow
	origin
	FDs []int `json:"fds"`
}

// upgrade serves OpUpgrade. It returns only when it fails; then everything is as
// before but the created containers, which the daemon makes again.
func (s *Server) upgrade(binary string) error {
	if !filepath.IsAbs(binary) {
		return fmt.Errorf("upgrade: %q: want an absolute path: %w", binary, errdefs.ErrInvalidArgument)
	}
	if err := s.check(binary); err != nil {
		return fmt.Errorf("upgrade to %s: %w: %w", binary, err, errdefs.ErrFailedPrecondition)
	}
	deadline := time.Now().Add(upgradeTime)
	if err := s.awake(deadline); err != nil { // while requests are served
		return err
	}
	for !s.gate.TryLock() {
		if time.Now().After(deadline) {
			return fmt.Errorf("upgrade: requests are still being served: %w", errdefs.ErrUnavailable)
		}
		time.Sleep(2 * time.Millisecond)
	}
	defer s.gate.Unlock()
	if err := s.awake(time.Now().Add(awakeTime)); err != nil {
		return err
	}
	s.log.Info("upgrade", "from", version.String(), "program", binary)
	err := s.become(binary)
	s.log.Error("upgrade failed", "program", binary, "error", err)
	s.mu.Lock()
	for c := range s.conns {
		c.close() // who comes back compares
	}
	s.mu.Unlock()
	return err
}

// awake waits until each thread of ours can end, as one cannot that waits for a log
// disk that does not answer. execve(2) ends all threads and waits for them, and
// until then this process would be nothing.
func (s *Server) awake(deadline time.Time) error {
	for {
		w, stuck := kernel.Stuck(os.Getpid())
		if !stuck {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("upgrade: a thread of the supervisor cannot end: %s: %w", w, errdefs.ErrUnavailable)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// check runs the program, which must not be a broken file or something else, nor
// a supervisor of before there were upgrades.
func (s *Server) check(binary string) error {
	forked := s.children.forking()
	defer forked()
	ctx, cancel := context.WithTimeout(s.ctx, checkTime)
	defer cancel()
	return osexec.CommandContext(ctx, binary, "--resume=-1", "--version").Run()
}

func (s *Server) become(binary string) (err error) {
	s.dropCreated()
	// From here on no child may be made: it would inherit what execve must not close.
	syscall.ForkLock.Lock()
	defer syscall.ForkLock.Unlock()
	var left []int
	defer func() { // only when it fails, and before a child can be made again
		for _, fd := range left {
			_ = unix.Close(fd)
		}
	}()
	var fault error
	leave := func(f *os.File) int {
		fd := -1
		err := control(f, func(have int) (err error) {
			fd, err = unix.FcntlInt(uintptr(have), unix.F_DUPFD, 3)
			return err
		})
		if err != nil {
			if !errors.Is(err, os.ErrClosed) { // hung up
				fault = errors.Join(fault, fmt.Errorf("%s: %w", f.Name(), err))
			}
			return -1
		}
		left = append(left, fd)
		return fd
	}
	s.mu.Lock() // guardState may make them anew
	e := estate{Listener: leave(s.listener), Lock: leave(s.lock), Kept: map[string]int{}}
	s.mu.Unlock()
	lanes, err := s.lanes.All()
	if err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	defer closeLanes(lanes)
	for _, l := range lanes {
		var fds []int
		for _, f := range l.Files {
			fds = append(fds, leave(f))
		}
		e.Lanes = append(e.Lanes, fds)
	}
	for _, c := range s.all() {
		fault = errors.Join(fault, e.leaveContainer(s, c, leave))
	}
	s.mu.Lock()
	for k, f := range s.kept {
		e.Kept[k] = leave(f)
	}
	s.mu.Unlock()
	if fault != nil {
		return fmt.Errorf("upgrade: %w", fault)
	}
	// Nobody is reaped any more, and of those who were it is known how they ended.
	s.children.mu.Lock()
	defer s.children.mu.Unlock()
	for i, p := range e.firsts {
		e.Containers[i].Ended = p.reaped.Load()
	}
	for i, p := range e.further {
		e.Execs[i].Ended = p.reaped.Load()
	}
	text, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	fd, err := unix.MemfdCreate("berth-supervisor", 0)
	if err != nil {
		return fmt.Errorf("upgrade: memfd_create: %w", err)
	}
	mem := os.NewFile(uintptr(fd), "estate")
	defer mem.Close()
	if _, err := mem.Write(text); err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	var limit syscall.Rlimit
	lerr := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	args := []string{binary, "--state", s.cfg.StateDir, "--resume", strconv.Itoa(fd)}
	err = syscall.Exec(binary, args, os.Environ())
	if lerr == nil { // Exec lowers it to what this process was started with
		lerr = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
	}
	return errors.Join(fmt.Errorf("upgrade: execve %s: %w", binary, err), lerr)
}

// dropCreated deletes what is created and not started.
func (s *Server) dropCreated() {
	for _, c := range s.all() {
		c.mu.Lock()
		created := c.first == nil
		c.mu.Unlock()
		if created {
			if err := c.delete(s, true); err != nil {
				s.log.Error("created container is not deleted before an upgrade", "container", string(c.id), "error", err)
			}
		}
	}
}

func (e *estate) leaveContainer(s *Server, c *container, leave func(*os.File) int) error {
	h, files, ok := c.holding(s)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !ok {
		if c.first != nil {
			return fmt.Errorf("container %s cannot be left to another program: %w", c.id, unix.EMFILE)
		}
		return nil
	}
	c.request.addTo(&h)
	numbers := func(files []*os.File) (out []int) {
		for _, f := range files {
			out = append(out, leave(f))
		}
		wire.CloseFiles(files)
		return out
	}
	e.Containers = append(e.Containers, leftParts{Holding: h, origin: origin{Foreign: c.first.foreign}, FDs: numbers(files)})
	e.firsts = append(e.firsts, c.first)
	for n, x := range c.execs {
		if x == nil {
			continue
		}
		l := leftExec{Follow: wire.Follow{ID: c.id, Exec: n, Pid: x.pid}, origin: origin{Foreign: x.foreign}, FDs: []int{leave(x.pidfd)}}
		if x.console != nil {
			if fd := leave(x.console); fd >= 0 {
				l.Terminal, l.FDs = true, append(l.FDs, fd)
			}
		}
		e.Execs, e.further = append(e.Execs, l), append(e.further, x.process)
	}
	for _, u := range c.unheard {
		e.Unheard = append(e.Unheard, u)
	}
	return nil
}

// Resume goes on where another program of the same process left, with the memfd
// that it left open. What cannot be taken up is logged.
func Resume(cfg Config, memfd int) (*Server, error) {
	unix.CloseOnExec(memfd)
	mem := os.NewFile(uintptr(memfd), "estate")
	defer mem.Close()
	var e estate
	text, err := io.ReadAll(io.NewSectionReader(mem, 0, 1<<30))
	if err == nil {
		err = json.Unmarshal(text, &e)
	}
	if err != nil {
		return nil, fmt.Errorf("resume: %w", err)
	}
	s := newServer(cfg)
	if s.lock, err = found(e.Lock); err != nil {
		return nil, fmt.Errorf("resume: lock: %w", err)
	}
	if s.listener, err = found(e.Listener); err != nil {
		return nil, errors.Join(fmt.Errorf("resume: socket: %w", err), s.lock.Close())
	}
	s.socket, _ = idOf(filepath.Join(cfg.StateDir, SocketName)) // gone: guardState makes it anew
	for k, fd := range e.Kept {
		if f, err := found(fd); err == nil {
			s.kept[k] = f
		}
	}
	for _, fds := range e.Lanes {
		files := foundAll(fds)
		if err := s.putLanes(files); err != nil {
			s.log.Error("output may be lost in an upgrade", "error", err)
		}
		wire.CloseFiles(files)
	}
	for _, l := range e.Containers {
		files := foundAll(l.FDs)
		if err := s.inherit(l.Holding, files, l.origin); err != nil {
			s.log.Error("container is lost in an upgrade", "container", string(l.ID), "error", err)
		}
		wire.CloseFiles(files)
	}
	for _, l := range s.left.drop() {
		s.lanes.Put(l)
	}
	nobody := &conn{s: s, closed: true}
	for _, l := range e.Execs {
		files := foundAll(l.FDs)
		if c, err := s.find(l.ID); err == nil {
			if err := c.inheritExec(s, nobody, l.Follow, files, l.origin); err != nil {
				s.log.Error("exec is lost in an upgrade", "container", string(l.ID), "error", err)
			}
		}
		wire.CloseFiles(files)
	}
	for _, u := range e.Unheard {
		if c, err := s.find(u.ID); err == nil {
			c.mu.Lock()
			if c.unheard == nil {
				c.unheard = map[id.Exec]wire.Exit{}
			}
			c.unheard[u.Exec] = u
			c.mu.Unlock()
		}
	}
	return s, nil
}

// found takes over a descriptor that the former program left open.
func found(fd int) (*os.File, error) {
	if fd < 3 {
		return nil, fmt.Errorf("descriptor %d: %w", fd, errdefs.ErrNotFound)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("descriptor %d: %w", fd, err)
	}
	return os.NewFile(uintptr(fd), "left"), nil
}

func foundAll(fds []int) (files []*os.File) {
	for _, fd := range fds {
		f, err := found(fd)
		if err != nil {
			f = os.NewFile(^uintptr(0), "missing")
		}
		files = append(files, f)
	}
	return files
}
