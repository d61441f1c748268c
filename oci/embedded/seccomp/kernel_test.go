package seccomp

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// The test binary is also the process that is filtered.
func TestMain(m *testing.M) {
	if os.Args[0] == "filtered" {
		filtered()
		return
	}
	os.Exit(m.Run())
}

// order is what a filtered process is to do after it has loaded the profile.
type order struct {
	Profile *specs.LinuxSeccomp
	Calls   [][7]uint64 // number and arguments
	Exec    string      // or a program
}

// result is what a call returned.
type result struct {
	Value uint64
	Errno unix.Errno
}

func filtered() {
	var o order
	check(json.Unmarshal([]byte(os.Args[1]), &o))
	f, err := Compile(o.Profile)
	check(err)
	// The filter is this thread's alone; the rest of the runtime goes on as before.
	runtime.LockOSThread()
	tid := unix.Gettid()
	ended := make(chan bool)
	go func() {
		defer close(ended)
		for {
			if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d/exe", tid)); err != nil {
				fmt.Println("thread is gone")
				os.Exit(0)
			}
			time.Sleep(time.Millisecond)
		}
	}()
	check(unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	prog := unix.SockFprog{Len: uint16(len(f.Prog)), Filter: &f.Prog[0]}
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, 1, uintptr(f.Flags), uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		check(errno)
	}
	if o.Exec != "" {
		check(unix.Exec(o.Exec, []string{o.Exec}, nil))
	}
	if f.Listener {
		fmt.Println(fd)
		_, err := bufio.NewReader(os.Stdin).ReadString('\n')
		check(err)
	}
	var out []result
	for _, c := range o.Calls {
		r, _, errno := unix.RawSyscall6(uintptr(c[0]), uintptr(c[1]), uintptr(c[2]), uintptr(c[3]), uintptr(c[4]), uintptr(c[5]), uintptr(c[6]))
		out = append(out, result{uint64(r), errno})
	}
	check(json.NewEncoder(os.Stdout).Encode(out))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func command(t testing.TB, o order) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"filtered", string(text)}
	return cmd
}

// inKernel makes the calls under the profile.
func inKernel(t testing.TB, p *specs.LinuxSeccomp, calls ...[7]uint64) []result {
	t.Helper()
	cmd := command(t, order{Profile: p, Calls: calls})
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	b, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, &stderr)
	}
	var out []result
	if err := json.Unmarshal(b, &out); err != nil || len(out) != len(calls) {
		t.Fatalf("%q: %v", b, err)
	}
	return out
}

// on is a profile that treats getppid, which takes no arguments, in some way.
func on(action specs.LinuxSeccompAction, errno *uint, args ...specs.LinuxSeccompArg) *specs.LinuxSeccomp {
	return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/agent", Syscalls: []specs.LinuxSyscall{
		{Names: []string{"getppid"}, Action: action, ErrnoRet: errno, Args: args},
	}}
}

func TestKernelActions(t *testing.T) {
	_, calls := native()
	ppid := [7]uint64{uint64(calls["getppid"])}
	own := uint64(os.Getpid())
	for _, x := range []struct {
		action specs.LinuxSeccompAction
		errno  *uint
		want   result
	}{
		{specs.ActAllow, nil, result{own, 0}}, {specs.ActLog, nil, result{own, 0}},
		{specs.ActErrno, nil, result{^uint64(0), unix.EPERM}}, {specs.ActErrno, ptr(uint(95)), result{^uint64(0), 95}},
		{specs.ActErrno, ptr(uint(0)), result{0, 0}},
		{specs.ActTrace, nil, result{^uint64(0), unix.ENOSYS}}, // no tracer
	} {
		if got := inKernel(t, on(x.action, x.errno), ppid)[0]; got != x.want {
			t.Errorf("%s: %+v, want %+v", x.action, got, x.want)
		}
	}
	for action, want := range map[specs.LinuxSeccompAction]string{
		specs.ActKillProcess: "", specs.ActKillThread: "thread is gone\n", specs.ActKill: "thread is gone\n", specs.ActTrap: "SIGSYS",
	} {
		cmd := command(t, order{Profile: on(action, nil), Calls: [][7]uint64{ppid}})
		out, err := cmd.CombinedOutput()
		status, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if killed := status.Signaled() && status.Signal() == unix.SIGSYS; killed != (action == specs.ActKillProcess) || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v %q", action, err, out)
		}
	}
	// Every flag that the features name as supported loads.
	for _, fl := range Features().SupportedFlags {
		p := on(specs.ActErrno, nil)
		p.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlag(fl)}
		if fl == string(specs.LinuxSeccompFlagWaitKillableRecv) {
			continue // TestListener
		}
		if got := inKernel(t, p, ppid)[0]; got.Errno != unix.EPERM {
			t.Errorf("%s: %+v", fl, got)
		}
	}
}

// TestKernelAgrees: the kernel comes to what the literal reading of the profile
// says, for conditions on all arguments.
func TestKernelAgrees(t *testing.T) {
	arch, numbers := native()
	values := []uint64{0, 1, 38, 0xffffffff, 1 << 32, 1<<32 | 38, ^uint64(0)}
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 2))
	value := func() uint64 { return values[r.IntN(len(values))] }
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow}
	for i := range 40 {
		s := specs.LinuxSyscall{Names: []string{"getppid"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(100 + i))}
		for range 1 + r.IntN(3) {
			s.Args = append(s.Args, specs.LinuxSeccompArg{Index: uint(r.IntN(6)), Value: value(), ValueTwo: value(), Op: operators[r.IntN(len(operators))]})
		}
		p.Syscalls = append(p.Syscalls, s)
	}
	var calls [][7]uint64
	for range 500 {
		calls = append(calls, [7]uint64{uint64(numbers["getppid"]), value(), value(), value(), value(), value(), value()})
	}
	for i, got := range inKernel(t, p, calls...) {
		c := call{nr: numbers["getppid"], arch: arch}
		copy(c.args[:], calls[i][1:])
		want := evaluate(p, c)
		if want == allow && got.Errno != 0 || want != allow && uint32(got.Errno) != want&0xffff {
			t.Fatalf("seed %d: %s: %#x: %+v, want %#x", seed, describe(p), calls[i], got, want)
		}
	}
}

