package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/test/pace"
	"github.com/berth-runtime/berth/test/testimage"
)

// binary is berth-oci as it is built for users, and program what runs in the containers.
var (
	binary  string
	program []byte
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			return m.Run()
		}
		dir, err := os.MkdirTemp("", "berth-oci-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		if binary = os.Getenv("BERTH_TEST_OCI"); binary == "" { // set where there is no go command
			binary = filepath.Join(dir, "berth-oci")
			build := exec.Command("go", "build", "-o", binary, ".")
			build.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := build.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "build: %v: %s\n", err, out)
				return 1
			}
		}
		if program, err = testimage.BuildProgram(context.Background(), ""); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

var cgroupRoot = fmt.Sprintf("/berth-oci-test-%d", os.Getpid())

var serial atomic.Int64

// bench is a bundle with a state root of its own.
type bench struct {
	t      testing.TB
	root   string
	bundle string
	spec   *specs.Spec
}

// newBench makes a bundle whose program is the test image's command args. At the
// end of the test its containers are deleted and nothing may be left of them.
func newBench(t testing.TB, args ...string) *bench {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	b := &bench{t: t, root: filepath.Join(dir, "state"), bundle: filepath.Join(dir, "bundle"), spec: exampleSpec()}
	for _, d := range []string{"bin", "proc", "sys", "dev", "etc", "tmp"} {
		if err := os.MkdirAll(filepath.Join(b.bundle, "rootfs", d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(b.bundle, "rootfs/bin/prog"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	b.spec.Process.Terminal = false
	b.spec.Process.Args = append([]string{"prog"}, args...)
	b.spec.Process.Env = []string{"PATH=/bin"}
	b.write()
	mounts := mountCount(t)
	t.Cleanup(func() {
		if entries, _ := os.ReadDir(b.root); len(entries) > 0 {
			for _, e := range entries {
				b.do("delete", "--force", e.Name()).ok()
			}
		}
		b.nothingLeft()
		if n := mountCount(t); n != mounts {
			t.Errorf("mounts: %d before, %d after", mounts, n)
		}
		for _, d := range cgroupDirs() {
			_ = os.Remove(filepath.Join(d, cgroupRoot)) // another bench may use it
		}
	})
	return b
}

func (b *bench) write() {
	b.t.Helper()
	data, err := json.Marshal(b.spec)
	if err != nil {
		b.t.Fatal(err)
	}
	b.writeRaw(data)
}

func (b *bench) writeRaw(data []byte) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.bundle, "config.json"), data, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// id names a new container, with a cgroup to match in the config.
func (b *bench) id() string {
	b.t.Helper()
	id := fmt.Sprintf("c%d-%d", os.Getpid(), serial.Add(1))
	b.spec.Linux.CgroupsPath = cgroupRoot + "/" + id
	b.write()
	return id
}

// result is what a command left.
type result struct {
	t        testing.TB
	args     []string
	out, err string
	code     int
}

func (b *bench) command(args ...string) *exec.Cmd {
	c := exec.Command(binary, append([]string{"--root", b.root}, args...)...)
	c.Dir = b.bundle
	return c
}

func (b *bench) do(args ...string) result {
	b.t.Helper()
	return b.finish(b.command(args...))
}

func (b *bench) finish(c *exec.Cmd) result {
	b.t.Helper()
	// Files, not pipes: a detached container keeps them.
	out, err := os.CreateTemp(b.t.TempDir(), "out")
	if err != nil {
		b.t.Fatal(err)
	}
	defer out.Close()
	errs, err := os.CreateTemp(b.t.TempDir(), "err")
	if err != nil {
		b.t.Fatal(err)
	}
	defer errs.Close()
	c.Stdout, c.Stderr = out, errs
	_ = c.Run() // its exit code is looked at
	r := result{t: b.t, args: c.Args[1:], code: c.ProcessState.ExitCode()}
	o, _ := os.ReadFile(out.Name())
	e, _ := os.ReadFile(errs.Name())
	r.out, r.err = string(o), string(e)
	return r
}

func (r result) ok() result {
	r.t.Helper()
	return r.exits(0)
}

func (r result) exits(code int) result {
	r.t.Helper()
	if r.code != code {
		r.t.Fatalf("%v: exit code %d, want %d\n%s%s", r.args, r.code, code, r.out, r.err)
	}
	return r
}

// says checks that the error is one line with all of parts.
func (r result) says(parts ...string) result {
	r.t.Helper()
	for _, p := range parts {
		if !strings.Contains(r.err, p) {
			r.t.Fatalf("%v: stderr %q does not say %q", r.args, r.err, p)
		}
	}
	if strings.Count(r.err, "\n") != 1 {
		r.t.Fatalf("%v: stderr is not one line: %q", r.args, r.err)
	}
	return r
}

func (r result) prints(want string) result {
	r.t.Helper()
	if r.out != want {
		r.t.Fatalf("%v: stdout %q, want %q", r.args, r.out, want)
	}
	return r
}

// state is the status of a container as state prints it.
func (b *bench) state(id string) description {
	b.t.Helper()
	var d description
	if err := json.Unmarshal([]byte(b.do("state", id).ok().out), &d); err != nil {
		b.t.Fatal(err)
	}
	return d
}

func (b *bench) status(id string, want string) {
	b.t.Helper()
	if got := b.state(id).Status; string(got) != want {
		b.t.Fatalf("status %q, want %q", got, want)
	}
}

// eventually waits for what the kernel does in its own time.
func (b *bench) eventually(what string, f func() bool) {
	b.t.Helper()
	deadline := time.Now().Add(pace.Wait(5 * time.Second))
	for !f() {
		if time.Now().After(deadline) {
			b.t.Fatalf("not within the time: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func mountCount(t testing.TB) int {
	t.Helper()
	m, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(m, []byte("\n"))
}

func cgroupDirs() []string {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*")
	return append(dirs, "/sys/fs/cgroup")
}

// nothingLeft checks that no container of the bench has a directory, a cgroup or a process.
func (b *bench) nothingLeft() {
	b.t.Helper()
	if entries, _ := os.ReadDir(b.root); len(entries) > 0 {
		b.t.Errorf("state directories left: %v", entries)
	}
	for _, d := range cgroupDirs() {
		left, _ := filepath.Glob(filepath.Join(d, cgroupRoot, fmt.Sprintf("c%d-*", os.Getpid())))
		if len(left) > 0 {
			b.t.Errorf("cgroups left: %v", left)
		}
	}
	b.eventually("no process holds the state or the bundle", func() bool { return len(b.holders()) == 0 })
}

// holders lists processes with a file of the bench open, or running from it.
func (b *bench) holders() []string {
	var out []string
	top := filepath.Dir(b.bundle)
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	exes, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, p := range slices.Concat(fds, exes) {
		if strings.HasPrefix(p, fmt.Sprintf("/proc/%d/", os.Getpid())) {
			continue
		}
		if to, err := os.Readlink(p); err == nil && strings.HasPrefix(to, top+"/") {
			out = append(out, p+" -> "+to)
		}
	}
	return out
}
