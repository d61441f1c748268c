package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const lineSize = 100

// logs measures a container that prints as fast as it may: from its start until
// its exit is visible and every line is in the log file.
func (b *bench) logs(ctx context.Context) error {
	if b.o.logMiB <= 0 {
		return nil
	}
	lines := b.o.logMiB << 20 / lineSize
	s := b.result.series("logs")
	before, start := b.watched.cpu(), time.Now()
	p, err := b.up(ctx, "logs", func(call string, d time.Duration) {
		if call == "CreateContainer" {
			before, start = b.watched.cpu(), time.Now()
		}
	}, "/bin/print", fmt.Sprint(lines), fmt.Sprint(lineSize))
	if err != nil {
		return err
	}
	if err := b.exited(ctx, p); err != nil {
		return err
	}
	wall, used := time.Since(start), b.watched.cpu().since(before)
	file := filepath.Join(p.config.LogDirectory, "main.log")
	got, err := countLines(file)
	if err != nil {
		return err
	}
	// A runtime may say EXITED before its log is whole; the time then counts.
	for late := time.Now(); got < lines && time.Since(late) < 20*time.Second; {
		time.Sleep(20 * time.Millisecond)
		if got, err = countLines(file); err != nil {
			return err
		}
		wall, used = time.Since(start), b.watched.cpu().since(before)
	}
	if got != lines {
		return fmt.Errorf("log of %d lines has %d", lines, got)
	}
	mib := float64(lines) * lineSize / (1 << 20)
	s.value("lines of 100 bytes", "MiB/s", mib/wall.Seconds())
	if b.watched.given() {
		s.value("CPU of the runtime's processes", "s/GiB", used.self.Seconds()*1024/mib)
	}
	return b.down(ctx, p, nil)
}

// exited waits until the container's exit with status 0 is visible.
func (b *bench) exited(ctx context.Context, p *pod) error {
	ctx, cancel := context.WithTimeout(ctx, b.o.timeout)
	defer cancel()
	for {
		r, err := b.runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: p.container})
		if err != nil {
			return err
		}
		if r.Status.State == cri.ContainerState_CONTAINER_EXITED {
			if r.Status.ExitCode != 0 {
				return fmt.Errorf("container exit status %d: %s", r.Status.ExitCode, r.Status.Message)
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("container still %v: %w", r.Status.State, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func countLines(file string) (int, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n, buf := 0, make([]byte, 1<<20)
	for {
		c, err := f.Read(buf)
		n += bytes.Count(buf[:c], []byte{'\n'})
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return 0, err
		}
	}
}