// agent is the other end of a listenerPath.
func agent(t *testing.T, path string) (receive func() (*os.File, specs.ContainerProcessState)) {
	t.Helper()
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(l) })
	if err := errors.Join(unix.Bind(l, &unix.SockaddrUnix{Name: path}), unix.Listen(l, 0)); err != nil {
		t.Fatal(err)
	}
	return func() (*os.File, specs.ContainerProcessState) {
		c, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(c)
		buf, oob := make([]byte, 1<<20), make([]byte, 256)
		total := 0
		var fds []int
		for {
			n, oobn, _, _, err := unix.Recvmsg(c, buf[total:], oob, unix.MSG_CMSG_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			if oobn > 0 {
				msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
				if err != nil {
					t.Fatal(err)
				}
				more, err := unix.ParseUnixRights(&msgs[0])
				if err != nil {
					t.Fatal(err)
				}
				fds = append(fds, more...)
			}
			if total += n; n == 0 {
				break
			}
		}
		var st specs.ContainerProcessState
		if err := json.Unmarshal(buf[:total], &st); err != nil || len(fds) != 1 {
			t.Fatalf("%q, %d descriptors: %v", buf[:total], len(fds), err)
		}
		return os.NewFile(uintptr(fds[0]), "listener"), st
	}
}

// notification is struct seccomp_notif.
type notification struct {
	id   uint64
	_    [2]uint32 // pid, flags
	nr   int32
	_    [3]uint32 // arch, instruction pointer
	args [6]uint64
}

// response is struct seccomp_notif_resp.
type response struct {
	id    uint64
	val   int64
	errno int32
	flags uint32
}

func ioctl[T any](f *os.File, op uintptr, v *T) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), op, uintptr(unsafe.Pointer(v))); errno != 0 {
		return errno
	}
	return nil
}

// TestListener goes the whole way: load, take the descriptor out of the waiting
// process, send it to the agent, which answers the calls.
func TestListener(t *testing.T) {
	_, numbers := native()
	p := on(specs.ActNotify, nil)
	p.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}
	ppid := [7]uint64{uint64(numbers["getppid"]), 7}
	cmd := command(t, order{Profile: p, Calls: [][7]uint64{ppid, ppid, ppid}})
	pidfd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd, Pdeathsig: unix.SIGKILL}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // Pdeathsig is of the thread
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	process := os.NewFile(uintptr(pidfd), "pidfd")
	defer process.Close()
	out := bufio.NewReader(stdout)
	var n int
	if _, err := fmt.Fscanln(out, &n); err != nil {
		t.Fatal(err)
	}
	taken, err := TakeFD(process, n)
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if flags, err := unix.FcntlInt(taken.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("the listener is inherited: %#x, %v", flags, err)
	}
	path := t.TempDir() + "/agent.sock"
	receive := agent(t, path)
	want := specs.ContainerProcessState{
		Version: specs.Version, Pid: cmd.Process.Pid, Metadata: strings.Repeat("m", 600<<10), // more than the socket holds
		State: specs.State{Version: specs.Version, ID: "c", Status: specs.StateCreating, Pid: cmd.Process.Pid, Bundle: "/b"},
	}
	sent := make(chan error, 1)
	go func() { sent <- SendListener(path, taken, want) }()
	listener, st := receive()
	defer listener.Close()
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if len(st.Fds) != 1 || st.Fds[0] != "seccompFd" || st.Pid != want.Pid || st.Metadata != want.Metadata || st.State.ID != "c" {
		t.Errorf("state %v %d %+v", st.Fds, st.Pid, st.State)
	}
	if _, err := stdin.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	for _, answer := range []response{{val: 1234}, {errno: -int32(unix.EXDEV)}, {flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}} {
		var q notification
		if err := ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, &q); err != nil {
			t.Fatal(err)
		}
		if uint32(q.nr) != numbers["getppid"] || q.args[0] != 7 {
			t.Errorf("notified of %d %v", q.nr, q.args)
		}
		answer.id = q.id
		if err := ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, &answer); err != nil {
			t.Fatal(err)
		}
	}
	var got []result
	if err := json.NewDecoder(out).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if answers := []result{{1234, 0}, {^uint64(0), unix.EXDEV}, {uint64(os.Getpid()), 0}}; !slices.Equal(got, answers) {
		t.Errorf("%+v, want %+v", got, answers)
	}
}

func TestListenerErrors(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	agent(t, dir+"/full")
	agent(t, dir+"/deaf")
	soon := func() time.Time { return time.Now().Add(50 * time.Millisecond) }
	// A backlog of 0 takes one connection.
	first, err := dial(dir+"/full", soon())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	for path, want := range map[string]string{
		dir + "/none": "no such file", dir + "/file": "connection refused", "relative": "absolute path",
		"/" + strings.Repeat("x", 200): "at most 107 bytes", dir + "/full": "temporarily unavailable", dir + "/deaf": "timeout",
	} {
		st := specs.ContainerProcessState{Metadata: strings.Repeat("m", 4<<20)}
		err := sendBy(soon(), path, null, st)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "linux.seccomp.listenerPath") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := TakeFD(null, 0); err == nil {
		t.Error("/dev/null is no pidfd")
	}
}
