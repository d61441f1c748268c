// Package seccomp compiles an OCI seccomp profile to classic BPF. The kernel
// runs a new filter once for every system call number to fill its cache, so the
// depth of the filter is what loading costs: the numbers are put in a balanced
// tree of ranges.
package seccomp

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Filter is a program for seccomp(SECCOMP_SET_MODE_FILTER, Flags, ...).
type Filter struct {
	Prog  []unix.SockFilter
	Flags int
}

const maxInsns = 4096 // BPF_MAXINSNS

const (
	offNR   = 0
	offArch = 4
	offArgs = 16
	x32Bit  = 0x40000000
)

// Compile translates a profile. Names that no listed architecture has are
// ignored, as profiles name the calls of all kernels; a rule with the default
// action is left out. A call newer than all that the profile names gets ENOSYS
// in place of a default errno, so that C libraries fall back to older calls.
func Compile(p *specs.LinuxSeccomp) (*Filter, error) {
	if p.ListenerPath != "" || p.ListenerMetadata != "" {
		return nil, fmt.Errorf("linux.seccomp.listenerPath: notification of a listener is not supported; remove it: %w", errdefs.ErrNotImplemented)
	}
	def, err := action(p.DefaultAction, p.DefaultErrnoRet, "linux.seccomp.defaultAction")
	if err != nil {
		return nil, err
	}
	f := &Filter{}
	for _, fl := range p.Flags {
		switch fl {
		case specs.LinuxSeccompFlagLog:
			f.Flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			f.Flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		case "SECCOMP_FILTER_FLAG_TSYNC": // the loading process has one thread
		default:
			return nil, fmt.Errorf("linux.seccomp.flags: %q is not supported: %w", fl, errdefs.ErrInvalidArgument)
		}
	}
	arches, err := listed(p.Architectures)
	if err != nil {
		return nil, err
	}
	rules, err := compileRules(p, def)
	if err != nil {
		return nil, err
	}
	f.Prog = []unix.SockFilter{load(offArch)}
	for _, a := range arches {
		body := a.body(rules, def)
		f.Prog = append(f.Prog, unlessEqual(a.audit, len(body))...)
		f.Prog = append(f.Prog, body...)
	}
	// A process of an architecture the profile does not list is not let through.
	f.Prog = append(f.Prog, ret(unix.SECCOMP_RET_KILL_PROCESS))
	if len(f.Prog) > maxInsns {
		return nil, fmt.Errorf("linux.seccomp: the profile needs %d instructions, the kernel takes %d: %w", len(f.Prog), maxInsns, errdefs.ErrInvalidArgument)
	}
	return f, nil
}

// choice is one rule for a system call: an action if all conditions hold.
type choice struct {
	conds []specs.LinuxSeccompArg
	ret   uint32
}

// compileRules groups the profile's rules by the call's name.
func compileRules(p *specs.LinuxSeccomp, def uint32) (map[string][]choice, error) {
	rules := map[string][]choice{}
	for i, s := range p.Syscalls {
		field := fmt.Sprintf("linux.seccomp.syscalls[%d]", i)
		act, err := action(s.Action, s.ErrnoRet, field+".action")
		if err != nil {
			return nil, err
		}
		if len(s.Names) == 0 {
			return nil, fmt.Errorf("%s.names: empty: %w", field, errdefs.ErrInvalidArgument)
		}
		var choices []choice
		seen := map[uint]bool{}
		repeated := false
		for k, a := range s.Args {
			if a.Index > 5 {
				return nil, fmt.Errorf("%s.args[%d].index %d: want 0 to 5: %w", field, k, a.Index, errdefs.ErrInvalidArgument)
			}
			if !slices.Contains(operators, a.Op) {
				return nil, fmt.Errorf("%s.args[%d].op %q: unknown: %w", field, k, a.Op, errdefs.ErrInvalidArgument)
			}
			repeated = repeated || seen[a.Index]
			seen[a.Index] = true
		}
		if repeated {
			// Conditions on one argument twice are alternatives, by the convention of
			// every OCI runtime (one rule each).
			for _, a := range s.Args {
				choices = append(choices, choice{[]specs.LinuxSeccompArg{a}, act})
			}
		} else {
			choices = []choice{{s.Args, act}}
		}
		for _, n := range s.Names {
			if act == def {
				if _, ok := rules[n]; !ok {
					rules[n] = nil // still a name that the profile knows
				}
				continue
			}
			rules[n] = append(rules[n], choices...)
		}
	}
	return rules, nil
}

var operators = []specs.LinuxSeccompOperator{
	specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual,
	specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual,
}

