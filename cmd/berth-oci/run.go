package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded"
)

// exitStatus carries the container's exit code to main.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// idForm is the grammar of container ids: safe as one path element.
var idForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_+.-]*$`)

func runCommand() *cobra.Command {
	bundle := "."
	c := &cobra.Command{
		Use:   "run ID",
		Short: "Run a container in the foreground and end with its exit code",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !idForm.MatchString(args[0]) || len(args[0]) > 1024 {
				return fmt.Errorf("id %q: want letters, digits and _+.-, not starting with a sign", args[0])
			}
			s, err := loadSpec(bundle)
			if err != nil {
				return err
			}
			if s.Linux != nil && s.Linux.CgroupsPath == "" {
				s.Linux.CgroupsPath = "/" + args[0] // removed whole at the end, as there is no parent of ours
			}
			return run(cmd.Context(), id.Container(args[0]), s)
		},
	}
	c.Flags().StringVarP(&bundle, "bundle", "b", ".", "directory of the bundle")
	return c
}

func loadSpec(bundle string) (*specs.Spec, error) {
	f, err := os.Open(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	defer f.Close()
	var s specs.Spec
	if err := json.NewDecoder(f).Decode(&s); err != nil {
		return nil, fmt.Errorf("config.json: %w", err)
	}
	if s.Root != nil && s.Root.Path != "" && !filepath.IsAbs(s.Root.Path) {
		if s.Root.Path, err = filepath.Abs(filepath.Join(bundle, s.Root.Path)); err != nil {
			return nil, err
		}
	}
	return &s, nil
}

// run creates, starts and waits. The returned error is exitStatus unless the
// container could not be run or removed.
func run(ctx context.Context, name id.Container, s *specs.Spec) (err error) {
	rt, err := embedded.New(embedded.Config{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rt.Close()) }()
	c, err := rt.Create(ctx, oci.CreateRequest{ID: name, Spec: s})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.KillAll(), c.Delete()) }()
	// Before the start, so that no signal is lost in between.
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	defer func() {
		signal.Stop(signals)
		close(signals)
	}()
	p, err := c.Start(ctx, oci.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
	if err != nil {
		return err
	}
	defer p.PidFD.Close()
	if p.Console != nil {
		release, err := connectTerminal(p.Console)
		if err != nil {
			return err
		}
		defer release()
	}
	go forward(signals, p)
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(p.Pid, &ws, 0, nil)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return fmt.Errorf("wait: %w", err)
		}
	}
	if ws.Signaled() {
		return exitStatus(128 + int(ws.Signal()))
	}
	if code := ws.ExitStatus(); code != 0 {
		return exitStatus(code)
	}
	return nil
}

// forward passes signals on to the container until the process ends.
func forward(signals <-chan os.Signal, p oci.Process) {
	for s := range signals {
		switch s {
		case unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE: // ours: the child's end, the Go scheduler's, our output's
		case unix.SIGWINCH:
			if p.Console != nil {
				resize(p.Console)
			}
		default:
			_ = unix.Kill(p.Pid, s.(unix.Signal)) // it may have ended
		}
	}
}

func resize(console *os.File) {
	if ws, err := unix.IoctlGetWinsize(int(os.Stdin.Fd()), unix.TIOCGWINSZ); err == nil {
		_ = unix.IoctlSetWinsize(int(console.Fd()), unix.TIOCSWINSZ, ws)
	}
}

// connectTerminal copies between our stdio and the container's terminal.
// release waits for the rest of the output.
func connectTerminal(console *os.File) (release func(), err error) {
	restore := func() {}
	if fd := int(os.Stdin.Fd()); term.IsTerminal(fd) {
		old, err := term.MakeRaw(fd)
		if err != nil {
			return nil, fmt.Errorf("terminal: %w", err)
		}
		restore = func() { _ = term.Restore(fd, old) }
		resize(console)
	}
	// The reader of stdin ends with the process: a read of it cannot be called off.
	go func() { _, _ = io.Copy(console, os.Stdin) }()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(os.Stdout, console) // ends with EIO when the last terminal holder is gone
	}()
	return func() {
		<-done
		restore()
		console.Close()
	}, nil
}
