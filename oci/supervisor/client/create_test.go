package client

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// supervisor is one end of the protocol that keeps profiles, or not.
type supervisor struct {
	t       *testing.T
	version int
	forget  bool // every profile at once
	fail    error

	mu       sync.Mutex
	profiles map[string]bool
	ops      []string
}

// serve serves one connection in dir.
func (s *supervisor) serve(dir string) {
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { unix.Close(l) })
	if err := errors.Join(unix.Bind(l, &unix.SockaddrUnix{Name: filepath.Join(dir, socketName)}), unix.Listen(l, 1)); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if err != nil {
			return
		}
		conn, err := wire.NewConn(fd)
		if err != nil {
			s.t.Error(err)
			return
		}
		for {
			f, _, err := conn.Recv()
			if err != nil {
				conn.Close()
				return
			}
			body, err := s.answer(f)
			text, _ := json.Marshal(body)
			if err := conn.Send(wire.Frame{ID: f.ID, Err: wire.ToError(err), Body: text}); err != nil {
				s.t.Error(err)
			}
		}
	}()
}

func (s *supervisor) answer(f wire.Frame) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch f.Op {
	case wire.OpHello:
		return wire.HelloReply{Version: s.version}, nil
	case wire.OpProfile:
		if s.version < 2 {
			return nil, errdefs.ErrNotImplemented
		}
		var p wire.Profile
		if err := json.Unmarshal(f.Body, &p); err != nil {
			return nil, err
		}
		sum := sha256.Sum256(p.Text)
		if hex.EncodeToString(sum[:]) != p.Digest {
			s.t.Errorf("digest %s of a text that has %x", p.Digest, sum)
		}
		s.profiles[p.Digest] = !s.forget
	case wire.OpCreate, wire.OpCreateProfile:
		var r wire.Create
		if err := json.Unmarshal(f.Body, &r); err != nil {
			return nil, err
		}
		inline := r.Spec.Linux != nil && r.Spec.Linux.Seccomp != nil
		if inline && r.Seccomp != "" || f.Op == wire.OpCreateProfile && (s.version < 2 || r.Seccomp == "") || r.Spec.Hostname != "h" {
			s.t.Errorf("%s: %s", f.Op, f.Body)
		}
		s.ops = append(s.ops, fmt.Sprintf("%s inline=%v", f.Op, inline))
		if r.Seccomp != "" && !s.profiles[r.Seccomp] {
			return nil, fmt.Errorf("%s: %w", r.Seccomp, wire.ErrUnknownProfile)
		}
		return nil, s.fail
	}
	s.ops = append(s.ops, string(f.Op))
	return nil, nil
}

// take returns what was asked since the last time.
func (s *supervisor) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	ops := strings.Join(s.ops, ", ")
	s.ops = nil
	return ops
}

func TestCreateSendsProfilesOnce(t *testing.T) {
	request := func(call string) wire.Create {
		// Characters that JSON escapes: the text must arrive as it was hashed.
		return wire.Create{ID: "c", Spec: &specs.Spec{Hostname: "h", Linux: &specs.Linux{Seccomp: &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow, ListenerMetadata: "<&>\u2028", Syscalls: []specs.LinuxSyscall{{Names: []string{call}, Action: specs.ActErrno}},
		}}}}
	}
	open := func(t *testing.T, s *supervisor) *Client {
		s.t, s.profiles = t, map[string]bool{}
		dir := t.TempDir()
		s.serve(dir)
		c, err := Open(context.Background(), Config{StateDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	const short, profile, inline = "create-profile inline=false", "profile", "create inline=true"
	t.Run("new", func(t *testing.T) {
		s := &supervisor{version: 2}
		c := open(t, s)
		for i, want := range []string{short + ", profile, " + short, short, short} {
			r := request("mkdir")
			if err := c.Create(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			if got := s.take(); got != want {
				t.Errorf("create %d: %s", i, got)
			}
			if r.Spec.Linux.Seccomp == nil {
				t.Error("the caller's spec was changed")
			}
		}
		if err := c.Create(t.Context(), request("rmdir")); err != nil {
			t.Fatal(err)
		}
		if got := s.take(); got != short+", profile, "+short {
			t.Errorf("another profile: %s", got)
		}
		clear(s.profiles) // as after a restart
		if err := c.Create(t.Context(), request("mkdir")); err != nil {
			t.Fatal(err)
		}
		if got := s.take(); got != short+", profile, "+short {
			t.Errorf("after the supervisor forgot: %s", got)
		}
		for _, spec := range []*specs.Spec{{Hostname: "h"}, {Hostname: "h", Linux: &specs.Linux{}}} {
			if err := c.Create(t.Context(), wire.Create{ID: "c", Spec: spec}); err != nil {
				t.Fatal(err)
			}
			if got := s.take(); got != "create inline=false" {
				t.Errorf("without a profile: %s", got)
			}
		}
		s.fail = fmt.Errorf("mounts.x: descriptor: %w", errdefs.ErrNotFound)
		if err := c.Create(t.Context(), request("mkdir")); !errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, wire.ErrUnknownProfile) || s.take() != short {
			t.Errorf("another error: %v", err)
		}
		s.fail = nil
		large := request("mkdir")
		large.Spec.Linux.Seccomp.ListenerMetadata = strings.Repeat("m", wire.MaxProfile)
		if err := c.Create(t.Context(), large); err != nil || s.take() != inline {
			t.Errorf("a large profile: %v", err)
		}
	})
	t.Run("old", func(t *testing.T) {
		s := &supervisor{version: 1}
		c := open(t, s)
		for range 2 {
			if err := c.Create(t.Context(), request("mkdir")); err != nil {
				t.Fatal(err)
			}
			if got := s.take(); got != inline {
				t.Errorf("%s", got)
			}
		}
	})
	t.Run("no room", func(t *testing.T) {
		s := &supervisor{version: 2, forget: true}
		c := open(t, s)
		if err := c.Create(t.Context(), request("mkdir")); err != nil {
			t.Fatal(err)
		}
		want := strings.Join([]string{short, profile, short, profile, short, profile, inline}, ", ")
		if got := s.take(); got != want {
			t.Errorf("%s", got)
		}
	})
}
