package embedded

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

// hookOutput is how much of a failed hook's output goes into its error, in bytes.
const hookOutput = 4096

// checkHooks checks the hooks of all points.
func (p *plan) checkHooks() error {
	h := p.spec.Hooks
	if h == nil {
		return nil
	}
	for _, point := range []struct {
		name  string
		hooks []specs.Hook
	}{
		//lint:ignore SA1019 prestart is deprecated and still in use
		{"prestart", h.Prestart}, {"createRuntime", h.CreateRuntime}, {"createContainer", h.CreateContainer},
		{"startContainer", h.StartContainer}, {"poststart", h.Poststart}, {"poststop", h.Poststop},
	} {
		for i, k := range point.hooks {
			if !path.IsAbs(k.Path) {
				return invalid("hooks.%s[%d].path %q: want an absolute path", point.name, i, k.Path)
			}
			if k.Timeout != nil && *k.Timeout <= 0 {
				return invalid("hooks.%s[%d].timeout %d: want more than 0 seconds", point.name, i, *k.Timeout)
			}
			for _, v := range slices.Concat(k.Args, k.Env, []string{k.Path}) {
				if strings.ContainsRune(v, 0) {
					return invalid("hooks.%s[%d]: a string holds a NUL byte", point.name, i)
				}
			}
		}
	}
	if len(h.CreateContainer) > 0 && !p.ownMounts() {
		return invalid("hooks.createContainer: needs a mount namespace of its own; add {\"type\": \"mount\"} to linux.namespaces")
	}
	return nil
}

// earlyHooks are those that run before the container's root is its root.
func (p *plan) earlyHooks() []specs.Hook {
	if p.spec.Hooks == nil {
		return nil
	}
	//lint:ignore SA1019 prestart is deprecated and still in use
	return slices.Concat(p.spec.Hooks.Prestart, p.spec.Hooks.CreateRuntime)
}

// hostTree tells whether hooks of the spec look for the host's files in the
// container's mount namespace: it is built in a copy of the host's then, and the
// container's root becomes its root after them.
func (p *plan) hostTree() bool {
	return p.ownMounts() && (len(p.earlyHooks()) > 0 || p.spec.Hooks != nil && len(p.spec.Hooks.CreateContainer) > 0)
}

// hookState is what hooks read on stdin (runtime-spec, "State").
func (c *Container) hookState(status specs.ContainerState, pid int) []byte {
	b, _ := json.Marshal(specs.State{ // values of plain types
		Version: specs.Version, ID: string(c.id), Status: status, Pid: pid, Bundle: c.bundle, Annotations: c.plan.spec.Annotations,
	})
	return b
}

// runHooks runs hooks in order in the runtime's namespaces; the first that fails
// ends it.
func runHooks(ctx context.Context, point string, hooks []specs.Hook, state []byte, dir string) error {
	for i, h := range hooks {
		if err := runHook(ctx, h, state, dir); err != nil {
			return fmt.Errorf("hooks.%s[%d] %q: %w", point, i, h.Path, err)
		}
	}
	return nil
}

// hookTime bounds a hook by its timeout.
func hookTime(ctx context.Context, h specs.Hook) (context.Context, context.CancelFunc) {
	if h.Timeout == nil {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, time.Duration(*h.Timeout)*time.Second, fmt.Errorf("not done after its timeout of %d s", *h.Timeout))
}

func runHook(ctx context.Context, h specs.Hook, state []byte, dir string) error {
	ctx, cancel := hookTime(ctx, h)
	defer cancel()
	args := h.Args
	if len(args) == 0 {
		args = []string{h.Path}
	}
	env := h.Env
	if env == nil {
		env = []string{} // nil would be our own (invariant I10)
	}
	var out tail
	cmd := exec.CommandContext(ctx, h.Path)
	cmd.Args, cmd.Env, cmd.Dir = args, env, dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(state), &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second // for output that a daemonised grandchild holds open
	err := cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // the hook itself ended well
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return withOutput(err, &out)
}

func withOutput(err error, out *tail) error {
	if err == nil || len(out.b) == 0 {
		return err
	}
	return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out.b)))
}

// tail keeps the last bytes written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - hookOutput; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

// execHook appends the execve of a hook.
func (s *script) execHook(h specs.Hook) {
	args := h.Args
	if len(args) == 0 {
		args = []string{h.Path}
	}
	s.do("exec", unix.SYS_EXECVE, h.Path, s.strs(args), s.strs(h.Env))
}

// runInside runs hooks in the namespaces of the container's first process, each
// started by start with its stdio.
func (c *Container) runInside(ctx context.Context, point string, hooks []specs.Hook, state []byte, start func(h specs.Hook, in, out *os.File) (oci.Process, error)) error {
	for i, h := range hooks {
		if err := c.runInsideOne(ctx, h, state, start); err != nil {
			return fmt.Errorf("hooks.%s[%d] %q: %w", point, i, h.Path, err)
		}
	}
	return nil
}

func (c *Container) runInsideOne(ctx context.Context, h specs.Hook, state []byte, start func(h specs.Hook, in, out *os.File) (oci.Process, error)) error {
	ctx, cancel := hookTime(ctx, h)
	defer cancel()
	in, inW, err := os.Pipe()
	if err != nil {
		return err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return errors.Join(err, in.Close(), inW.Close())
	}
	defer outR.Close()
	proc, err := start(h, in, outW)
	if err := errors.Join(in.Close(), outW.Close()); err != nil {
		return err
	}
	if err != nil {
		// Its text alone: the failed call is not one of the container's own process.
		return errors.Join(errors.New(err.Error()), inW.Close())
	}
	go func() { // a hook that reads nothing gets EPIPE for us
		_, _ = inW.Write(state)
		inW.Close()
	}()
	var out tail
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(&out, outR)
	}()
	stop := context.AfterFunc(ctx, func() { _ = unix.PidfdSendSignal(int(proc.PidFD.Fd()), unix.SIGKILL, nil, 0) })
	ws, err := kernel.Reap(proc.Pid)
	stop()
	_ = outR.SetReadDeadline(time.Now().Add(time.Second)) // as WaitDelay above
	<-read
	err = errors.Join(err, proc.PidFD.Close())
	switch {
	case err != nil:
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case ws.Signaled():
		err = fmt.Errorf("signal: %s", ws.Signal())
	case ws.ExitStatus() != 0:
		err = fmt.Errorf("exit status %d", ws.ExitStatus())
	}
	return withOutput(err, &out)
}
