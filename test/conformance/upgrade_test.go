package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/internal/id"
	"github.com/berth-runtime/berth/oci/supervisor/wire"
	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/pace"
)

// otherSupervisor builds a supervisor of another version from the sources in dir.
func otherSupervisor(t *testing.T, dir, version string) string {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skipf("needs the go command to build another supervisor: %v", err)
	}
	bin := filepath.Join(t.TempDir(), "berth-supervisor")
	build := exec.Command("go", "build", "-o", bin, "-ldflags", "-X github.com/berth-runtime/berth/internal/version.Version="+version, "./cmd/berth-supervisor")
	build.Dir, build.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}

// checkout is the top of the sources.
func checkout(t *testing.T) string {
	t.Helper()
	bin, err := harness.Bin()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(bin)
}

// ownNode runs the test on a daemon of its own with another supervisor program,
// in place of the shared one, whose pods are gone.
func ownNode(t *testing.T, bin string) {
	t.Helper()
	shared := node
	endSupervisor(t)
	own, err := harness.New(t.TempDir(), "--log-level", "debug")
	if err != nil {
		t.Fatal(err)
	}
	node = own
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(own.LogTail(4096))
		}
		if err := own.Close(context.Background()); err != nil {
			t.Error(err)
		}
		node = shared
		if err := node.Start(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if err := node.Config(fmt.Sprintf("[runtime]\nsupervisor = %q\n", bin)); err != nil {
		t.Fatal(err)
	}
	if err := node.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Images.PullImage(ctx(t), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: images.prog}}); err != nil {
		t.Fatal(err)
	}
}

