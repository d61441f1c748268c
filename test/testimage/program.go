// Package testimage makes container images out of nothing but the Go toolchain,
// and serves them from a registry on loopback: what the benchmark, the demo and
// the end-to-end tests pull and run.
//
// The program in the images is package prog; everything else of an image (layers,
// compressions, config, trees of many files) is built from values by Layer, Image
// and Tree, so that a test states the image that it needs.
package testimage

import (
	"context"
	"embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

const builtProgram = "BERTH_TESTIMAGE_PROG"

//go:embed prog/*.go
var source embed.FS

// BuildProgram builds the test program for goarch ("" is the machine's own) as a
// static binary with the go command of $PATH, and returns its bytes. It needs
// neither the network nor this module's source: the program's own source is in
// the calling binary. Where $BERTH_TESTIMAGE_PROG is set it names a file that
// holds the program already built for the machine's own architecture: machines
// without Go, such as the virtual machine of `make test-vm`, use that.
func BuildProgram(ctx context.Context, goarch string) ([]byte, error) {
	if built := os.Getenv(builtProgram); built != "" && (goarch == "" || goarch == runtime.GOARCH) {
		return os.ReadFile(built)
	}
	dir, err := os.MkdirTemp("", "berth-testimage-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	files, err := source.ReadDir("prog")
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		if strings.HasSuffix(f.Name(), "_test.go") {
			continue
		}
		body, err := source.ReadFile("prog/" + f.Name())
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, f.Name()), body, 0o644); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module prog\n\ngo 1.24\n"), 0o644); err != nil {
		return nil, err
	}
	out := filepath.Join(dir, "out", "prog")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=", "GOWORK=off", "GOTOOLCHAIN=local")
	if goarch != "" {
		cmd.Env = append(cmd.Env, "GOARCH="+goarch)
	}
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("test program: go build: %w: %s", err, strings.TrimSpace(string(msg)))
	}
	return os.ReadFile(out)
}
