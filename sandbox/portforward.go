package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/internal/kernel"
)

const dialTimeout = 10 * time.Second

// PortForward connects stream to a port on the pod's loopback, 127.0.0.1 first
// and then ::1. Each direction ends when its source does; it returns after both.
func (e *Engine) PortForward(ctx context.Context, ref string, port int32, stream io.ReadWriteCloser) error {
	if port < 1 || port > 65535 {
		return fmt.Errorf("port %d: is not between 1 and 65535: %w", port, errdefs.ErrInvalidArgument)
	}
	p, err := e.findPod(ref)
	if err != nil {
		return err
	}
	s := p.status.Load()
	if s == nil || s.State != PodReady {
		return fmt.Errorf("pod sandbox %s: is not ready: %w", id.Short(p.id), errdefs.ErrFailedPrecondition)
	}
	conn, err := e.dialPod(ctx, p, port)
	if err != nil {
		return fmt.Errorf("pod sandbox %s: port %d: %w", id.Short(p.id), port, err)
	}
	defer conn.Close()
	defer context.AfterFunc(e.ctx, func() { conn.Close() })()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	var in, out error
	var wg sync.WaitGroup
	wg.Go(func() {
		_, in = io.Copy(conn, stream)
		_ = conn.CloseWrite() // the server sees the end of the request and may still answer
	})
	_, out = io.Copy(stream, conn)
	if c, ok := stream.(interface{ CloseWrite() error }); ok {
		_ = c.CloseWrite()
	} else {
		// A stream of this kind closes its write side only; reading goes on.
		_ = stream.Close()
	}
	wg.Wait()
	if errors.Is(in, unix.EPIPE) || errors.Is(in, unix.ECONNRESET) {
		in = nil // the server has answered and takes no more: the client's business
	}
	return errors.Join(in, out)
}

// dialPod dials from inside the pod's network namespace. The socket belongs to
// the namespace that it was made in, so only the dialling has to happen there;
// both addresses are literals, which the dialer connects to on its own thread.
func (e *Engine) dialPod(ctx context.Context, p *pod, port int32) (*net.TCPConn, error) {
	var conn net.Conn
	dial := func() error {
		var errs []error
		for _, host := range []string{"127.0.0.1", "::1"} {
			d := net.Dialer{Timeout: dialTimeout}
			c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
			if err == nil {
				conn = c
				return nil
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
	if p.record().Config.Namespaces.Network == NamespaceNode {
		if err := dial(); err != nil {
			return nil, err
		}
		return conn.(*net.TCPConn), nil
	}
	ns, err := p.dup("net")
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if err := kernel.In(kernel.NetNS, ns, dial); err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}
