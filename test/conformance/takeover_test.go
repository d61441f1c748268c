package conformance

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-runtime/berth/test/harness"
	"github.com/berth-runtime/berth/test/pace"
)

// killSupervisor kills the shared daemon's supervisor and returns when another
// one serves.
func killSupervisor(t *testing.T) {
	t.Helper()
	old := node.SupervisorPid()
	if old == 0 {
		t.Fatal("there is no supervisor")
	}
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(pace.Wait(20 * time.Second)); ; time.Sleep(5 * time.Millisecond) {
		if p := node.SupervisorPid(); p != 0 && p != old {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no supervisor takes over")
		}
	}
}

// wantRunning checks that a container is as it was and can be used.
func wantRunning(t *testing.T, c string, pid int) {
	t.Helper()
	if s := containerStatus(t, c); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("container: %v", s)
	}
	if now := pidOf(t, c); now != pid {
		t.Errorf("process %d, was %d", now, pid)
	}
	if out, _, code := execSync(t, c, "/bin/echo", "here"); out != "here\n" || code != 0 {
		t.Errorf("exec: %q %d", out, code)
	}
}

// ended checks how a container ended that may have lost its supervisor.
func ended(t *testing.T, s *cri.ContainerStatus, code int32, reason string) {
	t.Helper()
	if s.State == cri.ContainerState_CONTAINER_EXITED && s.ExitCode == code && s.Reason == reason {
		return
	}
	if harness.CodeUnknown(s) {
		return
	}
	t.Errorf("ended with %d %s (%s), want %d %s", s.ExitCode, s.Reason, s.Message, code, reason)
}

// TestTheSupervisorIsKilled: no container notices, however often.
func TestTheSupervisorIsKilled(t *testing.T) {
	p := runPod(t, sharedPID)
	shared := create(t, p, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	})
	start(t, shared)
	own := runPod(t, nil)
	c := run(t, own, "sleep", "1000")
	created := create(t, own, nil)
	over := run(t, own, "exit", "3")
	waitExit(t, over)
	pids := map[string]int{shared: pidOf(t, shared), c: pidOf(t, c)}
	for range 3 {
		killSupervisor(t)
		for id, pid := range pids {
			wantRunning(t, id, pid)
		}
		if s := podStatus(t, p.id); s.State != cri.PodSandboxState_SANDBOX_READY {
			t.Errorf("pod: %v", s)
		}
		if s := containerStatus(t, created); s.State != cri.ContainerState_CONTAINER_CREATED {
			t.Errorf("created container: %v", s)
		}
		if s := containerStatus(t, over); s.ExitCode != 3 {
			t.Errorf("ended container: %v", s)
		}
	}
	start(t, created)
	wantRunning(t, created, pidOf(t, created))
	again := run(t, own, "sleep", "1000") // the pod's namespaces were handed over
	if out, _, code := execSync(t, again, "/bin/hostname"); code != 0 || out != own.config.Hostname+"\n" {
		t.Errorf("container in an old pod: %q %d", out, code)
	}
	// Once more with a daemon that was not there when they were started.
	restart(t, nil)
	killSupervisor(t)
	for id, pid := range pids {
		wantRunning(t, id, pid)
	}
	for _, id := range []string{shared, c, created} {
		stop(t, id, 0)
		ended(t, containerStatus(t, id), 137, "Error")
	}
}

// TestExitsWithoutASupervisor: who ends while no supervisor is there, and after it
// was replaced, has the right exit code.
func TestExitsWithoutASupervisor(t *testing.T) {
	p := runPod(t, nil)
	codes := map[string]int32{}
	for i := range 10 {
		codes[run(t, p, "exit-after", fmt.Sprint(100+i*40), fmt.Sprint(40+i))] = int32(40 + i)
	}
	for range 3 {
		killSupervisor(t)
		time.Sleep(70 * time.Millisecond)
	}
	for c, code := range codes {
		ended(t, waitExit(t, c), code, "Error")
	}
}

