package supervisor_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor"
	"github.com/berth-runtime/berth/oci/supervisor/client"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
)

// contents returns the content of each record of one stream.
func contents(t testing.TB, path, stream string) []string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 {
			t.Fatalf("record %q", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			t.Fatal(err)
		}
		if f[1] == stream {
			out = append(out, f[3])
		}
	}
	return out
}

func TestContainerLife(t *testing.T) {
	n := newNode(t)
	c := n.open()
	k, log := start(t, c, n.dir, wire.Create{Spec: shell("echo out; echo err >&2; sleep 60 & exit 7")})
	e := exitOf(t, c, k)
	if e.Code != 7 || e.Signal != 0 || e.OOMKilled || e.Pid == 0 || e.FinishedAt.IsZero() {
		t.Errorf("exit %+v", e)
	}
	if got := contents(t, log, "stdout"); len(got) != 1 || got[0] != "out" {
		t.Errorf("stdout %q", got)
	}
	if got := contents(t, log, "stderr"); len(got) != 1 || got[0] != "err" {
		t.Errorf("stderr %q", got)
	}
	list, err := c.List(t.Context())
	if err != nil || len(list) != 1 || list[0].State != wire.Exited || list[0].Exit == nil || list[0].Exit.Code != 7 {
		t.Errorf("list %+v, %v", list, err)
	}
	if _, err := c.Start(t.Context(), wire.Start{ID: k}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("second start: %v", err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := c.Delete(context.Background(), k); err != nil {
				t.Errorf("delete: %v", err)
			}
		})
	}
	wg.Wait()
	if list, _ := c.List(t.Context()); len(list) != 0 {
		t.Errorf("still listed: %+v", list)
	}
}

func TestSignalsAndDeleteOfRunning(t *testing.T) {
	n := newNode(t)
	c := n.open()
	k, _ := start(t, c, n.dir, wire.Create{Spec: shell("exec sleep 60")})
	if err := c.Signal(t.Context(), wire.Signal{ID: k, Signal: 15}); err != nil {
		t.Fatal(err)
	}
	if e := exitOf(t, c, k); e.Code != 143 || e.Signal != 15 {
		t.Errorf("exit %+v", e)
	}
	k, _ = start(t, c, n.dir, wire.Create{Spec: shell("trap '' TERM; sleep 60 & wait; sleep 60")})
	if err := c.Delete(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	if e := exitOf(t, c, k); e.Code != 137 {
		t.Errorf("exit %+v", e)
	}
	if err := c.Signal(t.Context(), wire.Signal{ID: k, Signal: 15}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("signal of a deleted container: %v", err)
	}
	if err := c.Delete(t.Context(), k); err != nil {
		t.Errorf("second delete: %v", err)
	}
}

func TestCreateErrors(t *testing.T) {
	n := newNode(t)
	c := n.open()
	ok := wire.Create{ID: id.NewContainer(), Spec: shell("true")}
	other := ok
	other.Stdin = true
	for _, tc := range []struct {
		name string
		r    wire.Create
		want error
	}{
		{"first", ok, nil},
		{"identical retry", ok, nil},
		{"same id, other body", other, errdefs.ErrAlreadyExists},
		{"handler", wire.Create{ID: id.NewContainer(), Handler: "nope", Spec: shell("true")}, errdefs.ErrInvalidArgument},
		{"id", wire.Create{ID: "../x", Spec: shell("true")}, errdefs.ErrInvalidArgument},
		{"no spec", wire.Create{ID: id.NewContainer()}, errdefs.ErrInvalidArgument},
		{"refused", wire.Create{ID: id.NewContainer(), Spec: &specs.Spec{Hostname: "refuse"}}, errdefs.ErrInvalidArgument},
		{"panic", wire.Create{ID: id.NewContainer(), Spec: &specs.Spec{Hostname: "panic"}}, errdefs.ErrInternal},
		{"key not kept", wire.Create{ID: id.NewContainer(), Spec: shell("true"), Namespaces: map[specs.LinuxNamespaceType]string{"network": "x"}}, errdefs.ErrNotFound},
		{"join of nobody", wire.Create{ID: id.NewContainer(), Spec: shell("true"), JoinPID: id.NewContainer()}, errdefs.ErrNotFound},
	} {
		if err := c.Create(t.Context(), tc.r); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
	list, err := c.List(t.Context())
	if err != nil || len(list) != 1 || list[0].State != wire.Created {
		t.Errorf("list %+v, %v", list, err)
	}
}

func TestJoinPID(t *testing.T) {
	n := newNode(t)
	c := n.open()
	a, _ := start(t, c, n.dir, wire.Create{Spec: shell("exec sleep 60")})
	r := wire.Create{ID: id.NewContainer(), Spec: shell("true"), JoinPID: a}
	if err := c.Create(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if err := c.Signal(t.Context(), wire.Signal{ID: a, Signal: 9, All: true}); err != nil {
		t.Fatal(err)
	}
	exitOf(t, c, a)
	r.ID = id.NewContainer()
	if err := c.Create(t.Context(), r); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("join of a dead one: %v", err)
	}
}

func TestKilledClientLosesNothing(t *testing.T) {
	n := newNode(t)
	const lines = 3000
	k, log := id.NewContainer(), filepath.Join(n.dir, "logs", "0.log")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), role+"=client", "STATE="+n.dir, "ID="+string(k), "LOG="+log,
		fmt.Sprintf("SCRIPT=i=0; while [ $i -lt %d ]; do echo line $i; i=$((i+1)); [ $((i %% 100)) = 0 ] && sleep 0.02; done; exit 7", lines))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said, _ := bufio.NewReader(out).ReadString('\n')
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if said != "started <nil>\n" {
		t.Fatalf("client said %q", said)
	}
	c := n.open()
	var info []wire.Info
	waitFor(t, "exit record in the list", func() bool {
		info, err = c.List(t.Context())
		return err == nil && len(info) == 1 && info[0].State == wire.Exited
	})
	if t.Failed() || info[0].ID != k || info[0].Exit.Code != 7 {
		t.Fatalf("list %+v, %v", info, err)
	}
	got := contents(t, log, "stdout")
	if len(got) != lines {
		t.Fatalf("%d lines, want %d", len(got), lines)
	}
	for i, l := range got {
		if l != "line "+strconv.Itoa(i) {
			t.Fatalf("line %d is %q", i, l)
		}
	}
}

