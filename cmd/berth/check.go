package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Verdicts of a check.
const (
	checkOK   = "ok"
	checkWarn = "warn"
	checkFail = "fail"
)

// finding is the outcome of one check: what was found, and what to do when it
// is not ok.
type finding struct {
	Check   string `json:"check"`
	Verdict string `json:"verdict"`
	Found   string `json:"found"`
	Remedy  string `json:"remedy,omitempty"`
}

// check is one probe. It returns what it found; an error with a remedy makes it
// a warning or, when without this no pod can run, a failure.
type check struct {
	name     string
	required bool
	probe    func(context.Context, *env) (found string, err error)
}

// remedied is a probe's error together with what to do about it.
type remedied struct {
	err    error
	remedy string
}

func (r *remedied) Error() string { return r.err.Error() }
func (r *remedied) Unwrap() error { return r.err }

func remedy(err error, format string, args ...any) error {
	return &remedied{err, fmt.Sprintf(format, args...)}
}

func checkCommand(e *env) *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Tell whether this node can run pods, and what to do if not",
		Long:  "Probe the kernel and the node, one line for each check: ok, warn (something will not work) or fail (no pod can run). The exit code is 1 when one fails.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list := runChecks(cmd.Context(), e, checks(root))
			failed := false
			rows := [][]string{}
			for _, f := range list {
				failed = failed || f.Verdict == checkFail
				text := f.Found
				if f.Remedy != "" {
					text += "; " + f.Remedy
				}
				rows = append(rows, []string{f.Verdict, f.Check, text})
			}
			done, err := e.print(list)
			if !done {
				err = table(e.out, rows)
			}
			if err == nil && failed {
				return exitCode(1)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&root, "root", "/var/lib/berth", "the daemon's root directory")
	return cmd
}

func runChecks(ctx context.Context, e *env, list []check) []finding {
	var out []finding
	for _, c := range list {
		found, err := c.probe(ctx, e)
		f := finding{Check: c.name, Verdict: checkOK, Found: found}
		if err != nil {
			f.Verdict, f.Found = checkWarn, err.Error()
			if c.required {
				f.Verdict = checkFail
			}
			var r *remedied
			if errors.As(err, &r) {
				f.Remedy = r.remedy
			}
		}
		out = append(out, f)
	}
	return out
}

func checks(root string) []check {
	return []check{
		{"root user", true, rootUser},
		{"kernel calls", true, kernelCalls},
		{"detached mounts", false, detachedMounts},
		{"exit codes after a crash", false, pidfdInfo},
		{"namespaces", true, namespaces},
		{"cgroups", true, cgroups},
		{"seccomp", false, seccomp},
		{"AppArmor", false, apparmor},
		{"overlayfs", true, overlay},
		{"root directory", true, func(context.Context, *env) (string, error) { return rootDirectory(root) }},
		{"pod network", true, podNetwork},
		{"nftables", true, nftablesOffered},
		{"IPv4 forwarding", false, forwarding("/proc/sys/net/ipv4/ip_forward", "net.ipv4.ip_forward")},
		{"IPv6 forwarding", false, forwarding("/proc/sys/net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding")},
		{"supervisor", true, supervisorBinary},
		{"daemon", false, daemon},
	}
}

// supervisorBinary looks where the daemon looks.
func supervisorBinary(context.Context, *env) (string, error) {
	const name = "berth-supervisor"
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if st, err := os.Stat(beside); err == nil && st.Mode()&0o111 != 0 {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", remedy(fmt.Errorf("%s is neither beside this program nor in PATH", name), "install it beside berthd")
	}
	return path, nil
}

func daemon(ctx context.Context, e *env) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	v, err := e.runtime().Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return "", remedy(fmt.Errorf("nothing answers on %s", e.socket), "start berthd, or name its socket with --socket")
	}
	s, err := e.runtime().Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return "", remedy(fmt.Errorf("%s: %s", e.socket, plain(err)), "see the daemon's log")
	}
	for _, c := range s.Status.GetConditions() {
		if !c.Status {
			return "", remedy(fmt.Errorf("%s %s: %s is false: %s", v.RuntimeName, v.RuntimeVersion, c.Type, c.Message), "see the daemon's log")
		}
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s is ready on %s", v.RuntimeName, v.RuntimeVersion, e.socket)), nil
}