// TestLogsOutliveTheSupervisor: every line is in the log, once.
func TestLogsOutliveTheSupervisor(t *testing.T) {
	p := runPod(t, nil)
	const lines, pause = 4000, 1000 // microseconds
	counter := run(t, p, "count", fmt.Sprint(lines), fmt.Sprint(pause))
	quick := run(t, p, "count", "20000", "1")
	for range 6 {
		killSupervisor(t)
		time.Sleep(200 * time.Millisecond)
	}
	for c, want := range map[string]int{counter: lines, quick: 20000} {
		ended(t, waitExit(t, c), 0, "Completed")
		got := logs(t, c)
		var gap time.Duration
		for i, r := range got {
			if i > 0 {
				gap = max(gap, r.at.Sub(got[i-1].at))
			}
			if r.content != fmt.Sprint(i) || r.tag != "F" {
				t.Fatalf("line %d of the log is %s %q", i, r.tag, r.content)
			}
		}
		if len(got) != want {
			t.Errorf("%d of %d lines", len(got), want)
		}
		t.Logf("longest time without a line: %v", gap)
	}
}

// TestExecsOutliveTheSupervisor: sessions with and without a terminal go on and
// tell their exit code.
func TestExecsOutliveTheSupervisor(t *testing.T) {
	p := runPod(t, nil)
	c := run(t, p, "sleep", "1000")
	var wg sync.WaitGroup
	wg.Go(func() {
		r, err := node.Runtime.ExecSync(ctx(t), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"/bin/exit-after", "1500", "7"}})
		if !harness.CodesSurvive() && status.Code(err) == codes.Unavailable {
			return
		}
		if err != nil || r.ExitCode != 7 {
			t.Errorf("ExecSync: %v %v", r, err)
		}
	})
	plain := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/cat"}, Stdin: true, Stdout: true}), true, true, false, false)
	tty := open(t, execURL(t, c, &cri.ExecRequest{Cmd: []string{"/bin/cat"}, Stdin: true, Stdout: true, Tty: true}), true, true, false, true)
	echoes := func(s *session, text string) {
		t.Helper()
		if _, err := io.WriteString(s.in, text+"\n"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, len(text))
		if _, err := io.ReadFull(s.out, b); err != nil || string(b) != text {
			t.Fatalf("%q: %v", b, err)
		}
	}
	echoes(plain, "before")
	echoes(tty, "before")
	time.Sleep(100 * time.Millisecond) // the ExecSync has begun
	killSupervisor(t)
	// "before" comes twice from a terminal: its echo, and from the program.
	if _, err := io.ReadFull(tty.out, make([]byte, len("\r\nbefore\r\n"))); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(plain.out, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	echoes(plain, "after")
	echoes(tty, "after")
	if err := plain.in.Close(); err != nil {
		t.Fatal(err)
	}
	if code := plain.exitCode(t); code != "0" && harness.CodesSurvive() {
		t.Errorf("session: %s", code)
	}
	if _, err := io.WriteString(tty.in, "\x04"); err != nil {
		t.Fatal(err)
	}
	if code := tty.exitCode(t); code != "0" && harness.CodesSurvive() {
		t.Errorf("session with a terminal: %s", code)
	}
	wg.Wait()
	// A command that takes too long can be killed by the supervisor that inherited it.
	begin := time.Now()
	done := make(chan error, 1)
	go func() {
		_, err := node.Runtime.ExecSync(ctx(t), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"/bin/sleep", "98761"}, Timeout: 2})
		done <- err
	}()
	time.Sleep(100 * time.Millisecond)
	killSupervisor(t)
	if err := <-done; err == nil || !strings.Contains(err.Error(), "timed out after 2 s") {
		t.Errorf("timeout: %v", err)
	}
	if d := time.Since(begin); d > pace.Wait(15*time.Second) {
		t.Errorf("timeout after %v", d)
	}
	cmdlines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range cmdlines {
		if b, _ := os.ReadFile(file); strings.Contains(string(b), "98761") {
			t.Errorf("the command goes on: %s %q", file, b)
		}
	}
}

