package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// sleeper is a bench with a running container that does nothing.
func sleeper(t *testing.T) (*bench, string) {
	t.Helper()
	b := newBench(t, "sleep")
	id := b.id()
	b.do("run", "-d", id).ok()
	return b, id
}

func TestExecFlags(t *testing.T) {
	b, id := sleeper(t)
	b.do("exec", id, "prog", "exit", "3").exits(3)
	b.do("exec", "--cwd", "/tmp", id, "prog", "pwd").ok().prints("/tmp\n")
	b.do("exec", "-e", "A=1", "--env", "B=x,y", id, "prog", "env", "A", "B").ok().prints("1\nx,y\n")
	b.do("exec", "-u", "5:6", "-g", "7", "--additional-gids", "8", id, "prog", "id").ok().prints("uid=5 gid=6 groups=7,8\n")
	b.do("exec", "--user", "5", id, "prog", "id").ok().prints("uid=5 gid=0 groups=\n")
	// What follows the id is the command's, however it looks.
	b.do("exec", id, "prog", "echo", "-t", "--cwd", "/x").ok().prints("-t --cwd /x\n")
	status := b.do("exec", "--cap", "CAP_SYS_PTRACE", "--no-new-privs=false", id, "prog", "cat", "/proc/self/status").ok().out
	if v := field(t, status, "CapEff:"); v&(1<<unix.CAP_SYS_PTRACE) == 0 {
		t.Errorf("--cap: effective %#x", v)
	}
	if v := field(t, status, "NoNewPrivs:"); v != 0 {
		t.Errorf("--no-new-privs=false: %d", v)
	}
	if v := field(t, b.do("exec", "--no-new-privs", id, "prog", "cat", "/proc/self/status").ok().out, "NoNewPrivs:"); v != 1 {
		t.Errorf("--no-new-privs: %d", v)
	}
}

func field(t *testing.T, status, name string) uint64 {
	t.Helper()
	for line := range strings.Lines(status) {
		if v, ok := strings.CutPrefix(line, name); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s in %s", name, status)
	return 0
}

func TestExecFailsWith255(t *testing.T) {
	b, id := sleeper(t)
	b.do("exec", id, "nosuch").exits(255).says("exec failed", "executable file not found in $PATH")
	b.do("exec", "nosuch", "prog", "true").exits(255).says("container does not exist")
	b.do("exec", id).exits(255).says("exec args cannot be empty")
	b.do("exec").exits(255).says("requires a minimum of 1")
	b.do("exec", "--cwd", "tmp", id, "prog", "true").exits(255).says("process.cwd")
	b.do("exec", "--user", "root", id, "prog", "true").exits(255).says("bad uid")
	b.do("exec", "--pid-file", "/nonexistent/pid", id, "prog", "sleep").exits(255).says("--pid-file")
	b.do("exec", "--preserve-fds", "2", id, "prog", "true").exits(255).says("preserved-fd")
	b.do("exec", "--cgroup", "nosuch", id, "prog", "true").exits(255).says("--cgroup")
	b.do("exec", "--console-socket", "/nosuch", "-d", "-t", id, "prog", "true").exits(255).says("--console-socket")
	b.do("exec", "-d", "-t", id, "prog", "true").exits(255).says("console socket")
	if pids := b.do("ps", "-f", "json", id).ok().out; strings.Contains(pids, ",") {
		t.Fatalf("a failed exec left its process: %s", pids)
	}
}

func TestExecProcessFile(t *testing.T) {
	b, id := sleeper(t)
	file := filepath.Join(b.bundle, "process.json")
	p := specs.Process{Args: []string{"/bin/prog", "env"}, Cwd: "/", Env: []string{"ONLY=this"}}
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	b.do("exec", "--process", file, id).ok().prints("ONLY=this\nHOME=/\n")
	if err := os.WriteFile(file, []byte("{\n \"args\": 5}"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.do("exec", "-p", file, id).exits(255).says("line 2", "args")
}

func TestExecDetached(t *testing.T) {
	b, id := sleeper(t)
	file := filepath.Join(b.bundle, "pid")
	b.do("exec", "-d", "--pid-file", file, id, "prog", "sleep").ok()
	pid, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if pids := b.do("ps", "-f", "json", id).ok().out; !strings.Contains(pids, string(pid)) {
		t.Fatalf("process %s is not in the container: %s", pid, pids)
	}
	table := b.do("ps", id).ok().out
	if !strings.Contains(table, "PID") || strings.Count(table, "prog sleep") != 2 {
		t.Fatalf("ps: %s", table)
	}
	if out := b.do("ps", id, "-o", "pid,comm").ok().out; !strings.Contains(out, "prog") || strings.Contains(out, "UID") {
		t.Fatalf("ps with options: %s", out)
	}
}

func TestExecInACgroupBelow(t *testing.T) {
	b, id := sleeper(t)
	at, arg := "/sys/fs/cgroup"+cgroupRoot+"/"+id+"/sub", "sub"
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		at, arg = "/sys/fs/cgroup/pids"+cgroupRoot+"/"+id+"/sub", "pids:sub"
	}
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	b.do("exec", "-d", "--cgroup", arg, id, "prog", "sleep").ok()
	procs, err := os.ReadFile(at + "/cgroup.procs")
	if err != nil || len(strings.Fields(string(procs))) != 1 {
		t.Fatalf("%s: %q %v", at, procs, err)
	}
}

// listen makes a unix socket that receives a descriptor.
func listen(t *testing.T) (path string, receive func() (string, *os.File)) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return path, func() (string, *os.File) {
		t.Helper()
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		name, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
		n, oobn, _, _, err := c.(*net.UnixConn).ReadMsgUnix(name, oob)
		if err != nil {
			t.Fatal(err)
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(msgs) != 1 {
			t.Fatalf("%v %v", msgs, err)
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) != 1 {
			t.Fatalf("%v %v", fds, err)
		}
		f := os.NewFile(uintptr(fds[0]), string(name[:n]))
		t.Cleanup(func() { f.Close() })
		return string(name[:n]), f
	}
}

func TestConsoleSocketGetsTheTerminal(t *testing.T) {
	b := newBench(t, "tty", "wait")
	b.spec.Process.Terminal = true
	b.spec.Process.ConsoleSize = &specs.Box{Height: 17, Width: 71}
	id := b.id()
	b.do("create", id).exits(1).says("console socket")
	b.nothingLeft()
	path, receive := listen(t)
	b.do("create", "--console-socket", path, id).ok()
	_, master := receive()
	b.do("start", id).ok()
	if _, err := master.WriteString("\n"); err != nil {
		t.Fatal(err)
	}
	if out := readAll(master); !strings.Contains(out, "stdin=1 stdout=1 stderr=1 rows=17 cols=71") {
		t.Fatalf("terminal: %q", out)
	}
	b.do("delete", "-f", id).ok()

	b, id = sleeper(t)
	path, receive = listen(t)
	b.do("exec", "-t", "-d", "--console-socket", path, id, "prog", "tty").ok()
	_, master = receive()
	if out := readAll(master); !strings.Contains(out, "stdin=1 stdout=1 stderr=1") {
		t.Fatalf("terminal of exec: %q", out)
	}
}

// readAll reads a terminal until its other side is gone.
func readAll(f *os.File) string {
	var out []byte
	for {
		b := make([]byte, 4096)
		n, err := f.Read(b)
		out = append(out, b[:n]...)
		if err != nil {
			return string(out)
		}
	}
}

func TestForegroundTerminalIsCopied(t *testing.T) {
	b := newBench(t, "tty")
	b.spec.Process.Terminal = true
	c := b.command("run", b.id())
	c.Stdin = strings.NewReader("")
	// Redirected output has the program's line ends, not the terminal's.
	b.finish(c).ok().prints("stdin=1 stdout=1 stderr=1 rows=0 cols=0\n")
}

func TestPidfdSocket(t *testing.T) {
	b := newBench(t, "sleep")
	id := b.id()
	path, receive := listen(t)
	b.do("run", "-d", "--pidfd-socket", path, id).ok()
	_, pidfd := receive()
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd.Fd()))
	if err != nil || !strings.Contains(string(info), fmt.Sprintf("Pid:\t%d\n", b.state(id).Pid)) {
		t.Fatalf("%s %v", info, err)
	}
	if err := unix.PidfdSendSignal(int(pidfd.Fd()), unix.SIGKILL, nil, 0); err != nil {
		t.Fatal(err)
	}
	b.eventually("stopped", func() bool { return b.state(id).Status == "stopped" })
}

