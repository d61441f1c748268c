package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func logsCommand(e *env) *cobra.Command {
	var follow bool
	var tail int
	cmd := &cobra.Command{
		Use:   "logs [-f] [--tail N] CONTAINER",
		Short: "Print a container's log",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := e.containers(cmd.Context())
			if err != nil {
				return err
			}
			o, err := find(args[0], all)
			if err != nil {
				return err
			}
			r, err := e.runtime().ContainerStatus(cmd.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: o.id})
			if err != nil {
				return err
			}
			if r.Status.LogPath == "" {
				return fmt.Errorf("container %s has no log: its pod or it was made without a log path", short(o.id))
			}
			l := &logReader{out: e.out, errOut: e.errOut, path: r.Status.LogPath}
			if follow {
				l.running = func(ctx context.Context) bool {
					r, err := e.runtime().ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: o.id})
					return err == nil && r.Status.State <= runtimeapi.ContainerState_CONTAINER_RUNNING
				}
			}
			return l.run(cmd.Context(), tail)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on while the container runs")
	cmd.Flags().IntVar(&tail, "tail", -1, "print the last N lines only; -1 is all")
	return cmd
}

// followInterval is how often a followed log is looked at.
const followInterval = 100 * time.Millisecond

// logReader prints a log file in CRI's format. running is nil when the log is
// not followed.
type logReader struct {
	out, errOut io.Writer
	path        string
	running     func(context.Context) bool
}

func (l *logReader) run(ctx context.Context, tail int) error {
	f, err := os.Open(l.path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("log %s is not there: the container was not started yet, or someone removed the file", l.path)
	}
	if err != nil {
		return err
	}
	defer func() { f.Close() }()
	if tail >= 0 {
		if err := seekTail(f, tail); err != nil {
			return err
		}
	}
	r := bufio.NewReaderSize(f, 64<<10)
	var rest []byte // of a record that is not complete yet
	for {
		// Asked before reading: what is written until the end is read after it.
		alive := l.running != nil && l.running(ctx)
		if rest, err = l.copy(r, rest); err != nil {
			return err
		}
		next, err := reopened(f, l.path)
		if err != nil {
			return err
		}
		switch {
		case next != nil: // rotated: the old file was read to its end
			f.Close()
			f = next
			r.Reset(f)
			rest = nil
		case !alive:
			return nil
		default:
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(followInterval):
			}
		}
	}
}

// copy prints all complete records and returns the begin of an incomplete one.
func (l *logReader) copy(r *bufio.Reader, rest []byte) ([]byte, error) {
	for {
		b, err := r.ReadSlice('\n')
		rest = append(rest, b...)
		switch {
		case err == nil:
			if err := l.record(rest); err != nil {
				return nil, err
			}
			rest = rest[:0]
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			return rest, nil
		default:
			return rest, err
		}
	}
}

// reopened returns the new file at path when it is another one than f.
func reopened(f *os.File, path string) (*os.File, error) {
	old, err := f.Stat()
	if err != nil {
		return nil, err
	}
	now, err := os.Stat(path)
	if err != nil || os.SameFile(old, now) {
		return nil, nil // renamed and not made anew yet, or the same
	}
	next, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return next, err
}

// record prints the content of one record: "<time> <stream> <tags> <content>\n".
// The newline is content with tag F, and only the record's end with tag P.
func (l *logReader) record(b []byte) error {
	stream, partial, content, ok := parseRecord(b)
	if !ok {
		return fmt.Errorf("%s: %q is not a record of the CRI log format", l.path, b)
	}
	to := l.out
	if stream == "stderr" {
		to = l.errOut
	}
	if partial {
		content = content[:len(content)-1]
	}
	_, err := to.Write(content)
	return err
}

// parseRecord splits a record; content ends with the record's newline.
func parseRecord(b []byte) (stream string, partial bool, content []byte, ok bool) {
	p := bytes.SplitN(b, []byte{' '}, 4)
	if len(p) != 4 || len(p[3]) == 0 || p[3][len(p[3])-1] != '\n' {
		return "", false, nil, false
	}
	tag, _, _ := bytes.Cut(p[2], []byte{':'})
	stream = string(p[1])
	if stream != "stdout" && stream != "stderr" || len(tag) != 1 || tag[0] != 'P' && tag[0] != 'F' {
		return "", false, nil, false
	}
	return stream, tag[0] == 'P', p[3], true
}

// seekTail moves f to the begin of its n-th last line. A line may be several
// partial records.
func seekTail(f *os.File, n int) error {
	var starts []int64 // of the last n lines, a ring once it is full
	lines := 0
	r := bufio.NewReaderSize(f, 64<<10)
	var at int64
	var record []byte
	begin := true
	for {
		b, err := r.ReadSlice('\n')
		record = append(record, b...)
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if begin && n > 0 {
			if len(starts) < n {
				starts = append(starts, at)
			} else {
				starts[lines%n] = at
			}
			lines++
		}
		_, partial, _, ok := parseRecord(record)
		begin = !ok || !partial
		at += int64(len(record))
		record = record[:0]
	}
	to := at
	switch {
	case len(starts) > 0 && lines > n:
		to = starts[lines%n]
	case len(starts) > 0:
		to = starts[0]
	}
	_, err := f.Seek(to, io.SeekStart)
	return err
}
