package attacks

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/berth-runtime/berth/test/pace"
)

// result is what a command left.
type result struct {
	t        *testing.T
	args     []string
	out, err string
	code     int
}

func (b *bench) command(args ...string) *exec.Cmd {
	c := exec.Command(runtimeBinary, append([]string{"--root", b.root}, args...)...)
	c.Dir = b.bundle
	c.Env = append(os.Environ(), b.env...)
	return c
}

func (b *bench) do(args ...string) result {
	b.t.Helper()
	return b.finish(b.command(args...))
}

func (b *bench) finish(c *exec.Cmd) result {
	b.t.Helper()
	// Files, not pipes: a detached container keeps them.
	var files [2]*os.File
	for i := range files {
		f, err := os.CreateTemp(b.dir, "out")
		if err != nil {
			b.t.Fatal(err)
		}
		defer os.Remove(f.Name())
		defer f.Close()
		files[i] = f
	}
	c.Stdout, c.Stderr = files[0], files[1]
	if err := c.Start(); err != nil {
		b.t.Fatal(err)
	}
	stuck := time.AfterFunc(pace.Wait(30*time.Second), func() { _ = c.Process.Kill() })
	_ = c.Wait() // its exit code is looked at
	stuck.Stop()
	r := result{t: b.t, args: c.Args[1:], code: c.ProcessState.ExitCode()}
	o, _ := os.ReadFile(files[0].Name())
	e, _ := os.ReadFile(files[1].Name())
	r.out, r.err = string(o), string(e)
	return r
}

// run runs the container to its end.
func (b *bench) run() result {
	b.t.Helper()
	return b.do("run", b.id())
}

// start runs the container detached, with the output in the file returned.
func (b *bench) start() (id, out string) {
	b.t.Helper()
	id = b.id()
	f, err := os.Create(filepath.Join(b.dir, id+".out"))
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	c := b.command("run", "--detach", id)
	c.Stdout, c.Stderr = f, f
	if err := c.Run(); err != nil {
		text, _ := os.ReadFile(f.Name())
		b.t.Fatalf("run: %v: %s", err, text)
	}
	return id, f.Name()
}

func (r result) ok() result {
	r.t.Helper()
	if r.code != 0 {
		r.t.Fatalf("%v: exit code %d\n%s%s", r.args, r.code, r.out, r.err)
	}
	return r
}

// refused checks that the runtime itself ended with an error that names parts.
func (r result) refused(parts ...string) result {
	r.t.Helper()
	if r.code == 0 || r.out != "" {
		r.t.Fatalf("%v: not refused: exit code %d\n%s%s", r.args, r.code, r.out, r.err)
	}
	for _, p := range parts {
		if !strings.Contains(r.err, p) {
			r.t.Fatalf("%v: stderr %q does not say %q", r.args, r.err, p)
		}
	}
	return r
}

// expect checks the answers of the attacker, by what it was asked.
func (r result) expect(want map[string]string) result {
	r.t.Helper()
	for key, v := range want {
		if got := r.value(key); got != v {
			r.t.Errorf("%s: %q, want %q", key, got, v)
		}
	}
	return r
}

func (r result) value(key string) string {
	r.t.Helper()
	for line := range strings.Lines(r.out) {
		if v, ok := strings.CutPrefix(line, key+" "); ok {
			return strings.TrimSpace(v)
		}
	}
	r.t.Fatalf("no answer to %q in:\n%s%s", key, r.out, r.err)
	return ""
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(pace.Wait(10 * time.Second)); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within the time: %s", what)
		}
	}
}
