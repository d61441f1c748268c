package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// streams runs execs as real processes of the machine, each in a process group.
type streams struct {
	*link
	mu      sync.Mutex
	out     *os.File // the container's, of the last attach
	stdinR  *os.File // read end of the container's stdin
	closed  int      // CloseStdin calls
	resized []wire.Resize
}

func (s *streams) Exec(ctx context.Context, r wire.Exec, in, out, errOut *os.File) (int, *os.File, <-chan wire.Exit, error) {
	cmd := exec.Command(r.Process.Args[0], r.Process.Args[1:]...)
	cmd.Env = []string{"PATH=/usr/bin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if in != nil {
		cmd.Stdin = in
	}
	if out != nil {
		cmd.Stdout = out
	}
	if errOut != nil {
		cmd.Stderr = errOut
	}
	var console *os.File
	if r.Process.Terminal {
		master, end, err := openPTY()
		if err != nil {
			return 0, nil, nil, err
		}
		defer end.Close()
		console, cmd.Stdin, cmd.Stdout, cmd.Stderr = master, end, end, end
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	}
	exit := make(chan wire.Exit, 1)
	err := s.call(ctx, "exec", string(r.ID), func() error {
		f, err := s.find(r.ID)
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		f.execs[r.Exec] = cmd.Process.Pid
		return nil
	})
	if cmd.Process != nil {
		go func() {
			_ = cmd.Wait()
			st := cmd.ProcessState.Sys().(syscall.WaitStatus)
			code := st.ExitStatus()
			if st.Signaled() {
				code = 128 + int(st.Signal())
			}
			exit <- wire.Exit{ID: r.ID, Exec: r.Exec, Code: code}
		}()
	}
	if err != nil {
		return 0, nil, nil, err
	}
	return cmd.Process.Pid, console, exit, nil
}

func openPTY() (master, end *os.File, err error) {
	if master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		end, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
	}
	return master, end, err
}

func (s *streams) Resize(_ context.Context, r wire.Resize) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resized = append(s.resized, r)
	return nil
}

func (s *streams) Attach(_ context.Context, _ id.Container, out, _ *os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out = dupFile(out)
	return nil
}

func (s *streams) Stdin(context.Context, id.Container) (*os.File, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stdinR = os.NewFile(uintptr(p[0]), "stdin")
	return os.NewFile(uintptr(p[1]), "stdin"), nil
}

func (s *streams) CloseStdin(context.Context, id.Container) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed++
	return nil
}

// alive counts the processes of the group.
func alive(pg int) bool { return unix.Kill(-pg, 0) == nil }

func (w *world) group(c id.Container) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, pg := range w.containers[c].execs {
		return pg
	}
	return 0
}

func execKit(t *testing.T) (*kit, id.Container) {
	k := newKit(t)
	return k, k.running(k.pod("a"), "c")
}

func TestExecSync(t *testing.T) {
	k, c := execKit(t)
	ctx := context.Background()
	r := must(k.ExecSync(ctx, string(c), []string{"sh", "-c", "echo out; echo err >&2; exit 7"}, 0))(t)
	if string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" || r.ExitCode != 7 {
		t.Errorf("%q %q %d", r.Stdout, r.Stderr, r.ExitCode)
	}
	if _, err := k.ExecSync(ctx, string(c), nil, 0); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no command: %v", err)
	}
	if _, err := k.ExecSync(ctx, "nope", []string{"true"}, 0); !errdefs.IsNotFound(err) {
		t.Errorf("no container: %v", err)
	}
	stopped := k.ctr(k.pod("b"), "created")
	if _, err := k.ExecSync(ctx, string(stopped), []string{"true"}, 0); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a container that does not run: %v", err)
	}
}

func TestExecSyncCapsItsOutput(t *testing.T) {
	k, c := execKit(t)
	r := must(k.ExecSync(context.Background(), string(c), []string{"sh", "-c", "head -c 17000000 /dev/zero; echo end >&2"}, time.Minute))(t)
	if len(r.Stdout) != maxExecOutput || string(r.Stderr) != "end\n" || r.ExitCode != 0 {
		t.Errorf("%d bytes, stderr %q, code %d", len(r.Stdout), r.Stderr, r.ExitCode)
	}
}

