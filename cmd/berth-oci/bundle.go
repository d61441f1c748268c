package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const configFile = "config.json"

// maxConfig bounds what is read of a config.json, in bytes.
const maxConfig = 64 << 20

// bundle is a bundle's directory with its config, as it is and decoded.
type bundle struct {
	dir  string // absolute
	raw  []byte
	spec *specs.Spec
}

// openBundle enters the bundle's directory, since relative paths of the config
// and of --console-socket start there, and reads the config.
func openBundle(dir string) (*bundle, error) {
	if dir != "" {
		if err := os.Chdir(dir); err != nil {
			return nil, fmt.Errorf("--bundle: %w", err)
		}
	}
	wd, err := os.Getwd()
	if err != nil {
		return nil, fmt.Errorf("--bundle: %w", err)
	}
	b := &bundle{dir: wd}
	f, err := os.Open(configFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("JSON specification file %s not found in %s", configFile, wd)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if b.raw, err = readBounded(f); err != nil {
		return nil, fmt.Errorf("%s: %w", configFile, err)
	}
	if err := decode(b.raw, &b.spec); err != nil {
		return nil, fmt.Errorf("%s: %w", configFile, err)
	}
	if err := checkSpec(b.spec); err != nil {
		return nil, fmt.Errorf("%s: %w", configFile, err)
	}
	return b, nil
}

func readBounded(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxConfig+1))
	if err == nil && len(b) > maxConfig {
		err = fmt.Errorf("larger than %d MiB", maxConfig>>20)
	}
	return b, err
}

// decode reads one JSON value; its errors say where. Unknown fields are passed
// over, as the runtime-spec demands ("Extensibility").
func decode(b []byte, into any) error {
	err := json.Unmarshal(b, into)
	var syntax *json.SyntaxError
	var typ *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		line, col := position(b, syntax.Offset)
		return fmt.Errorf("line %d, column %d: %w", line, col, err)
	case errors.As(err, &typ):
		line, col := position(b, typ.Offset)
		return fmt.Errorf("line %d, column %d: %s: want %s, not a JSON %s", line, col, typ.Field, typ.Type, typ.Value)
	}
	return err
}

// position turns the offset after a byte into the byte's line and column, from 1.
func position(b []byte, offset int64) (line, col int) {
	at := b[:min(max(int(offset)-1, 0), len(b))]
	return bytes.Count(at, []byte("\n")) + 1, len(at) - bytes.LastIndexByte(at, '\n')
}

// checkSpec checks what the runtime below takes for granted.
func checkSpec(s *specs.Spec) error {
	if s == nil {
		return errors.New("null is no config")
	}
	if err := checkVersion(s.Version); err != nil {
		return err
	}
	if s.Root == nil || s.Root.Path == "" {
		return errors.New("root.path: missing")
	}
	return checkProcess(s.Process)
}

func checkProcess(p *specs.Process) error {
	switch {
	case p == nil:
		return errors.New("process: missing")
	case p.Cwd == "":
		return errors.New("process.cwd: missing")
	case !filepath.IsAbs(p.Cwd):
		return fmt.Errorf("process.cwd %q: want an absolute path", p.Cwd)
	case len(p.Args) == 0:
		return errors.New("process.args: missing")
	}
	return nil
}

// checkVersion takes every version 1 of the runtime-spec: later ones only add
// fields that are passed over.
func checkVersion(v string) error {
	if v == "" {
		return errors.New("ociVersion: missing")
	}
	core, _, _ := strings.Cut(v, "+")
	core, _, _ = strings.Cut(core, "-")
	parts := strings.Split(core, ".")
	ok := len(parts) == 3
	for _, p := range parts {
		_, err := strconv.ParseUint(p, 10, 32)
		ok = ok && err == nil
	}
	if !ok {
		return fmt.Errorf("ociVersion %q: want a semantic version such as %s", v, specs.Version)
	}
	if parts[0] != "1" {
		return fmt.Errorf("ociVersion %q: unknown; berth-oci knows version 1 up to %s", v, specs.Version)
	}
	return nil
}

// complete fills in what a config may leave to the runtime. It does the same
// each time: what is kept of a container is the config as it was given.
func complete(s *specs.Spec, id, bundle string, systemd, noCgroup bool) {
	if !filepath.IsAbs(s.Root.Path) {
		s.Root.Path = filepath.Join(bundle, s.Root.Path)
	}
	if s.Linux == nil || s.Linux.CgroupsPath != "" || noCgroup {
		return
	}
	s.Linux.CgroupsPath = id // relative: below our own cgroup
	if systemd {
		s.Linux.CgroupsPath = ":berth:" + id
	}
}
