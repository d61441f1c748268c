package seccomp

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/sandbox/model"
	"github.com/berth-runtime/berth/sandbox/spec"
)

// defaultProfile is what a container with RuntimeDefault gets.
func defaultProfile(t *testing.T) *specs.LinuxSeccomp {
	t.Helper()
	s, err := spec.Build(spec.Input{
		ID: "c1", PodID: "p1", Pod: &model.PodConfig{Meta: model.PodMeta{Name: "p", UID: "u", Namespace: "n"}},
		Container: &model.ContainerConfig{Meta: model.ContainerMeta{Name: "c"}, Security: model.Security{Seccomp: &model.Profile{}, NoNewPrivs: true}},
		Image:     ocispec.ImageConfig{Entrypoint: []string{"/app"}}, CgroupPath: "/c1", Host: spec.Host{Seccomp: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s.Linux.Seccomp
}

// TestDefaultProfileSockets: AF_ALG (CVE-2026-31431) and AF_VSOCK sockets are
// refused by every call that shows a filter the family. socketcall, which only
// 32-bit x86 has, keeps it in memory: the default profile lets it through, as
// 32-bit C libraries know no other way to a socket, and what it makes is for a
// security module to refuse. TestSocketcall shows what a profile can do.
func TestDefaultProfileSockets(t *testing.T) {
	p := defaultProfile(t)
	prog := compile(t, p)
	refused := errno(unix.EPERM)
	for _, x := range []struct {
		name string
		c    call
		want uint32
	}{
		{"AF_ALG", call{41, unix.AUDIT_ARCH_X86_64, [6]uint64{38, 5}}, refused},
		{"AF_VSOCK", call{41, unix.AUDIT_ARCH_X86_64, [6]uint64{40, 1}}, refused},
		{"AF_ALG with upper bits, which the kernel drops", call{41, unix.AUDIT_ARCH_X86_64, [6]uint64{1<<32 | 38, 5}}, refused},
		{"AF_ALG, x32", call{x32Bit | 41, unix.AUDIT_ARCH_X86_64, [6]uint64{38, 5}}, refused},
		{"AF_ALG, x32, upper bits", call{x32Bit | 41, unix.AUDIT_ARCH_X86_64, [6]uint64{1<<32 | 38, 5}}, refused},
		{"AF_ALG, i386", call{359, unix.AUDIT_ARCH_I386, [6]uint64{38, 5}}, refused},
		{"AF_VSOCK, i386", call{359, unix.AUDIT_ARCH_I386, [6]uint64{40, 1}}, refused},
		{"AF_INET", call{41, unix.AUDIT_ARCH_X86_64, [6]uint64{2, 1}}, allow},
		{"AF_INET, i386", call{359, unix.AUDIT_ARCH_I386, [6]uint64{2, 1}}, allow},
		{"socketcall", call{102, unix.AUDIT_ARCH_I386, [6]uint64{1, 0x1000}}, allow},
	} {
		if got := run(t, prog, x.c); got != x.want {
			t.Errorf("%s: %#x, want %#x", x.name, got, x.want)
		}
	}
	got := inKernel(t, p, [7]uint64{41, 38, 5}, [7]uint64{41, 1<<32 | 38, 5}, [7]uint64{41, 40, 1}, [7]uint64{41, 2, 1})
	for i, e := range []unix.Errno{unix.EPERM, unix.EPERM, unix.EPERM, 0} {
		if got[i].Errno != e {
			t.Errorf("socket %d in the kernel: %+v, want %v", i, got[i], e)
		}
	}
	if e := in386(t, p, 359, 38, 5); e != unix.EPERM {
		t.Errorf("i386 socket(AF_ALG): %v", e)
	}
}

// TestSocketcall: a profile that stops socket stops it as a function of
// socketcall too, whatever the family; that of others is not touched.
func TestSocketcall(t *testing.T) {
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86}, Syscalls: []specs.LinuxSyscall{
		{Names: []string{"socketcall"}, Action: specs.ActAllow},
		{Names: []string{"socket"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(unix.EXDEV)), Args: []specs.LinuxSeccompArg{{Value: 38, Op: specs.OpEqualTo}}},
	}}
	for _, x := range []struct {
		regs [4]uint32
		want unix.Errno
	}{
		{[4]uint32{359, 38, 5}, unix.EXDEV},         // socket(AF_ALG)
		{[4]uint32{102, 1, dataAddr}, unix.EXDEV},   // socketcall(SYS_SOCKET)
		{[4]uint32{102, 2, dataAddr}, unix.EBADF},   // socketcall(SYS_BIND)
		{[4]uint32{102, 99, dataAddr}, unix.EINVAL}, // no function
	} {
		if got := in386(t, p, x.regs[0], x.regs[1], x.regs[2]); got != x.want {
			t.Errorf("%v: %v, want %v", x.regs, got, x.want)
		}
	}
}

const (
	loadAddr = 0x08048000
	codeAddr = loadAddr + 84
	dataAddr = codeAddr + 31 // of three words: AF_ALG, SOCK_SEQPACKET, 0
)

// in386 makes a call by int 0x80 in a 32-bit program of our own and returns its error.
func in386(t *testing.T, p *specs.LinuxSeccomp, nr, ebx, ecx uint32) unix.Errno {
	t.Helper()
	le := binary.LittleEndian
	b := []byte{0x7f, 'E', 'L', 'F', 1, 1, 1, 15: 0}
	b = le.AppendUint16(le.AppendUint16(b, 2), 3) // EXEC, 386
	for _, v := range []uint32{1, codeAddr, 52, 0, 0} {
		b = le.AppendUint32(b, v)
	}
	for _, v := range []uint16{52, 32, 1, 40, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	for _, v := range []uint32{1, 0, loadAddr, loadAddr, 127, 127, 7, 0x1000} {
		b = le.AppendUint32(b, v)
	}
	b = le.AppendUint32(append(b, 0xb8), nr)                           // mov eax
	b = le.AppendUint32(append(b, 0xbb), ebx)                          // mov ebx
	b = le.AppendUint32(append(b, 0xb9), ecx)                          // mov ecx
	b = append(b, 0x31, 0xd2, 0xcd, 0x80, 0xf7, 0xd8, 0x89, 0xc3)      // xor edx,edx; int 0x80; neg eax; mov ebx,eax
	b = append(b, 0x31, 0xc0, 0x40, 0xcd, 0x80, 0x90, 0x90, 0x90)      // eax = 1, exit: int 0x80
	b = le.AppendUint32(le.AppendUint32(le.AppendUint32(b, 38), 5), 0) // data
	path := t.TempDir() + "/program"
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := exec.Command(path).Run(); errors.Is(err, unix.ENOEXEC) {
		t.Skip("the kernel runs no 32-bit programs")
	}
	cmd := command(t, order{Profile: p, Exec: path})
	out, err := cmd.CombinedOutput()
	if !cmd.ProcessState.Exited() || len(out) > 0 {
		t.Fatalf("%v: %s", err, out)
	}
	return unix.Errno(cmd.ProcessState.ExitCode())
}
