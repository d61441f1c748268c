package client

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// A caller without a deadline does not wait for ever for a supervisor that does
// not come.
func TestWaitIsBounded(t *testing.T) {
	c := &Client{ctx: context.Background(), ready: make(chan struct{}), waitTime: 30 * time.Millisecond}
	done := make(chan error, 1)
	go func() {
		_, err := c.List(context.Background())
		done <- err
	}()
	select {
	case err := <-done:
		if !errors.Is(err, errdefs.ErrUnavailable) {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("waits for ever")
	}
}

// What waits for the end of a supervisor ends with the client, which the
// supervisor outlives.
func TestSpawnedIsReapedOrLeft(t *testing.T) {
	for name, script := range map[string]string{"ends": "exit 3", "lives on": "exec sleep 2"} {
		t.Run(name, func(t *testing.T) {
			binary := filepath.Join(t.TempDir(), "supervisor")
			if err := os.WriteFile(binary, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			c := &Client{cfg: Config{StateDir: t.TempDir(), Binary: binary}}
			c.ctx, c.cancel = context.WithCancel(context.Background())
			ended, err := c.spawn()
			if err != nil {
				t.Fatal(err)
			}
			if name == "ends" {
				select {
				case err := <-ended:
					if err == nil {
						t.Error("no reason for the end")
					}
				case <-time.After(5 * time.Second):
					t.Error("the end is not seen")
				}
			}
			c.cancel()
			begin := time.Now()
			c.done.Wait()
			if d := time.Since(begin); d > time.Second {
				t.Errorf("waited %v for a supervisor that lives on", d)
			}
		})
	}
}

func TestRawEnv(t *testing.T) {
	if got := rawEnv(&specs.Process{Env: []string{"A=ä"}}); got != nil {
		t.Errorf("UTF-8: %q", got)
	}
	got := rawEnv(&specs.Process{Env: []string{"A=b", "B=\xff"}})
	if len(got) != 2 || string(got[0]) != "A=b" || string(got[1]) != "B=\xff" {
		t.Errorf("%q", got)
	}
	if rawEnv(nil) != nil || rawEnv(&specs.Process{}) != nil {
		t.Error("no environment")
	}
}
