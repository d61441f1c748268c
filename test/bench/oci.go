package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/test/testimage"
)

// hiddenEnv marks the process in whose mount namespace cgroup v2 is hidden.
const hiddenEnv = "BERTH_BENCH_HIDDEN"

// ociRuntime is a runtime by its command line.
type ociRuntime struct {
	name, path string
	root       string // its state
	times      map[string][]float64
	peak       []float64 // KiB charged to a created container's cgroup
}

// benchOCI measures OCI runtimes by their command lines: whole runs of a program
// that ends at once, and create, start, exec and delete of one that waits. They
// take turns within each round, on one bundle, so that all see the same machine.
func benchOCI(ctx context.Context, w io.Writer, args []string) error {
	f := flag.NewFlagSet("bench oci", flag.ContinueOnError)
	n := f.Int("n", 100, "rounds")
	hide := f.Bool("hide-unified", false, "hide the second, nearly empty hierarchy of a hybrid host: crun refuses such hosts")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() == 0 || *n < 1 {
		return errors.New("usage: bench oci [--n ROUNDS] [--hide-unified] NAME=PATH [NAME=PATH...]")
	}
	if *hide && os.Getenv(hiddenEnv) == "" {
		return againHidden(ctx, w, args)
	}
	dir, err := os.MkdirTemp("", "berth-bench-oci-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var all []*ociRuntime
	for _, a := range f.Args() {
		name, path, ok := strings.Cut(a, "=")
		if !ok || !filepath.IsAbs(path) {
			return fmt.Errorf("runtime %q: want NAME=/PATH", a)
		}
		all = append(all, &ociRuntime{name: name, path: path, root: filepath.Join(dir, "state-"+name), times: map[string][]float64{}})
	}
	if err := makeBundles(dir); err != nil {
		return err
	}
	const warm = 3
	for i := range *n + warm {
		for k := range all {
			r := all[(i+k)%len(all)]
			if err := r.round(ctx, dir, i, i >= warm); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
		}
	}
	writeOCI(w, all, *n)
	return nil
}

// againHidden runs the bench in a mount namespace of its own with an empty tmpfs
// over the v2 hierarchy beside v1.
func againHidden(ctx context.Context, w io.Writer, args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	script := `mount --make-rprivate / && mount -t tmpfs none /sys/fs/cgroup/unified && exec "$0" oci "$@"`
	c := exec.CommandContext(ctx, "/bin/sh", append([]string{"-c", script, self}, args...)...)
	c.Env = append(os.Environ(), hiddenEnv+"=1")
	c.Stdout, c.Stderr = w, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	return c.Run()
}

// makeBundles makes the bundles "run" and "wait" below dir: they differ in their
// program alone.
func makeBundles(dir string) error {
	for name, program := range map[string]func(string) ([]byte, error){"run": testimage.Exiter, "wait": testimage.Pauser} {
		b := filepath.Join(dir, name)
		for _, d := range []string{"proc", "sys", "dev", "tmp"} {
			if err := os.MkdirAll(filepath.Join(b, "rootfs", d), 0o755); err != nil {
				return err
			}
		}
		main, err := program(runtime.GOARCH)
		if err != nil {
			return err
		}
		yes, err := testimage.Exiter(runtime.GOARCH)
		if err != nil {
			return err
		}
		text, err := json.Marshal(ociSpec())
		if err != nil {
			return err
		}
		if err := errors.Join(os.WriteFile(b+"/rootfs/main", main, 0o755), os.WriteFile(b+"/rootfs/true", yes, 0o755), os.WriteFile(b+"/config.json", text, 0o644)); err != nil {
			return err
		}
	}
	return nil
}

// ociSpec is what "spec" of every runtime writes, without a terminal: namespaces
// of its own, masks, few capabilities. The version is one that old runtimes take.
func ociSpec() *specs.Spec {
	caps := []string{"CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"}
	none := []string{"nosuid", "noexec", "nodev"}
	return &specs.Spec{
		Version: "1.0.2", Root: &specs.Root{Path: "rootfs", Readonly: true}, Hostname: "bench",
		Process: &specs.Process{
			Args: []string{"/main"}, Env: []string{"PATH=/"}, Cwd: "/", NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: append([]string{"mode=1777", "size=65536k"}, none...)},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: none},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: append([]string{"ro"}, none...)},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: append([]string{"relatime", "ro"}, none...)},
		},
		Linux: &specs.Linux{
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
			},
			MaskedPaths:   []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
}