func execIn(t *testing.T, c *client.Client, k id.Container, script string, in, out *os.File) (id.Exec, int, <-chan wire.Exit) {
	t.Helper()
	x := id.NewExec()
	pid, console, exit, err := c.Exec(t.Context(), wire.Exec{ID: k, Exec: x, Process: shell(script).Process}, in, out, nil)
	if err != nil {
		t.Fatal(err)
	}
	if console != nil {
		t.Error("console without a terminal")
	}
	return x, pid, exit
}

func TestExec(t *testing.T) {
	n := newNode(t)
	c := n.open()
	k, _ := start(t, c, n.dir, wire.Create{Spec: shell("exec sleep 60")})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_, pid, exit := execIn(t, c, k, "echo hello; exit 3", nil, w)
	w.Close()
	b, err := io.ReadAll(r)
	if err != nil || string(b) != "hello\n" {
		t.Errorf("output %q, %v", b, err)
	}
	select {
	case e := <-exit:
		if e.Code != 3 || e.Pid != pid || e.ID != k {
			t.Errorf("exit %+v", e)
		}
	case <-time.After(5 * time.Second):
		t.Error("no exit")
	}
	_, _, _, err = c.Exec(t.Context(), wire.Exec{ID: k, Exec: id.NewExec(), Process: &specs.Process{Args: []string{"/nope"}}}, nil, nil, nil)
	if !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("missing program: %v", err)
	}
}

func TestExecKillTree(t *testing.T) {
	n := newNode(t)
	c := n.open()
	k, _ := start(t, c, n.dir, wire.Create{Spec: shell("exec sleep 60")})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// A child, a daemonised grandchild in the same session, and one in a session of its own.
	x, pid, exit := execIn(t, c, k, `sleep 61 & echo $!; (sleep 62 & echo $!); setsid sleep 63 & echo $!; echo end; wait; sleep 64`, nil, w)
	w.Close()
	pids := []int{pid}
	for s := bufio.NewScanner(r); s.Scan() && s.Text() != "end"; {
		p, err := strconv.Atoi(s.Text())
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, p)
	}
	if len(pids) != 4 {
		t.Fatalf("pids %v", pids)
	}
	if err := c.Signal(t.Context(), wire.Signal{ID: k, Exec: x, Signal: 9, All: true}); err != nil {
		t.Fatal(err)
	}
	for _, p := range pids {
		waitFor(t, fmt.Sprintf("pid %d to die", p), func() bool { return !alive(p) })
	}
	if e := <-exit; e.Code != 137 {
		t.Errorf("exit %+v", e)
	}
	if list, _ := c.List(t.Context()); len(list) != 1 || list[0].State != wire.Running {
		t.Errorf("the container went down with its exec: %+v", list)
	}
	waitFor(t, "orphans to be reaped", func() bool {
		for _, p := range pids {
			if _, err := os.Stat("/proc/" + strconv.Itoa(p)); err == nil {
				return false
			}
		}
		return true
	})
}