// TestStdinOutlivesTheSupervisor: with and without a terminal.
func TestStdinOutlivesTheSupervisor(t *testing.T) {
	for _, tty := range []bool{false, true} {
		t.Run(fmt.Sprintf("tty=%v", tty), func(t *testing.T) {
			p := runPod(t, nil)
			cfg := containerConfig([]string{"cat"})
			cfg.Stdin, cfg.Tty = true, tty
			c := createConfig(t, p, cfg)
			start(t, c)
			killSupervisor(t)
			r, err := node.Runtime.Attach(ctx(t), &cri.AttachRequest{ContainerId: c, Stdin: true, Stdout: true, Tty: tty})
			if err != nil {
				t.Fatal(err)
			}
			s := open(t, r.Url, true, true, false, tty)
			if _, err := io.WriteString(s.in, "hello\n"); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, len("hello"))
			if _, err := io.ReadFull(s.out, b); err != nil || string(b) != "hello" {
				t.Fatalf("%q: %v", b, err)
			}
			waitLog(t, c, "hello")
		})
	}
}

// TestRequestsOutliveTheSupervisor: what was asked of a supervisor that died, the
// next one does.
func TestRequestsOutliveTheSupervisor(t *testing.T) {
	for round := range 12 {
		p := preparePod(t, nil)
		lived := make(chan error, 1)
		go func() { lived <- life(t, p) }()
		time.Sleep(time.Duration(round) * 1500 * time.Microsecond)
		killSupervisor(t)
		if err := <-lived; err != nil {
			t.Errorf("round %d: %v", round, err)
		}
	}
}

// life runs a pod with one container, and takes both down.
func life(t *testing.T, p *pod) error {
	r, err := node.Runtime.RunPodSandbox(ctx(t), &cri.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		return fmt.Errorf("RunPodSandbox: %w", err)
	}
	p.id = r.PodSandboxId
	cr, err := node.Runtime.CreateContainer(ctx(t), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: containerConfig([]string{"sleep", "1000"}), SandboxConfig: p.config})
	if err != nil {
		return fmt.Errorf("CreateContainer: %w", err)
	}
	if _, err := node.Runtime.StartContainer(ctx(t), &cri.StartContainerRequest{ContainerId: cr.ContainerId}); err != nil {
		return fmt.Errorf("StartContainer: %w", err)
	}
	if _, err := node.Runtime.StopContainer(ctx(t), &cri.StopContainerRequest{ContainerId: cr.ContainerId}); err != nil {
		return fmt.Errorf("StopContainer: %w", err)
	}
	if _, err := node.Runtime.RemoveContainer(ctx(t), &cri.RemoveContainerRequest{ContainerId: cr.ContainerId}); err != nil {
		return fmt.Errorf("RemoveContainer: %w", err)
	}
	if _, err := node.Runtime.StopPodSandbox(ctx(t), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("StopPodSandbox: %w", err)
	}
	if _, err := node.Runtime.RemovePodSandbox(ctx(t), &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("RemovePodSandbox: %w", err)
	}
	return nil
}

// TestExternalHandlersOutliveTheSupervisor is TestTheSupervisorIsKilled for
// containers of runc and crun.
func TestExternalHandlersOutliveTheSupervisor(t *testing.T) {
	for _, e := range externals {
		t.Run(e.name, func(t *testing.T) {
			needExternal(t, e.name, e.path)
			t.Cleanup(func() { nothingOf(t, e.name) })
			p := onHandler(t, e.name, nil)
			c := run(t, p, "sleep", "1000")
			counter := run(t, p, "count", "500", "1000")
			created := create(t, p, nil)
			pid := pidOf(t, c)
			for range 2 {
				killSupervisor(t)
				wantRunning(t, c, pid)
			}
			start(t, created)
			wantRunning(t, created, pidOf(t, created))
			ended(t, waitExit(t, counter), 0, "Completed")
			if n := len(logs(t, counter)); n != 500 {
				t.Errorf("%d of 500 lines", n)
			}
			stop(t, c, 0)
			ended(t, containerStatus(t, c), 137, "Error")
		})
	}
}
