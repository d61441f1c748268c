// Package client connects to the stream URLs that Exec and Attach answer with.
// It speaks SPDY, because only there can the client end stdin and still read
// the output.
package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// Size is a terminal size in character cells.
type Size struct{ Width, Height uint16 }

// Streams are the caller's ends. The same ones must be set that the URL was
// asked for. Resize is read until it closes, with a terminal.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	TTY            bool
	Resize         <-chan Size
}

// Run connects to url, copies until the remote process has ended and all of its
// output has arrived, and returns its exit code. An error says that the streams
// or the command's start failed. A Stdin that blocks for ever keeps one
// goroutine reading it after Run returned.
func Run(ctx context.Context, url string, s Streams) (int, error) {
	conn, err := dial(ctx, url)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()

	errs, err := open(conn, remotecommand.StreamTypeError)
	if err != nil {
		return 0, err
	}
	_ = errs.Close() // nothing is sent on it
	var copies sync.WaitGroup
	if err := s.connect(ctx, conn, &copies); err != nil {
		return 0, err
	}
	copies.Wait()
	report, err := io.ReadAll(errs)
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if err != nil {
		return 0, fmt.Errorf("exit status: %w", err)
	}
	return parseStatus(report)
}

func dial(ctx context.Context, url string) (httpstream.Connection, error) {
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Add(httpstream.HeaderProtocolVersion, remotecommand.StreamProtocolV4Name)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("stream connection: %w", err)
	}
	conn, err := rt.NewConnection(resp)
	if err != nil {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("stream connection: %w", err)
	}
	if p := resp.Header.Get(httpstream.HeaderProtocolVersion); p != remotecommand.StreamProtocolV4Name {
		return nil, errors.Join(fmt.Errorf("stream connection: protocol %q, want %s", p, remotecommand.StreamProtocolV4Name), conn.Close())
	}
	return conn, nil
}

func open(conn httpstream.Connection, kind string) (httpstream.Stream, error) {
	s, err := conn.CreateStream(http.Header{remotecommand.StreamType: []string{kind}})
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", kind, err)
	}
	return s, nil
}

// connect opens the wanted streams; copies ends when all output has arrived.
func (s *Streams) connect(ctx context.Context, conn httpstream.Connection, copies *sync.WaitGroup) error {
	var stdin httpstream.Stream
	var err error
	if s.Stdin != nil {
		if stdin, err = open(conn, remotecommand.StreamTypeStdin); err != nil {
			return err
		}
	}
	for _, o := range []struct {
		kind string
		to   io.Writer
	}{{remotecommand.StreamTypeStdout, s.Stdout}, {remotecommand.StreamTypeStderr, s.Stderr}} {
		if o.to == nil {
			continue
		}
		from, err := open(conn, o.kind)
		if err != nil {
			return err
		}
		copies.Go(func() { _, _ = io.Copy(o.to, from) })
	}
	if s.TTY {
		resize, err := open(conn, remotecommand.StreamTypeResize)
		if err != nil {
			return err
		}
		go sendSizes(ctx, conn, resize, s.Resize)
	}
	if stdin != nil {
		go func() {
			// A failed copy means that the process has ended: its status tells.
			_, _ = io.Copy(stdin, s.Stdin)
			_ = stdin.Close() // the process reads the end of its input
		}()
	}
	return nil
}

// sendSizes ends with the connection.
func sendSizes(ctx context.Context, conn httpstream.Connection, to io.Writer, sizes <-chan Size) {
	enc := json.NewEncoder(to)
	for {
		select {
		case <-ctx.Done():
			return
		case <-conn.CloseChan():
			return
		case size, ok := <-sizes:
			if !ok || enc.Encode(size) != nil {
				return
			}
		}
	}
}

// parseStatus reads the Status document at the end of a session.
func parseStatus(b []byte) (int, error) {
	var st struct {
		Status, Message, Reason string
		Details                 struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if len(b) == 0 {
		return 0, errors.New("exit status: the connection ended without one")
	}
	if err := json.Unmarshal(b, &st); err != nil {
		return 0, fmt.Errorf("exit status: %w", err)
	}
	switch {
	case st.Status == "Success":
		return 0, nil
	case st.Reason == string(remotecommand.NonZeroExitCodeReason):
		for _, c := range st.Details.Causes {
			if c.Reason == string(remotecommand.ExitCodeCauseType) {
				return strconv.Atoi(c.Message)
			}
		}
	}
	return 0, errors.New(st.Message)
}
