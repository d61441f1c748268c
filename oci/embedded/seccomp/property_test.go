package seccomp

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// abi is an architecture as the evaluator sees it.
type abi struct {
	name   specs.Arch
	audit  uint32
	calls  map[string]uint32
	narrow bool
}

func abis() []abi {
	if runtime.GOARCH == "arm64" {
		return []abi{{specs.ArchAARCH64, unix.AUDIT_ARCH_AARCH64, arm64Calls, false}, {specs.ArchARM, unix.AUDIT_ARCH_ARM, armTable(), true}}
	}
	return []abi{
		{specs.ArchX86_64, unix.AUDIT_ARCH_X86_64, x8664Calls, false}, {specs.ArchX86, unix.AUDIT_ARCH_I386, x86Calls, true},
		{specs.ArchX32, unix.AUDIT_ARCH_X86_64, x32Calls(), false},
	}
}

// functions of i386's socketcall and ipc that the random profiles use.
var functions = map[string]map[uint64]string{
	"socketcall": {1: "socket", 3: "connect", 5: "accept"},
	"ipc":        {2: "semget", 21: "shmat"},
}

var numbers = map[specs.LinuxSeccompAction]uint32{
	specs.ActKill: unix.SECCOMP_RET_KILL_THREAD, specs.ActKillThread: unix.SECCOMP_RET_KILL_THREAD, specs.ActKillProcess: unix.SECCOMP_RET_KILL_PROCESS,
	specs.ActTrap: unix.SECCOMP_RET_TRAP, specs.ActErrno: unix.SECCOMP_RET_ERRNO | 1, specs.ActTrace: unix.SECCOMP_RET_TRACE | 1,
	specs.ActAllow: unix.SECCOMP_RET_ALLOW, specs.ActLog: unix.SECCOMP_RET_LOG, specs.ActNotify: unix.SECCOMP_RET_USER_NOTIF,
}

func meaning(a specs.LinuxSeccompAction, errno *uint) uint32 {
	if errno != nil {
		return numbers[a]&0xffff0000 | uint32(*errno)
	}
	return numbers[a]
}

// evaluate reads a profile literally: what happens to the call.
func evaluate(p *specs.LinuxSeccomp, c call) uint32 {
	def := meaning(p.DefaultAction, p.DefaultErrnoRet)
	var a *abi
	for i, x := range abis() {
		high := c.arch == unix.AUDIT_ARCH_X86_64 && c.nr >= x32Bit && c.nr != 0xffffffff
		if x.audit == c.arch && (x.name == specs.ArchX32) == high && (i == 0 || slices.Contains(p.Architectures, x.name)) {
			a = &abis()[i]
		}
	}
	if a == nil {
		return unix.SECCOMP_RET_KILL_PROCESS
	}
	if c.nr == 0xffffffff && c.arch == unix.AUDIT_ARCH_X86_64 {
		return def
	}
	name, known := "", false
	for n, nr := range a.calls {
		if nr == c.nr {
			name = n
		}
	}
	last := uint32(0)
	for _, s := range p.Syscalls {
		for _, n := range s.Names {
			nr, ok := a.calls[n]
			for mux, f := range functions {
				for _, of := range f {
					if of == n && a.narrow && runtime.GOARCH == "amd64" {
						nr, ok = max(nr, a.calls[mux]), true
					}
				}
			}
			if ok {
				last, known = max(last, nr), true
			}
		}
	}
	if known && c.nr > last {
		switch p.DefaultAction {
		case specs.ActAllow, specs.ActLog, specs.ActTrace:
			return def
		}
		return unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	}
	holds := func(x specs.LinuxSeccompArg) bool {
		v, w, arg := x.Value, x.ValueTwo, c.args[x.Index]
		if a.narrow {
			v, w, arg = uint64(uint32(v)), uint64(uint32(w)), uint64(uint32(arg))
		}
		switch x.Op {
		case specs.OpEqualTo:
			return arg == v
		case specs.OpNotEqual:
			return arg != v
		case specs.OpLessThan:
			return arg < v
		case specs.OpLessEqual:
			return arg <= v
		case specs.OpGreaterThan:
			return arg > v
		case specs.OpGreaterEqual:
			return arg >= v
		}
		return arg&v == w
	}
	conditional := func(of string, test func(specs.LinuxSyscall) bool) (uint32, bool) {
		for _, s := range p.Syscalls {
			if slices.Contains(s.Names, of) && len(s.Args) > 0 && test(s) {
				return meaning(s.Action, s.ErrnoRet), true
			}
		}
		return 0, false
	}
	plain := func(of string) (got uint32, any bool) {
		for _, s := range p.Syscalls {
			if r := meaning(s.Action, s.ErrnoRet); slices.Contains(s.Names, of) && len(s.Args) == 0 {
				if any = true; r != def {
					return r, true
				}
			}
		}
		return def, any
	}
	if r, ok := conditional(name, func(s specs.LinuxSyscall) bool {
		twice := map[uint]bool{}
		all, some, repeated := true, false, false
		for _, x := range s.Args {
			repeated = repeated || twice[x.Index]
			twice[x.Index] = true
			all, some = all && holds(x), some || holds(x)
		}
		return repeated && some || !repeated && all
	}); ok {
		return r
	}
	if f, ok := functions[name]; ok && a.narrow && runtime.GOARCH == "amd64" {
		n := c.args[0] & 0xffffffff
		if name == "ipc" {
			n &= 0xffff
		}
		if of, ok := f[n]; ok {
			if r, ok := conditional(of, func(s specs.LinuxSyscall) bool { return s.Action != specs.ActAllow && s.Action != specs.ActLog }); ok {
				return r
			}
			if r, ok := plain(of); ok {
				return r
			}
		}
	}
	r, _ := plain(name)
	return r
}

