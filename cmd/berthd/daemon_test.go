package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/cri"
	"github.com/berth-runtime/berth/imageservice"
	"github.com/berth-runtime/berth/internal/config"
)

// usage answers what a daemon asks of its parts before it is ready.
type usage struct{}

func (usage) FsUsage() imageservice.FsUsage {
	return imageservice.FsUsage{Mountpoint: "/", At: time.Now()}
}
func (u usage) WritableUsage() imageservice.FsUsage { return u.FsUsage() }

type engine struct {
	cri.Engine
	usage
}

func (e engine) WritableUsage() imageservice.FsUsage { return e.usage.WritableUsage() }

type images struct {
	cri.Images
	usage
}

func (i images) FsUsage() imageservice.FsUsage { return i.usage.FsUsage() }

func testConfig(t *testing.T) *config.Config {
	t.Helper()
	dir := t.TempDir()
	c := config.Default()
	c.Root, c.State, c.Socket = filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "s")
	c.LogLevel = "error"
	return c
}

// start runs a daemon over n and waits until its socket answers.
func start(t *testing.T, cfg *config.Config, closed *bool) (stop func() error) {
	t.Helper()
	opened := func(context.Context, *config.Config, *metrics) (*parts, error) {
		return &parts{engine: engine{}, images: images{}, close: func() error { *closed = true; return nil }}, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx, cfg, opened) }()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if probe(ctx, cfg.Socket) == nil {
			break
		}
		select {
		case err := <-done:
			t.Fatalf("daemon ended: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("daemon does not answer")
		}
	}
	return func() error { cancel(); return <-done }
}

func TestLifeOfTheDaemon(t *testing.T) {
	cfg := testConfig(t)
	cfg.MetricsAddress = freePort(t)
	// A socket that a killed daemon left must not be in the way.
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: cfg.Socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	left.Close()

	notify := filepath.Join(t.TempDir(), "notify")
	sd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer sd.Close()
	t.Setenv("NOTIFY_SOCKET", notify)

	var closed bool
	stop := start(t, cfg, &closed)
	if st, err := os.Stat(cfg.Socket); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("socket %v, %v; want mode 0660", st, err)
	}
	buf := make([]byte, 100)
	_ = sd.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := sd.Read(buf); err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("service manager was told %q, %v", buf[:n], err)
	}
	resp, err := http.Get("http://" + cfg.MetricsAddress + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if !strings.Contains(string(body), `berth_cri_request_duration_seconds_count{code="OK",method="Version"}`) {
		t.Error("metrics have no request histogram")
	}

	// A second daemon on the same state, and one on the same socket.
	err = run(t.Context(), cfg, nil)
	if err == nil || !strings.Contains(err.Error(), "in use by another berthd") {
		t.Errorf("second daemon on the state directory: %v", err)
	}
	other := *cfg
	other.State = filepath.Join(t.TempDir(), "state")
	if err := run(t.Context(), &other, nil); err == nil || !strings.Contains(err.Error(), "root directory "+cfg.Root+" is in use") || !strings.Contains(err.Error(), "--root") {
		t.Errorf("second daemon on the root directory: %v", err)
	}
	other.Root = filepath.Join(t.TempDir(), "root")
	if err := run(t.Context(), &other, nil); err == nil || !strings.Contains(err.Error(), "another daemon answers") {
		t.Errorf("second daemon on the socket, before it starts anything: %v", err)
	}
	if _, err := listen(cfg.Socket); err == nil || !strings.Contains(err.Error(), "another daemon answers") {
		t.Errorf("second daemon on the socket: %v", err)
	}

	if err := stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	if !closed {
		t.Error("parts were not closed")
	}
	if n, err := sd.Read(buf); err != nil || string(buf[:n]) != "STOPPING=1" {
		t.Errorf("service manager was told %q, %v", buf[:n], err)
	}
	// And again on the same directories.
	if err := start(t, cfg, &closed)(); err != nil {
		t.Errorf("second life: %v", err)
	}
}

func TestSIGTERM(t *testing.T) {
	cfg := testConfig(t)
	var closed bool
	stop := start(t, cfg, &closed)
	if err := unix.Kill(os.Getpid(), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); probe(t.Context(), cfg.Socket) == nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("daemon answers 5 s after SIGTERM")
		}
	}
	if err := stop(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

func TestOpenErrorLeavesNothing(t *testing.T) {
	cfg := testConfig(t)
	want := errors.New("no overlay")
	err := run(t.Context(), cfg, func(context.Context, *config.Config, *metrics) (*parts, error) { return nil, want })
	if !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(cfg.Socket); err == nil {
		t.Error("socket is left")
	}
	f, err := lockDir("state", cfg.State)
	if err != nil {
		t.Fatalf("lock is left: %v", err)
	}
	f.Close()
}

func TestListenRefusesWhatIsNoSocket(t *testing.T) {
	p := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(p); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("got %v", err)
	}
}

func TestCommand(t *testing.T) {
	var out bytes.Buffer
	cmd := command()
	cmd.SetOut(&out)
	cmd.SetArgs([]string{"config", "--root", "/r", "--metrics-address", "127.0.0.1:9"})
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"root = '/r'", "# flag --root", "# flag --metrics-address", "# default"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
	cmd = command()
	cmd.SetArgs([]string{"config", "--config", "/nonexistent"})
	if err := cmd.Execute(); err == nil {
		t.Error("a named file that is missing must be an error")
	}
	// Operators script against these.
	for _, name := range []string{"config", "root", "state", "socket", "cni-conf-dir", "cni-bin-dir", "registry-config-dir", "log-level", "metrics-address"} {
		if cmd.PersistentFlags().Lookup(name) == nil {
			t.Errorf("flag --%s is missing", name)
		}
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