func TestTerminal(t *testing.T) {
	n := newNode(t)
	c := n.open()
	spec := shell("read a; stty size; echo got $a")
	spec.Process.Terminal = true
	k, log := start(t, c, n.dir, wire.Create{Spec: spec, Stdin: true})
	if err := c.Resize(t.Context(), wire.Resize{ID: k, Width: 100, Height: 40}); err != nil {
		t.Fatal(err)
	}
	in, err := c.Stdin(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := in.WriteString("word\n"); err != nil {
		t.Fatal(err)
	}
	if e := exitOf(t, c, k); e.Code != 0 {
		t.Errorf("exit %+v", e)
	}
	got := strings.Join(contents(t, log, "stdout"), "|")
	if !strings.Contains(got, "40 100\r") || !strings.Contains(got, "got word\r") {
		t.Errorf("log %q", got)
	}
}

func TestStdin(t *testing.T) {
	for _, once := range []bool{false, true} {
		n := newNode(t)
		c := n.open()
		k, log := start(t, c, n.dir, wire.Create{Spec: shell("cat; echo eof"), Stdin: true, StdinOnce: once})
		in, err := c.Stdin(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.WriteString("a\n"); err != nil {
			t.Fatal(err)
		}
		in.Close()
		if !once {
			if err := c.CloseStdin(t.Context(), k); err != nil {
				t.Fatal(err)
			}
		}
		exitOf(t, c, k)
		if got := contents(t, log, "stdout"); strings.Join(got, "|") != "a|eof" {
			t.Errorf("once %v: log %q", once, got)
		}
	}
}

func TestAttach(t *testing.T) {
	n := newNode(t)
	c := n.open()
	const lines = 28000
	k, log := start(t, c, n.dir, wire.Create{Stdin: true,
		Spec: shell(fmt.Sprintf("read go; i=0; while [ $i -lt %d ]; do echo 0123456789012345678901234567890123456789 $i; i=$((i+1)); done", lines))})
	fastR, fastW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer fastR.Close()
	slowR, slowW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer slowR.Close()
	for _, w := range []*os.File{fastW, slowW} {
		if err := c.Attach(t.Context(), k, w, nil); err != nil {
			t.Fatal(err)
		}
		w.Close()
	}
	in, err := c.Stdin(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := in.WriteString("\n"); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(fastR) // ends when the supervisor closes its end
	if err != nil {
		t.Fatal(err)
	}
	if got := bytes.Count(all, []byte("\n")); got != lines {
		t.Errorf("attached reader got %d lines", got)
	}
	exitOf(t, c, k)
	if got := len(contents(t, log, "stdout")); got != lines {
		t.Errorf("log has %d lines", got)
	}
	cut, err := io.ReadAll(slowR) // what the pipe held when it was cut off
	if err != nil || len(cut) >= len(all) {
		t.Errorf("slow reader got %d of %d bytes, %v", len(cut), len(all), err)
	}
	if err := c.Attach(t.Context(), k, nil, nil); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("attach to an exited container: %v", err)
	}
}

func TestReopenLog(t *testing.T) {
	n := newNode(t)
	c := n.open()
	k, log := start(t, c, n.dir, wire.Create{Spec: shell("i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done")})
	for i := range 5 {
		if err := os.Rename(log, log+"."+strconv.Itoa(i)); err != nil {
			t.Fatal(err)
		}
		if err := c.ReopenLog(t.Context(), wire.ReopenLog{ID: k, Path: log}); err != nil {
			if errors.Is(err, errdefs.ErrFailedPrecondition) { // it was quicker than we
				_ = os.Rename(log+"."+strconv.Itoa(i), log)
				break
			}
			t.Fatal(err)
		}
	}
	exitOf(t, c, k)
	var got []string
	for i := range 5 {
		if _, err := os.Stat(log + "." + strconv.Itoa(i)); err == nil {
			got = append(got, contents(t, log+"."+strconv.Itoa(i), "stdout")...)
		}
	}
	got = append(got, contents(t, log, "stdout")...)
	for i, l := range got {
		if l != strconv.Itoa(i) {
			t.Fatalf("line %d is %q", i, l)
		}
	}
	if len(got) != 20000 {
		t.Errorf("%d lines", len(got))
	}
}

func TestKeptFDs(t *testing.T) {
	n := newNode(t)
	c := n.open()
	path := filepath.Join(n.dir, "file")
	if err := os.WriteFile(path, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.PutFDs(t.Context(), []string{"a", "b"}, []*os.File{f, f}); err != nil {
		t.Fatal(err)
	}
	f.Close()
	c.Close()
	c = n.open()
	if keys, err := c.ListFDs(t.Context()); err != nil || strings.Join(keys, ",") != "a,b" {
		t.Errorf("keys %v, %v", keys, err)
	}
	got, err := c.GetFDs(t.Context(), []string{"b"})
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(got[0]); string(b) != "kept" {
		t.Errorf("content %q", b)
	}
	got[0].Close()
	if _, err := c.GetFDs(t.Context(), []string{"a", "x"}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("missing key: %v", err)
	}
	for range 2 {
		if err := c.DropFDs(t.Context(), []string{"a", "b"}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestEndsByItselfAndIsAlone(t *testing.T) {
	n := newNode(t)
	c := n.open()
	pid := n.pid()
	if err := exec.Command(os.Args[0], "--state", n.dir).Run(); err == nil {
		t.Error("a second supervisor serves the directory")
	}
	k, _ := start(t, c, n.dir, wire.Create{Spec: shell("exec sleep 60")})
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	if list, err := c.List(t.Context()); err != nil || len(list) != 1 || n.pid() != pid {
		t.Fatalf("SIGTERM with a running container: %+v, %v", list, err)
	}
	if err := c.Delete(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	c.Close()
	begin := time.Now()
	waitFor(t, "the supervisor to end", func() bool { return !alive(pid) })
	if d := time.Since(begin); d < 4*time.Second {
		t.Errorf("ended after %v", d)
	}
	if _, err := os.Stat(filepath.Join(n.dir, supervisor.SocketName)); err == nil {
		t.Error("socket is left")
	}
}

func TestReconnectsToANewSupervisor(t *testing.T) {
	n := newNode(t)
	c := n.open()
	pid := n.pid()
	k, _ := start(t, c, n.dir, wire.Create{Spec: shell("exec sleep 60")})
	_, xpid, exit := execIn(t, c, k, "exec sleep 60", nil, nil)
	before, err := c.List(t.Context())
	if err != nil || len(before) != 1 {
		t.Fatal(before, err)
	}
	t.Cleanup(func() { // nobody else knows them any more
		for _, p := range []int{before[0].Pid, xpid} {
			_ = unix.Kill(p, unix.SIGKILL)
			waitFor(t, "an abandoned process to end", func() bool { return !alive(p) })
		}
	})
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case e := <-exit:
		if e.Code != client.ExitUnknown {
			t.Errorf("exec of a dead supervisor: %+v", e)
		}
	case <-time.After(5 * time.Second):
		t.Error("exec never ended")
	}
	select {
	case <-c.Resync():
	case <-time.After(5 * time.Second):
		t.Fatal("no resync")
	}
	list, err := c.List(t.Context())
	if err != nil || len(list) != 0 || n.pid() == pid {
		t.Errorf("list %+v, %v, pid %d", list, err, n.pid())
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	n := newNode(b)
	c := n.open()
	for b.Loop() {
		if _, err := c.ListFDs(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkContainerLog is a whole container's output: pipe, supervisor, file.
func BenchmarkContainerLog(b *testing.B) {
	n := newNode(b)
	c := n.open()
	const size = 256 << 20
	line := strings.Repeat("x", 99)
	b.SetBytes(size)
	for b.Loop() {
		k, log := start(b, c, n.dir, wire.Create{Spec: shell(fmt.Sprintf("yes %s | head -c %d", line, size))})
		exitOf(b, c, k)
		if err := c.Delete(b.Context(), k); err != nil {
			b.Fatal(err)
		}
		_ = os.Remove(log)
	}
}
