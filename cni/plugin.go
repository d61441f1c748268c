package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

const (
	maxOutput    = 1 << 20 // bytes of a plugin's output that are read
	shownOutput  = 1 << 10 // bytes of it shown in an error
	maxProcesses = 32      // plugin processes at a time
)

// PluginError says which plugin did not do its work, and why.
type PluginError struct {
	Plugin string // program name
	Verb   string // ADD, DEL, STATUS, GC, ...
	Code   uint   // the plugin's own error code; 0 if it gave none
	Reason string // the plugin's message, or the first 1 kB of its output
	Err    error  // how the process ended
}

// Error implements error.
func (e *PluginError) Error() string {
	s := fmt.Sprintf("cni plugin %s %s: %v", e.Plugin, e.Verb, e.Err)
	if e.Code != 0 {
		s += fmt.Sprintf(" (code %d)", e.Code)
	}
	if e.Reason != "" {
		s += ": " + e.Reason
	}
	return s
}

// Unwrap returns how the process ended.
func (e *PluginError) Unwrap() error { return e.Err }

// pluginExec runs plugins for libcni: each in a process group of its own, which
// is killed as a whole at the deadline, and not too many at once.
type pluginExec struct {
	version.PluginDecoder
	slots chan struct{}
}

var _ invoke.Exec = (*pluginExec)(nil)

func newPluginExec() *pluginExec { return &pluginExec{slots: make(chan struct{}, maxProcesses)} }

// FindInPath implements invoke.Exec.
func (e *pluginExec) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

// ExecPlugin implements invoke.Exec.
func (e *pluginExec) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	fail := &PluginError{Plugin: filepath.Base(path), Verb: verbOf(environ)}
	select {
	case e.slots <- struct{}{}:
		defer func() { <-e.slots }()
	case <-ctx.Done():
		fail.Err = fmt.Errorf("waited for %d other plugin processes: %w", maxProcesses, context.Cause(ctx))
		return nil, fail
	}
	out, diag, err := run(ctx, path, stdin, environ)
	switch {
	case ctx.Err() != nil && err != nil:
		fail.Err, fail.Reason = fmt.Errorf("killed: %w", context.Cause(ctx)), clip(out, diag)
	case errors.Is(err, errTooMuch):
		fail.Err, fail.Reason = err, clip(out, diag)
	case err != nil:
		fail.Err, fail.Reason = err, clip(out, diag)
		fail.take(out)
	case fail.Verb == "ADD":
		if fail.Err = checkResult(out); fail.Err == nil {
			return out, nil
		}
		fail.Reason = clip(out, diag)
		fail.take(out)
	default:
		return out, nil
	}
	return nil, fail
}

// take takes over the error that a plugin printed, if it is one.
func (e *PluginError) take(out []byte) {
	var said types.Error
	if json.Unmarshal(out, &said) == nil && said.Msg != "" {
		e.Code, e.Reason = said.Code, clip([]byte(said.Msg+" "+said.Details), nil)
	}
}

// checkResult says what is wrong with what a plugin printed after an ADD that it
// calls a success.
func checkResult(out []byte) error {
	var o map[string]json.RawMessage
	if json.Unmarshal(out, &o) != nil || o == nil {
		return errors.New("result is not a JSON object")
	}
	if o["code"] != nil && o["msg"] != nil { // some end with 0 all the same
		return errors.New("result is an error")
	}
	_, err := create.CreateFromBytes(out)
	return err
}

func verbOf(environ []string) string {
	i := slices.IndexFunc(environ, func(s string) bool { return strings.HasPrefix(s, "CNI_COMMAND=") })
	if i < 0 {
		return ""
	}
	return environ[i][len("CNI_COMMAND="):]
}

// run runs one plugin process to its end, or to ours: the next daemon asks for DEL,
// and an ADD that goes on behind it would leave behind what it makes.
func run(ctx context.Context, path string, stdin []byte, environ []string) (stdout, stderr []byte, err error) {
	// The kernel takes the end of the thread that forked for the end of the parent.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for range 5 {
		var out, diag capped
		c := exec.CommandContext(ctx, path)
		c.Env, c.Stdin, c.Stdout, c.Stderr = environ, bytes.NewReader(stdin), &out, &diag
		c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
		c.Cancel = func() error { return unix.Kill(-c.Process.Pid, unix.SIGKILL) }
		// A grandchild that left the group may hold the pipes open.
		c.WaitDelay = time.Second
		err = c.Run()
		if err == nil && out.over {
			err = errTooMuch
		}
		stdout, stderr = out.b, diag.b
		if !errors.Is(err, unix.ETXTBSY) {
			break
		}
		time.Sleep(50 * time.Millisecond) // the plugin is just being installed
	}
	return stdout, stderr, err
}

var errTooMuch = fmt.Errorf("output is larger than %d bytes", maxOutput)

// capped keeps the first maxOutput bytes written to it.
type capped struct {
	b    []byte
	over bool
}

func (c *capped) Write(p []byte) (int, error) {
	n := min(len(p), maxOutput-len(c.b))
	c.b = append(c.b, p[:n]...)
	c.over = c.over || n < len(p)
	return len(p), nil
}

// clip makes what a plugin printed fit for an error text.
func clip(stdout, stderr []byte) string {
	text := bytes.TrimSpace(stdout)
	if d := bytes.TrimSpace(stderr); len(d) > 0 {
		text = append(append(bytes.Clone(text), ' '), d...)
	}
	text = text[:min(len(text), shownOutput)]
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(string(text), "?")))
}
