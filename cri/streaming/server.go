// Package streaming serves the byte streams of exec, attach and port-forward
// over SPDY and WebSocket (k8s.io/cri-streaming) on a TCP address of the node.
// A request becomes a URL with a random single-use token; kubelets and crictl
// connect to it.
package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	lib "k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/sandbox"
)

// Engine runs processes in containers and connects streams to them.
type Engine interface {
	Exec(ctx context.Context, container string, cmd []string, s sandbox.StreamIO) (exitCode int32, err error)
	Attach(ctx context.Context, container string, s sandbox.StreamIO) error
	PortForward(ctx context.Context, pod string, port int32, stream io.ReadWriteCloser) error
}

// Config is what a Server needs to know.
type Config struct {
	// Address is the TCP address to listen on; port 0 takes a free one.
	Address string
	// IdleTimeout closes a connection without traffic; 0 means 4 h.
	IdleTimeout time.Duration
}

// Server makes URLs for streams and serves them.
type Server struct {
	listener net.Listener
	lib      lib.Server
	http     *http.Server
	adapter  *adapter
}

// Open listens; Serve must follow.
func Open(cfg Config, e Engine) (*Server, error) {
	l, err := net.Listen("tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("stream address %s: %w", cfg.Address, err)
	}
	c := lib.DefaultConfig
	if cfg.IdleTimeout > 0 {
		c.StreamIdleTimeout = cfg.IdleTimeout
	}
	c.Addr = l.Addr().String()
	c.BaseURL = &url.URL{Scheme: "http", Host: c.Addr}
	a := &adapter{engine: e}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	s, err := lib.NewServer(c, a)
	if err != nil {
		a.cancel()
		return nil, errors.Join(err, l.Close())
	}
	return &Server{
		listener: l,
		lib:      s,
		http:     &http.Server{Handler: s, ReadHeaderTimeout: time.Minute},
		adapter:  a,
	}, nil
}

// Address is the address that the server listens on.
func (s *Server) Address() string { return s.listener.Addr().String() }

// Serve serves streams until Close, and then returns nil.
func (s *Server) Serve() error {
	if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// drainTimeout bounds how long Close waits for sessions.
const drainTimeout = 5 * time.Second

// Close ends the listener, tells the running sessions to end and waits for them.
func (s *Server) Close() error {
	err := s.http.Close()
	if !s.adapter.close(drainTimeout) {
		err = errors.Join(err, fmt.Errorf("stream sessions still run %s after they were told to end", drainTimeout))
	}
	// Only once Serve ran is the listener the HTTP server's.
	if e := s.listener.Close(); e != nil && !errors.Is(e, net.ErrClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// Exec makes the URL for a command. The request was validated by the caller.
func (s *Server) Exec(c id.Container, r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	return s.lib.GetExec(&runtimeapi.ExecRequest{
		ContainerId: session{c, r.Stdin, r.Stdout, r.Stderr}.key(),
		Cmd:         r.Cmd, Tty: r.Tty, Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr,
	})
}

// Attach makes the URL for a container's own streams.
func (s *Server) Attach(c id.Container, r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	return s.lib.GetAttach(&runtimeapi.AttachRequest{
		ContainerId: session{c, r.Stdin, r.Stdout, r.Stderr}.key(),
		Tty:         r.Tty, Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr,
	})
}

// PortForward makes the URL for connections to ports of a pod.
func (s *Server) PortForward(p id.Pod, r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	return s.lib.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: string(p), Port: r.Port})
}

// session is what a token stands for. The library hands back the container id
// alone, and over WebSocket it makes streams that were not asked for too, so the
// wanted ones travel with the id.
type session struct {
	container             id.Container
	stdin, stdout, stderr bool
}

func (s session) key() string {
	flags := [3]byte{'-', '-', '-'}
	for i, on := range []bool{s.stdin, s.stdout, s.stderr} {
		if on {
			flags[i] = "ioe"[i]
		}
	}
	return string(flags[:]) + string(s.container)
}

func parseKey(k string) session {
	return session{id.Container(k[3:]), k[0] == 'i', k[1] == 'o', k[2] == 'e'}
}

// adapter is the engine in the library's words. It keeps count of the sessions:
// the HTTP server forgets connections that were hijacked.
type adapter struct {
	engine Engine
	ctx    context.Context // ends with the server: requests of hijacked connections never end by themselves
	cancel context.CancelFunc

	mu       sync.Mutex
	sessions sync.WaitGroup // added to under mu, and not once closed
	closed   bool
}

// begin makes a session's context, which ends with the request or the server.
// The session calls end when it returns.
func (a *adapter) begin(ctx context.Context) (_ context.Context, end func(), err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, nil, fmt.Errorf("the daemon is stopping: %w", errdefs.ErrUnavailable)
	}
	a.sessions.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(a.ctx, cancel)
	return ctx, func() { stop(); cancel(); a.sessions.Done() }, nil
}

// close ends all sessions and reports whether they did within timeout.
func (a *adapter) close(timeout time.Duration) bool {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.cancel()
	done := make(chan struct{})
	go func() {
		a.sessions.Wait()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-time.After(timeout):
		return false
	}
}

// exitError must itself be what the library looks for (k8s.io/utils/exec.ExitError):
// it does not unwrap.
type exitError int32

func (e exitError) Error() string   { return fmt.Sprintf("exit status %d", int32(e)) }
func (e exitError) String() string  { return e.Error() }
func (e exitError) Exited() bool    { return true }
func (e exitError) ExitStatus() int { return int(e) }

// Exec runs cmd with the session's streams.
func (a *adapter) Exec(ctx context.Context, key string, cmd []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	s := parseKey(key)
	ctx, end, err := a.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	code, err := a.engine.Exec(ctx, string(s.container), cmd, s.streams(ctx, in, out, errOut, tty, resize))
	if err == nil && code != 0 {
		return exitError(code)
	}
	return err
}

// Attach connects the session's streams to the container's process.
func (a *adapter) Attach(ctx context.Context, key string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	s := parseKey(key)
	ctx, end, err := a.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	return a.engine.Attach(ctx, string(s.container), s.streams(ctx, in, out, errOut, tty, resize))
}

// PortForward connects one stream to one port.
func (a *adapter) PortForward(ctx context.Context, pod string, port int32, stream io.ReadWriteCloser) error {
	ctx, end, err := a.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	return a.engine.PortForward(ctx, pod, port, stream)
}

// streams are the wanted streams as the engine takes them. Sizes are read until
// ctx ends also without a terminal: over WebSocket an unread one blocks the
// whole connection.
func (s session) streams(ctx context.Context, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) sandbox.StreamIO {
	io := sandbox.StreamIO{TTY: tty}
	if s.stdin {
		io.Stdin = in
	}
	if s.stdout {
		io.Stdout = out
	}
	if s.stderr {
		io.Stderr = errOut
	}
	if resize == nil {
		return io
	}
	sizes := make(chan sandbox.TermSize)
	if tty {
		io.Resize = sizes
	}
	go forwardSizes(ctx, resize, sizes, tty)
	return io
}

// forwardSizes ends with the session: ctx ends when its Exec or Attach returns.
func forwardSizes(ctx context.Context, from <-chan remotecommand.TerminalSize, to chan<- sandbox.TermSize, tty bool) {
	defer close(to)
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-from:
			if !ok {
				return
			}
			if !tty || size.Width == 0 || size.Height == 0 {
				continue
			}
			select {
			case to <- sandbox.TermSize{Width: size.Width, Height: size.Height}:
			case <-ctx.Done():
				return
			}
		}
	}
}
