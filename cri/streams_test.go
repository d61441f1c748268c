package cri

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/berth-runtime/berth/cri/streaming/client"
)

func execURL(t *testing.T, c testClient, r *runtimeapi.ExecRequest) string {
	t.Helper()
	r.ContainerId = mustStart(t, c, mustRun(t, c))
	resp, err := c.Exec(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(resp.Url, "http://127.0.0.1:") {
		t.Errorf("url %q is not absolute with the real port", resp.Url)
	}
	return resp.Url
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestSPDYExec(t *testing.T) {
	c := serve(t, newFake())
	t.Run("half-close", func(t *testing.T) {
		// The echo ends only when it reads the end of stdin, and its output must
		// arrive after that.
		url := execURL(t, c, &runtimeapi.ExecRequest{Cmd: []string{"cat"}, Stdin: true, Stdout: true})
		in := strings.Repeat("0123456789", 100_000)
		var out bytes.Buffer
		code, err := client.Run(bounded(t), url, client.Streams{Stdin: strings.NewReader(in), Stdout: &out})
		if err != nil || code != 0 || out.String() != in {
			t.Errorf("code %d, %v, %d bytes of %d", code, err, out.Len(), len(in))
		}
	})
	t.Run("exit code", func(t *testing.T) {
		url := execURL(t, c, &runtimeapi.ExecRequest{Cmd: []string{"exit7"}, Stdout: true, Stderr: true})
		var out, errOut bytes.Buffer
		code, err := client.Run(bounded(t), url, client.Streams{Stdout: &out, Stderr: &errOut})
		if err != nil || code != 7 || errOut.String() != "no" {
			t.Errorf("code %d, %v, stderr %q", code, err, errOut.String())
		}
	})
	t.Run("resize", func(t *testing.T) {
		url := execURL(t, c, &runtimeapi.ExecRequest{Cmd: []string{"size"}, Stdout: true, Tty: true})
		sizes := make(chan client.Size, 2)
		sizes <- client.Size{} // 0x0 is no size
		sizes <- client.Size{Width: 120, Height: 40}
		var out bytes.Buffer
		if _, err := client.Run(bounded(t), url, client.Streams{Stdout: &out, TTY: true, Resize: sizes}); err != nil || out.String() != "120x40" {
			t.Errorf("%v, size %q", err, out.String())
		}
	})
	t.Run("failed", func(t *testing.T) {
		url := execURL(t, c, &runtimeapi.ExecRequest{Cmd: []string{"broken"}, Stdout: true})
		if _, err := client.Run(bounded(t), url, client.Streams{Stdout: io.Discard}); err == nil || !strings.Contains(err.Error(), "supervisor is gone") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("token works once", func(t *testing.T) {
		url := execURL(t, c, &runtimeapi.ExecRequest{Cmd: []string{"exit7"}, Stderr: true})
		if _, err := client.Run(bounded(t), url, client.Streams{Stderr: io.Discard}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Run(bounded(t), url, client.Streams{Stderr: io.Discard}); err == nil {
			t.Error("a second use must fail")
		}
	})
}

func dialWS(t *testing.T, url, protocol string) *websocket.Conn {
	t.Helper()
	cfg, err := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), "http://localhost")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Protocol = []string{protocol}
	ws, err := cfg.DialContext(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	_ = ws.SetDeadline(time.Now().Add(10 * time.Second))
	t.Cleanup(func() { ws.Close() })
	return ws
}

// read collects what arrives on each channel until the server closes.
func readWS(ws *websocket.Conn) map[byte]string {
	got := map[byte]string{}
	for {
		var b []byte
		if err := websocket.Message.Receive(ws, &b); err != nil {
			return got
		}
		if len(b) > 0 {
			got[b[0]] += string(b[1:])
		}
	}
}

func TestWebSocketExec(t *testing.T) {
	c := serve(t, newFake())
	t.Run("only the wanted streams", func(t *testing.T) {
		url := execURL(t, c, &runtimeapi.ExecRequest{Cmd: []string{"streams"}, Stdout: true})
		got := readWS(dialWS(t, url, "v4.channel.k8s.io"))
		if got[1] != "false true false" || !strings.Contains(got[3], `"Success"`) {
			t.Errorf("got %q", got)
		}
	})
	t.Run("exit code", func(t *testing.T) {
		url := execURL(t, c, &runtimeapi.ExecRequest{Cmd: []string{"exit7"}, Stderr: true})
		got := readWS(dialWS(t, url, "v4.channel.k8s.io"))
		if got[2] != "no" || !strings.Contains(got[3], `"message":"7"`) {
			t.Errorf("got %q", got)
		}
	})
	t.Run("sizes without a terminal do not block", func(t *testing.T) {
		url := execURL(t, c, &runtimeapi.ExecRequest{Cmd: []string{"cat"}, Stdin: true, Stdout: true})
		ws := dialWS(t, url, "v4.channel.k8s.io")
		for range 3 {
			if err := websocket.Message.Send(ws, append([]byte{4}, `{"Width":1,"Height":1}`...)); err != nil {
				t.Fatal(err)
			}
		}
		if err := websocket.Message.Send(ws, append([]byte{0}, "hello"...)); err != nil {
			t.Fatal(err)
		}
		for got := ""; got != "hello"; {
			var b []byte
			if err := websocket.Message.Receive(ws, &b); err != nil {
				t.Fatal(err)
			}
			if len(b) > 1 && b[0] == 1 {
				got += string(b[1:])
			}
		}
	})
}

func TestPortForwardHalfClose(t *testing.T) {
	c := serve(t, newFake())
	pod := mustRun(t, c)
	r, err := c.PortForward(t.Context(), &runtimeapi.PortForwardRequest{PodSandboxId: pod, Port: []int32{80}})
	if err != nil {
		t.Fatal(err)
	}
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(bounded(t), http.MethodPost, r.Url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Add(httpstream.HeaderProtocolVersion, portforward.ProtocolV1Name)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := rt.NewConnection(resp)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	forward := func(port, request string) (data, errs httpstream.Stream) {
		h := http.Header{}
		h.Set(portforward.PortHeader, port)
		h.Set(portforward.PortForwardRequestIDHeader, request)
		h.Set(portforward.StreamType, portforward.StreamTypeError)
		errs, err := conn.CreateStream(h)
		if err != nil {
			t.Fatal(err)
		}
		_ = errs.Close()
		h.Set(portforward.StreamType, portforward.StreamTypeData)
		// The client may see the reset of a refused pair before the answer to its stream.
		data, err = conn.CreateStream(h)
		if err != nil && port != "1" {
			t.Fatal(err)
		}
		return data, errs
	}

	// One pair fails; the others on the connection go on.
	_, refused := forward("1", "0")
	if b, _ := io.ReadAll(refused); !strings.Contains(string(b), "connection refused") {
		t.Errorf("error stream says %q", b)
	}
	data, errs := forward("80", "1")
	if _, err := io.WriteString(data, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := data.Close(); err != nil { // our half only
		t.Fatal(err)
	}
	if b, err := io.ReadAll(data); string(b) != "HELLO" {
		t.Errorf("after the half-close got %q, %v", b, err)
	}
	if b, _ := io.ReadAll(errs); len(b) != 0 {
		t.Errorf("error stream says %q", b)
	}
}

// A session that waits for its client must not hold up the daemon's stop.
func TestStopEndsSessions(t *testing.T) {
	f := newFake()
	c := serve(t, f)
	url := execURL(t, c, &runtimeapi.ExecRequest{Cmd: []string{"size"}, Stdout: true, Tty: true})
	ended := make(chan error, 1)
	go func() {
		_, err := client.Run(context.Background(), url, client.Streams{Stdout: io.Discard, TTY: true, Resize: make(chan client.Size)})
		ended <- err
	}()
	f.started.Wait()
	c.stop()
	select {
	case <-ended:
	case <-time.After(3 * time.Second):
		t.Error("the session goes on")
	}
}