// round is one turn of a runtime; what it takes counts with keep.
func (r *ociRuntime) round(ctx context.Context, dir string, i int, keep bool) (err error) {
	id := fmt.Sprintf("bench-oci-%d-%s-%d", os.Getpid(), r.name, i)
	do := func(what, bundle string, args ...string) error {
		c := exec.CommandContext(ctx, r.path, append([]string{"--root", r.root}, args...)...)
		// A file: a created container keeps it, and the end of a pipe would never come.
		out, err := os.Create(filepath.Join(dir, "stderr"))
		if err != nil {
			return err
		}
		defer out.Close()
		c.Dir, c.Stderr = filepath.Join(dir, bundle), out
		at := time.Now()
		if err := c.Run(); err != nil {
			text, _ := os.ReadFile(out.Name())
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(text))
		}
		if keep && what != "" {
			r.times[what] = append(r.times[what], float64(time.Since(at).Microseconds())/1000)
		}
		return nil
	}
	defer func() {
		if err != nil {
			_ = do("", "wait", "delete", "--force", id) // what there is of it
		}
	}()
	if err := do("run", "run", "run", id); err != nil {
		return err
	}
	if err := do("create", "wait", "create", id); err != nil {
		return err
	}
	if keep {
		if k, ok := r.charged(ctx, id); ok {
			r.peak = append(r.peak, k)
		}
	}
	if err := do("start", "wait", "start", id); err != nil {
		return err
	}
	if err := do("exec", "wait", "exec", id, "/true"); err != nil {
		return err
	}
	if err := do("", "wait", "kill", id, "KILL"); err != nil {
		return err
	}
	for range 200 {
		s, err := r.state(ctx, id)
		if err != nil {
			return err
		}
		if s.Status == specs.StateStopped {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	return do("delete", "wait", "delete", id)
}

func (r *ociRuntime) state(ctx context.Context, id string) (s specs.State, err error) {
	out, err := exec.CommandContext(ctx, r.path, "--root", r.root, "state", id).Output()
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	return s, err
}

// charged is the most memory that was charged to the cgroup of a created
// container, whose program does not run yet: the runtime's own.
func (r *ociRuntime) charged(ctx context.Context, id string) (kib float64, ok bool) {
	s, err := r.state(ctx, id)
	if err != nil {
		return 0, false
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(s.Pid) + "/cgroup")
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(b)) {
		p := strings.SplitN(strings.TrimSpace(line), ":", 3)
		file := ""
		switch {
		case len(p) == 3 && slices.Contains(strings.Split(p[1], ","), "memory"):
			file = "/sys/fs/cgroup/memory" + p[2] + "/memory.max_usage_in_bytes"
		case len(p) == 3 && p[0] == "0":
			file = "/sys/fs/cgroup" + p[2] + "/memory.peak"
		}
		if text, err := os.ReadFile(file); err == nil {
			n, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
			return n / 1024, err == nil
		}
	}
	return 0, false
}

// writeOCI writes a Markdown table: medians with the 10th and 90th percentile, and
// the ratio of the medians to those of the first runtime.
func writeOCI(w io.Writer, all []*ociRuntime, n int) {
	fmt.Fprintf(w, "%d rounds, ms: median (p10-p90), ratio to %s\n\n", n, all[0].name)
	columns := []string{"run", "create", "start", "exec", "delete"}
	for _, r := range all {
		for _, v := range append(slices.Collect(maps.Values(r.times)), r.peak) {
			slices.Sort(v)
		}
	}
	fmt.Fprintf(w, "| runtime | %s | KiB charged at create |\n|---|%s---:|\n", strings.Join(columns, " | "), strings.Repeat("---:|", len(columns)))
	for _, r := range all {
		fmt.Fprintf(w, "| %s |", r.name)
		for _, c := range columns {
			v := r.times[c]
			fmt.Fprintf(w, " %.2f (%.1f-%.1f) x%.2f |", quantile(v, 0.5), quantile(v, 0.1), quantile(v, 0.9), quantile(v, 0.5)/quantile(all[0].times[c], 0.5))
		}
		if len(r.peak) > 0 {
			fmt.Fprintf(w, " %.0f |\n", quantile(r.peak, 0.5))
		} else {
			fmt.Fprint(w, " not to be read |\n")
		}
	}
}