// endSupervisor ends the daemon, and the supervisor, which has nothing to do.
func endSupervisor(t *testing.T) {
	t.Helper()
	pid := node.SupervisorPid()
	if err := node.Kill(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if pid == 0 {
		return
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && err != syscall.ESRCH {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(pace.Wait(10 * time.Second)); node.SupervisorPid() == pid; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("supervisor %d does not end", pid)
		}
	}
}

// programOf tells which program the supervisor runs.
func programOf(t *testing.T, pid int) string {
	t.Helper()
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// TestSupervisorUpgrade: a daemon that finds a supervisor of another version makes
// it the new one: the same process, the same children, and nobody notices.
func TestSupervisorUpgrade(t *testing.T) {
	ownNode(t, otherSupervisor(t, checkout(t), "0.0.9"))
	p := runPod(t, sharedPID)
	shared := create(t, p, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	})
	start(t, shared)
	own := runPod(t, nil)
	sleeper := run(t, own, "sleep", "1000")
	counter := run(t, own, "count", "4000", "1000")
	created := create(t, own, nil)
	pending := map[string]int32{}
	for i := range 8 {
		pending[run(t, own, "exit-after", fmt.Sprint(100+60*i), fmt.Sprint(30+i))] = int32(30 + i)
	}
	pids := map[string]int{shared: pidOf(t, shared), sleeper: pidOf(t, sleeper)}
	old := node.SupervisorPid()
	if !strings.Contains(programOf(t, old), "TestSupervisorUpgrade") {
		t.Fatalf("supervisor is %s", programOf(t, old))
	}
	if err := node.Config(""); err != nil {
		t.Fatal(err)
	}
	restart(t, nil)
	if now := node.SupervisorPid(); now != old {
		t.Fatalf("supervisor %d, was %d", now, old)
	}
	if exe := programOf(t, old); exe != filepath.Join(checkout(t), "bin", "berth-supervisor") {
		t.Fatalf("supervisor is %s", exe)
	}
	for c, pid := range pids {
		wantRunning(t, c, pid)
	}
	for c, code := range pending {
		if s := waitExit(t, c); s.ExitCode != code || s.Reason != "Error" {
			t.Errorf("pending exit: %v", s)
		}
	}
	start(t, created)
	wantRunning(t, created, pidOf(t, created))
	if s := waitExit(t, counter); s.ExitCode != 0 {
		t.Errorf("%v", s)
	}
	if got := logs(t, counter); len(got) != 4000 || got[3999].content != "3999" {
		t.Errorf("%d lines", len(got))
	}
	killSupervisor(t) // what was upgraded can be taken over as well
	for c, pid := range pids {
		wantRunning(t, c, pid)
	}
	stop(t, sleeper, 0)
	ended(t, containerStatus(t, sleeper), 137, "Error")
}

// supervisorConn connects to the supervisor's own socket.
func supervisorConn(t *testing.T) *wire.Conn {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(node.Dir, "run", "supervisor.sock")}); err != nil {
		t.Fatal(err)
	}
	conn, err := wire.NewConn(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// asks sends a request over the supervisor's own socket.
func asks(t *testing.T, conn *wire.Conn, op wire.Op, r any) {
	t.Helper()
	body, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Send(wire.Frame{ID: 1, Op: op, Body: body}); err != nil {
		t.Fatal(err)
	}
}

// askUpgrade asks the supervisor to become another program.
func askUpgrade(t *testing.T, bin string) {
	t.Helper()
	conn := supervisorConn(t)
	defer conn.Close()
	asks(t, conn, wire.OpUpgrade, wire.Upgrade{Binary: bin})
	if f, _, err := conn.Recv(); err == nil {
		t.Fatalf("upgrade: %v", f.Err)
	}
}

// TestSupervisorUpgradeBesideADeadDisk: execve(2) first ends all threads, and one
// that sleeps uninterruptibly does not end. The supervisor stays what it is, rather
// than being nothing until the disk of one container's log answers.
func TestSupervisorUpgradeBesideADeadDisk(t *testing.T) {
	dir, revive := deadMount(t)
	p := runPod(t, nil)
	c, other := run(t, p, "sleep", "1000"), run(t, p, "sleep", "1000")
	t.Cleanup(revive) // before the pod's removal
	asks(t, supervisorConn(t), wire.OpReopenLog, wire.ReopenLog{ID: id.Container(c), Path: filepath.Join(dir, "dead")})
	time.Sleep(100 * time.Millisecond) // it has begun
	pid := node.SupervisorPid()
	conn := supervisorConn(t)
	if err := conn.SetRecvDeadline(time.Now().Add(pace.Wait(20 * time.Second))); err != nil {
		t.Fatal(err)
	}
	asks(t, conn, wire.OpUpgrade, wire.Upgrade{Binary: filepath.Join(checkout(t), "bin", "berth-supervisor")})
	if f, _, err := conn.Recv(); err != nil || f.Err == nil || !errdefs.IsUnavailable(f.Err) {
		t.Errorf("upgrade: %v, %v", f.Err, err)
	}
	if code := execCode(t, other, "/bin/exit", "5"); code != 5 {
		t.Errorf("exec: code %d", code)
	}
	if now := node.SupervisorPid(); now != pid {
		t.Errorf("supervisor %d, was %d", now, pid)
	}
}

// TestSupervisorUpgradeUnderSessions: the daemon goes on, and so do its sessions.
// The supervisor becomes another version, and then, when the daemon sees that, the
// daemon's own again.
func TestSupervisorUpgradeUnderSessions(t *testing.T) {
	other := otherSupervisor(t, checkout(t), "0.0.9")
	p := runPod(t, nil)
	c := run(t, p, "sleep", "1000")
	s := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/cat"}, Stdin: true, Stdout: true}), true, true, false, false)
	code := make(chan error, 1)
	go func() {
		r, err := node.Runtime.ExecSync(ctx(t), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"/bin/exit-after", "1500", "9"}})
		if err == nil && r.ExitCode != 9 {
			err = fmt.Errorf("code %d", r.ExitCode)
		}
		code <- err
	}()
	time.Sleep(100 * time.Millisecond) // it has begun
	pid := node.SupervisorPid()
	askUpgrade(t, other)
	if _, err := io.WriteString(s.in, "after\n"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len("after\n"))
	if _, err := io.ReadFull(s.out, b); err != nil || string(b) != "after\n" {
		t.Fatalf("%q: %v", b, err)
	}
	if err := s.in.Close(); err != nil {
		t.Fatal(err)
	}
	if code := s.exitCode(t); code != "0" {
		t.Errorf("session: %s", code)
	}
	if err := <-code; err != nil {
		t.Error(err)
	}
	wantRunning(t, c, pidOf(t, c))
	if now := node.SupervisorPid(); now != pid {
		t.Errorf("supervisor %d, was %d", now, pid)
	}
	if exe := programOf(t, pid); exe != filepath.Join(checkout(t), "bin", "berth-supervisor") {
		t.Errorf("supervisor is %s", exe)
	}
	b, err := os.ReadFile(filepath.Join(node.Dir, "run", "supervisor.log"))
	if err != nil || strings.Count(string(b), "msg=upgrade from=") < 2 {
		t.Errorf("upgrades: %v\n%s", err, b)
	}
}

