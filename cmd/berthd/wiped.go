package main

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/berth-runtime/berth/internal/watch"
)

// socket is a listener on a path that outlives the path: when the file is
// deleted, as in a /run that is wiped, again makes a new one and Accept goes on
// with it.
type socket struct {
	path string

	mu     sync.Mutex
	l      *net.UnixListener // guarded by mu
	id     os.FileInfo       // guarded by mu; of the file
	closed bool              // guarded by mu
}

func (s *socket) current() (*net.UnixListener, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.l, s.closed
}

// Accept implements net.Listener.
func (s *socket) Accept() (net.Conn, error) {
	for {
		l, _ := s.current()
		c, err := l.Accept()
		if err != nil {
			if now, closed := s.current(); now != l && !closed {
				continue
			}
		}
		return c, err
	}
}

// Addr implements net.Listener.
func (s *socket) Addr() net.Addr {
	l, _ := s.current()
	return l.Addr()
}

// Close implements net.Listener. It removes the file if it is ours.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.l.SetUnlinkOnClose(s.isThereLocked())
	return s.l.Close()
}

func (s *socket) isThereLocked() bool {
	at, err := os.Lstat(s.path)
	return err == nil && os.SameFile(at, s.id)
}

// again makes the file anew if it is not there any more.
func (s *socket) again() (made bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.isThereLocked() {
		return false, nil
	}
	l, id, err := bind(s.path)
	if err != nil {
		return false, err
	}
	s.l.SetUnlinkOnClose(false) // the name is the new one's
	_ = s.l.Close()
	s.l, s.id = l, id
	return true, nil
}

// guardSockets makes sockets anew when their folder is wiped, until the returned
// function is called. What else was in the state folder is made again where it
// is needed; running containers have what they need open.
func guardSockets(ctx context.Context, sockets ...*socket) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for _, s := range sockets {
		again := func() {
			switch made, err := s.again(); {
			case err != nil:
				klog.ErrorS(err, "State folder was wiped and the socket cannot be made anew; nobody can connect", "socket", s.path)
			case made:
				klog.ErrorS(errors.New("somebody deleted files of the running daemon"),
					"State folder was wiped: the socket is made anew. Running containers go on; their pods' hosts, hostname and resolv.conf are made again for new containers", "socket", s.path)
			}
		}
		wg.Go(func() {
			for ctx.Err() == nil {
				_ = watch.Dir(ctx, filepath.Dir(s.path), again)
				if ctx.Err() != nil {
					return
				}
				again() // the folder itself is gone
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
	}
	return func() {
		cancel()
		wg.Wait()
	}
}
