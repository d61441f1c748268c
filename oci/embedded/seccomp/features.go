package seccomp

import (
	"runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"golang.org/x/sys/unix"
)

// Features describes what Compile takes (runtime-spec, "Features Structure",
// linux.seccomp). SupportedFlags are those that the running kernel knows.
func Features() *features.Seccomp {
	yes := true
	arches := []string{string(specs.ArchX86_64), string(specs.ArchX86), string(specs.ArchX32)}
	if runtime.GOARCH == "arm64" {
		arches = []string{string(specs.ArchAARCH64), string(specs.ArchARM)}
	}
	f := &features.Seccomp{
		Enabled: &yes,
		Actions: []string{
			string(specs.ActAllow), string(specs.ActErrno), string(specs.ActKill), string(specs.ActKillProcess),
			string(specs.ActKillThread), string(specs.ActLog), string(specs.ActNotify), string(specs.ActTrace), string(specs.ActTrap),
		},
		Operators: []string{
			string(specs.OpEqualTo), string(specs.OpGreaterEqual), string(specs.OpGreaterThan), string(specs.OpLessEqual),
			string(specs.OpLessThan), string(specs.OpMaskedEqual), string(specs.OpNotEqual),
		},
		Archs: arches,
	}
	for _, fl := range []specs.LinuxSeccompFlag{
		specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow, flagTSYNC, specs.LinuxSeccompFlagWaitKillableRecv,
	} {
		f.KnownFlags = append(f.KnownFlags, string(fl))
		if flagSupported(fl) {
			f.SupportedFlags = append(f.SupportedFlags, string(fl))
		}
	}
	return f
}

// flagSupported asks the kernel by a load without a program, which fails with
// EFAULT after its flags were found good.
func flagSupported(fl specs.LinuxSeccompFlag) bool {
	const setModeFilter = 1
	bits, err := flags([]specs.LinuxSeccompFlag{fl}, fl == specs.LinuxSeccompFlagWaitKillableRecv)
	if err != nil {
		return false
	}
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, setModeFilter, uintptr(bits), 0)
	return errno == unix.EFAULT
}
