package seccomp

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// call is struct seccomp_data.
type call struct {
	nr   uint32
	arch uint32
	args [6]uint64
}

// run interprets a filter as the kernel does.
func run(t testing.TB, prog []unix.SockFilter, c call) uint32 {
	t.Helper()
	var data [64]byte
	binary.LittleEndian.PutUint32(data[0:], c.nr)
	binary.LittleEndian.PutUint32(data[4:], c.arch)
	for i, a := range c.args {
		binary.LittleEndian.PutUint64(data[16+8*i:], a)
	}
	var acc uint32
	for pc := 0; pc < len(prog); pc++ {
		i := prog[pc]
		cond := func(b bool) {
			if b {
				pc += int(i.Jt)
			} else {
				pc += int(i.Jf)
			}
		}
		switch i.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			acc = binary.LittleEndian.Uint32(data[i.K:])
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			acc &= i.K
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(i.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			cond(acc == i.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			cond(acc >= i.K)
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			cond(acc > i.K)
		case unix.BPF_RET | unix.BPF_K:
			return i.K
		default:
			t.Fatalf("unknown instruction %#x", i.Code)
		}
	}
	t.Fatal("the filter has no end")
	return 0
}

func ptr[T any](v T) *T { return &v }

func compile(t testing.TB, p *specs.LinuxSeccomp) []unix.SockFilter {
	t.Helper()
	f, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	return f.Prog
}

func native() (uint32, map[string]uint32) {
	if runtime.GOARCH == "arm64" {
		return unix.AUDIT_ARCH_AARCH64, arm64Calls
	}
	return unix.AUDIT_ARCH_X86_64, x8664Calls
}

const (
	allow = unix.SECCOMP_RET_ALLOW
	kill  = unix.SECCOMP_RET_KILL_PROCESS
)

func errno(e unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(e) }

// TestOperators compares every operator with its arithmetic meaning on values
// around the borders of the 32 bit halves.
func TestOperators(t *testing.T) {
	arch, calls := native()
	values := []uint64{0, 1, 2, 0xffffffff, 1 << 32, 1<<32 | 1, 2 << 32, 0xffffffff << 32, ^uint64(0), 0x7f000000}
	meaning := map[specs.LinuxSeccompOperator]func(x, v, v2 uint64) bool{
		specs.OpEqualTo:      func(x, v, _ uint64) bool { return x == v },
		specs.OpNotEqual:     func(x, v, _ uint64) bool { return x != v },
		specs.OpLessThan:     func(x, v, _ uint64) bool { return x < v },
		specs.OpLessEqual:    func(x, v, _ uint64) bool { return x <= v },
		specs.OpGreaterThan:  func(x, v, _ uint64) bool { return x > v },
		specs.OpGreaterEqual: func(x, v, _ uint64) bool { return x >= v },
		specs.OpMaskedEqual:  func(x, v, v2 uint64) bool { return x&v == v2 },
	}
	for op, holds := range meaning {
		for _, v := range values {
			for _, v2 := range []uint64{0, 1, v} {
				prog := compile(t, &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{
					Names: []string{"socket"}, Action: specs.ActAllow,
					Args: []specs.LinuxSeccompArg{{Index: 3, Value: v, ValueTwo: v2, Op: op}},
				}}})
				for _, x := range values {
					want := errno(unix.EPERM)
					if holds(x, v, v2) {
						want = allow
					}
					if got := run(t, prog, call{calls["socket"], arch, [6]uint64{3: x}}); got != want {
						t.Fatalf("%#x %s %#x,%#x: %#x, want %#x", x, op, v, v2, got, want)
					}
				}
			}
		}
	}
}