func action(a specs.LinuxSeccompAction, errno *uint, field string) (uint32, error) {
	data := uint32(0)
	if errno != nil {
		if *errno > 0xffff {
			return 0, fmt.Errorf("%s: errnoRet %d is too large: %w", field, *errno, errdefs.ErrInvalidArgument)
		}
		data = uint32(*errno)
	}
	switch a {
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW, nil
	case specs.ActErrno:
		if errno == nil {
			data = uint32(unix.EPERM)
		}
		if data > 4095 {
			return 0, fmt.Errorf("%s: errnoRet %d is no errno: %w", field, data, errdefs.ErrInvalidArgument)
		}
		return unix.SECCOMP_RET_ERRNO | data, nil
	case specs.ActKill, specs.ActKillThread:
		return unix.SECCOMP_RET_KILL_THREAD, nil
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	case specs.ActTrap:
		return unix.SECCOMP_RET_TRAP, nil
	case specs.ActTrace:
		if errno == nil {
			data = uint32(unix.EPERM)
		}
		return unix.SECCOMP_RET_TRACE | data, nil
	case specs.ActLog:
		return unix.SECCOMP_RET_LOG, nil
	case specs.ActNotify:
		return 0, fmt.Errorf("%s: SCMP_ACT_NOTIFY is not supported: %w", field, errdefs.ErrNotImplemented)
	}
	return 0, fmt.Errorf("%s %q: unknown: %w", field, a, errdefs.ErrInvalidArgument)
}

// body is the filter for one architecture; it never falls through.
func (a *arch) body(rules map[string][]choice, def uint32) []unix.SockFilter {
	tree := a.tree(a.calls, 0, rules, def)
	head := []unix.SockFilter{load(offNR)}
	if a.audit != unix.AUDIT_ARCH_X86_64 {
		return append(head, tree...)
	}
	// x32 calls come under the x86-64 audit number with bit 30 set.
	if a.x32 {
		head = append(head, unlessAtLeast(x32Bit, a.tree(x32Calls(), x32Bit, rules, def))...)
	} else {
		head = append(head, unlessAtLeast(x32Bit, []unix.SockFilter{ret(unix.SECCOMP_RET_KILL_PROCESS)})...)
	}
	return append(head, tree...)
}

// span is a range of call numbers, up to the next span, with one outcome.
type span struct {
	from uint32
	code []unix.SockFilter
}

func (a *arch) tree(calls map[string]uint32, base uint32, rules map[string][]choice, def uint32) []unix.SockFilter {
	outcome := map[uint32][]choice{}
	last := base
	for name, cs := range rules {
		if nr, ok := calls[name]; ok {
			outcome[nr] = append(outcome[nr], cs...)
			last = max(last, nr)
		}
	}
	plain := []unix.SockFilter{ret(def)}
	spans := []span{{base, plain}}
	add := func(from uint32, code []unix.SockFilter) {
		if n := len(spans); spans[n-1].from == from {
			spans[n-1].code = code
		} else if !(len(code) == 1 && slices.Equal(code, spans[n-1].code)) {
			spans = append(spans, span{from, code})
		}
	}
	for nr := base; nr <= last; nr++ {
		if cs := outcome[nr]; len(cs) > 0 {
			add(nr, a.choices(cs, def))
		} else {
			add(nr, plain)
		}
	}
	beyond := plain
	if def&0xffff0000 == unix.SECCOMP_RET_ERRNO {
		beyond = []unix.SockFilter{ret(unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS))}
	}
	add(last+1, beyond)
	return bisect(spans)
}

func bisect(s []span) []unix.SockFilter {
	if len(s) == 1 {
		return s[0].code
	}
	m := len(s) / 2
	low, high := bisect(s[:m]), bisect(s[m:])
	return append(ifBelow(s[m].from, low), high...)
}

// choices is the code for one call with rules. Rules with conditions come
// first, in the profile's order, then an unconditional one, then the default.
func (a *arch) choices(cs []choice, def uint32) []unix.SockFilter {
	end := def
	for _, c := range slices.Backward(cs) {
		if len(c.conds) == 0 {
			end = c.ret
		}
	}
	var out []unix.SockFilter
	for _, c := range cs {
		if len(c.conds) == 0 {
			continue
		}
		var block []unix.SockFilter
		// Built from the last condition to the first: each needs the distance to
		// the block's end, where a condition that fails leads.
		block = append(block, ret(c.ret))
		for _, cond := range slices.Backward(c.conds) {
			block = append(a.condition(cond, len(block)), block...)
		}
		out = append(out, block...)
	}
	return append(out, ret(end))
}

// condition tests one argument; if it does not hold, it jumps over rest
// instructions that follow its own.
func (a *arch) condition(c specs.LinuxSeccompArg, rest int) []unix.SockFilter {
	lo, hi := uint32(offArgs+8*c.Index), uint32(offArgs+8*c.Index+4)
	vl, vh := uint32(c.Value), uint32(c.Value>>32)
	var k code
	switch c.Op {
	case specs.OpEqualTo, specs.OpNotEqual:
		k = k.equal(a, hi, vh, lo, vl, c.Op == specs.OpEqualTo)
	case specs.OpMaskedEqual:
		// value is the mask, valueTwo what must remain.
		dl, dh := uint32(c.ValueTwo), uint32(c.ValueTwo>>32)
		if !a.narrow {
			k = append(k, asm{ins: load(hi)}, asm{ins: and(vh)}, asm{ins: jeq(dh), no: toFail})
		}
		k = append(k, asm{ins: load(lo)}, asm{ins: and(vl)}, asm{ins: jeq(dl), no: toFail})
	case specs.OpGreaterEqual, specs.OpLessThan:
		k = k.order(a, hi, vh, lo, vl, jge(vl), c.Op == specs.OpGreaterEqual)
	case specs.OpGreaterThan, specs.OpLessEqual:
		k = k.order(a, hi, vh, lo, vl, jgt(vl), c.Op == specs.OpGreaterThan)
	}
	return k.link(rest)
}