// TestRandomProfiles compares the compiled filter with the literal reading.
func TestRandomProfiles(t *testing.T) {
	names := []string{"read", "write", "socket", "connect", "accept", "semget", "shmat", "socketcall", "ipc", "clone", "mseal", "ioctl", "no_such_call", "breakpoint"}
	values := []uint64{0, 1, 2, 5, 21, 38, 0xffff, 1 << 16, 0xfffffffe, 0xffffffff, 1 << 32, 1<<32 | 1, 1<<32 | 38, 0xffffffff << 32, ^uint64(0)}
	var actions []specs.LinuxSeccompAction
	for a := range numbers {
		actions = append(actions, a)
	}
	slices.Sort(actions)
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	value := func() uint64 {
		if r.IntN(8) == 0 {
			return r.Uint64()
		}
		return values[r.IntN(len(values))]
	}
	errno := func(a specs.LinuxSeccompAction) *uint {
		if a == specs.ActErrno || a == specs.ActTrace {
			return []*uint{nil, ptr(uint(1)), ptr(uint(r.IntN(4096)))}[r.IntN(3)]
		}
		return nil
	}
	accepted := 0
	for range 2000 {
		p := &specs.LinuxSeccomp{DefaultAction: actions[r.IntN(len(actions))], ListenerPath: "/agent"}
		p.DefaultErrnoRet = errno(p.DefaultAction)
		for _, a := range abis() {
			if r.IntN(2) == 0 {
				p.Architectures = append(p.Architectures, a.name)
			}
		}
		for range r.IntN(12) {
			s := specs.LinuxSyscall{Action: actions[r.IntN(len(actions))]}
			s.ErrnoRet = errno(s.Action)
			for range 1 + r.IntN(3) {
				s.Names = append(s.Names, names[r.IntN(len(names))])
			}
			slices.Sort(s.Names)
			s.Names = slices.Compact(s.Names)
			for range r.IntN(4) {
				s.Args = append(s.Args, specs.LinuxSeccompArg{Index: uint(r.IntN(6)), Value: value(), ValueTwo: value(), Op: operators[r.IntN(len(operators))]})
			}
			p.Syscalls = append(p.Syscalls, s)
		}
		if r.IntN(2) == 0 { // otherwise most that notify are refused
			p.Syscalls = append([]specs.LinuxSyscall{{Names: []string{"read", "write"}, Action: specs.ActAllow}}, p.Syscalls...)
		}
		f, err := Compile(p)
		if err != nil {
			continue // TestBadProfiles
		}
		accepted++
		for range 200 {
			a := abis()[r.IntN(len(abis()))]
			c := call{arch: a.audit, args: [6]uint64{value(), value(), value(), value(), value(), value()}}
			if a.narrow {
				for i := range c.args {
					c.args[i] &= 0xffffffff
				}
			}
			nr, ok := a.calls[names[r.IntN(len(names))]]
			if c.nr = nr; !ok || r.IntN(10) == 0 {
				c.nr = []uint32{r.Uint32N(600), 0xffffffff, x32Bit | r.Uint32N(600), r.Uint32()}[r.IntN(4)]
			}
			if got, want := run(t, f.Prog, c), evaluate(p, c); got != want {
				t.Fatalf("seed %d: %s: %#x %d %#x: %#x, want %#x", seed, describe(p), c.arch, c.nr, c.args, got, want)
			}
		}
	}
	if accepted < 500 {
		t.Errorf("only %d profiles were accepted", accepted)
	}
}

func describe(p *specs.LinuxSeccomp) string {
	s := fmt.Sprintf("default %#x, %v", meaning(p.DefaultAction, p.DefaultErrnoRet), p.Architectures)
	for _, x := range p.Syscalls {
		s += fmt.Sprintf("\n%v %#x %+v", x.Names, meaning(x.Action, x.ErrnoRet), x.Args)
	}
	return s
}