func TestRules(t *testing.T) {
	arch, calls := native()
	prog := compile(t, &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno, DefaultErrnoRet: ptr(uint(unix.EXDEV)),
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "write", "no_such_call"}, Action: specs.ActAllow},
			// Conditions of one rule all hold; rules of one call are alternatives.
			{Names: []string{"socket"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
				{Index: 0, Value: 1, Op: specs.OpEqualTo}, {Index: 1, Value: 2, Op: specs.OpEqualTo},
			}},
			{Names: []string{"socket"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(unix.EACCES)), Args: []specs.LinuxSeccompArg{{Index: 0, Value: 38, Op: specs.OpEqualTo}}},
			// One argument twice: either.
			{Names: []string{"personality"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{
				{Index: 0, Value: 0, Op: specs.OpEqualTo}, {Index: 0, Value: 8, Op: specs.OpEqualTo},
			}},
			// A condition before the unconditional rule, whatever their order.
			{Names: []string{"kill"}, Action: specs.ActAllow},
			{Names: []string{"kill"}, Action: specs.ActTrap, Args: []specs.LinuxSeccompArg{{Index: 1, Value: 9, Op: specs.OpEqualTo}}},
			{Names: []string{"clone3"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(unix.ENOSYS))},
			{Names: []string{"ptrace"}, Action: specs.ActKillThread},
			{Names: []string{"reboot"}, Action: specs.ActLog},
			{Names: []string{"mount"}, Action: specs.ActTrace, ErrnoRet: ptr(uint(7))},
		},
	})
	def := errno(unix.EXDEV)
	for _, x := range []struct {
		name string
		args [6]uint64
		want uint32
	}{
		{"read", [6]uint64{}, allow}, {"write", [6]uint64{}, allow}, {"close", [6]uint64{}, def},
		{"socket", [6]uint64{1, 2}, allow}, {"socket", [6]uint64{1, 3}, def}, {"socket", [6]uint64{38, 2}, errno(unix.EACCES)},
		{"personality", [6]uint64{0}, allow}, {"personality", [6]uint64{8}, allow}, {"personality", [6]uint64{9}, def},
		{"kill", [6]uint64{1, 15}, allow}, {"kill", [6]uint64{1, 9}, unix.SECCOMP_RET_TRAP},
		{"clone3", [6]uint64{}, errno(unix.ENOSYS)}, {"ptrace", [6]uint64{}, unix.SECCOMP_RET_KILL_THREAD},
		{"reboot", [6]uint64{}, unix.SECCOMP_RET_LOG}, {"mount", [6]uint64{}, unix.SECCOMP_RET_TRACE | 7},
	} {
		if got := run(t, prog, call{calls[x.name], arch, x.args}); got != x.want {
			t.Errorf("%s%v: %#x, want %#x", x.name, x.args, got, x.want)
		}
	}
	// Newer than everything the profile names.
	if got := run(t, prog, call{nr: 460, arch: arch}); got != errno(unix.ENOSYS) {
		t.Errorf("a newer call: %#x", got)
	}
	if got := run(t, prog, call{nr: 0, arch: 0x1234}); got != kill {
		t.Errorf("a foreign architecture: %#x", got)
	}
}

// TestWholeTable checks the tree against the profile for every number.
func TestWholeTable(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the numbers of x86")
	}
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32}}
	allowed := map[string]bool{"open_tree_attr": true}
	i := 0
	for name := range x8664Calls {
		if i++; i%3 != 0 {
			allowed[name] = true
		}
	}
	var names []string
	for n := range allowed {
		names = append(names, n)
	}
	p.Syscalls = []specs.LinuxSyscall{{Names: names, Action: specs.ActAllow}}
	prog := compile(t, p)
	for _, a := range []struct {
		audit uint32
		calls map[string]uint32
	}{{unix.AUDIT_ARCH_X86_64, x8664Calls}, {unix.AUDIT_ARCH_I386, x86Calls}, {unix.AUDIT_ARCH_X86_64, x32Calls()}} {
		outcome := map[uint32]bool{}
		for n, nr := range a.calls {
			outcome[nr] = outcome[nr] || allowed[n]
		}
		for nr, ok := range outcome {
			got := run(t, prog, call{nr: nr, arch: a.audit})
			if (got == allow) != ok {
				t.Errorf("arch %#x call %d: %#x, allowed %v", a.audit, nr, got, ok)
			}
		}
	}
	t.Logf("%d instructions", len(prog))
}

// TestNarrow: an i386 argument has 32 bits, whatever the profile's value.
func TestNarrow(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the numbers of x86")
	}
	prog := compile(t, &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"socket"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Value: 38, Op: specs.OpEqualTo}}}},
	})
	if got := run(t, prog, call{x86Calls["socket"], unix.AUDIT_ARCH_I386, [6]uint64{38}}); got != errno(unix.EPERM) {
		t.Errorf("i386 socket(38): %#x", got)
	}
	if got := run(t, prog, call{x86Calls["socket"], unix.AUDIT_ARCH_I386, [6]uint64{2}}); got != allow {
		t.Errorf("i386 socket(2): %#x", got)
	}
	// x32 is not listed.
	if got := run(t, prog, call{nr: x32Bit, arch: unix.AUDIT_ARCH_X86_64}); got != kill {
		t.Errorf("x32: %#x", got)
	}
}

