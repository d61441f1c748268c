package seccomp

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// body is the filter for one architecture; it never falls through.
func (a *arch) body(rules []rule, def uint32) []unix.SockFilter {
	tree := a.tree(a.calls, 0, rules, def)
	head := []unix.SockFilter{load(offNR)}
	if a.audit != unix.AUDIT_ARCH_X86_64 {
		return append(head, tree...)
	}
	// x32 calls come under the x86-64 audit number with bit 30 set.
	high := []unix.SockFilter{ret(unix.SECCOMP_RET_KILL_PROCESS)}
	if a.x32 {
		high = a.tree(x32Calls(), x32Bit, rules, def)
	}
	// -1 is what a tracer leaves of a call it suppresses: no call of x32.
	high = append(unlessEqual(0xffffffff, 1), append([]unix.SockFilter{ret(def)}, high...)...)
	head = append(head, unlessAtLeast(x32Bit, high)...)
	return append(head, tree...)
}

// span is a range of call numbers, up to the next span, with one outcome.
type span struct {
	from uint32
	code []unix.SockFilter
}

func (a *arch) tree(calls map[string]uint32, base uint32, rules []rule, def uint32) []unix.SockFilter {
	outcome, last, named := a.outcomes(rules, calls, def)
	if !named {
		return []unix.SockFilter{ret(def)}
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
	if !passes(def) && def&unix.SECCOMP_RET_ACTION_FULL != unix.SECCOMP_RET_TRACE {
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

// choices is the code for one call with rules.
func (a *arch) choices(cs []choice, def uint32) []unix.SockFilter {
	end := unconditional(cs, def)
	conds := make([]choice, 0, len(cs))
	for _, c := range cs {
		if len(c.conds) > 0 {
			conds = append(conds, c)
		}
	}
	// The last ones decide nothing if they come to the same.
	for len(conds) > 0 && conds[len(conds)-1].ret == end {
		conds = conds[:len(conds)-1]
	}
	var out []unix.SockFilter
	for _, c := range conds {
		// Built from the last condition to the first: each needs the distance to
		// the block's end, where a condition that fails leads.
		block := []unix.SockFilter{ret(c.ret)}
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
