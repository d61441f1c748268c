package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestCreateStartKillDelete(t *testing.T) {
	b := newBench(t, "sleep")
	b.spec.Annotations = map[string]string{"a": "b"}
	id := b.id()
	b.do("create", "--bundle", b.bundle, "--pid-file", filepath.Join(b.bundle, "pid"), id).ok()
	s := b.state(id)
	pid, _ := os.ReadFile(filepath.Join(b.bundle, "pid"))
	if s.Status != "created" || strconv.Itoa(s.Pid) != string(pid) || s.Bundle != b.bundle || s.Owner != "root" ||
		s.Rootfs != filepath.Join(b.bundle, "rootfs") || s.Annotations["a"] != "b" || s.ID != id || s.OCIVersion == "" || s.Created.IsZero() {
		t.Fatalf("state: %+v, pid file %q", s, pid)
	}
	if fi, err := os.Stat(filepath.Join(b.root, id)); err != nil || fi.Mode().Perm() != 0o700 {
		t.Fatalf("state directory: %v %v", fi, err)
	}
	b.do("create", id).exits(1).says("container with given ID already exists")
	b.do("exec", id, "prog", "echo", "early").ok().prints("early\n")
	b.do("start", id).ok()
	b.status(id, "running")
	b.do("start", id).exits(1).says("cannot start an already running container")
	b.do("delete", id).exits(1).says("is not stopped: running")

	var list []description
	if err := json.Unmarshal([]byte(b.do("list", "--format", "json").ok().out), &list); err != nil || len(list) != 1 || list[0].ID != id {
		t.Fatalf("list: %v %v", list, err)
	}
	b.do("list", "-q").ok().prints(id + "\n")
	if out := b.do("list").ok().out; !strings.HasPrefix(out, "ID ") || !strings.Contains(out, "running") {
		t.Fatalf("list: %q", out)
	}
	b.do("list", "--format", "xml").exits(1).says("xml")

	b.do("kill", id, "nosuch").exits(1).says("unknown signal")
	b.do("kill", id, "SIGTERM").ok() // the program ends on it
	b.eventually("stopped", func() bool { return b.state(id).Status == "stopped" })
	if p := b.state(id).Pid; p != 0 {
		t.Fatalf("pid %d of a stopped container", p)
	}
	b.do("kill", id, "0").exits(1).says("container not running")
	b.do("kill", "--all", id, "9").ok()
	b.do("start", id).exits(1).says("cannot start a container that has stopped")
	b.do("exec", id, "prog", "true").exits(255).says("exec failed", "stopped container")
	b.do("delete", id).ok()
	b.do("state", id).exits(1).says("container does not exist")
	b.do("delete", id).exits(1).says("container does not exist")
	b.do("delete", "--force", id).ok()
	b.nothingLeft()
}

func TestDeleteOfACreatedContainerNeedsNoForce(t *testing.T) {
	b := newBench(t, "sleep")
	id := b.id()
	b.do("create", id).ok()
	b.do("delete", id).ok()
	b.nothingLeft()
}

// A second container in the cgroup of the first would take it along when it is deleted.
func TestACgroupInUseIsRefused(t *testing.T) {
	b, id := sleeper(t)
	b.do("run", "-d", "second").exits(1).says("linux.cgroupsPath", "container's cgroup is not empty")
	b.do("delete", "--force", "second").ok()
	b.status(id, "running")
}

func TestKillEndsACreatedContainer(t *testing.T) {
	b := newBench(t, "sleep")
	id := b.id()
	b.do("create", id).ok()
	b.do("kill", id, "WINCH").ok()
	b.status(id, "created")
	b.do("kill", id).ok()
	b.eventually("stopped", func() bool { return b.state(id).Status == "stopped" })
	b.do("delete", id).ok()

	// Not by the command either: whoever was given the pidfd or the pid may send it.
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGHUP} {
		id = b.id()
		b.do("create", id).ok()
		pid := b.state(id).Pid
		if err := unix.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
		b.eventually("stopped", func() bool { return b.state(id).Status == "stopped" })
		b.do("start", id).exits(1).says("cannot start a container that has stopped")
		b.do("delete", id).ok()
	}
}

func TestRunEndsWithTheProgramsCode(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
	}{{[]string{"true"}, 0}, {[]string{"exit", "42"}, 42}, {[]string{"exit", "255"}, 255}} {
		b := newBench(t, c.args...)
		b.do("run", b.id()).exits(c.code)
		b.nothingLeft()
	}
	b := newBench(t, "both", "to-out", "to-err")
	r := b.do("run", "-b", b.bundle, "--no-pivot", "--no-new-keyring", "--no-subreaper", b.id()).ok().prints("to-out\n")
	if r.err != "to-err\n" {
		t.Fatalf("stderr %q", r.err)
	}
	b = newBench(t, "cat")
	c := b.command("run", b.id())
	c.Stdin = strings.NewReader("through\n")
	b.finish(c).ok().prints("through\n")
}