func TestPassedDescriptors(t *testing.T) {
	b := newBench(t, "fds")
	open := func(name string) *os.File {
		f, err := os.Create(filepath.Join(t.TempDir(), name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	c := b.command("run", "--preserve-fds", "1", b.id())
	c.ExtraFiles = []*os.File{open("kept"), open("not-kept")}
	out := b.finish(c).ok().out
	if !strings.Contains(out, "3 ") || !strings.Contains(out, "/kept") || strings.Contains(out, "not-kept") {
		t.Fatalf("descriptors:\n%s", out)
	}
	b.do("run", "--preserve-fds", "1", b.id()).exits(1).says("preserved-fd 0 (of 1)")
	b.nothingLeft()

	// Socket activation: LISTEN_PID must be the pid of berth-oci, which only a
	// shell that becomes it knows.
	b = newBench(t, "env", "LISTEN_FDS", "LISTEN_PID")
	c = b.command("run", b.id())
	c.Args = append([]string{"sh", "-c", `LISTEN_FDS=2 LISTEN_PID=$$ exec "$@"`, "sh", binary}, c.Args[1:]...)
	c.Path = "/bin/sh"
	c.ExtraFiles = []*os.File{open("first"), open("second")}
	b.finish(c).ok().prints("2\n1\n")
}

// A caller may start the server of the socket together with berth-oci.
func TestDialWaitsForTheServer(t *testing.T) {
	for _, dir := range []string{t.TempDir(), filepath.Join(t.TempDir(), strings.Repeat("long", 40))} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		at, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer at.Close()
		done := make(chan error, 1)
		go func() {
			f, err := dial(filepath.Join(dir, "s"))
			if err == nil {
				f.Close()
			}
			done <- err
		}()
		time.Sleep(time.Millisecond) // most often the first try has failed by then
		l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/s", at.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if _, err := dial(filepath.Join(t.TempDir(), "none")); !errors.Is(err, unix.ENOENT) {
		t.Errorf("without a server: %v", err)
	}
}