func TestExecSyncTimeoutKillsAll(t *testing.T) {
	k, c := execKit(t)
	began := time.Now()
	_, err := k.ExecSync(context.Background(), string(c), []string{"sh", "-c", "sleep 60 & sleep 60"}, 200*time.Millisecond)
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 5*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	pg := k.w.group(c)
	until(t, "the group is dead", func() bool { return !alive(pg) })
}

func TestExecSyncCancelledCallerKills(t *testing.T) {
	k, c := execKit(t)
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := k.ExecSync(ctx, string(c), []string{"sleep", "60"}, 0); err == nil {
		t.Error("no error")
	}
	pg := k.w.group(c)
	until(t, "the process is dead", func() bool { return !alive(pg) })
}

// TestExecWhoseAnswerIsLost: the process started, the caller gave up before it knew.
func TestExecWhoseAnswerIsLost(t *testing.T) {
	k, c := execKit(t)
	k.w.set(func(op, _ string) error {
		if op == "exec!" {
			time.Sleep(300 * time.Millisecond)
			return context.DeadlineExceeded
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := k.ExecSync(ctx, string(c), []string{"sleep", "60"}, 0); err == nil {
		t.Error("no error")
	}
	pg := k.w.group(c)
	until(t, "the process is dead", func() bool { return !alive(pg) })
}

func TestExecSyncGrandchildHoldsThePipe(t *testing.T) {
	k, c := execKit(t)
	for name, script := range map[string]string{
		"silent":     "sleep 20 & echo done",
		"chattering": "(while echo x; do :; done) & echo done",
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			r := must(k.ExecSync(context.Background(), string(c), []string{"sh", "-c", script}, time.Minute))(t)
			if d := time.Since(began); !bytes.Contains(r.Stdout, []byte("done\n")) || d > 5*time.Second {
				t.Errorf("%d bytes after %v", len(r.Stdout), d)
			}
		})
	}
	k.w.mu.Lock()
	defer k.w.mu.Unlock()
	for _, pg := range k.w.containers[c].execs {
		_ = unix.Kill(-pg, unix.SIGKILL)
	}
}

// sink is a client's output stream that takes its time, or breaks.
type sink struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	delay time.Duration
	err   error
	ended bool
}

func (s *sink) Write(p []byte) (int, error) {
	time.Sleep(s.delay)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.err
	}
	return s.buf.Write(p)
}

func (s *sink) Close() error { s.mu.Lock(); s.ended = true; s.mu.Unlock(); return nil }

func (s *sink) String() string { s.mu.Lock(); defer s.mu.Unlock(); return s.buf.String() }

func TestExecStreams(t *testing.T) {
	k, c := execKit(t)
	out, errOut := &sink{}, &sink{}
	code := must(k.Exec(context.Background(), string(c), []string{"sh", "-c", "cat; echo bad >&2; exit 3"},
		StreamIO{Stdin: strings.NewReader("hello"), Stdout: out, Stderr: errOut}))(t)
	if code != 3 || out.String() != "hello" || errOut.String() != "bad\n" || !out.ended || !errOut.ended {
		t.Errorf("%d %q %q %v %v", code, out, errOut, out.ended, errOut.ended)
	}
	if code := must(k.Exec(context.Background(), string(c), []string{"true"}, StreamIO{}))(t); code != 0 {
		t.Errorf("no streams: %d", code)
	}
}

// TestExecSlowClientLosesNothing: the process is long gone when the client takes
// the last of its output.
func TestExecSlowClientLosesNothing(t *testing.T) {
	k, c := execKit(t)
	out := &sink{delay: 2 * drainAfterExit}
	must(k.Exec(context.Background(), string(c), []string{"head", "-c", "60000", "/dev/zero"}, StreamIO{Stdout: out}))(t)
	if n := len(out.String()); n != 60000 {
		t.Errorf("%d bytes of 60000", n)
	}
}

func TestExecGoneClientEndsTheProcess(t *testing.T) {
	k, c := execKit(t)
	done := make(chan int32, 1)
	go func() {
		code, _ := k.Exec(context.Background(), string(c), []string{"cat", "/dev/zero"}, StreamIO{Stdout: &sink{err: io.ErrClosedPipe}})
		done <- code
	}()
	select {
	case code := <-done:
		if code != 128+int32(unix.SIGPIPE) {
			t.Errorf("code %d", code)
		}
	case <-time.After(10 * time.Second):
		t.Error("the process waits for a reader that is gone")
		_ = unix.Kill(-k.w.group(c), unix.SIGKILL)
	}
}

