// Package external runs containers by the command line of any OCI runtime: runc,
// crun, youki, and those whose containers are no processes of the host.
//
// A runtime of that kind wants a bundle: a folder with config.json and the root
// filesystem mounted below it. Berth keeps the host's mount table empty, so each
// container has a mount namespace of its own, held by a descriptor: a copy of
// the host's, into which mounts of the host propagate and out of which none do.
// The overlay, the pod's descriptors and the image volumes are mounted in it, the
// namespaces that the container joins are bound in it as files, and every command
// for the container is run in it. When the last process is gone and the
// descriptor closed, the kernel takes all of that down, also when we crash.
//
// Standard streams are known at Start only, and "create" hands on its own to the
// container: so Start runs both "create" and "start", and Create makes the bundle.
//
// The container's process is reparented to us when the command that made it ends:
// the caller must be a child subreaper.
package external

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/undo"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// DefaultTimeout is how long one command may take when its definition does not say.
const DefaultTimeout = 30 * time.Second

// Command is oci.Command, for those who may not import package oci.
type Command = oci.Command

// Config configures a Runtime.
type Config struct {
	Handler string // for messages, and the name of the runtime's folder
	Command oci.Command
	// Dir is the folder of all external runtimes; this one's is below it. It must
	// die with the boot and be open to root alone. It is made if missing.
	Dir string
	// Cgroups overrides the detected cgroup hierarchies.
	Cgroups *cgroup.Host
	// Forking, when not nil, is called before a command is started, and what it
	// returns when the command was reaped: a reaper of orphans must not reap it.
	Forking func() (done func())
	// Log takes warnings; nil means slog.Default.
	Log *slog.Logger
}

// Runtime makes containers. It holds no list of them.
type Runtime struct {
	cfg     Config
	dir     string // of this runtime: its own state and the bundles
	cgroups *cgroup.Host
	log     *slog.Logger
	serial  atomic.Uint64 // names files of concurrent calls
}

var _ oci.Runtime = (*Runtime)(nil)

// Check reports whether the runtime of c can be called: an executable regular
// file, named by an absolute path, because a search in PATH could end elsewhere
// for the supervisor than for the operator (invariant I17).
func Check(c oci.Command) error {
	if !filepath.IsAbs(c.Path) {
		return fmt.Errorf("path %q is not absolute: %w", c.Path, errdefs.ErrInvalidArgument)
	}
	st, err := os.Stat(c.Path)
	if err != nil {
		return fmt.Errorf("path: %w; install the runtime there or correct the path: %w", err, errdefs.ErrFailedPrecondition)
	}
	if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return fmt.Errorf("path %q is not an executable file: %w", c.Path, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// New prepares a runtime. It runs nothing.
func New(c Config) (*Runtime, error) {
	if c.Handler == "" || filepath.Base(c.Handler) != c.Handler || c.Handler == ".." || c.Handler == "." {
		return nil, fmt.Errorf("handler %q: not a file name: %w", c.Handler, errdefs.ErrInvalidArgument)
	}
	if err := Check(c.Command); err != nil {
		return nil, fmt.Errorf("handler %q: %w", c.Handler, err)
	}
	r := &Runtime{cfg: c, dir: filepath.Join(c.Dir, c.Handler), cgroups: c.Cgroups, log: c.Log}
	if r.cfg.Command.Timeout <= 0 {
		r.cfg.Command.Timeout = DefaultTimeout
	}
	if r.cfg.Forking == nil {
		r.cfg.Forking = func() func() { return func() {} }
	}
	if r.log == nil {
		r.log = slog.Default()
	}
	if r.cgroups == nil {
		var err error
		if r.cgroups, err = cgroup.Detect(); err != nil {
			return nil, err
		}
	}
	for _, d := range []string{r.stateDir(), r.bundles()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("handler %q: %w", c.Handler, err)
		}
	}
	return r, nil
}

func (r *Runtime) stateDir() string { return filepath.Join(r.dir, "state") } // the runtime's --root
func (r *Runtime) bundles() string  { return filepath.Join(r.dir, "bundles") }

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// Create implements oci.Runtime. What the runtime itself refuses in the spec
// comes up in Start.
func (r *Runtime) Create(ctx context.Context, req oci.CreateRequest) (_ oci.Container, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := check(req); err != nil {
		return nil, err
	}
	c := &Container{rt: r, id: req.ID, dir: filepath.Join(r.bundles(), string(req.ID))}
	var u undo.Stack
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("create container: handler %q: %w", r.cfg.Handler, err), u.Run())
		}
	}()
	if p := req.Spec.Linux.CgroupsPath; p != "" {
		if c.cgroup, err = r.cgroups.Open(p); err != nil {
			return nil, err
		}
		c.cgroupPath = p
	}
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
		}
		return nil, err
	}
	u.Push(func() error { return removeBundle(c.dir) })
	// On disk before anything else is made: a later supervisor must find it.
	if err := writeLabel(c.dir, label{Command: r.cfg.Command, Cgroup: c.cgroupPath}); err != nil {
		return nil, err
	}
	if c.spec, err = clone(req.Spec); err != nil {
		return nil, err
	}
	// Minor versions add fields; a runtime that knows a newer one takes the oldest,
	// and old ones refuse a number that they do not know.
	c.spec.Version = "1.0.2"
	if c.mounts, err = c.buildBundle(req); err != nil {
		return nil, err
	}
	u.Push(c.mounts.Close)
	for _, e := range c.spec.Process.Env {
		if !utf8.ValidString(e) {
			r.log.Warn("environment of a container is changed: config.json carries UTF-8 only", "container", string(req.ID), "handler", r.cfg.Handler)
			break
		}
	}
	u.Release()
	return c, nil
}

func check(req oci.CreateRequest) error {
	s := req.Spec
	switch {
	case req.PodInit:
		return invalid("podInit: is the embedded runtime's")
	case s == nil || s.Linux == nil:
		return invalid("linux: missing")
	case s.Process == nil:
		return invalid("process: missing")
	case (req.Rootfs.Upper == "") != (req.Rootfs.Work == ""):
		return invalid("rootfs: upper and work go together")
	case req.Rootfs.Idmap:
		return invalid("rootfs.idmap: is the embedded runtime's")
	case len(req.Rootfs.Lowers) == 0 && (s.Root == nil || s.Root.Path == ""):
		return invalid("root.path: missing")
	}
	return nil
}

// clone copies a spec deeply: ours is changed and outlives the call. Strings are
// copied as they are, also those that JSON would change.
func clone(s *specs.Spec) (*specs.Spec, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	var out specs.Spec
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	if out.Root == nil {
		out.Root = &specs.Root{}
	}
	out.Process.Env = append([]string(nil), s.Process.Env...)
	return &out, nil
}
