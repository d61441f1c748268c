package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/cri/streaming/client"
)

func execCommand(e *env) *cobra.Command {
	var stdin, tty bool
	cmd := &cobra.Command{
		Use:   "exec [-i] [-t] CONTAINER COMMAND [ARG...]",
		Short: "Run a command in a container",
		Long:  "Run a command in a running container and exit with its exit code. CONTAINER is an id, a unique prefix of one, or [[NAMESPACE/]POD/]NAME.",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := e.containers(cmd.Context())
			if err != nil {
				return err
			}
			o, err := find(args[0], all)
			if err != nil {
				return err
			}
			run := e.execSync
			if stdin || tty {
				run = func(ctx context.Context, id string, argv []string) (int, error) {
					return e.execStreams(ctx, id, argv, stdin, tty, cmd.InOrStdin())
				}
			}
			code, err := run(cmd.Context(), o.id, args[1:])
			if err == nil && code != 0 {
				return exitCode(code)
			}
			return err
		},
	}
	cmd.Flags().SetInterspersed(false) // what follows the container belongs to the command
	cmd.Flags().BoolVarP(&stdin, "stdin", "i", false, "connect standard input")
	cmd.Flags().BoolVarP(&tty, "tty", "t", false, "give the command a terminal")
	return cmd
}

// execSync runs without streams: one request, output at the end.
func (e *env) execSync(ctx context.Context, id string, argv []string) (int, error) {
	r, err := e.runtime().ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: argv})
	if err != nil {
		return 0, err
	}
	_, err = e.out.Write(r.Stdout)
	_, err2 := e.errOut.Write(r.Stderr)
	return int(r.ExitCode), errors.Join(err, err2)
}

func (e *env) execStreams(ctx context.Context, id string, argv []string, stdin, tty bool, in io.Reader) (int, error) {
	r, err := e.runtime().Exec(ctx, &runtimeapi.ExecRequest{ContainerId: id, Cmd: argv, Stdin: stdin, Stdout: true, Stderr: !tty, Tty: tty})
	if err != nil {
		return 0, err
	}
	s := client.Streams{Stdout: e.out, TTY: tty}
	if stdin {
		s.Stdin = in
	}
	if !tty {
		s.Stderr = e.errOut
		return client.Run(ctx, r.Url, s)
	}
	fd := int(os.Stdin.Fd())
	if !term.IsTerminal(fd) {
		return client.Run(ctx, r.Url, s)
	}
	if stdin {
		old, err := term.MakeRaw(fd)
		if err != nil {
			return 0, fmt.Errorf("terminal: %w", err)
		}
		defer func() { _ = term.Restore(fd, old) }()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.Resize = sizes(ctx, fd)
	return client.Run(ctx, r.Url, s)
}

// sizes sends the terminal's size now and after each change, until ctx ends.
func sizes(ctx context.Context, fd int) <-chan client.Size {
	out := make(chan client.Size)
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, unix.SIGWINCH)
	go func() {
		defer signal.Stop(changed)
		for {
			if w, h, err := term.GetSize(fd); err == nil {
				select {
				case out <- client.Size{Width: uint16(w), Height: uint16(h)}:
				case <-ctx.Done():
					return
				}
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}