// TestExecEndsWithItsContext also when a write to the client never returns.
func TestExecEndsWithItsContext(t *testing.T) {
	k, c := execKit(t)
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := k.Exec(ctx, string(c), []string{"cat", "/dev/zero"}, StreamIO{Stdout: &sink{delay: 3 * time.Second}})
	if err == nil || time.Since(began) > 2*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	pg := k.w.group(c)
	until(t, "the process is dead of SIGPIPE", func() bool { return !alive(pg) })
}

func TestExecTerminal(t *testing.T) {
	k, c := execKit(t)
	s := k.cfg.Streams.(*streams)
	r, w := io.Pipe()
	defer w.Close()
	sizes := make(chan TermSize, 2)
	sizes <- TermSize{}
	sizes <- TermSize{Width: 100, Height: 30}
	out := &sink{}
	go func() {
		until(t, "resized", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.resized) == 1 })
		_, _ = io.WriteString(w, "hi\n")
	}()
	code := must(k.Exec(context.Background(), string(c), []string{"sh", "-c", "read x; echo got $x; exit 4"},
		StreamIO{Stdin: r, Stdout: out, TTY: true, Resize: sizes}))(t)
	if code != 4 || !strings.Contains(out.String(), "got hi\r\n") {
		t.Errorf("%d, %q", code, out)
	}
	if got := s.resized[0]; got.Width != 100 || got.Height != 30 || got.Exec == "" {
		t.Errorf("%+v", got)
	}
}

func TestExecTerminalHangsUp(t *testing.T) {
	k, c := execKit(t)
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := k.Exec(ctx, string(c), []string{"sleep", "60"}, StreamIO{Stdout: &sink{}, TTY: true}); err == nil {
		t.Error("no error")
	}
	pg := k.w.group(c)
	until(t, "the process is dead of SIGHUP", func() bool { return !alive(pg) })
}

func attachKit(t *testing.T, cfg *ContainerConfig) (*kit, *streams, id.Container) {
	k := newKit(t)
	c := must(k.CreateContainer(context.Background(), string(k.pod("a")), cfg))(t)
	ok(t, k.StartContainer(context.Background(), string(c)))
	return k, k.cfg.Streams.(*streams), c
}

func TestAttach(t *testing.T) {
	cfg := ctrConfig("c")
	cfg.Stdin, cfg.StdinOnce = true, true
	k, s, c := attachKit(t, cfg)
	out := &sink{}
	done := make(chan error, 1)
	go func() {
		done <- k.Attach(context.Background(), string(c), StreamIO{Stdin: strings.NewReader("in"), Stdout: out})
	}()
	until(t, "attached", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.out != nil && s.stdinR != nil })
	if b := must(io.ReadAll(s.stdinR))(t); string(b) != "in" {
		t.Errorf("stdin %q", b)
	}
	s.stdinR.Close()
	_, _ = s.out.WriteString("hello")
	s.out.Close()
	ok(t, <-done)
	if out.String() != "hello" || !out.ended {
		t.Errorf("%q %v", out, out.ended)
	}
	until(t, "stdin_once closes stdin", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.closed == 1 })
}

func TestAttachGoneClient(t *testing.T) {
	k, s, c := attachKit(t, ctrConfig("c"))
	done := make(chan error, 1)
	go func() {
		done <- k.Attach(context.Background(), string(c), StreamIO{Stdout: &sink{err: io.ErrClosedPipe}})
	}()
	until(t, "attached", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.out != nil })
	_, _ = s.out.WriteString("hello")
	ok(t, <-done)
	if _, err := s.out.WriteString("more"); !errors.Is(err, unix.EPIPE) {
		t.Errorf("the supervisor's end is still open: %v", err)
	}
	s.out.Close()
}

func TestAttachEndsWithTheEngine(t *testing.T) {
	k, s, c := attachKit(t, ctrConfig("c"))
	done := make(chan error, 1)
	go func() { done <- k.Attach(context.Background(), string(c), StreamIO{Stdout: &sink{}}) }()
	until(t, "attached", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.out != nil })
	k.cancel()
	if err := <-done; err == nil {
		t.Error("no error")
	}
	s.out.Close()
}
