package conformance

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// spdyDial upgrades to SPDY at url, as kubectl through the kubelet does.
func spdyDial(t *testing.T, url, protocol string) httpstream.Connection {
	t.Helper()
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		t.Fatal(err)
	}
	q, err := http.NewRequest(http.MethodPost, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	q.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	r, err := rt.RoundTrip(q)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := rt.NewConnection(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func stream(t *testing.T, c httpstream.Connection, kind string, more ...string) httpstream.Stream {
	t.Helper()
	h := http.Header{"Streamtype": {kind}}
	for i := 0; i+1 < len(more); i += 2 {
		h.Set(more[i], more[i+1])
	}
	s, err := c.CreateStream(h)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// session is a remote command: its streams by name.
type session struct {
	conn                             httpstream.Connection
	errs, in, out, stderr, resizeOut httpstream.Stream
}

func open(t *testing.T, url string, stdin, stdout, stderr, tty bool) *session {
	t.Helper()
	s := &session{conn: spdyDial(t, url, "v4.channel.k8s.io")}
	s.errs = stream(t, s.conn, "error")
	if stdin {
		s.in = stream(t, s.conn, "stdin")
	}
	if stdout {
		s.out = stream(t, s.conn, "stdout")
	}
	if stderr {
		s.stderr = stream(t, s.conn, "stderr")
	}
	if tty {
		s.resizeOut = stream(t, s.conn, "resize")
	}
	return s
}

// exitCode reads the status that ends a session.
func (s *session) exitCode(t *testing.T) string {
	t.Helper()
	b, err := io.ReadAll(s.errs)
	if err != nil {
		t.Fatal(err)
	}
	var st struct {
		Status  string
		Message string
		Details struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if err := json.Unmarshal(b, &st); err != nil {
		t.Fatalf("status %q: %v", b, err)
	}
	if st.Status == "Success" {
		return "0"
	}
	for _, c := range st.Details.Causes {
		if c.Reason == "ExitCode" {
			return c.Message
		}
	}
	return st.Message
}

func execURL(t *testing.T, c string, q *cri.ExecRequest) string {
	t.Helper()
	q.ContainerId = c
	r, err := node.Runtime.Exec(ctx(t), q)
	if err != nil {
		t.Fatal(err)
	}
	return r.Url
}

func TestExecStreamsAndExitStatus(t *testing.T) {
	c := run(t, runPod(t, nil), "sleep", "1000")
	s := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/both", "to out", "to err"}, Stdout: true, Stderr: true}), false, true, true, false)
	out, _ := io.ReadAll(s.out)
	errOut, _ := io.ReadAll(s.stderr)
	if string(out) != "to out\n" || string(errOut) != "to err\n" {
		t.Errorf("out %q err %q", out, errOut)
	}
	if code := s.exitCode(t); code != "0" {
		t.Errorf("code %s", code)
	}
	s = open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/exit", "42"}, Stdout: true}), false, true, false, false)
	if code := s.exitCode(t); code != "42" {
		t.Errorf("code %s", code)
	}
}

func TestExecStdinHalfClose(t *testing.T) {
	c := run(t, runPod(t, nil), "sleep", "1000")
	s := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/cat"}, Stdin: true, Stdout: true}), true, true, false, false)
	want := make([]byte, 3<<20)
	_, _ = rand.Read(want)
	go func() {
		_, _ = s.in.Write(want)
		_ = s.in.Close() // half-close: cat ends and its output still comes
	}()
	got, err := io.ReadAll(s.out)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d of %d bytes came back, %v", len(got), len(want), err)
	}
	if code := s.exitCode(t); code != "0" {
		t.Errorf("code %s", code)
	}
}

func TestExecWithATerminalAndResize(t *testing.T) {
	c := run(t, runPod(t, nil), "sleep", "1000")
	s := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/prog", "tty", "wait"}, Stdin: true, Stdout: true, Tty: true}), true, true, false, true)
	if err := json.NewEncoder(s.resizeOut).Encode(map[string]int{"Width": 97, "Height": 31}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	if _, err := io.WriteString(s.in, "go\n"); err != nil {
		t.Fatal(err)
	}
	out, _ := io.ReadAll(s.out)
	if !strings.Contains(string(out), "97") || !strings.Contains(string(out), "31") {
		t.Errorf("terminal says %q", out)
	}
}

func TestAttachSeesOutputAndFeedsStdin(t *testing.T) {
	p := runPod(t, nil)
	c := started(t, p, func(c *cri.ContainerConfig) {
		c.Args, c.Stdin, c.StdinOnce = []string{"cat"}, true, true
	})
	r, err := node.Runtime.Attach(ctx(t), &cri.AttachRequest{ContainerId: c, Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, r.Url, true, true, false, false)
	if _, err := io.WriteString(s.in, "through attach\n"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, err := s.out.Read(buf)
	if err != nil || string(buf[:n]) != "through attach\n" {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	_ = s.in.Close() // stdin_once: cat sees the end and exits
	if st := waitExit(t, c); st.ExitCode != 0 {
		t.Errorf("code %d", st.ExitCode)
	}
	if l := logs(t, c); len(l) != 1 || l[0].content != "through attach" {
		t.Errorf("log %v", l)
	}
	_, err = node.Runtime.Attach(ctx(t), &cri.AttachRequest{ContainerId: c, Stdout: true})
	wantCode(t, err, codes.FailedPrecondition, "running")
}

func TestStreamRequestsAreValidated(t *testing.T) {
	c := run(t, runPod(t, nil), "sleep", "1000")
	for _, q := range []*cri.ExecRequest{
		{Cmd: []string{"true"}, Stdout: true, Stderr: true, Tty: true},
		{Cmd: []string{"true"}},
		{Stdout: true},
	} {
		q.ContainerId = c
		_, err := node.Runtime.Exec(ctx(t), q)
		wantCode(t, err, codes.InvalidArgument, "")
	}
}

func TestPortForwardHalfClosesBothWays(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "listen", "tcp", "127.0.0.1:7777")
	waitLog(t, c, "listening")
	r, err := node.Runtime.PortForward(ctx(t), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{7777}})
	if err != nil {
		t.Fatal(err)
	}
	conn := spdyDial(t, r.Url, "portforward.k8s.io")
	for i := range 3 {
		id := fmt.Sprint(i)
		errs := stream(t, conn, "error", "port", "7777", "requestID", id)
		data := stream(t, conn, "data", "port", "7777", "requestID", id)
		want := make([]byte, 2<<20)
		_, _ = rand.Read(want)
		go func() {
			_, _ = data.Write(want)
			_ = data.Close()
		}()
		got, err := io.ReadAll(data)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d of %d bytes, %v", len(got), len(want), err)
		}
		if msg, _ := io.ReadAll(errs); len(msg) > 0 {
			t.Fatalf("error stream: %s", msg)
		}
	}
	errs := stream(t, conn, "error", "port", "9", "requestID", "9")
	_ = stream(t, conn, "data", "port", "9", "requestID", "9")
	if msg, _ := io.ReadAll(errs); !strings.Contains(string(msg), "9") {
		t.Errorf("a closed port is not reported: %q", msg)
	}
}

func TestStreamingListensOnLoopbackOnly(t *testing.T) {
	c := run(t, runPod(t, nil), "sleep", "1000")
	u := execURL(t, c, &cri.ExecRequest{Cmd: []string{"true"}, Stdout: true})
	host, _, err := net.SplitHostPort(strings.Split(strings.TrimPrefix(u, "http://"), "/")[0])
	if err != nil || !net.ParseIP(host).IsLoopback() {
		t.Fatalf("%s", u)
	}
	r, err := http.Get(u[:strings.LastIndex(u, "/")+1] + "AAAAAAAA")
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode/100 == 2 {
		t.Errorf("a made-up token was accepted: %s", r.Status)
	}
}
