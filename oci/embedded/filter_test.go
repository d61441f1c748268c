package embedded

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/embedded/seccomp"
)

// TestListenerOfAScript: a start program loads a filter that denies all it does
// not need and notifies of what it does next, reports the listener and waits; its
// parent takes the listener and answers.
func TestListenerOfAScript(t *testing.T) {
	f, err := seccomp.Compile(&specs.LinuxSeccomp{DefaultAction: specs.ActErrno, ListenerPath: "/agent", Syscalls: []specs.LinuxSyscall{
		{Names: []string{"read", "write", "exit_group"}, Action: specs.ActAllow}, {Names: []string{"getppid"}, Action: specs.ActNotify},
	}})
	if err != nil {
		t.Fatal(err)
	}
	pipe := func() (*os.File, *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close(); w.Close() })
		return r, w
	}
	status, statusW := pipe()
	gate, gateW := pipe()
	s := newScript()
	s.do("no_new_privs", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	listener := s.loadFilter(f).out()
	s.do("report the listener", unix.SYS_WRITE, statusFD, uintptr(listener), 8) // the word itself, not its value
	s.do("wait for the agent", unix.SYS_READ, s.fd(gate), uintptr(s.word()), 1)
	s.do("exit", unix.SYS_EXIT_GROUP, s.do("getppid", unix.SYS_GETPPID).out())
	prog, err := programFile(s.image())
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	pidfd := -1
	pid, err := forkExec(&syscall.ProcAttr{
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), statusW.Fd(), prog.Fd(), gate.Fd()},
		Env:   []string{}, Sys: &syscall.SysProcAttr{PidFD: &pidfd},
	})
	if err != nil {
		t.Fatal(err)
	}
	statusW.Close()
	process := os.NewFile(uintptr(pidfd), "pidfd")
	defer process.Close()
	ended := false
	defer func() {
		if !ended {
			_ = unix.Kill(pid, unix.SIGKILL) // ours until it is reaped
			_, _ = reap(pid)
		}
	}()
	var report [8]byte
	if _, err := io.ReadFull(status, report[:]); err != nil {
		t.Fatal(err)
	}
	taken, err := seccomp.TakeFD(process, int(binary.LittleEndian.Uint64(report[:])))
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		t.Skip("needs ptrace access")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if _, err := gateW.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	var question [80]byte // struct seccomp_notif: id, pid, flags, data
	if err := notify(taken, unix.SECCOMP_IOCTL_NOTIF_RECV, &question[0]); err != nil {
		t.Fatal(err)
	}
	if nr := binary.LittleEndian.Uint32(question[16:]); nr != unix.SYS_GETPPID {
		t.Errorf("notified of call %d", nr)
	}
	var answer [24]byte // struct seccomp_notif_resp: id, val, error, flags
	copy(answer[:8], question[:8])
	answer[8] = 42
	if err := notify(taken, unix.SECCOMP_IOCTL_NOTIF_SEND, &answer[0]); err != nil {
		t.Fatal(err)
	}
	ws, err := reap(pid)
	ended = true
	if err != nil || !ws.Exited() || ws.ExitStatus() != 42 {
		rest, _ := io.ReadAll(status)
		t.Errorf("%#x, %v, %q", ws, err, rest)
	}
}

func notify(f *os.File, op uintptr, p *byte) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), op, uintptr(unsafe.Pointer(p))); errno != 0 {
		return errno
	}
	return nil
}

// TestFilterCache: a digest finds the filter without a look at the profile, and
// the same profile without its digest finds it too.
func TestFilterCache(t *testing.T) {
	var c filterCache
	profile := func(a specs.LinuxSeccompAction) *specs.LinuxSeccomp { return &specs.LinuxSeccomp{DefaultAction: a} }
	get := func(a specs.LinuxSeccompAction, digest [32]byte) *seccomp.Filter {
		t.Helper()
		f, err := c.get(profile(a), digest)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	allow, kill := get(specs.ActAllow, [32]byte{}), get(specs.ActKill, [32]byte{})
	if allow == kill || get(specs.ActAllow, [32]byte{}) != allow {
		t.Error("not found by content")
	}
	named := get(specs.ActLog, [32]byte{1})
	if get(specs.ActLog, [32]byte{1}) != named || get(specs.ActLog, [32]byte{2}) == named {
		t.Error("not found by digest")
	}
	if _, err := c.get(profile("X"), [32]byte{3}); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "linux.seccomp.defaultAction") {
		t.Error(err)
	}
	for i := range 3 * maxFilters {
		get(specs.ActLog, [32]byte{byte(i), byte(i >> 8), 1})
		if len(c.m) > maxFilters {
			t.Fatalf("%d filters", len(c.m))
		}
	}
}