func TestRunOfNothingFails(t *testing.T) {
	b := newBench(t)
	b.spec.Process.Args = []string{"nosuch"}
	b.do("run", b.id()).exits(1).says(`exec: "nosuch": executable file not found in $PATH`)
	b.nothingLeft()
	b.spec.Process.Args = []string{"/etc"}
	b.do("run", b.id()).exits(1).says(`exec: "/etc"`, "permission denied")
	b.nothingLeft()
}

func TestRunKeepAndDetach(t *testing.T) {
	b := newBench(t, "true")
	id := b.id()
	b.do("run", "--keep", id).ok()
	b.status(id, "stopped")
	b.do("delete", id).ok()
	b = newBench(t, "sleep")
	id = b.id()
	b.do("run", "--detach", id).ok()
	b.status(id, "running")
	b.do("kill", id, "KILL").ok()
	b.eventually("stopped", func() bool { return b.state(id).Status == "stopped" })
	b.do("delete", id).ok()
	b.nothingLeft()
}

func TestRunForwardsSignals(t *testing.T) {
	b := newBench(t, "signal-report")
	c := b.command("run", b.id())
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make([]byte, 6)
	if _, err := out.Read(ready); err != nil || string(ready) != "ready\n" {
		t.Fatalf("%q %v", ready, err)
	}
	if err := c.Process.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait()
	if code := c.ProcessState.ExitCode(); code != 100+int(syscall.SIGUSR2) {
		t.Fatalf("exit code %d", code)
	}
	b.nothingLeft()
}

func TestAProgramKilledBySignal(t *testing.T) {
	b := newBench(t, "sleep")
	id := b.id()
	c := b.command("run", id)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	b.eventually("running", func() bool { return strings.Contains(b.do("state", id).out, `"running"`) })
	b.do("kill", id, "9").ok()
	_ = c.Wait()
	if code := c.ProcessState.ExitCode(); code != 128+9 {
		t.Fatalf("exit code %d", code)
	}
}

// A delete from elsewhere does not make the run that waits fail or leave anything.
func TestDeleteUnderARunningRun(t *testing.T) {
	b := newBench(t, "sleep")
	id := b.id()
	c := b.command("run", id)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	b.eventually("running", func() bool { return strings.Contains(b.do("state", id).out, `"running"`) })
	b.do("delete", "-f", id).ok()
	_ = c.Wait()
	if code := c.ProcessState.ExitCode(); code != 128+9 {
		t.Fatalf("exit code %d", code)
	}
	b.nothingLeft()
}

func TestOneOfManyCreatesWins(t *testing.T) {
	b := newBench(t, "sleep")
	id := b.id()
	var cmds []*exec.Cmd
	for range 8 {
		c := b.command("create", id)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		cmds = append(cmds, c)
	}
	won := 0
	for _, c := range cmds {
		if c.Wait() == nil {
			won++
		}
	}
	if won != 1 {
		t.Fatalf("%d creates of one id succeeded", won)
	}
	b.status(id, "created")
	// Starts and deletes at once: each leaves a whole container or none.
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			args := []string{"start", id}
			if i%2 == 0 {
				args = []string{"delete", "--force", id}
			}
			_ = b.command(args...).Run()
		})
	}
	wg.Wait()
	b.do("state", id).exits(1).says("container does not exist")
	b.nothingLeft()
}

func TestKillReachesAllWithoutAPIDNamespace(t *testing.T) {
	b := newBench(t, "fork", "3")
	b.spec.Linux.Namespaces = b.spec.Linux.Namespaces[1:] // pid
	b.spec.Mounts[0].Type, b.spec.Mounts[0].Source, b.spec.Mounts[0].Options = "bind", "/proc", []string{"rbind"}
	b.spec.Linux.MaskedPaths, b.spec.Linux.ReadonlyPaths = nil, nil
	id := b.id()
	b.do("run", "-d", id).ok()
	b.eventually("forked", func() bool { return strings.Count(b.do("ps", "-f", "json", id).out, ",") == 3 })
	b.do("kill", id, "KILL").ok()
	b.eventually("all gone", func() bool { return b.do("ps", "-f", "json", id).out == "[]\n" })
	b.do("delete", id).ok()
	b.nothingLeft()
}

func TestParseSignal(t *testing.T) {
	for in, want := range map[string]unix.Signal{
		"TERM": 15, "term": 15, "SIGKILL": 9, "9": 9, "0": 0, "64": 64, "RTMIN+3": 37, "SIGRTMIN": 34, "usr1": 10,
	} {
		if got, err := parseSignal(in); err != nil || got != want {
			t.Errorf("%s: %v %v", in, got, err)
		}
	}
	for _, in := range []string{"", "65", "-1", "SIGNOPE", "RTMIN+99"} {
		if got, err := parseSignal(in); err == nil {
			t.Errorf("%q: %v", in, got)
		}
	}
}
