package embedded

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/kernel"
	"github.com/berth-runtime/berth/oci"
)

// medians reports the median of each named duration.
type medians map[string][]time.Duration

func (m medians) add(name string, since time.Time) time.Time {
	now := time.Now()
	m[name] = append(m[name], now.Sub(since))
	return now
}

func (m medians) report(b *testing.B) {
	for name, v := range m {
		slices.Sort(v)
		b.ReportMetric(float64(v[len(v)/2].Microseconds()), name+"-p50-us")
		b.ReportMetric(float64(v[len(v)*99/100].Microseconds()), name+"-p99-us")
	}
}

// benchSpec is the spec of one life: a fresh cgroup, a program that waits.
func benchSpec(base *container) *specs.Spec {
	s, l, p := *base.req.Spec, *base.req.Spec.Linux, *base.req.Spec.Process
	p.Args = []string{"/bin/sleep"}
	l.CgroupsPath = fmt.Sprintf("%s/bench-%d", cgroupRoot, serial.Add(1))
	s.Linux, s.Process = &l, &p
	return &s
}

// rested runs a benchmark without and with a pause before each turn: a quiet node
// waits for RCU grace periods that a busy loop hides.
func rested(b *testing.B, f func(b *testing.B, pause time.Duration)) {
	b.Run("busy", func(b *testing.B) { f(b, 0) })
	b.Run("idle", func(b *testing.B) { f(b, 50*time.Millisecond) })
}

// BenchmarkLife joins the namespaces of a pod, as containers of pods do.
func BenchmarkLife(b *testing.B) { rested(b, benchLife) }

func benchLife(b *testing.B, pause time.Duration) {
	r := runtimeFor(b)
	base := newContainer(b)
	kinds := map[specs.LinuxNamespaceType]kernel.Namespace{
		specs.NetworkNamespace: kernel.NetNS, specs.IPCNamespace: kernel.IPCNS, specs.UTSNamespace: kernel.UTSNS,
	}
	base.req.Namespaces = map[specs.LinuxNamespaceType]*os.File{}
	for k, name := range kinds {
		ns, err := kernel.NewNamespaces([]kernel.Namespace{name}, nil)
		if err != nil {
			b.Fatal(err)
		}
		defer ns[0].Close()
		base.req.Namespaces[k] = ns[0]
	}
	base.req.Rootfs.Volatile = false // its directories are used again
	m := medians{}
	for b.Loop() {
		req := base.req
		req.Spec = benchSpec(base)
		time.Sleep(pause)
		t := time.Now()
		c, err := r.Create(context.Background(), req)
		if err != nil {
			b.Fatal(err)
		}
		m.add("create", t)
		time.Sleep(pause)
		created := time.Now()
		p, err := c.Start(context.Background(), oci.Stdio{})
		if err != nil {
			b.Fatal(err)
		}
		started := m.add("start", created)
		if err := unix.PidfdSendSignal(int(p.PidFD.Fd()), unix.SIGKILL, nil, 0); err != nil {
			b.Fatal(err)
		}
		if _, err := kernel.Reap(p.Pid); err != nil {
			b.Fatal(err)
		}
		p.PidFD.Close()
		killed := m.add("kill", started)
		if err := c.Delete(); err != nil {
			b.Fatal(err)
		}
		m.add("delete", killed)
	}
	m.report(b)
}

func BenchmarkExec(b *testing.B) { rested(b, benchExec) }

func benchExec(b *testing.B, pause time.Duration) {
	r := runtimeFor(b)
	c := newContainer(b)
	c.req.Spec.Process.Args = []string{"/bin/sleep"}
	run := c.start(r)
	p := *c.req.Spec.Process
	p.Args = []string{"/bin/true"}
	m := medians{}
	for b.Loop() {
		time.Sleep(pause)
		t := time.Now()
		proc, err := run.c.Exec(context.Background(), &p, oci.Stdio{})
		if err != nil {
			b.Fatal(err)
		}
		if ws, err := kernel.Reap(proc.Pid); err != nil || ws != 0 {
			b.Fatal(ws, err)
		}
		proc.PidFD.Close()
		m.add("exec", t)
	}
	m.report(b)
}

// BenchmarkPeer measures the same life and exec with runc's command line, where
// it is installed: the rootfs is a plain directory, which favours it.
func BenchmarkPeer(b *testing.B) {
	needRoot(b)
	runc, err := exec.LookPath("runc")
	if err != nil {
		b.Skip("runc is not installed")
	}
	base := newContainer(b)
	bundle, state := b.TempDir(), b.TempDir()
	if err := os.Rename(base.req.Rootfs.Lowers[0], bundle+"/rootfs"); err != nil {
		b.Fatal(err)
	}
	command := func(args ...string) error {
		out, err := exec.Command(runc, append([]string{"--root", state}, args...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("runc %v: %w: %s", args, err, out)
		}
		return nil
	}
	b.Cleanup(func() {
		_ = command("delete", "-f", "peer")
		dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupRoot)
		for _, d := range dirs {
			_ = unix.Rmdir(d)
		}
	})
	m := medians{}
	for b.Loop() {
		s := benchSpec(base)
		s.Version = "1.0.2"
		text, err := json.Marshal(s)
		if err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(bundle+"/config.json", text, 0o600); err != nil {
			b.Fatal(err)
		}
		t := time.Now()
		// A file and no pipe: the container keeps its creator's stdio.
		complaint, err := os.Create(bundle + "/stderr")
		if err != nil {
			b.Fatal(err)
		}
		create := exec.Command(runc, "--root", state, "create", "-b", bundle, "peer")
		create.Stderr = complaint
		err = create.Run()
		complaint.Close()
		if err != nil {
			why, _ := os.ReadFile(bundle + "/stderr")
			b.Skipf("runc does not work on this host: %v: %s", err, why)
		}
		if err := command("start", "peer"); err != nil {
			b.Fatal(err)
		}
		started := m.add("create+start", t)
		if err := command("exec", "peer", "/bin/true"); err != nil {
			b.Fatal(err)
		}
		ran := m.add("exec", started)
		if err := errors.Join(command("kill", "peer", "KILL"), command("delete", "-f", "peer")); err != nil {
			b.Fatal(err)
		}
		m.add("kill+delete", ran)
	}
	m.report(b)
}