// TestSupervisorUpgradeBetweenExitAndRecord: the first process has ended and is
// reaped, and its output is still waited for, since somebody outside holds the pipe.
// The other program cannot ask the kernel any more how it ended.
func TestSupervisorUpgradeBetweenExitAndRecord(t *testing.T) {
	other := otherSupervisor(t, checkout(t), "0.0.9")
	p := runPod(t, nil)
	c := run(t, p, "exit-after", "300", "33")
	pid := pidOf(t, c)
	stdout, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/1", pid), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer stdout.Close()
	for deadline := time.Now().Add(pace.Wait(10 * time.Second)); syscall.Kill(pid, 0) == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("does not end")
		}
	}
	askUpgrade(t, other)
	if s := waitExit(t, c); s.ExitCode != 33 {
		t.Errorf("%v", s)
	}
}

// wire3 is the last commit whose supervisor speaks version 3 of the protocol.
const wire3 = "6246edf"

// TestOldSupervisorServesANewDaemon: containers, execs and exits by a supervisor
// of an older wire version, which cannot be upgraded and goes on as it is.
func TestOldSupervisorServesANewDaemon(t *testing.T) {
	dir := t.TempDir()
	archive := exec.Command("sh", "-c", "git archive "+wire3+" | tar -x -C "+dir)
	archive.Dir = checkout(t)
	if out, err := archive.CombinedOutput(); err != nil {
		t.Skipf("the history is not here: %v %s", err, out)
	}
	ownNode(t, otherSupervisor(t, dir, "0.1.0-wire3"))
	p := runPod(t, nil)
	c := run(t, p, "sleep", "1000")
	counter := run(t, p, "count", "1500", "1000")
	pending := run(t, p, "exit-after", "500", "11")
	pid := node.SupervisorPid()
	restart(t, nil)
	if now := node.SupervisorPid(); now != pid {
		t.Fatalf("supervisor %d, was %d", now, pid)
	}
	wantRunning(t, c, pidOf(t, c))
	if s := waitExit(t, pending); s.ExitCode != 11 {
		t.Errorf("%v", s)
	}
	if s := waitExit(t, counter); s.ExitCode != 0 || len(logs(t, counter)) != 1500 {
		t.Errorf("%v, %d lines", s, len(logs(t, counter)))
	}
	other := run(t, p, "sleep", "1000")
	wantRunning(t, other, pidOf(t, other))
	if code := execCode(t, other, "/bin/exit", "5"); code != 5 {
		t.Errorf("exec: code %d", code)
	}
	stop(t, c, 0)
	if s := containerStatus(t, c); s.ExitCode != 137 {
		t.Errorf("%v", s)
	}
}

func execCode(t *testing.T, c string, cmd ...string) int32 {
	t.Helper()
	_, _, code := execSync(t, c, cmd...)
	return code
}
