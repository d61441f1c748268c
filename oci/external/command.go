package external

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

const (
	maxOutput  = 64 << 10               // bytes kept of what a command writes
	maxMessage = 2 << 10                // bytes of it in an error
	lastOutput = 200 * time.Millisecond // for output after the command's end
)

// environment is all that a runtime gets of ours (invariant I17): runtimes look
// up tools of the system by name.
var environment = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}

// call is one run of the runtime's command line.
type call struct {
	verb string
	args []string
	// stdio are the container's streams, which the command hands on. With them
	// nothing is captured: who inherits it would keep the pipe open.
	stdio *oci.Stdio
}

// run runs a command in the mount namespace ns (nil is ours) with the bundle as
// its working directory and returns what it wrote to stdout.
func (r *Runtime) run(ctx context.Context, ns *os.File, bundle string, c call) ([]byte, error) {
	done := r.cfg.Forking()
	defer done()
	out, err := r.execute(ctx, ns, bundle, c)
	if err != nil {
		return nil, fmt.Errorf("handler %q: %s %s: %w", r.cfg.Handler, r.cfg.Command.Path, c.verb, err)
	}
	return out, nil
}

func (r *Runtime) execute(ctx context.Context, ns *os.File, bundle string, c call) (_ []byte, err error) {
	log := filepath.Join(bundle, "log-"+strconv.FormatUint(r.serial.Add(1), 10))
	defer os.Remove(log)
	args := append([]string{}, r.cfg.Command.Args...)
	args = append(args, "--root", r.stateDir(), "--log", log, "--log-format", "json", c.verb)
	cmd := exec.Command(r.cfg.Command.Path, append(args, c.args...)...)
	cmd.Env, cmd.Dir = environment, bundle
	// A process group, so that a hung command is killed with what it started.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var outputs [2]*capture
	if c.stdio != nil {
		// A nil *os.File in an interface would not be nil.
		if c.stdio.In != nil {
			cmd.Stdin = c.stdio.In
		}
		if c.stdio.Out != nil {
			cmd.Stdout = c.stdio.Out
		}
		if c.stdio.Err != nil {
			cmd.Stderr = c.stdio.Err
		}
		cmd.ExtraFiles = c.stdio.Extra
	} else {
		for i, to := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
			if outputs[i], err = newCapture(); err != nil {
				return nil, err
			}
			defer outputs[i].close()
			*to = outputs[i].w
		}
	}
	if err := startIn(ns, cmd); err != nil {
		return nil, err
	}
	ended := r.wait(ctx, cmd)
	var stdout, stderr []byte
	if c.stdio == nil {
		stdout, stderr = outputs[0].end(), outputs[1].end()
	}
	if ended == nil {
		return stdout, nil
	}
	if errors.Is(ended, errdefs.ErrUnavailable) || errors.Is(ended, context.Canceled) {
		return nil, ended
	}
	text := lastError(log)
	if text == "" {
		text = strings.TrimSpace(string(stderr))
	}
	if text == "" {
		text = ended.Error()
	}
	if len(text) > maxMessage {
		text = text[:maxMessage] + "..."
	}
	return nil, &commandError{text}
}

// startIn starts cmd in the mount namespace ns.
func startIn(ns *os.File, cmd *exec.Cmd) error {
	if ns == nil {
		return cmd.Start()
	}
	return kernel.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare CLONE_FS: %w", err)
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter the bundle's mount namespace: %w", err)
		}
		return cmd.Start()
	})
}

// wait waits for the end of cmd, and kills it when its time is over.
func (r *Runtime) wait(ctx context.Context, cmd *exec.Cmd) error {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Command.Timeout)
	defer cancel()
	var mu sync.Mutex
	reaped, killed := false, false
	stop := context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		if !reaped { // its number, and its group's, are still its own
			killed = true
			_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		}
	})
	defer stop()
	for unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	mu.Lock()
	reaped = true
	mu.Unlock()
	err := cmd.Wait()
	switch {
	case killed && errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("did not end within %s and was killed: %w", r.cfg.Command.Timeout, errdefs.ErrUnavailable)
	case killed:
		return ctx.Err()
	}
	return err
}

// commandError is what a runtime said when it failed.
type commandError struct{ text string }

func (e *commandError) Error() string { return e.text }

// Unwrap tells the kinds apart that users act on: a program that is not there, or
// not executable. Runtimes say it in words only.
func (e *commandError) Unwrap() error {
	t := strings.ToLower(e.text)
	if !strings.Contains(t, "exec") { // `exec: "x"`, "executable file"
		return errdefs.ErrUnknown
	}
	switch {
	case strings.Contains(t, "not found"), strings.Contains(t, "no such file or directory"):
		return errdefs.ErrNotFound
	case strings.Contains(t, "permission denied"), strings.Contains(t, "is a directory"), strings.Contains(t, "not executable"):
		return errdefs.ErrPermissionDenied
	}
	return errdefs.ErrUnknown
}

// lastError is the message of the last error in a log of JSON lines.
func lastError(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > maxOutput {
		_, _ = f.Seek(-maxOutput, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, maxOutput))
	text := ""
	for line := range bytes.Lines(b) {
		var e struct{ Level, Msg string }
		if json.Unmarshal(line, &e) == nil && (e.Level == "error" || e.Level == "fatal") && e.Msg != "" {
			text = e.Msg
		}
	}
	return strings.TrimSpace(text)
}

// capture takes what a command writes: the first bytes are kept, the rest is
// read and dropped, so that the command does not block.
type capture struct {
	r, w *os.File
	buf  []byte
	done chan struct{}
}

func newCapture() (*capture, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	c := &capture{r: r, w: w, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		c.buf, _ = io.ReadAll(io.LimitReader(r, maxOutput))
		_, _ = io.Copy(io.Discard, r)
	}()
	return c, nil
}

// end returns the output. A child of the command that still has the pipe is not
// waited for.
func (c *capture) end() []byte {
	_ = c.w.Close()
	_ = c.r.SetReadDeadline(time.Now().Add(lastOutput))
	<-c.done
	return c.buf
}

func (c *capture) close() {
	_ = c.w.Close()
	_ = c.r.SetReadDeadline(time.Unix(1, 0))
	<-c.done
	_ = c.r.Close()
}
