package seccomp

import "golang.org/x/sys/unix"

func load(off uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: off}
}
func ret(v uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: v} }
func and(v uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: v}
}
func jump(n int) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(n)}
}
func jeq(v uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: v}
}
func jge(v uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, K: v}
}
func jgt(v uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K, K: v}
}

// unlessEqual skips n instructions if the accumulator is not v. Conditional
// jumps reach 255 instructions, jump reaches all.
func unlessEqual(v uint32, n int) []unix.SockFilter {
	j := jeq(v)
	if n < 256 {
		j.Jf = uint8(n)
		return []unix.SockFilter{j}
	}
	j.Jt = 1
	return []unix.SockFilter{j, jump(n)}
}

// unlessAtLeast runs code if the accumulator is >= v and leads past it otherwise.
func unlessAtLeast(v uint32, code []unix.SockFilter) []unix.SockFilter {
	j := jge(v)
	if len(code) < 256 {
		j.Jf = uint8(len(code))
		return append([]unix.SockFilter{j}, code...)
	}
	j.Jt = 1
	return append([]unix.SockFilter{j, jump(len(code))}, code...)
}

// ifBelow runs code if the accumulator is < v and leads past it otherwise.
func ifBelow(v uint32, code []unix.SockFilter) []unix.SockFilter {
	j := jge(v)
	if len(code) < 256 {
		j.Jt = uint8(len(code))
		return append([]unix.SockFilter{j}, code...)
	}
	j.Jf = 1
	return append([]unix.SockFilter{j, jump(len(code))}, code...)
}

// target is where a jump of a condition leads.
type target int

const (
	toNext target = iota // the next instruction
	toPass               // the end of the condition: it holds
	toFail               // past the rule: it does not
)

// asm is an instruction of a condition with symbolic jumps.
type asm struct {
	ins     unix.SockFilter
	yes, no target
}

type code []asm

// equal tests a 64 bit argument; want says whether equality is to hold. A
// narrow architecture's arguments have 32 bits.
func (k code) equal(a *arch, hi, vh, lo, vl uint32, want bool) code {
	hit, miss := toNext, toFail
	if !want {
		hit, miss = toFail, toPass
	}
	if !a.narrow {
		k = append(k, asm{ins: load(hi)}, asm{ins: jeq(vh), no: miss})
	}
	return append(k, asm{ins: load(lo)}, asm{ins: jeq(vl), yes: hit, no: miss})
}

// order tests >= or > (low is the test of the lower half), or their opposites
// if want is false.
func (k code) order(a *arch, hi, vh, lo, vl uint32, low unix.SockFilter, want bool) code {
	above, below := toPass, toFail
	if !want {
		above, below = toFail, toPass
	}
	if !a.narrow {
		k = append(k, asm{ins: load(hi)}, asm{ins: jgt(vh), yes: above}, asm{ins: jeq(vh), no: below})
	}
	return append(k, asm{ins: load(lo)}, asm{ins: low, yes: above, no: below})
}

// link turns the symbolic jumps into distances; toFail leads over rest more
// instructions. A chain of six conditions stays below 256.
func (k code) link(rest int) []unix.SockFilter {
	out := make([]unix.SockFilter, len(k))
	for i, x := range k {
		out[i] = x.ins
		out[i].Jt, out[i].Jf = distance(x.yes, len(k)-i-1, rest), distance(x.no, len(k)-i-1, rest)
	}
	return out
}

func distance(t target, left, rest int) uint8 {
	switch t {
	case toPass:
		return uint8(left)
	case toFail:
		return uint8(left + rest)
	}
	return 0
}
