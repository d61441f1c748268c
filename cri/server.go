package cri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/cri/streaming"
)

// maxMessage is the largest request taken and answer given, in bytes: kubelets
// receive no more than this. Larger requests get ResourceExhausted.
const maxMessage = 16 << 20

// Config is what a Server needs to know.
type Config struct {
	// StreamAddress is the TCP address that exec, attach and port-forward are
	// served on; "" means a free port on 127.0.0.1.
	StreamAddress string
	// StreamIdleTimeout closes a stream connection without traffic; 0 means 4 h.
	StreamIdleTimeout time.Duration
	// Observe is told of every finished request; it must not block. May be nil.
	Observe func(method string, code codes.Code, d time.Duration)
}

// Server serves CRI v1.
type Server struct {
	cfg     Config
	grpc    *grpc.Server
	streams *streaming.Server
}

type runtimeServer struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	engine  Engine
	node    Node
	streams *streaming.Server
}

type imageServer struct {
	runtimeapi.UnimplementedImageServiceServer
	images Images
	stats  Stats
}

// New makes a server over the engine, and opens the listener for streams.
func New(cfg Config, e Engine, i Images, n Node) (*Server, error) {
	if cfg.StreamAddress == "" {
		cfg.StreamAddress = "127.0.0.1:0"
	}
	streams, err := streaming.Open(streaming.Config{Address: cfg.StreamAddress, IdleTimeout: cfg.StreamIdleTimeout}, e)
	if err != nil {
		return nil, fmt.Errorf("stream server: %w", err)
	}
	s := &Server{cfg: cfg, streams: streams}
	s.grpc = grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.UnaryInterceptor(s.intercept),
		grpc.StreamInterceptor(s.interceptStream),
		// Several clients ping while idle; that must not cost them the connection.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		// Requests run on goroutines that stay: a fresh one grows its stack anew
		// for every request.
		grpc.NumStreamWorkers(streamWorkers),
		grpc.WaitForHandlers(true),
	)
	runtimeapi.RegisterRuntimeServiceServer(s.grpc, &runtimeServer{engine: e, node: n, streams: streams})
	runtimeapi.RegisterImageServiceServer(s.grpc, &imageServer{images: i, stats: e})
	return s, nil
}

// streamWorkers is how many requests find a warm goroutine; more are served on fresh ones.
const streamWorkers = 8

// Serve answers requests on l until Stop, and then returns nil. It closes l.
func (s *Server) Serve(l net.Listener) error {
	errs := make(chan error, 1)
	go func() { errs <- s.streams.Serve() }()
	err := s.grpc.Serve(l)
	if errors.Is(err, grpc.ErrServerStopped) {
		err = nil
	}
	return errors.Join(err, s.streams.Close(), <-errs)
}

// Close frees what New opened, of a server that was never served.
func (s *Server) Close() error { return s.streams.Close() }

// Stop takes no more requests and waits for the running ones until ctx ends;
// then it cuts them. Work that an engine operation does goes on detached.
func (s *Server) Stop(ctx context.Context) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.grpc.GracefulStop()
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.grpc.Stop()
		<-done
	}
}