func TestBadProfiles(t *testing.T) {
	rule := func(s specs.LinuxSyscall) *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{s}}
	}
	read := []string{"read"}
	notify := func(def specs.LinuxSeccompAction, more ...specs.LinuxSyscall) *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: def, ListenerPath: "/agent", Syscalls: append(more, specs.LinuxSyscall{Names: []string{"mkdir"}, Action: specs.ActNotify})}
	}
	noPath := notify(specs.ActAllow)
	noPath.ListenerPath = ""
	const wait = specs.LinuxSeccompFlagWaitKillableRecv
	for field, p := range map[string]*specs.LinuxSeccomp{
		`defaultAction ""`:                {},
		`defaultAction "X"`:               {DefaultAction: "X"},
		`architectures: "SCMP_ARCH_X"`:    {DefaultAction: specs.ActAllow, Architectures: []specs.Arch{"SCMP_ARCH_X"}},
		`flags[0] "X"`:                    {DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"X"}},
		`flags[1] "SECCOMP_FILTER_FLAG_W`: {DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{flagTSYNC, wait}},
		"defaultErrnoRet 4096":            {DefaultAction: specs.ActErrno, DefaultErrnoRet: ptr(uint(4096))},
		"defaultErrnoRet 65536":           {DefaultAction: specs.ActTrace, DefaultErrnoRet: ptr(uint(65536))},
		"defaultErrnoRet 1":               {DefaultAction: specs.ActKill, DefaultErrnoRet: ptr(uint(1))},
		"syscalls[0].errnoRet 0":          rule(specs.LinuxSyscall{Names: read, Action: specs.ActLog, ErrnoRet: ptr(uint(0))}),
		"syscalls[0].names":               rule(specs.LinuxSyscall{Action: specs.ActErrno}),
		"names: empty, or":                rule(specs.LinuxSyscall{Names: []string{"read", ""}, Action: specs.ActErrno}),
		`syscalls[0].action "X"`:          rule(specs.LinuxSyscall{Names: read, Action: "X"}),
		"args[0].index 6":                 rule(specs.LinuxSyscall{Names: read, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}}}),
		`args[0].op "X"`:                  rule(specs.LinuxSyscall{Names: read, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: "X"}}}),

		"listenerMetadata":          {DefaultAction: specs.ActAllow, ListenerMetadata: "m"},
		"listenerPath \"\"":         noPath,
		"as default action":         {DefaultAction: specs.ActNotify, ListenerPath: "/agent"},
		"for the write syscall":     notify(specs.ActAllow, specs.LinuxSyscall{Names: []string{"write"}, Action: specs.ActNotify}),
		`"write" must be allowed`:   notify(specs.ActErrno, specs.LinuxSyscall{Names: read, Action: specs.ActAllow}),
		`"read" must be allowed`:    notify(specs.ActAllow, specs.LinuxSyscall{Names: read, Action: specs.ActKill}),
		`"write" must be allowed w`: notify(specs.ActAllow, specs.LinuxSyscall{Names: []string{"write"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Value: 3, Op: specs.OpEqualTo}}}),
	} {
		if _, err := Compile(p); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
}

func TestNotify(t *testing.T) {
	p := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno, ListenerPath: "/agent", ListenerMetadata: "m",
		Flags: []specs.LinuxSeccompFlag{flagTSYNC, specs.LinuxSeccompFlagWaitKillableRecv, specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"write"}, Action: specs.ActAllow},
			{Names: []string{"read", "close", "execve"}, Action: specs.ActNotify}, // as runc: only write must not
		},
	}
	f, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	const want = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV | unix.SECCOMP_FILTER_FLAG_LOG | unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
	if !f.Listener || f.Flags != want {
		t.Errorf("listener %v, flags %#x", f.Listener, f.Flags)
	}
	arch, calls := native()
	if got := run(t, f.Prog, call{nr: calls["close"], arch: arch}); got != unix.SECCOMP_RET_USER_NOTIF {
		t.Errorf("close: %#x", got)
	}
	// Without a rule that notifies, the path is ignored (runtime-spec).
	p.Syscalls, p.Flags = p.Syscalls[:1], nil
	if f, err = Compile(p); err != nil || f.Listener || f.Flags != 0 {
		t.Errorf("%+v, %v", f, err)
	}
}

// FuzzCompile: a profile either is refused or every jump stays inside.
func FuzzCompile(f *testing.F) {
	f.Add(`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":1,"value":5,"op":"SCMP_CMP_GT"}]}]}`, uint32(0), uint64(7))
	arch, _ := native()
	f.Fuzz(func(t *testing.T, text string, nr uint32, arg uint64) {
		var p specs.LinuxSeccomp
		if json.Unmarshal([]byte(text), &p) != nil {
			return
		}
		filter, err := Compile(&p)
		if err != nil {
			return
		}
		if len(filter.Prog) > maxInsns {
			t.Fatal("too long")
		}
		run(t, filter.Prog, call{nr, arch, [6]uint64{arg, arg, arg, arg, arg, arg}})
	})
}

func BenchmarkCompile(b *testing.B) {
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32, specs.ArchAARCH64, specs.ArchARM}}
	for name := range x8664Calls {
		if len(name)%5 > 0 {
			p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{name}, Action: specs.ActAllow})
		}
	}
	var n int
	for b.Loop() {
		n = len(compile(b, p))
	}
	b.ReportMetric(float64(n), "insns")
}
