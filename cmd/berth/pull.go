package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/internal/pullapi"
)

func pullCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "pull IMAGE",
		Short: "Pull an image",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			start := time.Now()
			bar := &progress{w: io.Discard, start: start}
			if f, ok := e.errOut.(*os.File); ok && term.IsTerminal(int(f.Fd())) && e.output == "table" {
				bar.w = f
				if w, _, err := term.GetSize(int(f.Fd())); err == nil {
					bar.width = w
				}
			}
			id, err := e.pull(cmd.Context(), args[0], bar)
			if err != nil {
				return fmt.Errorf("pull of %s: %s", args[0], plain(err))
			}
			took := time.Since(start)
			if done, err := e.print(struct {
				Image   string  `json:"image"`
				ID      string  `json:"id"`
				Seconds float64 `json:"seconds"`
			}{args[0], id, took.Seconds()}); done {
				return err
			}
			_, err = fmt.Fprintf(e.out, "%s  %s  %s\n", args[0], short(id), took.Round(time.Millisecond))
			return err
		},
	}
}

// pull prefers the daemon's pull socket, which shows progress; any other CRI
// runtime pulls without.
func (e *env) pull(ctx context.Context, ref string, bar *progress) (string, error) {
	defer bar.clear()
	id, err := pullapi.Pull(ctx, pullapi.SocketFor(e.socket), ref, bar.update)
	if !errors.Is(err, pullapi.ErrNoServer) {
		return id, err
	}
	r, err := e.images().PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return r.GetImageRef(), err
}

// progress draws one line for the whole pull.
type progress struct {
	w      io.Writer
	width  int
	start  time.Time
	layers map[string]pullapi.Message
}

func (p *progress) update(m pullapi.Message) {
	if p.layers == nil {
		p.layers = map[string]pullapi.Message{}
	}
	if m.Layer == "" {
		return
	}
	p.layers[m.Layer] = m
	line := p.line(time.Since(p.start))
	if p.width > 0 && len(line) >= p.width {
		line = line[:p.width-1]
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", line)
}

func (p *progress) clear() {
	if len(p.layers) > 0 {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}

// line is "[####------]  12.0 MiB of 48.0 MiB  2 of 5 layers  3s".
func (p *progress) line(took time.Duration) string {
	var done, total int64
	complete := 0
	for _, l := range p.layers {
		done += l.Done
		total += max(l.Total, l.Done)
		if l.Complete {
			complete++
		}
	}
	const cells = 30
	full := 0
	if total > 0 {
		full = int(done * cells / total)
	}
	return fmt.Sprintf("[%s%s]  %s of %s  %d of %d layers  %s", strings.Repeat("#", full), strings.Repeat("-", cells-full),
		size(uint64(done)), size(uint64(total)), complete, len(p.layers), took.Round(time.Second))
}
