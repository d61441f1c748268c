package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/watch"
)

// guardState makes socket and lock anew when somebody deletes them, as in a /run
// that is wiped: a daemon that found none would start a second supervisor, which
// knows none of our containers.
func (s *Server) guardState(ctx context.Context) {
	for ctx.Err() == nil {
		again := func() {
			if err := s.remake(); err != nil {
				s.log.Error("state directory was wiped; a new daemon cannot find this supervisor and its containers", "state", s.cfg.StateDir, "error", err)
			}
		}
		_ = watch.Dir(ctx, s.cfg.StateDir, again)
		if ctx.Err() != nil {
			return
		}
		again() // the directory itself is gone
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// remake makes what is missing of lock and socket. Only guardState calls it.
func (s *Server) remake() (err error) {
	s.mu.Lock()
	ending, id, lock := s.ending, s.socket, s.lock
	s.mu.Unlock()
	socket := filepath.Join(s.cfg.StateDir, SocketName)
	if ending || isAt(id, socket) {
		return nil
	}
	if err := os.MkdirAll(s.cfg.StateDir, 0o700); err != nil {
		return err
	}
	if path := filepath.Join(s.cfg.StateDir, LockName); !fileIsAt(lock, path) {
		if lock, err = takeLock(path, 0); err != nil {
			return err
		}
	}
	l, id, err := listen(socket)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lock != lock {
		_ = s.lock.Close()
		s.lock = lock
	}
	if err != nil {
		return err
	}
	if s.ending {
		return errors.Join(os.Remove(socket), l.Close())
	}
	_ = s.listener.Close()
	s.listener, s.socket = l, id
	s.log.Error("state directory was wiped: socket and lock are made anew", "state", s.cfg.StateDir)
	s.clients.Go(func() { s.guard("accept", func() { s.accept(l) }) })
	return nil
}

// fileID tells one file from another that has its name.
type fileID struct{ dev, ino uint64 }

func idOf(path string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fileID{}, fmt.Errorf("%s: %w", path, err)
	}
	return fileID{st.Dev, st.Ino}, nil
}

func isAt(want fileID, path string) bool {
	id, err := idOf(path)
	return err == nil && id == want
}

func fileIsAt(f *os.File, path string) bool {
	have, err := f.Stat()
	at, aerr := os.Lstat(path)
	return errors.Join(err, aerr) == nil && os.SameFile(have, at)
}
