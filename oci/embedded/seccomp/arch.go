package seccomp

import (
	"fmt"
	"runtime"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// arch is one system call ABI.
type arch struct {
	audit  uint32
	calls  map[string]uint32
	narrow bool // arguments have 32 bits, and so have the profile's values
	x32    bool // x86-64: x32 calls are filtered by the profile too
	muxed  map[string]mux
}

// foreign are the architectures of other machines: a profile may list them, no
// process can have them.
var foreign = map[specs.Arch]bool{
	specs.ArchMIPS: true, specs.ArchMIPS64: true, specs.ArchMIPS64N32: true, specs.ArchMIPSEL: true,
	specs.ArchMIPSEL64: true, specs.ArchMIPSEL64N32: true, specs.ArchPPC: true, specs.ArchPPC64: true,
	specs.ArchPPC64LE: true, specs.ArchS390: true, specs.ArchS390X: true, specs.ArchPARISC: true,
	specs.ArchPARISC64: true, specs.ArchRISCV64: true, specs.ArchLOONGARCH64: true, specs.ArchM68K: true,
	specs.ArchSH: true, specs.ArchSHEB: true,
}

// listed returns this machine's ABIs among the profile's, the native one first
// and always.
func listed(names []specs.Arch) ([]*arch, error) {
	native, compat := &arch{audit: unix.AUDIT_ARCH_X86_64, calls: x8664Calls}, &arch{audit: unix.AUDIT_ARCH_I386, calls: x86Calls, narrow: true, muxed: x86Muxed()}
	nativeName, compatName := specs.ArchX86_64, specs.ArchX86
	if runtime.GOARCH == "arm64" {
		native, compat = &arch{audit: unix.AUDIT_ARCH_AARCH64, calls: arm64Calls}, &arch{audit: unix.AUDIT_ARCH_ARM, calls: armTable(), narrow: true}
		nativeName, compatName = specs.ArchAARCH64, specs.ArchARM
	}
	out := []*arch{native}
	both := map[specs.Arch]bool{specs.ArchX86: true, specs.ArchX86_64: true, specs.ArchX32: true, specs.ArchARM: true, specs.ArchAARCH64: true}
	for _, n := range names {
		switch {
		case n == nativeName:
		case n == compatName:
			if len(out) == 1 {
				out = append(out, compat)
			}
		case n == specs.ArchX32 && native.audit == unix.AUDIT_ARCH_X86_64:
			native.x32 = true
		case foreign[n], both[n]:
		default:
			return nil, fmt.Errorf("linux.seccomp.architectures: %q is unknown: %w", n, errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}

// armTable adds the calls that ARM has outside the common numbering.
var armTable = sync.OnceValue(func() map[string]uint32 {
	t := make(map[string]uint32, len(armCalls)+3)
	for n, nr := range armCalls {
		t[n] = nr
	}
	t["breakpoint"], t["cacheflush"], t["set_tls"] = 0xf0001, 0xf0002, 0xf0005
	return t
})

// x32Calls are the calls of x86-64 with bit 30 set, except those that x32 has
// under numbers of their own from 512 on, in this order.
var x32Calls = sync.OnceValue(func() map[string]uint32 {
	t := make(map[string]uint32, len(x8664Calls))
	for n, nr := range x8664Calls {
		t[n] = x32Bit | nr
	}
	own := strings.Fields("rt_sigaction rt_sigreturn ioctl readv writev recvfrom sendmsg recvmsg execve ptrace" +
		" rt_sigpending rt_sigtimedwait rt_sigqueueinfo sigaltstack timer_create mq_notify kexec_load waitid" +
		" set_robust_list get_robust_list vmsplice move_pages preadv pwritev rt_tgsigqueueinfo recvmmsg sendmmsg" +
		" process_vm_readv process_vm_writev setsockopt getsockopt io_setup io_submit execveat preadv2 pwritev2")
	for i, n := range own {
		t[n] = x32Bit | uint32(512+i)
	}
	return t
})

// x86Muxed are the calls that i386 also has as functions of socketcall and ipc.
var x86Muxed = sync.OnceValue(func() map[string]mux {
	t := map[string]mux{}
	sockets := strings.Fields("socket bind connect listen accept getsockname getpeername socketpair send recv" +
		" sendto recvfrom shutdown setsockopt getsockopt sendmsg recvmsg accept4 recvmmsg sendmmsg")
	for i, n := range sockets {
		t[n] = mux{"socketcall", uint64(i + 1), 0xffffffff}
	}
	for n, f := range map[string]uint64{
		"semop": 1, "semget": 2, "semctl": 3, "semtimedop": 4, "msgsnd": 11, "msgrcv": 12, "msgget": 13, "msgctl": 14,
		"shmat": 21, "shmdt": 22, "shmget": 23, "shmctl": 24,
	} {
		t[n] = mux{"ipc", f, 0xffff} // the upper half is a version
	}
	return t
})
