package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
	"github.com/berth-runtime/berth/oci/embedded"
)

// insideEnv tells the program, run again by inUserNamespace, that the user
// namespace of the spec is the one it is in.
const insideEnv = "_BERTH_OCI_INSIDE"

// inside reports whether this is the program's second run.
func inside() bool { return os.Getenv(insideEnv) != "" }

// needsUserNamespace reports whether the caller has to become the root of the
// spec's user namespace before anything can be made for it.
func needsUserNamespace(s *specs.Spec) (bool, error) {
	if os.Geteuid() == 0 || inside() {
		return false, nil
	}
	if s.Linux == nil || !slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace && n.Path == "" }) {
		return false, errors.New(`linux.namespaces: a user who is not root needs a new user namespace; see "berth-oci spec --rootless"`)
	}
	return true, nil
}

// inUserNamespace runs this program again as root of the spec's user
// namespace, and ends as it ends.
func (a *app) inUserNamespace(s *specs.Spec, preserve int) error {
	rt, err := embedded.New(embedded.Config{Log: a.log.Logger})
	if err != nil {
		return err
	}
	defer rt.Close()
	extra, _, err := a.passedFiles(preserve)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	p, err := rt.RunInUserNS(s.Linux, os.Args, append(os.Environ(), insideEnv+"=1"), oci.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Extra: extra})
	if err != nil {
		return fmt.Errorf("linux.namespaces: user: %w", err)
	}
	defer p.PidFD.Close()
	go (&attachment{signals: signals}).forward(p)
	ws, err := kernel.Reap(p.Pid)
	switch {
	case err != nil:
		return fmt.Errorf("wait: %w", err)
	case ws.Signaled():
		return exitStatus(128 + int(ws.Signal()))
	}
	return exitStatus(ws.ExitStatus())
}

// withoutUserNamespace is a spec for the second run: the namespace is there, with
// its mappings. Nothing else of s is shared by the result that callers change.
func withoutUserNamespace(s *specs.Spec) *specs.Spec {
	out, l := *s, *s.Linux
	l.Namespaces = slices.DeleteFunc(slices.Clone(l.Namespaces), func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace })
	l.UIDMappings, l.GIDMappings = nil, nil
	out.Linux = &l
	return &out
}
